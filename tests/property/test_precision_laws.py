"""What holds for every machine there is, and for those nobody built."""

from __future__ import annotations

import logging
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from portable_amp import (
    Capabilities,
    DeviceContext,
    DeviceError,
    PrecisionFallbackWarning,
    Support,
    UnsupportedPrecisionError,
    choose,
    common_plan,
    seed_everything,
)
from portable_amp.backends import Hardware, resolve_device
from portable_amp.capabilities import derive
from portable_amp.precision import Precision, PrecisionPlan, parse_precision
from portable_amp.testing import strategies
from support import playing

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def supported(plan: PrecisionPlan, can: Capabilities) -> bool:
    """The machine computes in the plan's dtype correctly and natively."""
    return not plan.autocast or (
        can.autocast
        and can.support(plan.dtype) is Support.NATIVE
        and (can.grad_scaler or not plan.scaler)
    )


@given(strategies.requests(), strategies.capabilities())
def test_every_plan_is_one_the_machine_supports_and_has_a_reason(
    request: Precision, can: Capabilities
) -> None:
    plan = choose(request, can)
    assert supported(plan, can)
    assert plan.reason
    assert plan.evidence == can.evidence
    assert plan.scaler is (plan.dtype is torch.float16)
    assert choose(request, can) == plan


@given(strategies.capabilities())
def test_auto_never_takes_what_is_incomplete_and_never_falls_back(can: Capabilities) -> None:
    plan = choose("auto", can)
    assert not plan.fell_back
    if can.mixed_precision_caveat:
        assert not plan.autocast
    elif can.autocast and can.bfloat16 is Support.NATIVE:
        assert plan.dtype is torch.bfloat16


@given(strategies.requests(), strategies.capabilities())
def test_an_explicit_request_is_honoured_or_marked(request: Precision, can: Capabilities) -> None:
    wanted = parse_precision(request)
    plan = choose(request, can)
    if wanted == "auto":
        return
    assert plan.fell_back is (plan.dtype is not DTYPES[wanted])
    assert plan.dtype in (DTYPES[wanted], torch.float32)
    honourable = PrecisionPlan(wanted, DTYPES[wanted], "")
    assert plan.fell_back is not supported(honourable, can)


@given(
    strategies.requests(), st.lists(strategies.capabilities(), min_size=1, max_size=4), st.randoms()
)
def test_a_common_plan_suits_every_rank_in_any_order(
    request: Precision, machines: list[Capabilities], order: random.Random
) -> None:
    plan = common_plan(request, machines)
    assert all(supported(plan, can) for can in machines)
    assert plan.reason
    shuffled = list(machines)
    order.shuffle(shuffled)
    assert common_plan(request, shuffled) == plan
    if not any(choose(request, can).autocast for can in machines):
        assert not plan.autocast
    if len(set(machines)) == 1:
        assert plan == choose(request, machines[0])


@given(strategies.hardware("cuda", "xpu", "mps", "cpu"), strategies.requests(), st.booleans())
def test_a_context_honours_tells_or_raises(
    hardware: Hardware, request: Precision, strict: bool
) -> None:
    kind = hardware.device_type
    with playing(hardware) as seen, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected = choose(request, derive(seen))
        logging.disable(logging.CRITICAL)
        try:
            if strict and expected.fell_back:
                with pytest.raises(UnsupportedPrecisionError):
                    DeviceContext(kind, precision=request, unsupported="raise")
                return
            unsupported = "raise" if strict else "fallback"
            ctx = DeviceContext(kind, precision=request, unsupported=unsupported)
            DeviceContext(kind, precision=request, unsupported=unsupported)
        finally:
            logging.disable(logging.NOTSET)
        assert ctx.plan == expected
        assert ctx.device.type == kind
        assert [w.category for w in caught] == [PrecisionFallbackWarning] * expected.fell_back
        assert ctx.autocast_device_type == (kind if expected.autocast else None)
        assert ctx.explain().splitlines()[:3] == ctx.summary().splitlines()
        assert ctx.scaler().is_enabled() is expected.scaler


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=12),
    st.binary(max_size=3),
    st.sampled_from(["cuda", "gpu", "fp16", "tf32", "xpu", "mps", "cpu", "bf16"]).flatmap(
        lambda word: st.tuples(st.text(max_size=2), st.just(word), st.text(max_size=4)).map("".join)
    ),
    st.sampled_from(["cuda:", "xpu:", "mps:", "cpu:"]).flatmap(
        lambda kind: st.integers(-300, 300).map(lambda index: f"{kind}{index}")
    ),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from([torch.float64, torch.device("meta"), torch.ones(3), torch.ones(()), object]),
    st.sampled_from([np.int64(16), np.zeros((2, 2)), np.float32(16), np.bool_(0), np.str_("fp16")]),
    st.sampled_from([slice(1), range(2), Ellipsis, {1}, print, "x" * 5000, "\ud800", "a\nb"]),
)


@given(ANYTHING)
def test_any_precision_works_or_is_refused_in_one_line(value: Any) -> None:
    try:
        assert parse_precision(value) in ("auto", "fp32", "fp16", "bf16")
    except UnsupportedPrecisionError as error:
        told = str(error)
        assert len(told.splitlines()) == 1, told
        assert len(told) < 400


@given(ANYTHING)
def test_any_device_works_or_is_refused_in_one_line(value: Any) -> None:
    with playing("a100", count=2):
        try:
            device = resolve_device(value)
        except DeviceError as error:
            told = str(error)
            assert len(told.splitlines()) == 1, told
            assert len(told) < 400
        else:
            assert str(device) in ("cpu", "cuda:0", "cuda:1")
            if isinstance(value, str):
                assert value in (str(device), device.type, "cpu:0")


@given(ANYTHING)
def test_any_seed_works_or_is_refused_in_one_line(value: Any) -> None:
    try:
        assert seed_everything(value) == value
    except ValueError as error:
        told = str(error)
        assert len(told.splitlines()) == 1, told
        assert len(told) < 200
