from __future__ import annotations

from dataclasses import replace

import pytest

from portable_amp import MachineError, Support, probe
from portable_amp.capabilities import derive
from portable_amp.testing import MACHINES, machine
from support import playing


@pytest.mark.parametrize(
    ("cc", "fp16", "bf16"),
    [
        ((5, 2), Support.EMULATED, Support.EMULATED),
        ((5, 3), Support.NATIVE, Support.EMULATED),
        ((6, 0), Support.NATIVE, Support.EMULATED),
        ((6, 1), Support.EMULATED, Support.EMULATED),
        ((7, 0), Support.NATIVE, Support.EMULATED),
        ((7, 5), Support.NATIVE, Support.EMULATED),
        ((8, 0), Support.NATIVE, Support.NATIVE),
        ((12, 0), Support.NATIVE, Support.NATIVE),
    ],
)
def test_nvidia(cc: tuple[int, int], fp16: Support, bf16: Support) -> None:
    can = derive(replace(machine("t4").hardware, compute_capability=cc))
    assert (can.float16, can.bfloat16) == (fp16, bf16)


@pytest.mark.parametrize(
    ("arch", "bf16"),
    [
        ("gfx803", Support.EMULATED),
        ("gfx906", Support.EMULATED),
        ("gfx908", Support.NATIVE),
        ("gfx942", Support.NATIVE),
        ("gfx1030", Support.ABSENT),
        ("gfx1100", Support.NATIVE),
    ],
)
def test_amd(arch: str, bf16: Support) -> None:
    assert derive(replace(machine("mi250").hardware, arch=arch)).bfloat16 is bf16


@pytest.mark.parametrize(
    ("torch_version", "macos", "fp16", "bf16", "scaler"),
    [
        ((2, 4), (15, 0), Support.ABSENT, Support.ABSENT, False),
        ((2, 5), (15, 0), Support.NATIVE, Support.ABSENT, False),
        ((2, 6), (13, 6), Support.NATIVE, Support.ABSENT, False),
        ((2, 6), (14, 0), Support.NATIVE, Support.NATIVE, False),
        ((2, 8), (14, 0), Support.NATIVE, Support.NATIVE, True),
    ],
)
def test_mps_by_version(
    torch_version: tuple[int, int],
    macos: tuple[int, int],
    fp16: Support,
    bf16: Support,
    scaler: bool,
) -> None:
    can = derive(replace(machine("m2-macos14").hardware, torch_version=torch_version, macos=macos))
    assert (can.float16, can.bfloat16, can.grad_scaler) == (fp16, bf16, scaler)
    assert can.autocast is (torch_version >= (2, 5))
    assert can.float64 is False


def test_every_machine_has_evidence() -> None:
    assert all(row.capabilities.evidence and row.source for row in MACHINES)


def test_a_device_is_read_once() -> None:
    reads = []
    with playing("t4", count=2):
        from portable_amp import backends

        row = backends.backend_for("cuda")
        object.__setattr__(
            row, "read", lambda device: reads.append(device) or machine("t4").hardware
        )
        for _ in range(3):
            probe("cuda:0")
            probe("cuda:1")
    assert [str(device) for device in reads] == ["cuda:0", "cuda:1"]


def test_an_unknown_machine_is_told_the_nearest() -> None:
    with pytest.raises(MachineError, match="a100"):
        machine("a101")
