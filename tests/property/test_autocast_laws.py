from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from portable_amp import DeviceContext, PrecisionFallbackWarning, Support, choose, maybe_autocast
from portable_amp.backends import Hardware
from portable_amp.capabilities import derive
from portable_amp.precision import Precision
from portable_amp.testing import strategies
from support import KINDS, playing

State = tuple[Any, ...]


def state() -> State:
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    per_kind = [(torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in KINDS]
    return (*per_kind, torch.is_autocast_cache_enabled(), nesting)


@given(
    strategies.hardware(*KINDS),
    st.sampled_from(KINDS),
    st.sampled_from([None, torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.booleans(),
)
def test_never_a_crash_never_a_false_on_and_always_restored(
    hardware: Hardware, kind: str, dtype: torch.dtype | None, enabled: bool
) -> None:
    can = derive(hardware)
    with playing(hardware), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = state()
        with maybe_autocast(kind, dtype, enabled):
            on = torch.is_autocast_enabled(kind)
            inside = torch.get_autocast_dtype(kind)
        assert state() == before
    assert all(w.category is PrecisionFallbackWarning for w in caught)
    assert len(caught) <= 1
    if not enabled:
        assert not on
        assert not caught
    if on and kind == hardware.device_type:
        assert can.autocast
        assert inside in (torch.float16, torch.bfloat16, torch.float32)
        if inside is not torch.float32:
            assert can.support(inside) is not Support.ABSENT
    if enabled and not on:
        assert caught or dtype is torch.float32


@given(strategies.hardware(*KINDS), strategies.requests(), st.booleans())
def test_a_contexts_region_is_its_plan(hardware: Hardware, request: Precision, outer: bool) -> None:
    kind, can = hardware.device_type, derive(hardware)
    plan = choose(request, can)
    with playing(hardware), warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionFallbackWarning)
        ctx = DeviceContext(kind, precision=request)
        before = state()
        around = torch.autocast("cpu", torch.bfloat16) if outer else contextlib.nullcontext()
        with around, ctx.autocast():
            if can.autocast:
                assert torch.is_autocast_enabled(kind) is plan.autocast
                if plan.autocast:
                    assert torch.get_autocast_dtype(kind) is plan.dtype
        assert state() == before
