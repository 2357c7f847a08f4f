"""What only a CUDA (or ROCm) device can show; on a played card these tests are tried out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from portable_amp import (
    DeviceContext,
    ScalerShim,
    is_oom_error,
    load_checkpoint,
    save_checkpoint,
    split_on_oom,
)
from portable_amp.numerics.compare import compare
from portable_amp.numerics.tracefile import read
from portable_amp.testing import play
from portable_amp.testing.play import is_playing


@pytest.fixture(params=["real", "played"], autouse=True)
def card(request: pytest.FixtureRequest) -> Iterator[None]:
    """A card of this machine, and one that is not there."""
    if request.param == "played":
        with play("h100", live=True, memory=2**29):
            yield
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch.cuda.is_available() is False")
    yield


def test_the_allocators_own_error_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, device="cuda")
    assert is_oom_error(caught.value)


def test_a_batch_that_does_not_fit_is_split_for_real() -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    weight = torch.ones(1, device="cuda", requires_grad=True)
    x = torch.ones(16, 1, device="cuda")
    columns = free // 4 // 16 * 2  # twice what the device has left, for the whole batch

    def step(part: torch.Tensor, share: float) -> None:
        ((part * weight).expand(-1, columns).clone().mean() * share).backward()

    parts = split_on_oom(step, x, parameters=[weight])
    assert len(parts) > 1
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.item(), 1.0)


def test_clearing_gives_memory_back() -> None:
    ctx = DeviceContext("cuda", precision="fp32")
    held = torch.empty(2**26, device=ctx.device)
    del held
    freed = ctx.clear_cache()
    assert freed is not None
    assert freed >= 2**28


def train(scaler: torch.amp.GradScaler, factors: list[float], fused: bool) -> list[object]:
    torch.manual_seed(0)
    weight = torch.randn(8, 8, device="cuda", requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    seen: list[object] = []
    for factor in factors:
        scaler.scale((weight * weight).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.append((weight.detach().cpu().numpy().tobytes(), scaler.get_scale()))
    return seen


@pytest.mark.parametrize("fused", [False, True])
def test_the_shim_is_torchs_scaler_bit_for_bit(fused: bool) -> None:
    factors = [1.0, float("inf"), 3e-5, float("nan"), 1.0, 1.0]
    expected = train(torch.amp.GradScaler("cuda"), factors, fused)
    assert train(ScalerShim("cuda", enabled=True), factors, fused) == expected


def test_scaler_state_goes_over_the_cpu_and_back(tmp_path: Path) -> None:
    gpu = ScalerShim("cuda", enabled=True)
    train(gpu, [float("inf"), 1.0], fused=False)
    save_checkpoint(tmp_path / "c.pt", {"scaler": gpu.state_dict()})
    cpu = ScalerShim("cpu")
    cpu.load_state_dict(load_checkpoint(tmp_path / "c.pt")["scaler"])
    save_checkpoint(tmp_path / "c.pt", {"scaler": cpu.state_dict()})
    back = ScalerShim("cuda", enabled=True)
    back.load_state_dict(load_checkpoint(tmp_path / "c.pt")["scaler"])
    assert back.get_scale() == 32768.0


def test_a_module_that_overflows_is_named_forward_and_backward() -> None:
    ctx = DeviceContext(precision="fp16")
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(3)))
    for layer in model.children():
        torch.nn.init.constant_(layer.weight, 10.0)
    model, batch = ctx.to(model), ctx.to(torch.ones(4, 8))
    report = ctx.find_nonfinite(model, batch, loss=lambda model, x: model(x).float().mean())
    assert (report.module, report.reaches) == ("2", "the loss")
    report = ctx.find_nonfinite(
        model, 1e-3 * batch, loss=lambda model, x: model(x).float().mean(), scale=2.0**16
    )
    assert (report.module, report.reaches) == ("2", "a gradient")
    assert not ctx.headroom(model, batch).ok


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, stride=2), torch.nn.GELU(), torch.nn.Flatten(),
        torch.nn.Linear(32 * 49, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 10),
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("training", [True, False])
def test_this_card_computes_right(precision: str, training: bool) -> None:
    ctx = DeviceContext("cuda", precision=precision, fp32="ieee")
    batch = torch.randn(8, 3, 16, 16)
    report = ctx.verify(network().train(training), batch, sizes=(1 + training, 33))
    assert report.ok, str(report)


def test_tf32_is_told_from_fp32_where_the_card_has_it() -> None:
    if is_playing():
        pytest.skip("needs a real card: a played one multiplies as the CPU does")
    ctx = DeviceContext("cuda", precision="fp32", fp32="tf32")
    if ctx.capabilities.tf32 is not True:
        pytest.skip(f"{ctx.capabilities.name} has no TF32")
    model, batch = network(), torch.randn(8, 3, 16, 16)
    report = ctx.verify(model, batch)
    assert report.ok, str(report)
    assert {one.module for one in report.limits if one.kind == "tf32"} >= {"3", "6"}, str(report)
    torch.set_float32_matmul_precision("high")
    try:
        report = DeviceContext("cuda", precision="fp32").verify(model, batch)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert {one.kind for one in report.faults} == {"tf32"}, str(report)


def test_a_trace_of_this_card_agrees_with_that_of_the_cpu(tmp_path: Path) -> None:
    batch, targets = torch.randn(8, 3, 16, 16), torch.arange(8)
    for device in ("cpu", "cuda"):
        ctx = DeviceContext(device, precision="fp32", fp32="ieee")
        model = ctx.to(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = ctx.scaler()
        x, y = ctx.to((batch, targets))
        with ctx.trace(model, tmp_path / f"{device}.trace"):
            for _ in range(3):
                with ctx.autocast():
                    loss = torch.nn.functional.cross_entropy(model(x), y)
                scaler.backward_step(loss, optimizer)
    verdict = compare(*(read(str(tmp_path / f"{one}.trace")) for one in ("cpu", "cuda")))
    assert verdict.same, str(verdict)
    assert verdict.steps == 3
