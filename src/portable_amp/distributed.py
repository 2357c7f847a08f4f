"""Several processes: their ranks from torchrun, the right way to talk, one plan for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from portable_amp.backends import backend_for, parse_device, torch_function
from portable_amp.capabilities import Capabilities
from portable_amp.errors import DistributedError
from portable_amp.precision import Precision, PrecisionPlan, choose, common_plan

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
    """Which process of a torchrun this is; without torchrun, the only one.

    >>> ranks()
    Ranks(rank=0, local_rank=0, world_size=1)

    Raises:
        DistributedError: the launcher's variables are incomplete or contradict each other.
    """
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return Ranks()
    try:
        found = Ranks(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    except KeyError as error:
        raise DistributedError(
            f"${error.args[0]} is not set, but RANK or WORLD_SIZE is: start with torchrun, which "
            "sets all of them, or unset them"
        ) from None
    except ValueError as error:
        raise DistributedError(f"RANK, LOCAL_RANK and WORLD_SIZE are numbers: {error}") from None
    if not 0 <= found.rank < found.world_size:
        raise DistributedError(f"RANK={found.rank} is not below WORLD_SIZE={found.world_size}")
    return found


def init_distributed(device: str | torch.device) -> Ranks:
    """Join the process group over the back end of `device`; nothing to join for one process.

    Raises:
        DistributedError: this kind of device cannot talk to its peers with this torch.
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
    select = torch_function(row.set_device)
    if select and where.index is not None:
        select(where.index)
    torch.distributed.init_process_group(row.distributed)
    return mine


def agree_on_plan(request: Precision, capabilities: Capabilities) -> PrecisionPlan:
    """The plan that all ranks follow: the best each of them can. Every rank must call it.

    Ranks that differ (two kinds of card, two versions of torch) would otherwise exchange gradients
    of different precision, or wait for each other in different steps.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return choose(request, capabilities)
    everyone: list[Capabilities] = [capabilities] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, capabilities)
    return common_plan(request, everyone)


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
