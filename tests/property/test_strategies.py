"""What the strategies promise: nothing outside of it is drawn, and all of it can be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from portable_amp import Support
from portable_amp.backends import Hardware
from portable_amp.nested import length_of, tensors_in
from portable_amp.precision import parse_precision
from portable_amp.testing import MACHINES, strategies

KINDS = ("cuda", "xpu", "mps", "cpu", "npu")
CATALOGUED = [row.hardware for row in MACHINES]
DRAWN = settings(
    max_examples=3000,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def containers(value: Any) -> list[Any]:
    """All that lies in it, itself included."""
    inside = value.values() if isinstance(value, dict) else value
    if not isinstance(value, (dict, list, tuple)):
        return [value]
    return [value, *(part for one in inside for part in containers(one))]


def has(*kinds: type) -> Callable[[Any], bool]:
    return lambda batch: any(type(part) in kinds for part in containers(batch))


def is_made_up(hw: Hardware) -> bool:
    return hw not in CATALOGUED


hardware, capabilities = strategies.hardware(), strategies.capabilities()
machines, streams = strategies.machines(), strategies.gradient_streams()
made_up, batches = hardware.filter(is_made_up), strategies.nested_batches()
CAN: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], bool]]] = {
    **{
        f"{name} of {kind}": (drawn, lambda one, kind=kind: one.device_type == kind)
        for name, drawn in (("hardware", hardware), ("capabilities", capabilities))
        for kind in KINDS
    },
    **{
        f"machines of {kind}": (machines, lambda row, kind=kind: row.hardware.device_type == kind)
        for kind in ("cuda", "xpu", "mps", "cpu", "hpu", "npu")
    },
    **{
        f"{name} {value}": (hardware, lambda hw, name=name, value=value: getattr(hw, name) is value)
        for name in ("float64", "float16", "bfloat16")
        for value in (None, True, False)
    },
    **{
        f"{kind} with {feature}": (
            strategies.hardware(kind).filter(is_made_up),
            lambda hw, feature=feature: feature in (*hw.cpu_features, hw.arch),
        )
        for kind, features in (
            ("cpu", ("avx2", "avx512_bf16", "amx_bf16", "amx_fp16", "bf16", "neon")),
            ("cuda", ("", "gfx803", "gfx906", "gfx908", "gfx90a", "gfx1030", "gfx1100")),
        )
        for feature in features
    },
    "a machine of the catalogue": (hardware, lambda hw: hw in CATALOGUED),
    "a card without tensor cores": (made_up, lambda hw: "GTX 16" in hw.name),
    "another card": (made_up, lambda hw: hw.name == "Card"),
    "no autocast": (hardware, lambda hw: not hw.autocast),
    "an old torch": (made_up, lambda hw: hw.torch_version == (2, 4)),
    "a torch to come": (made_up, lambda hw: hw.torch_version > (2, 15)),
    "an old card": (made_up, lambda hw: (3, 0) <= (hw.compute_capability or (9, 0)) < (6, 0)),
    "a card to come": (made_up, lambda hw: (hw.compute_capability or (0, 0)) > (12, 0)),
    "a round card": (made_up, lambda hw: (hw.compute_capability or (0, 1))[1] == 0),
    "an old macOS": (made_up, lambda hw: (hw.macos or (99, 0)) < (14, 0)),
    "a macOS to come": (made_up, lambda hw: (hw.macos or (0, 0)) >= (27, 0)),
    "a round macOS": (made_up, lambda hw: (hw.macos or (0, 1))[1] == 0),
    "gigabytes": (made_up, lambda hw: (hw.total_memory or 0) > 2**30),
    "next to nothing": (made_up, lambda hw: 0 < (hw.total_memory or 0) < 2**20),
    **{
        f"{name} is {value}": (capabilities, lambda can, n=name, v=value: getattr(can, n) == v)
        for name, values in (
            ("float16", Support),
            ("bfloat16", Support),
            ("float64", (None, True, False)),
            ("autocast", (True, False)),
            ("grad_scaler", (True, False)),
            ("autocast_float32", (True, False)),
            ("mixed_precision_caveat", ("", "a reason to be careful")),
        )
        for value in values
    },
    "a scaler on a device of an unknown name": (
        capabilities,
        lambda can: can.grad_scaler and can.name not in {hw.name for hw in CATALOGUED},
    ),
    "several readings": (capabilities, lambda can: len(can.evidence) > 2),
    **{
        f"a factor like {like}": (streams, lambda factors, ok=ok: any(map(ok, factors)))
        for like, ok in {
            "1": lambda f: f == 1,
            "0": lambda f: f == 0,
            "a negative one": lambda f: -9 < f < 0,
            "a tiny one": lambda f: 0 < abs(f) < 1e-20,
            "a small one": lambda f: 1e-6 < f < 1e-4,
            "a large one": lambda f: 1e3 < f < 1e5,
            "a huge one": lambda f: 1e20 < f < math.inf,
            "infinity": lambda f: f == math.inf,
            "minus infinity": lambda f: f == -math.inf,
            "NaN": math.isnan,
        }.items()
    },
    "no step": (streams, lambda factors: factors == []),
    "a dozen steps": (streams, lambda factors: len(factors) == 12),
    **{
        f"tensors of {dtype}": (
            batches,
            lambda batch, dtype=dtype: any(t.dtype is dtype for t in tensors_in(batch)),
        )
        for dtype in (
            torch.float32, torch.int64, torch.uint8, torch.bool, torch.float64, torch.float16,
            torch.bfloat16,
        )
    },
    **{
        f"something of {kind.__name__}": (batches, has(kind))
        for kind in (dict, list, tuple, str, int, type(None))
    },
    "a named tuple": (
        batches,
        lambda batch: any(hasattr(part, "_fields") for part in containers(batch)),
    ),
    "names, one per sample": (
        batches,
        lambda batch: any(
            isinstance(part, list) and part and all(isinstance(one, str) for one in part)
            for part in containers(batch)
        ),
    ),
    "one sample": (batches, lambda batch: length_of(batch) == 1),
    "eight samples": (batches, lambda batch: length_of(batch) == 8),
    "an image": (batches, lambda batch: any(t.dim() == 3 for t in tensors_in(batch))),
    "a row": (batches, lambda batch: any(t.dim() == 1 for t in tensors_in(batch))),
    "five entries": (batches, lambda b: any(len(c) == 5 for c in containers(b) if type(c) is dict)),
    "nesting": (
        batches,
        lambda batch: any(type(c) is not dict and has(dict)(c) for c in containers(batch)[1:]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CAN)
def test_this_can_be_drawn(what: str) -> None:
    strategy, looked_for = CAN[what]
    soon = settings(DRAWN, max_examples=60) if "factor" in what else DRAWN
    find(strategy, looked_for, settings=soon)


@settings(max_examples=25)
@given(st.sets(st.sampled_from(KINDS), min_size=1), st.data())
def test_only_what_was_asked_for_is_drawn(kinds: set[str], data: st.DataObject) -> None:
    read = data.draw(strategies.hardware(*kinds))
    assert read.device_type in kinds
    assert (2, 4) <= read.torch_version < (3, 0)
    assert data.draw(strategies.capabilities(*kinds)).device_type in kinds
    assert data.draw(strategies.machines(*kinds)).hardware.device_type in kinds


@given(strategies.hardware("never heard of"))
def test_a_device_type_that_no_machine_has_is_made_up(read: Any) -> None:
    assert read.device_type == "never heard of"


@given(strategies.requests())
def test_each_request_is_understood(request: Any) -> None:
    assert parse_precision(request) in ("auto", "fp32", "fp16", "bf16")


@given(st.data())
def test_gradients_overflow_where_they_were_told_to(data: st.DataObject) -> None:
    overflows = data.draw(st.none() | st.frozensets(st.integers(0, 9)))
    shortest = data.draw(st.integers(0, 4))
    longest = data.draw(st.integers(shortest, 6))
    factors = data.draw(
        strategies.gradient_streams(min_steps=shortest, max_steps=longest, overflows=overflows)
    )
    needed = max(overflows, default=-1) + 1 if overflows else 0
    assert max(shortest, needed) <= len(factors) <= max(longest, needed)
    assert all(isinstance(factor, float) for factor in factors)
    if overflows is not None:
        infinite = {step for step, factor in enumerate(factors) if not math.isfinite(factor)}
        assert infinite == overflows


@given(st.data())
def test_each_batch_has_a_tensor_and_one_length(data: st.DataObject) -> None:
    most = data.draw(st.integers(1, 5))
    batch = data.draw(strategies.nested_batches(max_samples=most))
    sizes = {len(tensor) for tensor in tensors_in(batch)}
    assert sizes == {length_of(batch)}
    assert sizes <= set(range(1, most + 1))
    for part in containers(batch):
        if isinstance(part, list) and all(isinstance(one, str) for one in part):
            assert len(part) == length_of(batch)
        elif isinstance(part, (dict, list, tuple)):
            assert 1 <= len(part) <= 5
