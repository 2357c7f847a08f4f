from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portable_amp import MachineError, Support, choose, probe
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


# As drivers name them, with and without the maker, the series and what a laptop adds.
WITHOUT_TENSOR_CORES = """\
NVIDIA T400|NVIDIA T400 4GB|NVIDIA T500|NVIDIA T550 Laptop GPU|NVIDIA T600|NVIDIA T600 Laptop GPU
NVIDIA T1000|NVIDIA T1000 8GB|Quadro T1000|Quadro T1000 with Max-Q Design|NVIDIA T1200 Laptop GPU
Quadro T2000|Quadro T2000 with Max-Q Design|NVIDIA GeForce MX450|GeForce MX450|NVIDIA GeForce MX550
NVIDIA GeForce GTX 1630|GeForce GTX 1650|NVIDIA GeForce GTX 1650 SUPER|GeForce GTX 1650 Ti
NVIDIA GeForce GTX 1650 with Max-Q Design|NVIDIA GeForce GTX 1660 Ti|GeForce GTX 1660 SUPER
NVIDIA CMP 30HX"""
WITH_TENSOR_CORES = """\
Tesla T4|NVIDIA T4|NVIDIA T4G|GRID T4-16Q|Tesla T40 24GB|NVIDIA T10|TITAN RTX|NVIDIA CMP 40HX
NVIDIA GeForce RTX 2060|NVIDIA GeForce RTX 2080 Ti|GeForce RTX 2070 with Max-Q Design
Quadro RTX 3000|Quadro RTX 4000|Quadro RTX 5000 with Max-Q Design|Quadro RTX 6000|Quadro RTX 8000
GRID RTX6000-24Q|NVIDIA GeForce RTX 2050"""


def _names(text: str) -> list[str]:
    return text.replace("\n", "|").split("|")


def _turing(name: str) -> Support:
    return derive(replace(machine("t4").hardware, name=name)).float16


@pytest.mark.parametrize("name", _names(WITHOUT_TENSOR_CORES))
def test_turing_without_tensor_cores(name: str) -> None:
    can = derive(replace(machine("t4").hardware, name=name))
    assert can.float16 is Support.ABSENT
    assert can.evidence[1] == "fp16 autocast gives NaN on Turing cards without tensor cores"
    assert choose("auto", can).name == "fp32"
    # The same word in the name of another generation says nothing.
    other = replace(machine("a100").hardware, name=name)
    assert derive(other).float16 is Support.NATIVE


@pytest.mark.parametrize("name", _names(WITH_TENSOR_CORES))
def test_turing_with_tensor_cores(name: str) -> None:
    assert _turing(name) is Support.NATIVE


@given(
    st.sampled_from(_names(WITHOUT_TENSOR_CORES)),
    st.sampled_from(_names(WITH_TENSOR_CORES)),
    st.sampled_from(["", "NVIDIA ", "GRID "]),
    st.sampled_from(["", " Laptop GPU", " with Max-Q Design", " 4GB", "-4Q"]),
    st.sampled_from([str, str.upper, str.lower]),
)
def test_what_makers_add_to_a_name_changes_nothing(
    without: str, having: str, before: str, after: str, case: Callable[[str], str]
) -> None:
    assert _turing(case(before + without + after)) is Support.ABSENT
    assert _turing(case(before + having + after)) is Support.NATIVE


@given(st.integers(0, 9999), st.sampled_from(["T{}", "T{} 8GB", "Quadro T{}"]))
def test_only_the_names_of_those_chips_are_meant(number: int, spelling: str) -> None:
    known = number in (400, 500, 550, 600, 1000, 1200, 2000)
    assert (_turing(spelling.format(number)) is Support.ABSENT) is known


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
