from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from portable_amp import Capabilities, MachineError, Support, backends, choose, probe
from portable_amp.backends import Hardware
from portable_amp.capabilities import derive, look_up, look_up_awake
from portable_amp.testing import MACHINES, machine
from support import playing


@pytest.mark.parametrize(
    ("cc", "fp16", "bf16"),
    [
        ((5, 2), Support.EMULATED, Support.EMULATED),
        ((5, 3), Support.NATIVE, Support.EMULATED),
        ((6, 0), Support.NATIVE, Support.EMULATED),
        ((6, 1), Support.EMULATED, Support.EMULATED),
        ((6, 2), Support.NATIVE, Support.EMULATED),
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
        ((2, 7), (14, 0), Support.NATIVE, Support.NATIVE, False),
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
        row = backends.backend_for("cuda")
        object.__setattr__(
            row, "read", lambda device: reads.append(device) or machine("t4").hardware
        )
        for _ in range(3):
            probe("cuda:0")
            probe("cuda:1")
    assert [str(device) for device in reads] == ["cuda:0", "cuda:1"]


def test_facts_are_looked_up_of_the_device_that_is_named_or_of_its_kind() -> None:
    reads: list[str] = []

    def read(device: torch.device) -> Hardware:
        reads.append(str(device))
        return replace(machine("t4").hardware, name=f"card {device.index}")

    with playing("t4", count=2):
        object.__setattr__(backends.backend_for("cuda"), "read", read)
        torch.cuda.set_device(1)
        for name, card in (("cuda:0", 0), ("cuda:1", 1), ("cuda", 1), ("cuda:2", 1)):
            kind, can = look_up(name)
            assert can is not None
            assert (kind, can.name) == ("cuda", f"card {card}")
    with playing("cpu"):
        assert look_up("cuda:0") == ("cuda", None)
        assert look_up("cpu") == ("cpu", probe("cpu"))
    with playing("m2-macos14"):  # whose module in torch does not say whether it is initialised
        assert look_up_awake("mps") == look_up("mps") == ("mps", probe("mps"))


def test_facts_are_for_good_and_what_nobody_says_is_no() -> None:
    can = Capabilities("npu", "Card", NATIVE, ABSENT, None, autocast=True, grad_scaler=True)
    assert (can.missing_dtypes, can.evidence, can.total_memory) == ((), (), None)
    assert (can.autocast_float32, can.mixed_precision_caveat) == (False, "")
    with pytest.raises(FrozenInstanceError):
        can.autocast = False  # type: ignore[misc]


def test_support_is_its_word() -> None:
    assert json.loads(json.dumps([*Support])) == ["native", "emulated", "absent"]


def test_an_unknown_machine_is_told_the_nearest() -> None:
    with pytest.raises(MachineError, match="a100"):
        machine("a101")


NATIVE, EMULATED, ABSENT = Support.NATIVE, Support.EMULATED, Support.ABSENT

# device type, fp16, bf16, float64, autocast, grad_scaler, autocast_float32, caveat, evidence, GiB
FACTS: dict[str, tuple[object, ...]] = {
    "t4": (
        "cuda", NATIVE, EMULATED, True, True, True, True, "",
        ("Tesla T4, compute capability 7.5",
         "bf16 is emulated below compute capability 8.0, and slower than fp32"), 15,
    ),
    "a100": (
        "cuda", NATIVE, NATIVE, True, True, True, True, "",
        ("NVIDIA A100-SXM4-40GB, compute capability 8.0",), 40,
    ),
    "mi250": (
        "cuda", NATIVE, NATIVE, True, True, True, True, "",
        ("AMD Instinct MI250X, gfx90a",), 64,
    ),
    "rx6800": (
        "cuda", NATIVE, ABSENT, True, True, True, True, "",
        ("AMD Radeon RX 6800, gfx1030", "gfx1030 has no bf16 instructions"), 16,
    ),
    "arc-a770": (
        "xpu", NATIVE, NATIVE, False, True, True, False, "",
        ("Intel(R) Arc(TM) A770 Graphics; the driver says fp16 yes, bf16 yes, fp64 no",), 16,
    ),
    "m1-macos13": (
        "mps", NATIVE, ABSENT, False, True, True, False,
        "torch's autocast covers only part of its operations on MPS",
        ("macOS 13.6, torch 2.8",
         "MPS autocast needs torch 2.5 for fp16, torch 2.6 and macOS 14 for bf16; "
         "a gradient scaler needs torch 2.8"), 16,
    ),
    "gaudi2": (
        "hpu", NATIVE, NATIVE, None, True, True, False,
        "portable-amp knows hpu only by what its torch module says",
        ("GAUDI2; torch.hpu says fp16 True, bf16 True (None: it does not say)",), 96,
    ),
    "cpu": (
        "cpu", EMULATED, EMULATED, True, True, True, False,
        "on a CPU mixed precision can be slower than fp32, depending on the model",
        ("x86_64, 16-bit instructions: none",), None,
    ),
    "cpu-amx": (
        "cpu", NATIVE, NATIVE, True, True, True, False,
        "on a CPU mixed precision can be slower than fp32, depending on the model",
        ("x86_64, 16-bit instructions: amx_bf16, avx512_bf16, avx512_fp16",), None,
    ),
}  # fmt: skip


TF32 = {"a100": True, "arc-a770": None, "gaudi2": None}  # the others have none


@pytest.mark.parametrize("key", FACTS)
def test_every_fact_of_a_machine(key: str) -> None:
    row = machine(key)
    kind, fp16, bf16, fp64, autocast, scaler, fp32, caveat, evidence, gib = FACTS[key]
    missing = (torch.float64, torch.complex128) if fp64 is False else ()
    if key == "m1-macos13":
        missing += (torch.bfloat16,)
    assert row.capabilities == Capabilities(
        device_type=kind,  # type: ignore[arg-type]
        name=row.hardware.name,
        float16=fp16,  # type: ignore[arg-type]
        bfloat16=bf16,  # type: ignore[arg-type]
        float64=fp64,  # type: ignore[arg-type]
        missing_dtypes=missing,
        autocast=autocast,  # type: ignore[arg-type]
        grad_scaler=scaler,  # type: ignore[arg-type]
        autocast_float32=fp32,  # type: ignore[arg-type]
        tf32=TF32.get(key, False),
        mixed_precision_caveat=caveat,  # type: ignore[arg-type]
        evidence=evidence,  # type: ignore[arg-type]
        total_memory=gib * 2**30 if isinstance(gib, int) else None,
    )
    without = derive(replace(row.hardware, autocast=False, total_memory=7, float64=None))
    assert (without.autocast, without.total_memory) == (False, 7)
    assert without.float64 is None


@pytest.mark.parametrize(
    ("arch", "tf32"), {"gfx90a": False, "gfx942": True, "gfx950": False}.items()
)
def test_tf32_of_amd(arch: str, tf32: bool) -> None:
    assert derive(replace(machine("mi250").hardware, arch=arch)).tf32 is tf32


@pytest.mark.parametrize("key", ["t4", "mi250", "arc-a770", "m2-macos14", "gaudi2"])
def test_what_was_read_is_what_is_derived_from(key: str) -> None:
    with playing(key) as hardware:
        assert probe(f"{hardware.device_type}:0") == derive(hardware)


@pytest.mark.parametrize(
    ("feature", "fp16", "bf16"),
    [
        ("avx512_bf16", EMULATED, NATIVE),
        ("amx_bf16", EMULATED, NATIVE),
        ("bf16", EMULATED, NATIVE),
        ("sve_bf16", EMULATED, NATIVE),
        ("avx512_fp16", NATIVE, EMULATED),
        ("amx_fp16", NATIVE, EMULATED),
        ("avx512_f", EMULATED, EMULATED),
    ],
)
def test_each_instruction_set_of_a_cpu(feature: str, fp16: Support, bf16: Support) -> None:
    can = derive(replace(machine("cpu").hardware, cpu_features=frozenset({feature})))
    assert (can.float16, can.bfloat16) == (fp16, bf16)
    assert can.evidence[0].endswith(feature if feature != "avx512_f" else "none")


@pytest.mark.parametrize(
    ("arch", "fp16", "bf16"),
    [
        ("gfx803", EMULATED, EMULATED),
        ("gfx900", NATIVE, EMULATED),
        ("gfx90a", NATIVE, NATIVE),
        ("gfx950", NATIVE, NATIVE),
        ("gfx1010", NATIVE, ABSENT),
        ("gfx1151", NATIVE, NATIVE),
        ("gfx1201", NATIVE, NATIVE),
    ],
)
def test_each_generation_of_amd(arch: str, fp16: Support, bf16: Support) -> None:
    can = derive(replace(machine("mi250").hardware, arch=arch))
    assert (can.float16, can.bfloat16) == (fp16, bf16)
    assert can.evidence[1:] == (() if bf16 is NATIVE else (f"{arch} has no bf16 instructions",))


@pytest.mark.parametrize(
    ("said", "fp16", "bf16", "word"),
    [(None, ABSENT, EMULATED, "unknown"), (False, ABSENT, EMULATED, "no"),
     (True, NATIVE, NATIVE, "yes")],
)  # fmt: skip
def test_what_intels_driver_says(
    said: bool | None, fp16: Support, bf16: Support, word: str
) -> None:
    hardware = replace(machine("max1550").hardware, float16=said, bfloat16=said, float64=said)
    can = derive(hardware)
    assert (can.float16, can.bfloat16, can.float64) == (fp16, bf16, said)
    assert can.evidence[0].endswith(f"fp16 {word}, bf16 {word}, fp64 {word}")


@pytest.mark.parametrize(("said", "support"), [(None, ABSENT), (False, ABSENT), (True, NATIVE)])
def test_what_a_vendors_module_says(said: bool | None, support: Support) -> None:
    can = derive(replace(machine("gaudi2").hardware, float16=said, bfloat16=not said))
    assert can.float16 is support
    assert can.bfloat16 is (ABSENT if said else NATIVE)


def test_readings_that_are_missing() -> None:
    nvidia = derive(replace(machine("a100").hardware, compute_capability=None))
    assert (nvidia.float16, nvidia.bfloat16) == (EMULATED, EMULATED)
    assert nvidia.evidence[0] == "NVIDIA A100-SXM4-40GB, compute capability 0.0"
    mac = derive(replace(machine("m2-macos14").hardware, macos=None))
    assert (mac.float16, mac.bfloat16) == (NATIVE, ABSENT)
    assert mac.evidence[0] == "macOS 0.0, torch 2.15"


@pytest.mark.parametrize("key", ["a100", "arc-a770", "m2-macos14", "cpu"])
def test_support_of_each_dtype(key: str) -> None:
    can = replace(machine(key).capabilities, float16=EMULATED, bfloat16=ABSENT)
    asked = [can.support(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert asked == [NATIVE, EMULATED, ABSENT]
