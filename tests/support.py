"""Machines to play in tests: the rows of absent back ends, made to answer from readings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from portable_amp import backends, capabilities, notices
from portable_amp.autocast import entered
from portable_amp.backends import Hardware, torch_version
from portable_amp.launchers import LAUNCHERS
from portable_amp.testing import Machine, machine, play

SETTINGS = {
    "PORTABLE_AMP_DEVICE",
    "PORTABLE_AMP_STRICT",
    *(v for row in LAUNCHERS for v in (row.sign, row.rank, row.local_rank, row.world_size)),
}


# The device types whose plans this torch can run. On MPS 2.4 has no autocast, and 2.5 one in
# float16 alone; the Macs that are played have torch 2.6 and later.
KINDS = [
    kind
    for kind in ("cpu", "cuda", "mps", "xpu")
    if torch.amp.is_autocast_available(kind) and (kind != "mps" or torch_version() >= (2, 6))
]


without_mps = pytest.mark.skipif(
    "mps" not in KINDS, reason=f"torch {torch.__version__} has no bfloat16 autocast for MPS"
)


def forget() -> None:
    """Nothing was probed, decided, told or computed yet."""
    capabilities.forget()
    notices.forget()
    entered.fp16 = False


@contextlib.contextmanager
def playing(hardware: Hardware | str, count: int = 1) -> Iterator[Hardware]:
    """This machine has `count` such devices, and no other accelerator; as this torch has it."""
    row = machine(hardware) if isinstance(hardware, str) else Machine("made up", hardware, "a test")
    with play(row, count=count) as played:
        yield played.machine.hardware


@contextlib.contextmanager
def asleep(key: str) -> Iterator[list[bool]]:
    """A machine whose CUDA is not initialised; the list is filled once anything initialises it."""
    awake: list[bool] = []

    def wake(*_: Any) -> Any:
        awake.append(True)
        return machine(key).hardware

    with playing(key), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: bool(awake))
        for name in ("get_device_properties", "get_device_capability", "is_bf16_supported"):
            patch.setattr(torch.cuda, name, wake)
        rows = [
            replace(row, read=wake) if row.device_type == "cuda" else row
            for row in backends.BACKENDS
        ]
        patch.setattr(backends, "BACKENDS", tuple(rows))
        yield awake
