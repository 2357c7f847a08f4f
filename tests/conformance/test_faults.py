"""The kit finds faults: each deliberate one in a row or a decision turns a played machine red."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from portable_amp import (
    DeviceContext,
    PrecisionFallbackWarning,
    ScalerShim,
    autocast,
    backends,
    capabilities,
    choose,
    context,
    is_oom_error,
    maybe_autocast,
    memory,
    notices,
    precision,
    scaler,
    split_on_oom,
    transfer,
)
from portable_amp.capabilities import Support
from portable_amp.testing import MACHINES, play
from portable_amp.testing.machines import machine
from support import KINDS

LIVE = {"cuda", "xpu", "mps"} & set(KINDS)
PLAYED = [row.key for row in MACHINES if row.hardware.device_type in {*KINDS, "hpu", "npu"}]


def examine(key: str) -> None:
    """Train, fail and recover on one machine; raises where the library breaks its contract."""
    live = machine(key).hardware.device_type in LIVE
    with play(key, live=live) as played:
        ctx = DeviceContext()
        assert ctx.device.type == played.kind, "the accelerator is not used"
        assert train(ctx) < 1.3, "it did not learn"
        lowered = {call.dtype for call in played.asked("autocast")}
        assert lowered <= {ctx.plan.dtype}, "autocast and plan disagree"
        bad = (*played.machine.slow, *played.machine.wrong)
        assert ctx.plan.dtype not in bad, "a slow or wrong precision"
        fp16 = ctx.plan.dtype is torch.float16
        assert bool(played.asked("scale")) is fp16, "a scaler is for fp16"
        if not played.pins:
            assert not played.asked("copy", non_blocking=True), "an unsafe copy"
            assert not played.asked("pin_memory"), "useless pinning"
        ctx.clear_cache(min_pressure=0.9)
        assert not played.asked("empty_cache"), "cleared without need"
        ctx.clear_cache()
        assert len(played.asked("empty_cache")) == played.row.accelerator, "not cleared"
        told_once(ctx)
        nested(ctx)
        carried(ctx)
        torch_fails(ctx)
        if live:
            recovers(ctx, played)


def train(ctx: DeviceContext) -> float:
    """Train as users do; the last loss."""
    torch.manual_seed(0)
    model = ctx.to(torch.nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    grad_scaler = ctx.scaler(init_scale=2.0**8)
    labels = torch.arange(8) % 4
    data = torch.utils.data.TensorDataset(F.one_hot(labels).float(), labels)
    for _ in range(4):
        for batch in torch.utils.data.DataLoader(data, batch_size=4, **ctx.loader_options()):
            x, y = ctx.to(batch)
            with ctx.autocast():
                out = model(x)
            if ctx.device.type in LIVE:
                assert out.dtype is ctx.plan.dtype, "the region computes in another dtype"
                assert out.device == ctx.device
            loss = F.cross_entropy(out.float(), y)
            result = grad_scaler.backward_step(loss, optimizer, max_norm=1.0)
            assert result.stepped
    return loss.item()


def told_once(ctx: DeviceContext) -> None:
    """A request that this machine refuses is told once, and one that it honours never."""
    refused = [p for p in ("fp16", "bf16") if choose(p, ctx.capabilities).fell_back]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for request in ("fp16", "bf16"):
            for _ in range(2):
                DeviceContext(precision=request)
    told = [w for w in caught if issubclass(w.category, PrecisionFallbackWarning)]
    assert len(told) == len(refused), "told too often, or not at all"


def nested(ctx: DeviceContext) -> None:
    """Regions in regions, and the same one again, leave autocast as it was."""
    kind = ctx.device.type
    if not ctx.capabilities.autocast:
        return
    halves = (torch.bfloat16, torch.float16)
    works = [dtype for dtype in halves if ctx.capabilities.support(dtype) is not Support.ABSENT]
    region = maybe_autocast(kind, works[0])
    with region, region:
        with maybe_autocast(kind, enabled=False):
            assert not torch.is_autocast_enabled(kind)
        with region:
            pass
    assert not torch.is_autocast_enabled(kind), "autocast stays on"


def carried(ctx: DeviceContext) -> None:
    """The loss scale survives a machine without scaling."""
    on = ScalerShim(ctx.device, init_scale=64.0, enabled=ctx.capabilities.grad_scaler)
    on.scale(torch.ones((), device=ctx.device))
    off = ScalerShim(ctx.device, enabled=False)
    off.load_state_dict(on.state_dict())
    assert off.state_dict() == on.state_dict(), "the scale is lost"


def torch_fails(ctx: DeviceContext) -> None:
    """A torch whose cache call raises ends no training run."""
    if ctx.backend.empty_cache is None:
        return
    module = torch.get_device_module(ctx.device)
    failure = AssertionError("INTERNAL ASSERT FAILED")
    with mock.patch.object(module, "empty_cache", side_effect=failure):
        assert ctx.clear_cache() is None


def recovers(ctx: DeviceContext, played: Any) -> None:
    """Out of memory, the batch is split, and the gradients are those of the whole batch."""

    def gradient(trouble: bool) -> torch.Tensor:
        memory._fitted.clear()
        weight = torch.ones(3, 2, device=ctx.device, requires_grad=True)
        batch = torch.arange(12.0, device=ctx.device).reshape(4, 3)

        def step(part: torch.Tensor, share: float) -> None:
            ((part @ weight).mean() * share).backward()

        if trouble:
            played.memory.fail_after(3)
        parts = split_on_oom(step, batch, parameters=[weight])
        assert len(parts) == (2 if trouble else 1)
        assert weight.grad is not None
        return weight.grad.cpu()

    assert torch.allclose(gradient(trouble=True), gradient(trouble=False)), "wrong gradients"
    played.memory.fail_after(0)
    with pytest.raises(RuntimeError) as caught:
        torch.ones(1, device=ctx.device)
    assert is_oom_error(caught.value), "its own out-of-memory error is not known"


@pytest.mark.parametrize("key", PLAYED)
def test_without_a_fault_every_machine_is_green(key: str) -> None:
    examine(key)


# --- the faults --------------------------------------------------------------------------------

Patch = Callable[[pytest.MonkeyPatch], None]


def derived(device_type: str, **wrong: Any) -> Patch:
    """The judge of this device type answers otherwise."""
    right = capabilities._DERIVE[device_type]
    return lambda patch: patch.setitem(
        capabilities._DERIVE, device_type, lambda hw: replace(right(hw), **wrong)
    )


def row(device_type: str, **wrong: Any) -> Patch:
    """The back end's record says otherwise."""
    rows = tuple(
        replace(r, **wrong) if r.device_type == device_type else r for r in backends.BACKENDS
    )
    return lambda patch: patch.setattr(backends, "BACKENDS", rows)


def attribute(owner: Any, name: str, value: Any) -> Patch:
    return lambda patch: patch.setattr(owner, name, value)


def _leaky_exit(self: Any, *exc: Any) -> bool:
    autocast.entered.regions.pop()
    return False


def _clear_cache_that_raises(device: Any = None, *, min_pressure: float | None = None) -> None:
    where = backends.resolve_device(device)
    empty = backends.torch_function(backends.backend_for(where.type).empty_cache)
    if empty and min_pressure is None:
        empty()


def _to_without_waiting(value: Any, device: torch.device, *_: Any) -> Any:
    if isinstance(value, torch.nn.Module):
        return value.to(device)
    return transfer.map_tensors(lambda t: t.to(device, non_blocking=True), value)


def _without_weights(step: Any, batch: Any, *, parameters: Any = ()) -> Any:
    return memory.split_on_oom(lambda part, weight: step(part, 1.0), batch, parameters=parameters)


def _float64_anywhere(patch: pytest.MonkeyPatch) -> None:
    derived("xpu", bfloat16=Support.ABSENT)(patch)  # so that it trains in fp16
    patch.setattr(scaler.ScalerShim, "unscale_", torch.amp.GradScaler.unscale_)


_FORGETFUL = attribute(
    context.DeviceContext,
    "_region",
    lambda ctx, *_: autocast.Autocast(ctx.device.type, None, True, None),
)

# fault: the machine that shows it, how it is put in, what is then said
FAULTS: dict[str, tuple[str, Patch, str]] = {
    "bf16 on a T4": ("t4", derived("cuda", bfloat16=Support.NATIVE), "slow or wrong"),
    "fp16 on a GTX 1660": ("gtx1660", derived("cuda", float16=Support.NATIVE), "result.stepped"),
    "fp16 on a plain CPU": (
        "cpu",
        derived("cpu", float16=Support.NATIVE, mixed_precision_caveat=""),
        "slow or wrong",
    ),
    "bf16 on RDNA2": ("rx6800", derived("cuda", bfloat16=Support.NATIVE), "did not learn"),
    "a scaler left on for bf16": (
        "a100",
        attribute(precision.PrecisionPlan, "scaler", property(lambda plan: plan.autocast)),
        "a scaler is for fp16",
    ),
    "no scaler for fp16": (
        "t4",
        attribute(precision.PrecisionPlan, "scaler", property(lambda plan: False)),
        "this scaler is off",
    ),
    "autocast without the plan's dtype": ("a100", _FORGETFUL, "computes in another dtype"),
    "autocast that is never off": ("m2-macos15", _FORGETFUL, "computes in another dtype"),
    "a non_blocking copy to MPS": (
        "m2-macos15",
        attribute(context, "to_device", _to_without_waiting),
        "an unsafe copy",
    ),
    "pinned memory for MPS": ("m2-macos15", row("mps", pins_memory=True), "pin_memory"),
    "a cache call that raises": (
        "m2-macos14",
        attribute(context, "clear_cache", _clear_cache_that_raises),
        "INTERNAL ASSERT",
    ),
    "a cache cleared without need": (
        "a100",
        attribute(memory, "_pressure", lambda stats: 1.0),
        "cleared without need",
    ),
    "another back end's cache": ("max1550", row("xpu", empty_cache="cuda.empty_cache"), "not cl"),
    "a notice printed twice": (
        "t4",
        attribute(context, "tell_once", lambda key, *told: notices.tell(*told)),
        "told too often",
    ),
    "a notice never printed": (
        "t4",
        attribute(context, "tell_once", lambda *told: None),
        "or not at all",
    ),
    "a nested autocast that leaks": (
        "h100",
        attribute(autocast.Autocast, "__exit__", _leaky_exit),
        "stays on",
    ),
    "torch's own autocast, entered twice": (
        "mi250",
        attribute(autocast, "Autocast", torch.autocast),
        "stays on",
    ),
    "a scaler that drops the state": (
        "v100",
        attribute(scaler.ScalerShim, "load_state_dict", lambda self, state: None),
        "the scale is lost",
    ),
    "unscaling in float64 on an Arc": ("arc-a770", _float64_anywhere, "fp64"),
    "MPS's out-of-memory error unknown": (
        "m2-macos15",
        attribute(memory, "is_oom_error", lambda error: isinstance(error, MemoryError)),
        "MPS backend out of memory",
    ),
    "parts of a batch that all weigh one": (
        "h100",
        lambda patch: patch.setitem(globals(), "split_on_oom", _without_weights),
        "wrong gradients",
    ),
    "the CPU preferred to the accelerator": (
        "h100",
        attribute(backends, "present", lambda: (backends.CPU, backends.CUDA)),
        "the accelerator is not used",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key, put_in, told = FAULTS[fault]
    if key not in PLAYED:
        pytest.skip(f"torch {torch.__version__} has no autocast for the device of {key}")
    put_in(monkeypatch)
    dtypes = {kind: torch.get_autocast_dtype(kind) for kind in KINDS}
    try:
        with pytest.raises(Exception) as caught:
            examine(key)
    finally:  # some faults leave autocast on
        autocast.entered.regions.clear()
        for kind, dtype in dtypes.items():
            torch.set_autocast_enabled(kind, False)
            torch.set_autocast_dtype(kind, dtype)
        for _ in range(torch.autocast_increment_nesting()):
            torch.autocast_decrement_nesting()
    assert told in "".join(traceback.format_exception(caught.value))


def test_there_are_enough_faults() -> None:
    assert len(FAULTS) >= 10
