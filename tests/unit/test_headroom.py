"""`DeviceContext.headroom`: what a T4 would do in fp16, told from fp32, and compared with one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from portable_amp import DeviceContext
from portable_amp.numerics import watch
from portable_amp.numerics.headroom import LARGEST, Gauge
from portable_amp.testing import play

CPU = DeviceContext("cpu", precision="fp32")
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
SERIES = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Does(nn.Module):
    """A layer, and functional code on positive numbers."""

    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.compute = nn.Linear(8, 8), compute
        self.made = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.made = self.compute(self.inner(x).abs() + 0.1)
        return self.made


def ones(x: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.ones(shape, device=x.device)


def zeros(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(4, dtype=torch.long, device=x.device)


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{
        name: getattr(F, name)
        for name in ("relu", "gelu", "silu", "softplus", "elu", "leaky_relu", "hardswish", "mish",
                     "logsigmoid", "relu6", "glu", "normalize")
    },
    **{
        name: getattr(torch, name)
        for name in ("exp", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "tanh", "sigmoid",
                     "sum", "mean", "prod", "var", "amax", "triu", "square")
    },
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "cumsum": lambda x: x.cumsum(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "batch_norm": lambda x: F.batch_norm(x, ones(x, 8), ones(x, 8), training=True),
    "instance_norm": lambda x: F.instance_norm(x[None]),
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "pow": lambda x: x**2,
    "norm": torch.linalg.vector_norm,
    "scaled": lambda x: x * 2.5,
    "with fp32": lambda x: x + ones(x, 8),
    "with a number in fp32": lambda x: x * ones(x),
    "cat": lambda x: torch.cat([x, ones(x, 4, 8)]),
    "stack": lambda x: torch.stack([x, x]),
    "mm": lambda x: x @ x.T,
    "mv": lambda x: x @ x[0],
    "bmm": lambda x: x[None] @ x.T[None],
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, -9.0),
    "in place": lambda x: x.clone().add_(ones(x, 8)),
    "attention": lambda x: F.scaled_dot_product_attention(*[x[None, None]] * 3),
    "dropout": lambda x: F.dropout(x, 0.5),
    "prelu": lambda x: F.prelu(x, ones(x, 1)),
    "conv": lambda x: F.conv1d(x[None], ones(x, 2, 4, 3)),
    "max_pool": lambda x: F.max_pool1d(x[None], 2),
    "interpolate": lambda x: F.interpolate(x[None, None], scale_factor=2, mode="bilinear"),
    "mse": lambda x: F.mse_loss(x, ones(x, 4, 8)),
    "smooth_l1": lambda x: F.smooth_l1_loss(x, ones(x, 4, 8)),
    "cross_entropy": lambda x: F.cross_entropy(x, zeros(x)),
    "bce": lambda x: F.binary_cross_entropy_with_logits(x, ones(x, 4, 8)),
    "topk": lambda x: x.topk(2).values,
    "index": lambda x: x[zeros(x)],
    "cdist": lambda x: torch.cdist(x, x),
    "zeros_like": lambda x: x + torch.zeros_like(x),
}  # fmt: skip


def test_what_is_fp16_there_is_what_a_live_t4_computes_in_fp16() -> None:
    wrong = []
    with play("t4", live=True):
        ctx = DeviceContext(precision="fp16")
        for name, function in FUNCTIONS.items():
            torch.manual_seed(0)
            model = Does(function)
            gauge = Gauge(model)
            with gauge.watch.watching():
                model(X)
            predicted = watch.memory_of(model.made) in gauge.half.memory
            there = ctx.to(model)
            with ctx.autocast():
                seen = there(ctx.to(X)).dtype is torch.float16
            if predicted is not seen:
                wrong.append(name)
    assert not wrong


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portable_amp.numerics.half.TO_FP32", {"exp"})
    with pytest.raises(AssertionError, match="softplus"):
        test_what_is_fp16_there_is_what_a_live_t4_computes_in_fp16()


class Attends(nn.Module):
    """Attention by hand."""

    def __init__(self, factor: float, mask: float = -math.inf) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.factor, self.mask = factor, mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = (self.q(x) * self.factor) @ (self.k(x) * self.factor).transpose(1, 2)
        hidden = torch.ones(5, 5, dtype=torch.bool, device=x.device).triu(1)
        mask = self.mask or torch.finfo(scores.dtype).min
        return scores.masked_fill(hidden, mask).softmax(-1) @ self.v(x)


def layers(*factors: float) -> nn.Module:
    made = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in factors))
    with torch.no_grad():
        for one, factor in zip(made, factors, strict=True):
            one.weight.copy_(torch.eye(8) * factor)
    return made


def summed(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = model(batch)
    return made.float().sum()


MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, str]] = {
    "small": (lambda: layers(1, 2, 3), X, ""),
    "output": (lambda: layers(1, 4e4, 1e-4), X, "1: mm"),
    "weight": (lambda: layers(1, 1e5), X * 1e-3, "1: what mm is given is"),
    "input": (lambda: layers(1e-4, 1), X * 1e5, "0: what mm is given is"),
    "scores": (lambda: Attends(1e3), SERIES, ": bmm"),
    "attention": (lambda: Attends(1.0), SERIES, ""),
    "attention, finfo.min": (lambda: Attends(1.0, 0.0), SERIES, ""),
    "inside, in fp32": (lambda: Does(lambda x: (x * 1e3) ** 2 / 1e6), X, ""),
    "inside, in fp16": (lambda: Does(lambda x: (x * 1e3) * (x * 1e3) / 1e6), X, ": mul"),
    "norm": (lambda: nn.Sequential(layers(1e3), nn.LayerNorm(8)), X, ""),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_tells_what_a_t4_would_do(name: str) -> None:
    make, batch, told = MODELS[name]
    torch.manual_seed(0)
    made = make()
    report = CPU.headroom(made, batch, loss=summed)
    over = [f"{one.module}: {one.operation}" for one in report.rows if one.headroom < 1]
    assert over[:1] == ([told] if told else [])
    assert report.ok is not told
    with play("t4", live=True):
        ctx = DeviceContext(precision="fp16")
        overflows = ctx.find_nonfinite(made, batch, loss=summed)
        assert overflows.ok is report.ok, str(overflows)
        assert ctx.headroom(made, batch, loss=summed).ok is report.ok


@pytest.mark.parametrize("factor", [1e-3, 1.0, 20.0])
def test_the_largest_scale_keeps_a_t4_finite_and_four_times_that_does_not(factor: float) -> None:
    made = layers(factor, factor, factor)
    report = CPU.headroom(made, X, loss=summed)
    assert report.scales is not None
    low, high = report.scales
    assert 1 <= low <= high
    with play("t4", live=True):
        ctx = DeviceContext(precision="fp16")
        assert ctx.find_nonfinite(made, X, loss=summed, scale=high).ok
        assert not ctx.find_nonfinite(made, X, loss=summed, scale=4 * high).ok


def test_the_shares_of_gradients_that_vanish_and_lose_bits() -> None:
    torch.manual_seed(0)
    made = nn.Linear(8, 64, bias=False)
    powers = 2.0 ** torch.arange(-40, 24)
    batch = torch.ones(4, 8)

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = model(batch)
        return (made * powers * 2.0**-24).sum()

    scaled = (
        2.0**10 * 2.0**-24 * powers
    )  # the gradient of each output, and a fourth of the weight's
    report = CPU.headroom(made, batch, loss=loss, scale=2.0**10)
    room = next(row for row in report.rows if row.module == "")
    kept = (4 * scaled).half()
    assert room.underflow == pytest.approx(float((kept == 0).float().mean()), abs=0.02)
    normal = torch.finfo(torch.float16).smallest_normal
    assert room.lossy == pytest.approx(float(((kept > 0) & (kept < normal)).float().mean()))
    assert room.gradient == 4 * float(scaled.max())
    assert report.underflow > 0.1
    more = CPU.headroom(made, batch, loss=loss, scale=2.0**20)
    assert more.underflow < report.underflow
    assert "gradients up to" in str(report)
    assert "vanish" in str(report)


def test_headroom_is_a_factor_and_a_power_of_two() -> None:
    report = CPU.headroom(layers(1.0), torch.full((1, 8), LARGEST / 8))
    (row,) = (row for row in report.rows if row.module == "0")
    assert (row.type, row.largest, row.headroom, row.powers) == ("Linear", LARGEST / 8, 8.0, 3.0)
    assert str(row).startswith("0 (Linear): mm up to 8.19e+03, room for 2^3;")
    idle = CPU.headroom(nn.LayerNorm(8, elementwise_affine=False), X)
    assert idle.ok
    assert idle.scales is None
    assert all(math.isinf(row.headroom) for row in idle.rows)


def test_what_it_says() -> None:
    good = str(CPU.headroom(layers(1, 2), X, loss=summed))
    assert good.startswith("In fp16 this model stays in range.\n- 1 (Linear): mm up to ")
    assert "\nAt loss scale 65536 0.0% of the gradients vanish, 0.0% lose bits" in good
    bad = str(CPU.headroom(layers(1e5, 1), X, loss=summed))
    assert bad.startswith("In fp16 this model overflows in 2 modules.\n- 1 (Linear): ")
    assert "which overflows" in bad
    steep = str(CPU.headroom(layers(1, 9), X, loss=summed, scale=2.0**15))
    assert "which overflow" in steep
    assert "overflow. Best: " in steep
    assert "What autocast computes in fp32 goes up to" in str(
        CPU.headroom(MODELS["inside, in fp32"][0](), X, loss=summed)
    )
    assert max(len(said.splitlines()) for said in (good, bad, steep)) <= 10


def test_faint_gradients_are_no_success() -> None:
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = model(batch)
        return (made * torch.tensor([1e14, 1, 1, 1, 1, 1, 1, 1]) * 1e-6).sum()

    report = CPU.headroom(layers(1.0), X, loss=loss)
    assert report.lost > 0.5
    assert not report.ok
    assert str(report).startswith("In fp16 ")


def test_everything_stays_as_it_was() -> None:
    made = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    made(X).sum().backward()
    gradients = [one.grad for one in made.parameters()]
    state, drawn, batch = copy.deepcopy(made.state_dict()), torch.get_rng_state(), X.clone()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert CPU.headroom(made, batch).ok
    assert all(torch.equal(state[name], one) for name, one in made.state_dict().items())
    assert all(one.grad is grad for one, grad in zip(made.parameters(), gradients, strict=True))
    assert torch.equal(drawn, torch.get_rng_state())
    assert torch.equal(batch, X)


@pytest.mark.parametrize("scale", [0, -1.0, math.inf, math.nan])
def test_a_scale_that_is_none(scale: Any) -> None:
    with pytest.raises(ValueError, match="a loss scale above 0 works here"):
        CPU.headroom(layers(1), X, scale=scale)
