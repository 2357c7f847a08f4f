from __future__ import annotations

import copy
import math
import pickle
import sys
import threading
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from portable_amp import (
    DeviceContext,
    GradientWarning,
    PrecisionFallbackWarning,
    ScaleCollapseWarning,
    ScalerShim,
    StateWarning,
    maybe_autocast,
)
from portable_amp.backends import backend_for, torch_version
from portable_amp.testing import machine, play
from support import asleep, playing, without_mps

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


def test_the_defaults_are_torchs() -> None:
    expected = torch.amp.GradScaler("cpu").state_dict()
    assert enabled().state_dict() == expected
    with playing("t4"):
        assert DeviceContext(precision="fp16").scaler().state_dict() == expected
    off = ScalerShim("cpu")
    for name in ("growth_factor", "backoff_factor", "growth_interval"):
        assert getattr(off, f"get_{name}")() == expected[name]


@pytest.mark.parametrize("wrong", [{"growth_factor": 1.0}, {"backoff_factor": 1.0}])
def test_factors_that_torch_refuses_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(AssertionError):
        enabled(**wrong)
    ScalerShim("cpu", enabled=False, **wrong)


def test_the_scaler_of_a_context_takes_torchs_numbers() -> None:
    with playing("t4"):
        scaler = DeviceContext(precision="fp16").scaler(8.0, 4.0, 0.25, 5)
    assert scaler.get_scale() == 8.0
    assert scaler.get_growth_factor() == 4.0
    assert scaler.get_backoff_factor() == 0.25
    assert scaler.get_growth_interval() == 5


@without_mps
@pytest.mark.parametrize(
    "key", ["a100", "t4", "m2-macos14", "arc-a770", "gtx1080", "gtx1660", "m1-macos13"]
)
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
        assert not ScalerShim("xpu", enabled=True).is_enabled()  # another subject
    assert len(caught) == 2


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


def test_a_step_without_scaling_has_the_scale_1() -> None:
    w, scaler = weight(), ScalerShim("cpu")
    result = scaler.backward_step((w * 2).sum(), sgd(w))
    assert (result.stepped, result.scale, result.grad_norm) == (True, 1.0, None)
    assert w.grad is None


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


class Takes(torch.optim.SGD):
    """Decides by itself, as with torch's deprecated way of fused optimizers."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None, *, grad_scaler: Any = None) -> None:  # type: ignore[override]
        self.got = grad_scaler
        super().step(closure)


def test_an_optimizer_that_takes_the_scaler_is_called_with_it() -> None:
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


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU plays a device that computes later: reading a number waits for it."""
    slow = replace(backend_for("cpu"), synchronize="cpu.synchronize")
    monkeypatch.setattr("portable_amp.scaler.backend_for", lambda kind: slow)


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize("fused", [False, True])
def test_no_fetch_from_the_device_beyond_torchs_own(fused: bool) -> None:
    def steps(scaler: Any) -> int:
        w = weight()
        optimizer = torch.optim.Adam([w], fused=fused)
        with pytest.MonkeyPatch.context() as patch:
            fetched = count_fetches(patch)
            for factor in (1.0, INF, 1.0):
                scaler.scale((w * factor).sum()).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
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
    assert scaler.step(optimizer, 1, print, two=2) == "returned"  # only the first is a closure
    assert optimizer.seen == ((1, print), {"two": 2})
    scaler.update()
    optimizer.zero_grad()
    assert scaler.backward_step(w.sum(), optimizer).stepped  # its step names no closure


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

    def told(steps: int) -> list[tuple[int, str]]:
        """After which of so many skipped steps, and what."""
        found = []
        for n in range(1, steps + 1):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                scaler.backward_step((w * INF).sum(), optimizer)
            assert {warning.category for warning in caught} <= {ScaleCollapseWarning}
            found += [(n, str(warning.message)) for warning in caught]
        return found

    ((at, text),) = told(100)
    assert at == 32
    assert "fallen to 6.10352e-05 after 32 skipped" in text
    assert scaler.get_scale() == 2.0**-14
    for _ in range(2):
        scaler.backward_step(w.sum(), optimizer)  # the next collapse is another one
        ((at, text),) = told(50)
        assert at == 16
        assert "after 16 skipped" in text


@pytest.mark.parametrize("named", [False, True])
def test_a_collapse_names_parameters_and_who_finds_the_module(named: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Embedding(5, 3, sparse=True))
    parameters: Any = [one for _, one in model.named_parameters()]
    if named and torch_version() >= (2, 6):
        parameters = model.named_parameters()
    optimizer, scaler = torch.optim.SGD(parameters, lr=0.1), enabled(init_scale=1.0)
    with pytest.warns(ScaleCollapseWarning) as caught:
        for _ in range(32):
            made = model[0](torch.ones(1, 2)).sum() + (model[1](torch.tensor([1])) * INF).sum()
            scaler.scale(made).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    (text,) = [str(one.message) for one in caught]
    which = "'1.weight'" if named and torch_version() >= (2, 6) else "number 2 of group 0"
    assert f"infinite or NaN in 1 of 3 parameters, first in {which} of shape (5, 3), and" in text
    assert "ctx.find_nonfinite(model, batch, loss=...) names the module" in text


def test_a_collapse_under_a_fused_optimizer_is_reported_when_results_are_read() -> None:
    w, scaler = weight(), enabled()
    optimizer = torch.optim.Adam([w], fused=True)
    with pytest.warns(ScaleCollapseWarning):
        for _ in range(48):
            assert not scaler.backward_step((w * INF).sum(), optimizer).stepped


@pytest.mark.parametrize("fused", [False, True])
def test_a_scale_that_fell_to_the_floor_recovers(fused: bool) -> None:
    w, scaler = weight(), enabled(init_scale=4.0, growth_interval=1)
    optimizer = torch.optim.Adam([w], fused=fused)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScaleCollapseWarning)
        for _ in range(200):
            scaler.backward_step((w * INF).sum(), optimizer)
    assert scaler.get_scale() == 2.0**-14
    for _ in range(16):
        assert scaler.backward_step(w.sum(), optimizer).stepped
    assert scaler.get_scale() == 4.0


def test_a_scale_that_was_chosen_below_the_floor_stays_there() -> None:
    w, scaler = weight(), enabled(init_scale=2.0**-20, growth_interval=10)
    for factor in (1.0, INF):
        scaler.backward_step((w * factor).sum(), sgd(w))
        assert scaler.get_scale() == 2.0**-20


def test_a_scale_that_was_set_below_the_floor_stays_while_steps_are_taken() -> None:
    w, scaler = weight(), enabled()
    scaler.update(2.0**-20)
    for _ in range(2):
        assert scaler.backward_step(w.sum(), sgd(w)).stepped
        assert scaler.get_scale() == 2.0**-20


def test_the_floor_holds_where_one_of_two_optimizers_steps() -> None:
    for factors in ((INF, 1.0), (1.0, INF)):
        w, other = weight(), weight()
        scaler = enabled(init_scale=2.0**-10)
        optimizers = [sgd(w), sgd(other)]
        for _ in range(6):
            scaler.scale((w * factors[0]).sum() + (other * factors[1]).sum()).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
        assert scaler.get_scale() == 2.0**-14


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
@pytest.mark.parametrize("missing", torch.amp.GradScaler("cpu").state_dict())
def test_foreign_state_is_refused(on: bool, missing: str) -> None:
    state = enabled(init_scale=8.0).state_dict()
    del state[missing]
    scaler = ScalerShim("cpu", enabled=on)
    before = scaler.state_dict()
    with pytest.raises(ValueError, match="not the state of a gradient scaler") as caught:
        scaler.load_state_dict(state)
    assert repr(missing) in str(caught.value)
    assert scaler.state_dict() == before


def test_loaded_state_is_not_what_the_step_before_changes() -> None:
    for factor in (INF, 1.0):
        w, scaler = weight(), enabled(growth_interval=1)
        scaler.backward_step((w * factor).sum(), sgd(w))
        scaler.load_state_dict(enabled(init_scale=8.0).state_dict())
        assert scaler.get_scale() == 8.0


@pytest.mark.parametrize("on", [True, False])
def test_it_pickles_and_copies_between_steps(on: bool) -> None:
    w, scaler = weight(), ScalerShim("cpu", enabled=on)
    scaler.backward_step(w.sum(), sgd(w))
    for twin in (pickle.loads(pickle.dumps(scaler)), copy.deepcopy(scaler)):
        assert twin.state_dict() == scaler.state_dict()
        assert twin.last_step is None  # it may hold tensors of the device
        twin.backward_step(w.sum(), sgd(w))


def test_a_result_reads_well() -> None:
    w, scaler = weight(), enabled()
    result = scaler.backward_step(w.sum(), sgd(w))
    assert repr(result) == "StepResult(stepped=True, scale=65536, grad_norm=None)"


# --- what passes where scaling is off passes where it is on ----------------------------------

BOTH = pytest.mark.parametrize("on", [False, True])


@BOTH
@pytest.mark.parametrize("fused", [False, True])
def test_steps_without_any_loss_or_gradient(on: bool, fused: bool) -> None:
    w, scaler = weight(), ScalerShim("cpu", enabled=on)
    optimizer = torch.optim.Adam([w], fused=fused)
    scaler.update()
    assert scaler.scale(None) is None
    for _ in range(2):
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        assert scaler.last_step
        assert scaler.last_step.stepped
        scaler.update()
        scaler.update()
    assert scaler.get_scale() == (65536.0 if on else 1.0)
    scaler.backward_step(w.sum(), optimizer)
    scaler.step(optimizer)
    scaler.update(512)
    assert scaler.get_scale() == (512.0 if on else 1.0)


@pytest.mark.parametrize("has_float64", [True, False])
@pytest.mark.parametrize("ask", ["step", "unscale_"])
def test_gradients_of_a_loss_that_was_never_scaled_are_refused(has_float64: bool, ask: str) -> None:
    told = []
    for scaler in (enabled(), torch.amp.GradScaler("cpu")):
        w = weight()
        w.sum().backward()
        scaler._has_float64 = has_float64
        with pytest.raises(AssertionError, match="did not use") as caught:
            getattr(scaler, ask)(sgd(w))
        told.append(str(caught.value))
    assert told[0] == told[1]


@pytest.mark.parametrize("has_float64", [True, False])
def test_unscaling_whatever_the_default_dtype_and_never_of_fp16(has_float64: bool) -> None:
    w, scaler = weight(), enabled()
    half = torch.ones(2, dtype=torch.float16, requires_grad=True)
    optimizer, of_fp16 = sgd(w), sgd(half)
    scaler._has_float64 = has_float64
    scaler.scale(w.sum()).backward()
    torch.set_default_dtype(torch.float64)
    try:
        scaler.unscale_(optimizer)
    finally:
        torch.set_default_dtype(torch.float32)
    assert w.grad is not None
    assert w.grad.tolist() == [1.0, 1.0]
    scaler.scale(half.float().sum()).backward()
    with pytest.raises(ValueError, match="FP16 gradients"):
        scaler.unscale_(of_fp16)


@without_mps
def test_a_device_without_float64_is_trained_there() -> None:
    with play("arc-a770", live=True) as played:
        ctx = DeviceContext(precision="fp16")
        w = torch.nn.Parameter(torch.tensor([1.0, 2.0], device=ctx.device))
        scaler, optimizer = ctx.scaler(), sgd(w)
        for factor in (1.0, INF):
            result = scaler.backward_step((w * factor).sum(), optimizer, max_norm=1e3)
            assert result.stepped is (factor == 1.0)
        assert not played.asked("copy")
        assert w.tolist() == [0.5, 1.5]


def test_an_update_before_any_loss_sets_the_scale() -> None:
    scaler = enabled()
    scaler.update(8)
    assert scaler.get_scale() == 8.0


@BOTH
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("conjugated", [False, True])
def test_complex_weights(on: bool, max_norm: float | None, conjugated: bool) -> None:
    def trained(step: Any) -> list[complex]:
        w = torch.tensor([1 + 2j, -3j], requires_grad=True)
        real = torch.tensor([1.0], requires_grad=True)
        optimizer = torch.optim.SGD([w, real], lr=0.5)
        for factor in (1.0, 0.5):
            loss = ((w * (2 - 1j)).abs().sum() + real.sum()) * factor
            step(loss, optimizer)
            if conjugated and w.grad is not None:
                w.grad = w.grad.conj()
        return [*w.tolist(), *real.tolist()]

    def plain(loss: torch.Tensor, optimizer: Any) -> None:
        loss.backward()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm)
        optimizer.step()
        optimizer.zero_grad()

    scaler = ScalerShim("cpu", enabled=on)
    assert trained(
        lambda loss, optimizer: scaler.backward_step(loss, optimizer, max_norm=max_norm)
    ) == pytest.approx(trained(plain))
    w = torch.tensor([1j], requires_grad=True)
    result = scaler.backward_step((w * INF).abs().sum(), torch.optim.SGD([w], lr=1.0))
    assert result.stepped is not on


def test_a_conjugated_gradient_is_unscaled() -> None:
    w, scaler = torch.tensor([1 + 1j], requires_grad=True), enabled(init_scale=4.0)
    optimizer = torch.optim.SGD([w], lr=1.0)
    scaler.scale(w.real.sum()).backward()
    w.grad = torch.tensor([4 - 8j]).conj()
    scaler.step(optimizer)
    assert w.tolist() == [0 - 1j]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_sparse_gradients(on: bool, dtype: torch.dtype) -> None:
    table = torch.nn.Parameter(torch.ones(4, 2, dtype=dtype))
    optimizer, scaler = torch.optim.SGD([table], lr=0.5), ScalerShim("cpu", enabled=on)
    rows = torch.tensor([1, 3, 1])  # one of them twice: not coalesced
    if dtype.is_complex:
        scaler.scale(table.real.sum()).backward()
        assert table.grad is not None
        table.grad = table.grad.to_sparse()
    else:
        looked_up = torch.nn.functional.embedding(rows, table, sparse=True)
        scaler.scale(looked_up.sum()).backward()
    assert table.grad is not None
    assert table.grad.is_sparse
    scaler.step(optimizer)
    scaler.update()
    expected = [0.5] * 4 if dtype.is_complex else [1.0, 0.0, 1.0, 0.5]
    assert table[:, 0].tolist() == expected
    assert scaler.last_step
    assert scaler.last_step.stepped


class Losses(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@BOTH
def test_several_losses_in_any_container(on: bool) -> None:
    w, scaler = weight(), ScalerShim("cpu", enabled=on, init_scale=8.0)
    one, two = w[0], w[1]
    factor = 8 if on else 1
    scaled = scaler.scale({"a": one, "b": two})
    assert {key: loss.item() for key, loss in scaled.items()} == {"a": factor, "b": 2 * factor}
    named = scaler.scale(Losses(one, two))
    assert (named.first.item(), named.second.item()) == (factor, 2 * factor)
    assert [loss.item() for loss in scaler.scale([one, two])] == [factor, 2 * factor]
    assert [loss.item() for loss in scaler.scale((one, two))] == [factor, 2 * factor]
    assert [loss.item() for loss in scaler.scale(iter([one, two]))] == [factor, 2 * factor]
    sum(scaled.values()).backward()
    scaler.step(sgd(w))
    scaler.update()
    assert w.tolist() == [0.5, 1.5]


@BOTH
def test_a_closure(on: bool) -> None:
    w, scaler = weight(), ScalerShim("cpu", enabled=on)
    optimizer = sgd(w)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = scaler.scale(w.sum())
        loss.backward()
        return loss  # type: ignore[no-any-return]

    for arguments, named in (((closure,), {}), ((), {"closure": closure})):
        before = w.tolist()
        if on:
            with pytest.raises(RuntimeError, match="SGD is given a closure"):
                scaler.step(optimizer, *arguments, **named)
            assert w.tolist() == before
        else:
            scaler.step(optimizer, *arguments, **named)
            assert w.tolist() == [value - 0.5 for value in before]
    closure()
    before = w.tolist()
    scaler.step(optimizer, closure=None)
    scaler.update()
    assert w.tolist() == [value - 0.5 for value in before]


@BOTH
def test_an_optimizer_that_needs_a_closure_is_refused_in_words(on: bool) -> None:
    w, scaler = weight(), ScalerShim("cpu", enabled=on)
    optimizer = torch.optim.LBFGS([w])
    with pytest.raises(TypeError, match="backward_step has no closure for LBFGS"):
        scaler.backward_step(w.sum(), optimizer)
    assert w.grad is None
    if not on:

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (w**2).sum()
            loss.backward()
            return loss.detach()  # LBFGS of torch 2.8 makes a number of it, and warns

        scaler.step(optimizer, closure)
        assert w.abs().max() < 1e-3


# --- two networks ------------------------------------------------------------------------------


class Gan:
    """A generator that is judged by a discriminator, whose gradients the former's loss leaves."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.generator, self.discriminator = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)
        self.optimizers = {
            "d": torch.optim.Adam(self.discriminator.parameters(), lr=0.1),
            "g": torch.optim.SGD(self.generator.parameters(), lr=0.1, momentum=0.9),
        }
        self.noise = torch.randn(8, 3)
        self.real = torch.randn(8, 4)

    def loss(self, which: str) -> torch.Tensor:
        made = self.generator(self.noise)
        if which == "g":
            return -self.discriminator(made).mean()
        return (self.discriminator(made.detach()) - self.discriminator(self.real)).mean()

    def weights(self) -> list[list[float]]:
        models = (self.generator, self.discriminator)
        return [w.flatten().tolist() for model in models for w in model.parameters()]


@BOTH
@pytest.mark.parametrize("order", ["dg", "ddg", "gd"])
def test_two_networks_train_as_by_the_plain_idiom(on: bool, order: str) -> None:
    ours, plain = Gan(), Gan()
    scaler = ScalerShim("cpu", enabled=on)
    for iteration in range(4):
        for which in order:
            if order == "gd" and which == "d" and iteration == 0:
                ours.optimizers["d"].zero_grad()
            assert scaler.backward_step(ours.loss(which), ours.optimizers[which]).stepped
            plain.optimizers[which].zero_grad()
            plain.loss(which).backward()
            plain.optimizers[which].step()
        assert ours.weights() == plain.weights()


@BOTH
def test_what_another_optimizer_has_accumulated_stays(on: bool) -> None:
    ours, scaler = Gan(), ScalerShim("cpu", enabled=on)
    for which in "dg":
        scaler.backward_step(ours.loss(which), ours.optimizers[which])
    scaler.scale(ours.loss("d")).backward()
    kept = [w.grad for w in ours.discriminator.parameters()]
    values = [gradient.clone() for gradient in kept if gradient is not None]
    assert len(values) == 2
    scaler.backward_step(ours.loss("g"), ours.optimizers["g"])
    for w, before, value in zip(ours.discriminator.parameters(), kept, values, strict=True):
        assert w.grad is before
        assert torch.equal(value, before)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss = ours.loss("g")
        loss.backward()
        scaler.backward_step(loss, ours.optimizers["g"])
    assert [w.grad for w in ours.discriminator.parameters()] == kept  # after an error, too


@BOTH
def test_gradients_that_another_loss_may_have_left_are_refused(on: bool) -> None:
    ours, scaler = Gan(), ScalerShim("cpu", enabled=on)
    scaler.backward_step(ours.loss("g"), ours.optimizers["g"])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="this Adam hold gradients already"):
            scaler.backward_step(ours.loss("d"), ours.optimizers["d"])
    ours.optimizers["d"].zero_grad()
    scaler.scale(ours.loss("d")).backward()  # accumulated by hand
    scaler.backward_step(ours.loss("d"), ours.optimizers["d"])


def test_a_single_optimizer_may_have_gradients_already() -> None:
    w = weight()
    w.sum().backward()
    ScalerShim("cpu").backward_step(w.sum(), sgd(w))
    assert w.tolist() == [0.0, 1.0]


def test_gradients_that_were_unscaled_by_hand_are_refused() -> None:
    w, scaler = weight(), enabled()
    optimizer = sgd(w)
    scaler.scale(w.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has been called"):
        scaler.backward_step(w.sum(), optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert scaler.backward_step(w.sum(), optimizer).stepped
    assert w.tolist() == [0.0, 1.0]


def test_one_optimizer_may_take_over_from_another() -> None:
    w, scaler = weight(), enabled()
    scaler.backward_step(w.sum(), sgd(w))
    w.grad = None
    scaler.scale(w.sum()).backward()
    assert scaler.backward_step(w.sum(), torch.optim.Adam([w])).stepped


def test_the_scale_is_updated_once_an_iteration() -> None:
    ours, scaler = Gan(), enabled(growth_interval=3)
    scales = []
    for _ in range(4):
        scales.append([scaler.backward_step(ours.loss(w), ours.optimizers[w]).scale for w in "dg"])
    assert scales == [[65536.0] * 2] * 3 + [[131072.0] * 2]
    bad = ours.loss("d") * INF
    assert not scaler.backward_step(bad, ours.optimizers["d"]).stepped
    last = scaler.backward_step(ours.loss("g"), ours.optimizers["g"])
    assert (last.stepped, last.scale) == (True, 131072.0)
    assert scaler.get_scale() == 65536.0  # the iteration is over
    scaler.update()
    assert scaler.get_scale() == 65536.0


LOOK = pytest.mark.parametrize(
    "look",
    [
        lambda scaler: scaler.get_scale(),
        lambda scaler: scaler.state_dict()["scale"],
        lambda scaler: scaler.scale(torch.ones(())).item(),
    ],
)
COPY = [lambda scaler: pickle.loads(pickle.dumps(scaler)), copy.deepcopy]


@LOOK
def test_whoever_looks_sees_the_scale_to_come(look: Any) -> None:
    w, scaler = weight(), enabled()
    scaler.backward_step((w * INF).sum(), sgd(w))
    assert look(scaler) == 32768.0
    scaler.update()
    assert look(scaler) == 32768.0


@pytest.mark.parametrize("copied", COPY)
def test_a_copy_has_the_scale_to_come(copied: Any) -> None:
    w, scaler = weight(), enabled()
    scaler.backward_step((w * INF).sum(), sgd(w))
    assert copied(scaler).get_scale() == 32768.0
    scaler.scale(w.sum()).backward()
    scaler.step(sgd(w))
    with pytest.raises(AssertionError, match="only be pickled"):
        copied(scaler)  # as torch says, before update()


@LOOK
def test_looking_before_the_update_by_hand_changes_nothing(look: Any) -> None:
    w, scaler = weight(), enabled()
    optimizer = sgd(w)
    for scale in (2.0**16, 2.0**15):
        scaler.scale((w * INF).sum()).backward()
        scaler.step(optimizer)
        assert look(scaler) == scale
        assert scaler.get_scale() == scale
        scaler.update()
        assert scaler.get_scale() == scale / 2


def test_what_is_scaled_by_hand_is_known_until_the_next_step() -> None:
    first, second, scaler = weight(), weight(), enabled()
    optimizers = sgd(first), sgd(second)
    scaler.scale(first.sum()).backward()  # accumulated
    scaler.backward_step(first.sum(), optimizers[0])
    second.sum().backward()
    with pytest.raises(RuntimeError, match="hold gradients already"):
        scaler.backward_step(second.sum(), optimizers[1])


def test_a_second_optimizer_of_the_same_loss_steps_by_hand() -> None:
    w, other = weight(), weight()
    scaler, optimizers = enabled(growth_interval=1), [sgd(w), sgd(other)]
    for _ in range(2):
        scaler.backward_step((w * other).sum(), optimizers[0])
        scaler.step(optimizers[1])
        optimizers[1].zero_grad()
    plain, twin = weight(), weight()
    for _ in range(2):
        (plain * twin).sum().backward()
        for used in (plain, twin):
            optimizer = sgd(used)
            optimizer.step()
            optimizer.zero_grad()
    assert (w.tolist(), other.tolist()) == (plain.tolist(), twin.tolist())
    assert scaler.get_scale() == 65536.0 * 4


# --- gradients that are infinite or NaN, with scaling off -------------------------------------


@pytest.mark.parametrize("bad", [INF, float("nan")])
@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"skip_nonfinite": True}])
def test_a_step_on_gradients_that_are_not_finite_is_skipped(
    bad: float, options: dict[str, Any]
) -> None:
    w, scaler = weight(), ScalerShim("cpu")
    optimizer = sgd(w)
    with pytest.warns(GradientWarning, match="step was skipped") as caught:
        for _ in range(2):
            result = scaler.backward_step((w * bad).sum(), optimizer, **options)
            assert result is scaler.last_step
            assert not result.stepped
            assert not math.isfinite(result.grad_norm or 0.0)
    assert len(caught) == 1
    assert w.tolist() == [1.0, 2.0]
    assert w.grad is None
    result = scaler.backward_step(w.sum(), optimizer, **options)
    assert result.stepped
    assert result.grad_norm == pytest.approx(2**0.5)
    assert w.tolist() != [1.0, 2.0]


def test_skipping_does_not_change_gradients() -> None:
    w, scaler = weight(), ScalerShim("cpu")
    scaler.backward_step((w * 100).sum(), sgd(w), skip_nonfinite=True)
    assert w.tolist() == [-49.0, -48.0]


@pytest.mark.parametrize("options", [{"skip_nonfinite": True}, {"max_norm": INF}])
def test_finite_gradients_of_an_infinite_norm_do_not_become_nan(options: dict[str, Any]) -> None:
    w = weight()
    result = enabled().backward_step((w * 3e19).sum(), sgd(w), **options)
    assert result.grad_norm == INF
    assert w.isfinite().all()


def test_a_step_on_gradients_that_are_not_finite_is_taken_if_told() -> None:
    w, scaler = weight(), ScalerShim("cpu")
    result = scaler.backward_step((w * INF).sum(), sgd(w), max_norm=1.0, skip_nonfinite=False)
    assert result.stepped
    assert not w.isfinite().any()


@pytest.mark.usefixtures("waiting")
def test_no_wait_for_the_norm_where_it_would_cost_one(monkeypatch: pytest.MonkeyPatch) -> None:
    w, scaler = weight(), ScalerShim("cpu")
    fetched = count_fetches(monkeypatch)
    result = scaler.backward_step((w * INF).sum(), sgd(w), max_norm=1.0)
    assert not fetched
    assert result.stepped
    with pytest.warns(GradientWarning, match="skip_nonfinite=True"):
        assert not math.isfinite(result.grad_norm or 0.0)
    w = weight()
    with pytest.warns(GradientWarning, match="step was skipped"):
        result = scaler.backward_step((w * INF).sum(), sgd(w), max_norm=1.0, skip_nonfinite=True)
    assert not result.stepped
    assert w.tolist() == [1.0, 2.0]
    assert scaler.backward_step(w.sum(), sgd(w), max_norm=1.0).grad_norm == pytest.approx(2**0.5)


@pytest.mark.usefixtures("waiting")
def test_an_optimizer_that_takes_the_scaler_is_no_fused_one() -> None:
    w, scaler = weight(), ScalerShim("cpu")
    result = scaler.backward_step((w * INF).sum(), Takes([w], lr=0.1), max_norm=1.0)
    assert result.stepped
    assert not w.isfinite().any()


@pytest.mark.usefixtures("waiting")
def test_a_fused_optimizer_skips_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    w, scaler = weight(), ScalerShim("cpu")
    optimizer = torch.optim.Adam([w], fused=True)
    fetched = count_fetches(monkeypatch)
    results = [
        scaler.backward_step((w * factor).sum(), optimizer, max_norm=1.0) for factor in (INF, 1.0)
    ]
    assert not fetched
    with pytest.warns(GradientWarning, match="step was skipped"):
        assert [result.stepped for result in results] == [False, True]
    assert w.isfinite().all()
    assert w.tolist() != [1.0, 2.0]
    assert not hasattr(optimizer, "found_inf")


# --- beside autocast ---------------------------------------------------------------------------


@BOTH
def test_a_loop_inside_one_region_of_torchs_own_learns(
    on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = sys.modules["torch.optim.optimizer"]  # ours are not to help
    monkeypatch.setattr(hooks, "_global_optimizer_post_hooks", {})
    torch.manual_seed(0)
    x, y = torch.randn(16, 8), torch.randn(16, 8)
    model = torch.nn.Linear(8, 8)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.5), ScalerShim("cpu", enabled=on)
    losses = []
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(20):
            loss = torch.nn.functional.mse_loss(model(x).float(), y)
            scaler.backward_step(loss, optimizer)
            losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def half() -> Any:
    with playing(replace(machine("cpu").hardware, cpu_features=frozenset({"avx512_fp16"}))):
        return DeviceContext("cpu", precision="fp16").autocast()


def test_a_disabled_scaler_that_follows_fp16_is_told_once() -> None:
    w, scaler = weight(), ScalerShim("cpu")
    with pytest.warns(GradientWarning, match="this scaler is off") as caught:
        for _ in range(2):
            with half():
                loss = w.sum()
            scaler.backward_step(loss, sgd(w))
    assert len(caught) == 1


def test_fp16_that_no_disabled_scaler_follows_is_not_told() -> None:
    w, scaler = weight(), ScalerShim("cpu")
    region = half()
    with region:
        enabled().backward_step(w.sum(), sgd(w))
    scaler.backward_step(w.sum(), sgd(w))
    with torch.no_grad(), region:
        pass
    scaler.backward_step(w.sum(), sgd(w))
    for later in (maybe_autocast("cpu", torch.bfloat16), DeviceContext("cpu").autocast()):
        with region:
            pass
        with later:
            pass
        scaler.backward_step(w.sum(), sgd(w))

    told: list[Any] = []

    def elsewhere() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scaler.backward_step(w.sum(), sgd(w))
        told.extend(caught)
        with region:
            pass

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert not told
    scaler.backward_step(w.sum(), sgd(w))


@pytest.mark.parametrize(
    ("key", "arguments", "on"),
    [
        ("t4", {"device": "cuda"}, True),
        ("t4", {}, True),
        ("a100", {}, False),
        ("a100", {"device": "cuda:0", "enabled": True}, True),
        ("a100", {"device": "cuda", "enabled": False}, False),
        ("gtx1660", {"device": "cuda"}, False),
    ],
)
def test_cuda_is_left_alone_until_somebody_asks(
    key: str, arguments: dict[str, Any], on: bool
) -> None:
    asks = [
        ScalerShim.is_enabled,
        lambda scaler: scaler._has_float64 and scaler._enabled,
        lambda scaler: bool(scaler.state_dict()),
        lambda scaler: copy.copy(scaler).is_enabled(),
        lambda scaler: pickle.loads(pickle.dumps(scaler)).is_enabled(),
    ]
    for ask in asks:
        with asleep(key) as awake:
            scaler = ScalerShim(**arguments)
            assert not awake
            assert ask(scaler) is on
            assert awake
            assert scaler.is_enabled() is on


def test_it_has_no_other_attributes_than_its_own() -> None:
    with pytest.raises(AttributeError, match="'ScalerShim' has no attribute 'enable'"):
        ScalerShim("cpu").enable  # noqa: B018


# --- state ------------------------------------------------------------------------------------


@BOTH
def test_saved_state_is_a_copy(on: bool) -> None:
    scaler = ScalerShim("cpu", enabled=on)
    state = enabled(init_scale=8.0).state_dict()
    scaler.load_state_dict(state)
    state["scale"] = 1.0
    scaler.state_dict()["scale"] = 2.0
    assert scaler.state_dict()["scale"] == 8.0


def test_infinities_on_any_device_count() -> None:
    """As where a model is spread over two: found is one tensor for each."""
    for values, stepped in (((0.0, 1.0), False), ((1.0, 0.0), False), ((0.0, 0.0), True)):
        for fused in (False, True):
            w, scaler = weight(), enabled()
            optimizer = torch.optim.Adam([w], fused=fused)
            scaler.scale(w.sum()).backward()
            scaler.unscale_(optimizer)
            state = scaler._per_optimizer_states[id(optimizer)]
            state["found_inf_per_device"] = dict(enumerate(map(torch.tensor, values)))
            scaler.step(optimizer)
            assert scaler.last_step
            result = scaler.last_step
            scaler.update()
            assert result.stepped is stepped
            assert scaler.get_scale() == (65536.0 if stepped else 32768.0)
            assert (w.tolist() != [1.0, 2.0]) is stepped
