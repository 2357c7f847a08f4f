"""Several processes: their ranks from the launcher, the right way to talk, one plan for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from portable_amp.backends import backend_for, parse_device, torch_function
from portable_amp.capabilities import Capabilities
from portable_amp.errors import DistributedError
from portable_amp.launchers import launcher
from portable_amp.precision import Precision, PrecisionPlan, common_plan

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """The one that writes and prints."""
        return self.rank == 0


def ranks() -> Ranks:
    """Which of the processes that torchrun, srun or mpirun started this is; else, the only one.

    >>> ranks()
    Ranks(rank=0, local_rank=0, world_size=1)

    Raises:
        DistributedError: the launcher's variables are incomplete or contradict each other.
    """
    row = launcher()
    if row is None:
        return Ranks()
    names = (row.rank, row.local_rank, row.world_size)
    try:
        found = Ranks(*(int(os.environ[name]) for name in names))
    except KeyError as error:
        raise DistributedError(
            f"${error.args[0]} is not set, but ${row.sign} is: start with torchrun, srun or mpirun,"
            " which set all of theirs, or unset it"
        ) from None
    except ValueError as error:
        raise DistributedError(f"{', '.join(names)} are numbers: {error}") from None
    for name, value in zip(names, (found.rank, found.local_rank)):  # noqa: B905
        if not 0 <= value < found.world_size:
            raise DistributedError(f"{name}={value} is not below {names[2]}={found.world_size}")
    return found


def init_distributed(device: str | torch.device) -> Ranks:
    """Join the process group over the back end of `device`; nothing to join for one process.

    Raises:
        DistributedError: this kind of device cannot talk to its peers with this torch, or
            $MASTER_ADDR and $MASTER_PORT do not say where they meet.
    """
    mine = ranks()
    if mine.world_size == 1 or torch.distributed.is_initialized():
        return mine
    where = parse_device(device)
    row = backend_for(where.type)
    if row.distributed is None:
        raise DistributedError(
            f"{where.type} has no distributed back end: start one process, or use device 'cpu'"
        )
    if not torch.distributed.is_backend_available(row.distributed):
        raise DistributedError(
            f"this torch was built without {row.distributed!r}, which {where.type} needs"
        )
    started = launcher()
    missing = sorted({"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys())
    if started and missing:
        raise DistributedError(
            f"${missing[0]} is not set: torchrun sets it, but srun and mpirun do not. Write this "
            f"before the command: {started.address}"
        )
    select = torch_function(row.set_device)
    if select and where.index is not None:
        select(where.index)
    torch.distributed.init_process_group(
        row.distributed, rank=mine.rank, world_size=mine.world_size
    )
    return mine


def agree_on_plan(request: Precision, capabilities: Capabilities) -> PrecisionPlan:
    """The plan that all ranks follow: the best each of them can. Every rank must call it.

    Ranks that differ (two kinds of card, two versions of torch) would otherwise exchange gradients
    of different precision, or wait for each other in different steps.
    """
    return common_plan(request, _of_all_ranks(capabilities))


def common_to_ranks(plan: PrecisionPlan, capabilities: Capabilities) -> PrecisionPlan:
    """The plan that rank 0 measured, if all ranks can compute it; else fp32. Every rank must call.

    Ranks whose devices are alike follow rank 0 in what they only emulate, too: it was measured.
    """
    everyone = _of_all_ranks(capabilities)
    alike = all(one.name == everyone[0].name for one in everyone)
    common = plan if alike else common_plan(plan.name, everyone)
    return plan if common.dtype is plan.dtype else replace(common, request=plan.request)


def _of_all_ranks(capabilities: Capabilities) -> list[Capabilities]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [capabilities]
    everyone: list[Capabilities] = [capabilities] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, capabilities)
    return everyone


def of_rank_0(decide: Callable[[], T]) -> T:
    """What rank 0 decides, on every rank; every rank must call it. It fails on all, or on none.

    Raises:
        RuntimeError: rank 0 failed.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return decide()
    told: list[Any] = [None, ""]
    if torch.distributed.get_rank() == 0:
        try:
            told[0] = decide()
        except Exception as error:
            told[1] = f"{type(error).__name__}: {error}"
    torch.distributed.broadcast_object_list(told, src=0)
    if told[1]:
        raise RuntimeError(f"rank 0 failed: {told[1]}")
    decided: T = told[0]
    return decided
