"""Several processes under torchrun: one plan, one model, and answers put together."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from cv_classification.config import Config, InputError
from portable_amp import DeviceContext, init_distributed, ranks

T = TypeVar("T")
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def join(ctx: DeviceContext, config: Config) -> DeviceContext:
    """Meet the other processes, if there are any, and agree on one plan.

    Raises:
        InputError: the settings do not suit this number of processes.
        DistributedError: this kind of device cannot talk to its peers.
    """
    count = ranks().world_size
    if config.data.batch_size % count:
        raise InputError(
            f"data.batch_size={config.data.batch_size} is of all {count} processes together, and "
            "they cannot share it equally"
        )
    if config.train.sharded and count == 1:
        raise InputError("train.sharded=true: one process has nobody to share with; use torchrun")
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun sets it; srun ends its processes itself
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    init_distributed(ctx.device)
    return ctx.agreed()


def _watch(launcher: int) -> None:
    """End this process at once when its launcher is gone: the job may be running elsewhere again.

    In a thread of its own, since the loop may be waiting for another process.
    """
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.write(2, b"the launcher has ended, and so does this process of it\n")
    os._exit(1)


def spread(model: nn.Module, ctx: DeviceContext, config: Config) -> nn.Module:
    """What to call in the loop: `model` itself, or a wrapper around it that all processes share."""
    if ranks().world_size == 1:
        return model
    if config.train.sharded:
        # From torch 2.6 on; imported here, so that all else runs on older ones.
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(ctx.device.type, (ranks().world_size,))
        fully_shard(model, mesh=mesh)  # in place
        return model
    return DistributedDataParallel(model)


def get_states(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole state of both, as one process would have it; every process must call it."""
    if sharded:
        return get_state_dict(model, optimizer, options=FULL)
    return model.state_dict(), optimizer.state_dict()


def set_states(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    states: Mapping[str, Any],
    *,
    sharded: bool,
) -> None:
    """Put back what `get_states` gave, as `states["model"]` and `states["optimizer"]`."""
    if sharded:
        set_state_dict(
            model,
            optimizer,
            model_state_dict=states["model"],
            optim_state_dict=states["optimizer"],
            options=FULL,
        )
    else:
        model.load_state_dict(states["model"])
        optimizer.load_state_dict(states["optimizer"])


def gather(value: T) -> list[T]:
    """What each process has, by rank; every process must call it."""
    if not distributed.is_initialized():
        return [value]
    found = [value] * ranks().world_size
    distributed.all_gather_object(found, value)
    return found


def total(*values: float, device: torch.device) -> list[float]:
    """The sums over all processes of numbers; several processes wait for their devices."""
    if not distributed.is_initialized():
        return [*values]
    stacked = torch.tensor(values, dtype=torch.float32, device=device)
    distributed.all_reduce(stacked)
    sums: list[float] = stacked.tolist()
    return sums


def tell(text: str) -> None:
    """Print it once, however many processes there are."""
    if ranks().is_main:
        print(text, flush=True)


def leave() -> None:
    """Take leave of the other processes."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
