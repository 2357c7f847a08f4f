"""Two runs of one loop: healthy pairs agree, and each planted fault is named where it is."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planted import backward
from portable_amp import DeviceContext
from portable_amp.numerics import tracefile
from portable_amp.numerics.compare import Verdict, compare
from portable_amp.numerics.trace import Trace
from portable_amp.testing import play

Change = Callable[[Any], Any]


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.act, self.down = nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)
        self.causal, self.axis, self.scale = True, -1, 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / (d // 2) ** 0.5
        if self.causal:
            scores = scores + torch.full_like(scores[0, 0], -1e4).triu(1)
        y = (scores.softmax(self.axis) @ v).transpose(1, 2).reshape(b, t, d)
        x = x + self.proj(y) * self.scale
        return x + self.down(self.act(self.up(self.n2(x))))


class Transformer(nn.Module):
    def __init__(self, tied: bool = False, d: int = 32) -> None:
        super().__init__()
        self.emb, self.pos = nn.Embedding(50, d), nn.Parameter(torch.randn(16, d) * 0.02)
        self.blocks = nn.Sequential(Block(d), Block(d))
        self.drop, self.norm, self.head = nn.Dropout(0.0), nn.LayerNorm(d), nn.Linear(d, 50)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.blocks(self.emb(i) + self.pos[: i.shape[1]]))
        return self.head(self.norm(x)).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lstm = nn.Embedding(50, 24), nn.LSTM(24, 32, 2, batch_first=True)
        self.fc = nn.Linear(32, 7)

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        return self.fc(self.lstm(self.emb(i))[0][:, -1])


class Residual(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)
        self.c2, self.b2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.b2(self.c2(self.act(self.b1(self.c1(x))))) + x)


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.LayerNorm(64),
        nn.Linear(64, 7),
    )  # fmt: skip


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), Residual(16),
        Residual(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 7),
    )  # fmt: skip


def images(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 3, 24, 24), torch.randint(0, 7, (n,))


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 50, (4, 16)), torch.randint(0, 50, (4, 16))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "mlp": (perceptron, lambda: (torch.randn(16, 20), torch.randint(0, 7, (16,)))),
    "conv": (convolutional, images),
    "lstm": (Recurrent, lambda: (torch.randint(0, 50, (8, 12)), torch.randint(0, 7, (8,)))),
    "transformer": (Transformer, texts),
    "tied": (functools.partial(Transformer, tied=True), texts),
}


def record(
    path: Path,
    name: str,
    *,
    seed: int = 0,
    steps: int = 3,
    lr: float = 0.05,
    adam: bool = False,
    change: Change = lambda model: None,
    batches: Change = lambda batches: batches,
    loss: Callable[..., torch.Tensor] = F.cross_entropy,
    layout: torch.memory_format = torch.contiguous_format,
    ctx: DeviceContext | None = None,
    region: Callable[[], Any] | None = None,
    during: Callable[[nn.Module, int], None] = lambda model, step: None,
    limit: int | None = None,
) -> tracefile.Trace:
    """Train, and read what was recorded."""
    given = {key: value for key, value in locals().items() if key not in ("path", "name")}
    train(Trace, path, name, **given)
    return tracefile.read(path)


def train(trace: Any, path: Path, name: str, **kw: Any) -> nn.Module:
    ctx = kw["ctx"] or DeviceContext("cpu", precision="fp32")
    torch.manual_seed(kw["seed"])
    make, batch = MODELS[name]
    model = make()
    given = kw["batches"]([batch() for _ in range(kw["steps"])])
    kw["change"](model)
    model = ctx.to(model).to(memory_format=kw["layout"])
    kind: Any = torch.optim.AdamW if kw["adam"] else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=kw["lr"])
    scaler = ctx.scaler()
    with trace(model, path, steps=kw["limit"]) if trace else contextlib.nullcontext():
        for step, one in enumerate(given):
            x, y = ctx.to(one)
            if x.dim() == 4:
                x = x.contiguous(memory_format=kw["layout"])
            kw["during"](model, step)
            with (kw["region"] or ctx.autocast)():
                loss = kw["loss"](model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return model


@pytest.fixture
def against(tmp_path: Path) -> Callable[..., Verdict]:
    """The verdict on a model, and the same with something changed."""

    def verdict(name: str, *, both: dict[str, Any] | None = None, **other: Any) -> Verdict:
        given = both or {}
        one = record(tmp_path / "a.trace", name, **given)
        return compare(one, record(tmp_path / "b.trace", name, **{**given, **other}))

    return verdict


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_healthy_runs_agree(name: str, adam: bool, against: Callable[..., Verdict]) -> None:
    both = {"adam": adam, "lr": 1e-3 if adam else 0.05, "steps": 3}
    for other in (
        {"layout": torch.channels_last},
        *(
            [{"region": functools.partial(torch.autocast, "cpu", torch.bfloat16)}]
            if name != "lstm"
            else []
        ),
    ):
        found = against(name, both=both, **other)
        assert found.same, str(found)
        assert found.steps == 3


def test_another_number_of_threads_agrees(against: Callable[..., Verdict]) -> None:
    threads = torch.get_num_threads()

    def other(model: nn.Module) -> None:
        torch.set_num_threads(3 - min(threads, 2))

    try:
        found = against("conv", change=other)
    finally:
        torch.set_num_threads(threads)
    assert found.same, str(found)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "lstm"])
def test_a_played_t4_agrees(name: str, tmp_path: Path) -> None:
    one = record(tmp_path / "a", name)
    with play("t4", live=True):
        other = record(tmp_path / "b", name, ctx=DeviceContext())
    found = compare(one, other)
    assert other.steps[0].scale == 65536
    assert found.same, str(found)


class Around(nn.Module):
    """Another module, off in some way."""

    def __init__(self, module: nn.Module, off: Change) -> None:
        super().__init__()
        self.forward_of, self.off = [module], off

    def forward(self, *args: Any) -> Any:
        return self.off(self.forward_of[0](*args))


def patched(name: str, off: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Change:
    """A module of the model computes something else; its name and type stay."""

    def change(model: nn.Module) -> None:
        module = model.get_submodule(name)
        module.forward = off(module.forward)  # type: ignore[method-assign]

    return change


def output(off: Change, name: str) -> Change:
    return patched(name, lambda forward: lambda *args: off(forward(*args)))


def gradient_of_input(name: str, factor: float) -> Change:
    return patched(name, lambda forward: lambda x: forward(backward(x, lambda g: g * factor)))


def set_on(name: str, **values: Any) -> Change:
    return lambda model: vars(model.get_submodule(name)).update(values)


def weight_gradient(name: str, factor: float) -> Change:
    return lambda model: model.get_parameter(name).register_hook(lambda g: g * factor)


def swapped(model: Any) -> None:
    block = model.blocks[1]
    forward = block.qkv.forward
    block.qkv.forward = lambda x: forward(x).roll(x.shape[-1], -1)


FAULTS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "forward scale": ("mlp", {"change": output(lambda y: y * 1.005, "3")}, "forward", "3"),
    "forward scale 0.1 %": (
        "conv",
        {"change": output(lambda y: y * 1.001, "4.b1")},
        "forward",
        "4.b1",
    ),
    "offset": ("conv", {"change": output(lambda y: y + 0.01, "3.c2")}, "forward", "3.c2"),
    "of one part": (
        "transformer",
        {"change": output(lambda y: torch.cat([y[:1] * 1.02, y[1:]]), "blocks.0.act")},
        "forward",
        "blocks.0.act",
    ),
    "backward scale": ("mlp", {"change": gradient_of_input("2", 1.05)}, "backward", "2"),
    "batch norm's gradient": (
        "conv",
        {"change": gradient_of_input("3.b2", 1.02)},
        "backward",
        "3.b2",
    ),
    "a weight's gradient": (
        "transformer",
        {"change": weight_gradient("blocks.1.up.weight", 1.05)},
        "backward",
        "blocks.1.up",
    ),
    "swapped operands": ("transformer", {"change": swapped}, "forward", "blocks.1.qkv"),
    "wrong axis": ("transformer", {"change": set_on("blocks.0", axis=-2)}, "forward", "blocks.0"),
    "no mask": ("tied", {"change": set_on("blocks.1", causal=False)}, "forward", "blocks.1"),
    "own forward of a parent": (
        "tied",
        {"change": set_on("blocks.1", scale=1.01)},
        "forward",
        "blocks.1",
    ),
    "dropped epsilon": (
        "tied",
        {"change": set_on("blocks.0.n1", eps=0.1)},
        "forward",
        "blocks.0.n1",
    ),
    "not a number": (
        "conv",
        {"change": output(lambda y: torch.where(y == y.amax(), torch.nan, y), "3.b1")},
        "forward",
        "3.b1",
    ),
    "a gradient that is infinite": (
        "lstm",
        {"change": gradient_of_input("fc", float("inf"))},
        "backward",
        "fc",
    ),
    "wrong loss": (
        "lstm",
        {"loss": functools.partial(F.cross_entropy, label_smoothing=0.1)},
        "loss",
        "",
    ),
    "the loss's gradient": (
        "mlp",
        {"loss": lambda z, y: backward(F.cross_entropy(z, y), lambda g: g * 1.1)},
        "backward",
        "",
    ),
    "other batch": (
        "conv",
        {"batches": lambda b: [*b[:1], images(), *b[2:]]},
        "inputs",
        "",
    ),
    "other size of batch": ("conv", {"batches": lambda b: [images(4)]}, "inputs", ""),
    "other weights": (
        "conv",
        {"change": lambda m: nn.init.ones_(m[3].b1.bias)},
        "weights",
        "3.b1.bias",
    ),
    "other learning rate": ("mlp", {"lr": 0.06}, "rates", ""),
    "other optimizer": ("mlp", {"adam": True}, "update", ""),
    "dropout": ("tied", {"change": set_on("drop", p=0.1)}, "random", "drop"),
    "stale running variance": (
        "conv",
        {"during": lambda model, step: vars(model[1]).update(momentum=0.0)},
        "buffer",
        "1.running_mean",
    ),
    "at a later step": (
        "mlp",
        {
            "during": lambda model, step: (
                output(lambda y: y * 1.5, "3")(model) if step == 2 else None
            )
        },
        "forward",
        "3",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str, against: Callable[..., Verdict]) -> None:
    name, other, kind, module = FAULTS[fault]
    found = against(name, **other)
    assert (found.kind, found.module) == (kind, module), str(found)
    assert found.rows or "shapes" in found.text or kind == "rates"
    assert found.step == {"other batch": 2, "other weights": 0, "at a later step": 3}.get(fault, 1)
