from __future__ import annotations

import itertools
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

from portable_amp import Support, UnsupportedPrecisionError, choose, common_plan
from portable_amp.precision import parse_dtype, parse_precision
from portable_amp.testing import MACHINES, Machine, machine

# machine: what "auto", "fp16" and "bf16" become there
EXPECTED = {
    "v100": "fp16 fp16 fp32",
    "t4": "fp16 fp16 fp32",
    "gtx1080": "fp32 fp32 fp32",
    "gtx1660": "fp32 fp32 fp32",
    "t1000": "fp32 fp32 fp32",
    "a100": "bf16 fp16 bf16",
    "orin": "bf16 fp16 bf16",
    "l4": "bf16 fp16 bf16",
    "rtx4090": "bf16 fp16 bf16",
    "rtx4090-windows": "bf16 fp16 bf16",
    "h100": "bf16 fp16 bf16",
    "b200": "bf16 fp16 bf16",
    "mi250": "bf16 fp16 bf16",
    "mi300x": "bf16 fp16 bf16",
    "rx6800": "fp16 fp16 fp32",
    "rx7900": "bf16 fp16 bf16",
    "arc-a770": "bf16 fp16 bf16",
    "max1550": "bf16 fp16 bf16",
    "m1-macos13": "fp32 fp16 fp32",
    "m2-macos14": "fp32 fp16 bf16",
    "m2-macos15": "fp32 fp16 bf16",
    "m2-macos15-torch24": "fp32 fp32 fp32",
    "gaudi2": "fp32 fp16 bf16",
    "ascend-910b": "fp32 fp16 bf16",
    "cpu": "fp32 fp32 fp32",
    "cpu-avx512bf16": "fp32 fp32 bf16",
    "cpu-amx": "fp32 fp16 bf16",
    "cpu-arm-bf16": "fp32 fp32 bf16",
}


@pytest.mark.parametrize("row", MACHINES, ids=lambda row: row.key)
def test_every_machine_of_the_catalogue(row: object) -> None:
    can = row.capabilities  # type: ignore[attr-defined]
    got = " ".join(choose(request, can).name for request in ("auto", "fp16", "bf16"))
    assert got == EXPECTED[row.key]  # type: ignore[attr-defined]


@pytest.mark.parametrize("row", MACHINES, ids=lambda row: row.key)
def test_facts_that_are_derived_are_those_of_the_catalogue(row: Machine) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        known = Support.EMULATED if dtype in row.slow else Support.NATIVE
        known = Support.ABSENT if dtype in row.wrong else known
        assert row.capabilities.support(dtype) is known


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *zip(("auto", True, None, " AUTO "), itertools.repeat("auto")),
        *zip(
            ("fp32", False, "no", "32-true", "32", "float32", 32, torch.float32),
            itertools.repeat("fp32"),
        ),
        *zip(("Float", "torch.float32"), itertools.repeat("fp32")),
        *zip(
            ("fp16", "16-mixed", "half", "16", "float16", 16, torch.float16, "FP16"),
            itertools.repeat("fp16"),
        ),
        ("torch.half", "fp16"),
        *zip(("bf16", "bf16-mixed", "bfloat16", torch.bfloat16), itertools.repeat("bf16")),
    ],
)
def test_spellings(value: object, expected: str) -> None:
    assert parse_precision(value) == expected  # type: ignore[arg-type]


# What other libraries and YAML call something else, and what is said of it.
OTHER_WORDS: dict[str, tuple[object, ...]] = {
    "casts the model itself": ("16-true", "bf16-true", "transformer-engine"),
    "multiply float32 matrices: 'fp32', and DeviceContext": (
        "tf32", "TF32", "tensorfloat32", "TensorFloat-32",
    ),
    "the model's own dtype": (
        "64", 64, "64-true", "fp64", "float64", "double", torch.float64, "torch.float64",
    ),
    "16 bits and no fewer": ("fp8", "float8", "8", 8, "int8", "int4", "fp4"),
    "did you mean 'auto'": ("mixed", "amp", "mixed_precision", "on", "true", "yes"),
    "did you mean 'fp32'": ("off", "false", "none"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("value", "why"),
    [
        *((value, why) for why, values in OTHER_WORDS.items() for value in values),
        ("bf15", "did you mean 'bf16'"),
        ("atuo", "did you mean 'auto'"),
        (0.5, r"it is no precision\. Use"),
        (1, "it is no precision"),
        (0, "it is no precision"),
        (1.0, "it is no precision"),
        ([], "it is no precision"),
        (torch.int8, "it is no precision"),
        ("fp16-mixed", "did you mean 'fp16'"),
        (16.0, "it is no precision"),
        ({}, "it is no precision"),
        (slice(1), "it is no precision"),
        ("", "it is no precision"),
    ],
)
def test_what_is_no_precision_is_refused_with_what_works(value: object, why: str) -> None:
    with pytest.raises(UnsupportedPrecisionError, match=why) as caught:
        parse_precision(value)  # type: ignore[arg-type]
    assert f"precision={value!r}: " in str(caught.value)
    assert "'auto', 'fp32', 'fp16' or 'bf16'" in str(caught.value)


def test_a_refused_request_names_what_works_here() -> None:
    plan = choose("bf16", machine("t4").capabilities)
    assert plan.fell_back
    assert plan.reason == "bf16 is emulated on this device, slower than fp32; fp16 works here"


def test_a_refused_request_names_nothing_where_nothing_works() -> None:
    plan = choose("bf16", machine("gtx1080").capabilities)
    assert plan.reason == "bf16 is emulated on this device, slower than fp32"


@pytest.mark.parametrize(
    ("value", "dtype"),
    [("bf16", torch.bfloat16), ("auto", None), (16, torch.float16), (torch.float64, torch.float64)],
)
def test_the_dtype_of_a_spelling(value: Any, dtype: torch.dtype | None) -> None:
    assert parse_dtype(value) is dtype


def test_fp16_needs_a_scaler_that_exists() -> None:
    can = replace(machine("m2-macos14").capabilities, grad_scaler=False)
    plan = choose("fp16", can)
    assert plan.dtype is torch.float32
    assert "gradient scaler" in plan.reason


def test_a_plan_is_for_good_and_says_nothing_that_was_not_measured() -> None:
    plan = choose("auto", machine("a100").capabilities)
    assert (plan.tuned, plan.chunk, plan.compiled, plan.fell_back) == (False, None, False, False)
    assert (plan.request, plan.settled) == ("auto", True)
    assert plan.memory_format is torch.contiguous_format
    assert [replace(plan, request=words).tuned for words in ("tuned", "tuned fp32")] == [True] * 2
    with pytest.raises(FrozenInstanceError):
        plan.dtype = torch.float32  # type: ignore[misc]


def test_only_fp16_is_scaled() -> None:
    can = machine("a100").capabilities
    assert [choose(name, can).scaler for name in ("fp32", "bf16", "fp16")] == [False, False, True]


def test_ranks_that_differ_take_what_all_can_do() -> None:
    a100, t4, cpu = (machine(key).capabilities for key in ("a100", "t4", "cpu"))
    assert common_plan("auto", [a100, a100]) == choose("auto", a100)
    mixed = common_plan("auto", [a100, t4])
    assert mixed.name == "fp16"
    assert not mixed.fell_back
    assert mixed.evidence == ("NVIDIA A100-SXM4-40GB: bf16", "Tesla T4: fp16")
    assert common_plan("auto", [a100, cpu]).name == "fp32"
    assert not common_plan("auto", [a100, cpu]).fell_back
    assert common_plan("bf16", [a100, t4]).fell_back
    assert common_plan("fp16", [a100, t4]).name == "fp16"


@pytest.mark.parametrize("change", [{"evidence": ("other",)}, {"bfloat16": Support.ABSENT}])
def test_ranks_that_agree_tell_the_same_whatever_their_order(change: dict[str, Any]) -> None:
    ranks = [machine("t4").capabilities, replace(machine("t4").capabilities, **change)]
    plan, other = (choose("bf16", rank) for rank in ranks)
    assert plan != other
    assert common_plan("bf16", ranks) == common_plan("bf16", ranks[::-1])


def test_ranks_without_mixed_precision_in_common() -> None:
    only_bf16 = replace(machine("a100").capabilities, float16=Support.ABSENT)
    only_fp16 = machine("t4").capabilities
    assert common_plan("auto", [only_bf16, only_fp16]).name == "fp32"


def test_no_machines_have_no_plan() -> None:
    with pytest.raises(ValueError, match="at least one"):
        common_plan("auto", [])
