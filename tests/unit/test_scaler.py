from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from portable_amp import (
    DeviceContext,
    PrecisionFallbackWarning,
    ScaleCollapseWarning,
    ScalerShim,
    StateWarning,
    maybe_autocast,
)
from portable_amp.testing import machine
from support import playing, without_mps

INF = float("inf")


def weight() -> torch.Tensor:
    return torch.tensor([1.0, 2.0], requires_grad=True)


def sgd(parameter: torch.Tensor) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter], lr=0.5)


def enabled(**options: Any) -> ScalerShim:
    return ScalerShim("cpu", enabled=True, **options)


def test_it_takes_torchs_arguments_in_torchs_order() -> None:
    scaler = ScalerShim("cpu", 8.0, 4.0, 0.25, 5, True)
    assert scaler.get_scale() == 8.0
    assert scaler.get_growth_factor() == 4.0
    assert scaler.get_backoff_factor() == 0.25
    assert scaler.get_growth_interval() == 5
    assert isinstance(scaler, torch.amp.GradScaler)


@without_mps
@pytest.mark.parametrize(("key", "on"), [("t4", True), ("a100", False), ("m2-macos14", False)])
def test_it_is_on_only_where_automatic_precision_is_fp16(key: str, on: bool) -> None:
    with playing(key):
        assert ScalerShim().is_enabled() is on
        ctx = DeviceContext(precision="fp16")
        assert ctx.scaler().is_enabled()
        assert not ctx.scaler(enabled=False).is_enabled()
        assert not DeviceContext(precision="fp32").scaler(enabled=True).is_enabled()
    assert not ScalerShim().is_enabled()


def test_the_scaler_of_a_context_takes_torchs_numbers() -> None:
    with playing("t4"):
        scaler = DeviceContext(precision="fp16").scaler(8.0, 4.0, 0.25, 5)
    assert scaler.get_scale() == 8.0
    assert scaler.get_growth_factor() == 4.0
    assert scaler.get_backoff_factor() == 0.25
    assert scaler.get_growth_interval() == 5


@without_mps
@pytest.mark.parametrize("key", ["a100", "t4", "m2-macos14", "arc-a770", "gtx1660", "m1-macos13"])
def test_the_two_drop_ins_agree(key: str) -> None:
    """fp16 without loss scaling loses gradients silently: swapped names must not lead there."""
    with playing(key) as hardware, warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionFallbackWarning)
        kind = hardware.device_type
        for named in ((), (kind,), (f"{kind}:0",)):
            with maybe_autocast(*named):
                half = torch.is_autocast_enabled(kind)
                half = half and torch.get_autocast_dtype(kind) is torch.float16
            assert ScalerShim(*named).is_enabled() is half


@without_mps
def test_fp16_that_cannot_be_scaled_is_told() -> None:
    old = replace(machine("m2-macos14").hardware, torch_version=(2, 6))
    with playing(old), pytest.warns(PrecisionFallbackWarning, match="no gradient scaler for it"):
        assert not ScalerShim("mps").is_enabled()


def test_an_absent_device_disables_it_and_is_told_once() -> None:
    with pytest.warns(PrecisionFallbackWarning, match="finds no such device") as caught:
        assert not ScalerShim("cuda", enabled=True).is_enabled()
        assert not ScalerShim("cuda:0", enabled=True).is_enabled()
    assert len(caught) == 1


def test_a_disabled_scaler_answers_its_getters() -> None:
    scaler = ScalerShim("cpu", growth_factor=3.0)
    assert scaler.get_growth_factor() == 3.0
    assert scaler.get_backoff_factor() == 0.5
    assert scaler.get_growth_interval() == 2000
    assert scaler.get_scale() == 1.0


def test_a_finite_step_and_a_skipped_one() -> None:
    w, scaler = weight(), enabled()
    optimizer = sgd(w)
    assert scaler.last_step is None
    result = scaler.backward_step((w * 2).sum(), optimizer)
    assert result is scaler.last_step
    assert (result.stepped, result.scale, result.grad_norm) == (True, 65536.0, None)
    assert w.tolist() == [0.0, 1.0]
    assert w.grad is None
    result = scaler.backward_step((w * INF).sum(), optimizer)
    assert (result.stepped, result.scale) == (False, 65536.0)
    assert w.tolist() == [0.0, 1.0]
    assert scaler.get_scale() == 32768.0


def test_clipping_sees_unscaled_gradients() -> None:
    w, scaler = weight(), enabled()
    result = scaler.backward_step((w * torch.tensor([3.0, 4.0])).sum(), sgd(w), max_norm=1.0)
    assert result.grad_norm == pytest.approx(5.0)
    assert w.tolist() == pytest.approx([1 - 0.5 * 0.6, 2 - 0.5 * 0.8])


def test_fused_optimizers_tell_too() -> None:
    w, scaler = weight(), enabled()
    optimizer = torch.optim.Adam([w], fused=True)
    before = w.tolist()
    first = scaler.backward_step((w * INF).sum(), optimizer)
    second = scaler.backward_step(w.sum(), optimizer)
    # Read after the fact: the first result must not have been changed by the second step.
    assert (first.stepped, first.scale) == (False, 65536.0)
    assert (second.stepped, second.scale) == (True, 32768.0)
    assert w.tolist() != before


def test_two_fused_optimizers_are_told_apart() -> None:
    good, bad, scaler = weight(), weight(), enabled()
    optimizers = [torch.optim.Adam([w], fused=True) for w in (good, bad)]
    scaler.scale(good.sum() + (bad * INF).sum()).backward()
    results = []
    for optimizer in optimizers:
        scaler.step(optimizer)
        results.append(scaler.last_step)
    scaler.update()  # torch adds both infs into the first optimizer's tensor
    assert [result.stepped for result in results if result] == [True, False]


def test_a_fused_optimizer_without_gradients_is_no_error() -> None:
    used, frozen, scaler = weight(), weight(), enabled()
    optimizers = [torch.optim.Adam([w], fused=True) for w in (used, frozen)]
    scaler.scale(used.sum()).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
        assert scaler.last_step
        assert scaler.last_step.stepped
    scaler.update()


def test_an_optimizer_that_takes_the_scaler_is_called_with_it() -> None:
    class Takes(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, closure: Any = None, *, grad_scaler: Any = None) -> None:
            self.got = grad_scaler

    w, scaler = weight(), enabled()
    optimizer = Takes([w], lr=0.1)
    scaler.scale(w.sum()).backward()
    with pytest.warns(FutureWarning, match="keyword argument"):
        scaler.step(optimizer)
    assert optimizer.got is scaler
    assert scaler.last_step
    assert scaler.last_step.stepped


def count_fetches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    fetched: list[str] = []
    real = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: fetched.append("item") or real(self))
    return fetched


@pytest.mark.parametrize("fused", [False, True])
def test_no_fetch_from_the_device_beyond_torchs_own(
    monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    def steps(scaler: torch.amp.GradScaler) -> int:
        w = weight()
        optimizer = torch.optim.Adam([w], fused=fused)
        fetched = count_fetches(monkeypatch)
        for factor in (1.0, INF, 1.0):
            scaler.scale((w * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        monkeypatch.undo()
        return len(fetched)

    assert steps(enabled()) == steps(torch.amp.GradScaler("cpu"))


def test_an_ordinary_step_is_told_without_any_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    w, scaler = weight(), enabled()
    result = scaler.backward_step(w.sum(), sgd(w))
    fetched = count_fetches(monkeypatch)
    assert result.stepped
    assert not fetched


class Recorder(torch.optim.SGD):
    """Keeps what `step` was called with."""

    def step(self, *args: Any, **kwargs: Any) -> str:  # type: ignore[override]
        self.seen = (args, kwargs)
        super().step()
        return "returned"


@pytest.mark.parametrize("on", [True, False])
def test_arguments_and_result_of_step_pass_through(on: bool) -> None:
    w = weight()
    optimizer, scaler = Recorder([w], lr=0.1), ScalerShim("cpu", enabled=on)
    scaler.scale(w.sum()).backward()
    assert scaler.step(optimizer, 1, two=2) == "returned"
    assert optimizer.seen == ((1,), {"two": 2})


@pytest.mark.parametrize("has_float64", [True, False])
def test_a_second_unscale_is_an_error(has_float64: bool) -> None:
    w, scaler = weight(), enabled()
    scaler._has_float64 = has_float64
    optimizer = sgd(w)
    scaler.scale(w.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="after step"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    scaler.update()
    scaler.scale(w.sum()).backward()
    scaler.unscale_(optimizer)


def test_without_float64_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: torch.Tensor) -> torch.Tensor:
        raise TypeError("no float64 on this device")

    def trained(scaler: torch.amp.GradScaler) -> list[float]:
        w = weight()
        optimizer = sgd(w)
        for factor in (1.0, 3.0, INF, 0.1):
            scaler.scale((w * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return [*w.tolist(), scaler.get_scale()]

    expected = trained(torch.amp.GradScaler("cpu"))
    scaler = enabled()
    scaler._has_float64 = False
    monkeypatch.setattr(torch.Tensor, "double", refuse)
    assert trained(scaler) == expected
    with pytest.raises(TypeError):  # so the stand-in does forbid it
        trained(torch.amp.GradScaler("cpu"))


@without_mps
def test_float64_is_asked_of_the_device() -> None:
    for key, has in {"arc-a770": False, "max1550": True, "m2-macos14": False, "t4": True}.items():
        with playing(key):
            assert DeviceContext(precision="fp16").scaler()._has_float64 is has


def test_update_takes_a_whole_number() -> None:
    w, scaler = weight(), enabled()
    scaler.scale(w.sum()).backward()
    scaler.step(sgd(w))
    scaler.update(1024)
    assert scaler.get_scale() == 1024.0


def test_a_collapsing_scale_is_reported_once() -> None:
    w, scaler = weight(), enabled()
    optimizer = sgd(w)
    with pytest.warns(ScaleCollapseWarning, match="skipped") as caught:
        for _ in range(100):
            scaler.backward_step((w * INF).sum(), optimizer)
    assert len(caught) == 1
    scaler.backward_step(w.sum(), optimizer)  # the next collapse is another one
    with pytest.warns(ScaleCollapseWarning):
        for _ in range(64):
            scaler.backward_step((w * INF).sum(), optimizer)


def test_a_collapse_under_a_fused_optimizer_is_reported_when_results_are_read() -> None:
    w, scaler = weight(), enabled()
    optimizer = torch.optim.Adam([w], fused=True)
    with pytest.warns(ScaleCollapseWarning):
        for _ in range(48):
            assert not scaler.backward_step((w * INF).sum(), optimizer).stepped


def test_a_calibrating_scale_is_not_a_collapse() -> None:
    w, scaler = weight(), enabled()
    for factor in [INF] * 20 + [1.0]:
        scaler.backward_step((w * factor).sum(), sgd(w))


def test_state_crosses_a_machine_without_scaling() -> None:
    w, cuda = weight(), enabled()
    cuda.backward_step((w * INF).sum(), sgd(w))
    saved = cuda.state_dict()
    assert saved["scale"] == 32768.0
    cpu = ScalerShim("cpu")
    cpu.load_state_dict(saved)
    cpu.backward_step(w.sum(), sgd(w))
    again = enabled()
    again.load_state_dict(cpu.state_dict())
    assert again.state_dict() == saved


def test_missing_state_starts_fresh_and_says_so() -> None:
    scaler = enabled()
    with pytest.warns(StateWarning, match="afresh at 65536"):
        scaler.load_state_dict(ScalerShim("cpu").state_dict())
    assert scaler.get_scale() == 65536.0
    ScalerShim("cpu").load_state_dict({})


@pytest.mark.parametrize("on", [True, False])
def test_foreign_state_is_refused(on: bool) -> None:
    with pytest.raises(ValueError, match="not the state of a gradient scaler"):
        ScalerShim("cpu", enabled=on).load_state_dict({"scale": 1.0})


@pytest.mark.parametrize("on", [True, False])
def test_it_pickles_and_copies_between_steps(on: bool) -> None:
    w, scaler = weight(), ScalerShim("cpu", enabled=on)
    scaler.backward_step(w.sum(), sgd(w))
    for twin in (pickle.loads(pickle.dumps(scaler)), copy.deepcopy(scaler)):
        assert twin.state_dict() == scaler.state_dict()
        twin.backward_step(w.sum(), sgd(w))


def test_a_result_reads_well() -> None:
    w, scaler = weight(), enabled()
    result = scaler.backward_step(w.sum(), sgd(w))
    assert repr(result) == "StepResult(stepped=True, scale=65536, grad_norm=None)"
