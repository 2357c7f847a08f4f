"""`DeviceContext.verify`: what computes right is not accused, and what does not is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from portable_amp import DeviceContext
from portable_amp.backends import torch_version
from portable_amp.numerics.report import Report
from portable_amp.testing import play

FP32 = DeviceContext("cpu", precision="fp32")


class Block(nn.Module):
    """Attention and a gated layer, as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16, bias=False)
        self.gate = nn.Linear(16, 32)

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None = None) -> Any:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        a, b = self.gate(x).chunk(2, -1)
        return {"x": x + a * torch.sigmoid(b), "rest": (None, 3)}


class Language(nn.Module):
    """Calls one block twice, by keyword; what it returns is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList([Block()])
        self.unused = nn.Linear(2, 2)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.embedding(words)
        mask = torch.ones(words.shape[1], words.shape[1], dtype=torch.bool).tril().to(words.device)
        for _ in range(2):
            x = self.blocks[0](x, mask=mask)["x"]
        return x @ self.embedding.weight.T


class Residual(nn.Module):
    """Convolutions with an addition in between, and a scale that begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.gamma = nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gamma * self.act(self.norm(self.conv(x)))


def images() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), Residual(), Residual(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(36, 5), nn.LogSoftmax(-1),
    )  # fmt: skip


IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WORDS = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(0))
SERIES = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "images": (images, IMAGES),
    "language": (Language, WORDS),
    "lstm": (lambda: nn.LSTM(16, 8, 2, batch_first=True, bidirectional=True), SERIES),
    "gru": (lambda: nn.GRU(16, 8, batch_first=True), SERIES),
    "transformer": (lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), SERIES),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", MODELS)
def test_what_computes_right_is_not_accused(name: str, training: bool, precision: Any) -> None:
    make, batch = MODELS[name]
    if name == "lstm" and precision == "bf16" and torch_version() < (2, 5):
        pytest.skip("torch 2.4 cannot compute an LSTM in bf16 on this CPU, which plays the machine")
    for seed in range(3):
        torch.manual_seed(seed)
        model = make().train(training)
        with play("h100", live=True):
            report = DeviceContext(precision=precision).verify(model, batch)
        assert report.ok, str(report)
        assert report.modules >= len([*model.children()])
        assert 0 < report.worst < 1


def test_the_model_its_gradients_and_random_states_stay() -> None:
    torch.manual_seed(0)
    model = images().train()
    model(IMAGES).sum().backward()
    before = copy.deepcopy(model)
    gradients = [one.grad.clone() for one in model.parameters() if one.grad is not None]
    batch, drawn = IMAGES.clone(), torch.get_rng_state()
    assert FP32.verify(model, batch).ok
    assert torch.equal(drawn, torch.get_rng_state())
    assert torch.equal(batch, IMAGES)
    for one, other in zip(model.modules(), before.modules(), strict=True):
        assert one.training == other.training
        assert getattr(one, "inplace", None) == getattr(other, "inplace", None)
    for one, gradient in zip(model.parameters(), gradients, strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, gradient)
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(model.buffers(), before.buffers(), strict=True):
        assert torch.equal(one, other)


class Faulty(nn.Module):
    """Right in float64, where the reference is; else off."""

    def __init__(self, inner: nn.Module, fault: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.fault = inner, fault

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        return y if x.dtype is torch.float64 else self.fault(y)


class Backward(torch.autograd.Function):
    """Right forward; backward another gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, change: Callable[..., Any]) -> torch.Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return ctx.change(gradients[0]), None


def backward(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda y: Backward.apply(y, change)  # type: ignore[no-untyped-call]


def truncated(y: torch.Tensor) -> torch.Tensor:
    """With the 10 bits of mantissa that TF32 has."""
    return (y.detach().view(torch.int32) & -8192).view(torch.float32) + 0 * y


def first_is_lost(y: torch.Tensor) -> torch.Tensor:
    return y * (torch.arange(y.numel()) > 0).view(y.shape)


def not_finite(y: torch.Tensor) -> torch.Tensor:
    return y.masked_fill((torch.arange(y.numel()) == 5).view(y.shape), float("nan"))


FAULTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a scale": lambda y: y * 1.001,
    "an offset": lambda y: y + 0.001,
    "a wrong axis": lambda y: y.transpose(0, -1).reshape(y.shape),
    "a sign": lambda y: -y,
    "rolled": lambda y: y.roll(1, 0),
    "one element": first_is_lost,
    "not finite": not_finite,
    "fewer digits": truncated,
    "bf16 inside": lambda y: y.bfloat16().float(),
    "clipped": lambda y: y.clamp(max=0.9 * float(y.detach().max())),
    "nothing": lambda y: y * 0,
    "a scaled gradient": backward(lambda g: g * 1.001),
    "a gradient that is lost": backward(lambda g: g * 0),
    "a gradient's last rows": backward(lambda g: torch.cat([g[:-1], 0 * g[-1:]])),
    "a rolled gradient": backward(lambda g: g.roll(1, 0)),
    "a gradient that is not finite": backward(not_finite),
    "a gradient with fewer digits": backward(lambda g: g.bfloat16().float()),
}


@pytest.mark.parametrize("place", ["0", "4.conv", "4.norm", "4", "8"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_where_it_is(fault: str, place: str) -> None:
    torch.manual_seed(0)
    model = images().eval()
    nn.init.normal_(model[4].gamma)  # type: ignore[arg-type]
    parent, _, name = place.rpartition(".")
    holder = model.get_submodule(parent)
    setattr(holder, name, Faulty(getattr(holder, name), FAULTS[fault]))
    report = FP32.verify(model, IMAGES)
    assert {one.module for one in report.faults} == {place}, str(report)
    assert {one.kind for one in report.faults} == {"wrong"}
    assert {one.type for one in report.faults} == {"Faulty"}
    assert ("gradient" in fault) == all("gradient" in one.what for one in report.faults)
    first, *rest = str(report).splitlines()
    assert first.startswith("cpu does NOT compute this model right in fp32: 1 modules are off, of")
    assert rest[0].startswith(f"- {place} (Faulty): {report.faults[0].what} is ")


def test_a_second_call_that_differs_is_found() -> None:
    calls: list[int] = []

    def second(y: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return y * (1.01 if len(calls) > 2 else 1)  # the first is to see the dtypes

    model = nn.Sequential(Faulty(nn.Linear(16, 4), second))
    assert FP32.verify(model, SERIES, repeats=1).ok
    made = []
    for options in ({}, {"repeats": 2}):
        calls.clear()
        assert {one.module for one in FP32.verify(model, SERIES, **options).faults} == {"0"}
        made.append(len(calls))
    assert made[0] == made[1]


def test_a_compiled_model_is_compared_as_it_was() -> None:
    def never(graph: Any, inputs: Any) -> Any:
        raise AssertionError("compiled")

    model = nn.Sequential(Faulty(nn.Linear(16, 4), lambda y: y * 1.01))
    wrapped: Any = torch.compile(model, backend=never)
    assert {one.module for one in FP32.verify(wrapped, SERIES).faults} == {"0"}


def test_a_statistic_that_is_not_written_is_found() -> None:
    class Stale(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dtype is not torch.float64:
                return F.batch_norm(x, None, None, self.weight, self.bias, training=True)
            return super().forward(x)

    report = FP32.verify(nn.Sequential(nn.Conv2d(3, 4, 3), Stale(4)), IMAGES)
    assert {one.what for one in report.faults} == {
        "buffer running_mean", "buffer running_var", "buffer num_batches_tracked",
    }  # fmt: skip


def report_of(model: nn.Module, batch: Any = SERIES, **options: Any) -> Report:
    return FP32.verify(model, batch, **options)


def test_what_draws_at_random_and_what_is_never_called_is_told() -> None:
    report = report_of(nn.Sequential(nn.Dropout(), nn.Linear(16, 2)))
    assert report.notes == ("0 draws at random: compared in eval mode",)
    assert report_of(Language(), WORDS).notes == ("never called: unused",)


def test_another_path_and_an_error_on_the_device_are_faults() -> None:
    class Otherwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(16, 2), nn.Linear(16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x) if x.dtype is torch.float64 else self.two(x)  # type: ignore[no-any-return]

    (fault,) = report_of(Otherwise()).faults
    assert (fault.module, fault.kind) == ("", "path")
    assert fault.what == "does not call one"

    def fails(y: torch.Tensor) -> None:
        if calls:
            raise NotImplementedError("no kernel")
        calls.append(1)

    calls: list[int] = []
    report = report_of(nn.Sequential(Faulty(nn.Linear(16, 2), lambda y: fails(y) or y)))
    assert [(one.module, one.kind) for one in report.faults] == [("0", "fails")]
    assert "NotImplementedError: no kernel" in str(report)


def test_what_a_dtype_cannot_hold_is_told_as_that() -> None:
    class Large(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ x.transpose(-1, -2)

    with play("t4", live=True):
        report = DeviceContext(precision="fp16").verify(nn.Sequential(Large()), 300 * SERIES)
        assert {one.kind for one in report.faults} == {"overflow"}, str(report)
        assert DeviceContext(precision="fp32").verify(nn.Sequential(Large()), 300 * SERIES).ok
