from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from portable_amp import ScalerShim

# What the gradient of each step is multiplied with; infinities and NaN at chosen steps.
FACTORS = st.lists(
    st.sampled_from([1.0, -0.5, 3e-5, 1e4, float("inf"), float("-inf"), float("nan")]),
    max_size=12,
)
OPTIMIZERS = st.sampled_from(
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    ]
)
SETTINGS = st.fixed_dictionaries(
    {
        "init_scale": st.sampled_from([1.0, 2.0**16, 2.0**24]),
        "growth_factor": st.sampled_from([2.0, 4.0]),
        "backoff_factor": st.sampled_from([0.5, 0.25]),
        "growth_interval": st.integers(1, 4),
    }
)


def parameters() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, requires_grad=True), torch.randn(2, 2, requires_grad=True)]


def loss_of(weights: list[torch.Tensor], factor: float) -> torch.Tensor:
    return sum(((w * w).sum() for w in weights), torch.zeros(())) * factor


def train(scaler: Any, make: Any, factors: list[float], clip: bool) -> list[Any]:
    """Train by hand, as torch's documentation does; everything that can be seen, step by step."""
    weights = parameters()
    optimizer = make(weights)
    seen: list[Any] = []
    for factor in factors:
        scaler.scale(loss_of(weights, factor)).backward()
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.append([w.detach().numpy().tobytes() for w in weights])
        seen.append((scaler.get_scale(), scaler.state_dict()))
    return seen


@given(FACTORS, OPTIMIZERS, SETTINGS, st.booleans(), st.booleans())
def test_enabled_it_is_torchs_scaler_bit_for_bit(
    factors: list[float], make: Any, settings: dict[str, Any], clip: bool, has_float64: bool
) -> None:
    shim = ScalerShim("cpu", **settings, enabled=True)
    shim._has_float64 = has_float64
    expected = train(torch.amp.GradScaler("cpu", **settings), make, factors, clip)
    assert train(shim, make, factors, clip) == expected


class Plain:
    """No scaler at all."""

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None: ...

    def update(self) -> None: ...

    def get_scale(self) -> float:
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        return {}


@given(FACTORS, OPTIMIZERS, st.booleans())
def test_disabled_it_is_plain_stepping_bit_for_bit(
    factors: list[float], make: Any, clip: bool
) -> None:
    assert train(ScalerShim("cpu"), make, factors, clip) == train(Plain(), make, factors, clip)


@given(FACTORS, OPTIMIZERS, st.booleans(), st.sampled_from([None, 1.0]))
def test_backward_step_is_the_same_by_hand_and_tells_the_truth(
    factors: list[float], make: Any, on: bool, max_norm: float | None
) -> None:
    weights = parameters()
    optimizer, scaler = make(weights), ScalerShim("cpu", enabled=on)
    results, scales = [], []
    for factor in factors:
        before = [w.detach().clone() for w in weights]
        scales.append(scaler.get_scale())
        results.append(scaler.backward_step(loss_of(weights, factor), optimizer, max_norm=max_norm))
        if on:
            changed = any(not torch.equal(b, w) for b, w in zip(before, weights, strict=True))
            assert changed is torch.isfinite(torch.tensor(factor)).item() or not changed
    by_hand = train(ScalerShim("cpu", enabled=on), make, factors, max_norm is not None)
    if factors:
        assert [w.detach().numpy().tobytes() for w in weights] == by_hand[-2]
    # Read at the end: later steps must not have changed what earlier ones tell.
    assert [result.scale for result in results] == scales
    backed_off = [
        result.stepped or not on or later < now
        for result, now, later in zip(
            results, scales, [*scales, scaler.get_scale()][1:], strict=True
        )
    ]
    assert all(backed_off)
    if not on:
        assert all(result.stepped for result in results)


@given(FACTORS, SETTINGS)
def test_state_survives_any_number_of_machines(factors: list[float], settings: Any) -> None:
    shim = ScalerShim("cpu", **settings, enabled=True)
    train(shim, lambda p: torch.optim.SGD(p, lr=0.1), factors, clip=False)
    saved = shim.state_dict()
    state = saved
    for on in (False, True, False, False, True):
        other = ScalerShim("cpu", enabled=on)
        other.load_state_dict(state)
        state = other.state_dict()
    assert state == saved
