"""`DeviceContext.verify`: what computes right is not accused, and what does not is named."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import planted
from portable_amp import DeviceContext
from portable_amp.backends import torch_version
from portable_amp.copies import mean_square
from portable_amp.numerics import progress
from portable_amp.numerics.judge import Distance, distances, worst
from portable_amp.numerics.progress import Progress
from portable_amp.numerics.replay import Place, Ran
from portable_amp.numerics.report import ADVICE, Fault, Report
from portable_amp.numerics.rounding import Rounding, Wide
from portable_amp.numerics.verify import resized, verify
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


def there(x: torch.Tensor) -> bool:
    """Not in the reference."""
    return x.dtype not in (torch.float64, torch.complex128)


class Faulty(nn.Module):
    """Right in float64, where the reference is; else off."""

    def __init__(self, inner: nn.Module, fault: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.fault = inner, fault

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        return self.fault(y) if there(x) else y


def backward(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda y: planted.backward(y, change)


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


@pytest.mark.parametrize("place", ["4.norm", "4"])
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
    assert first.startswith("cpu does NOT compute this model right in fp32: 1 module is off, of")
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
    assert report_of(nn.BatchNorm2d(3), IMAGES).ok


def report_of(model: nn.Module, batch: Any = SERIES, **options: Any) -> Report:
    return FP32.verify(model, batch, **options)


def test_what_draws_at_random_and_what_is_never_called_is_told() -> None:
    report = report_of(nn.Sequential(Drawing(), nn.Linear(16, 2)))
    assert report.notes == ("0 draws at random: compared in eval mode",)
    assert report.ok
    report = report_of(nn.Sequential(Drawing(wrong=True), nn.Linear(16, 2)))
    assert {one.module for one in report.faults} == {"0"}
    assert report_of(nn.Sequential(Drawing()).eval()).notes == ()
    assert report_of(Language(), WORDS).notes == ("never called: unused",)


class Drawing(nn.Module):
    """Draws other numbers than the reference in training, as each device does."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = torch.rand(x.shape, dtype=x.dtype) < 0.5 if self.training else 1
        return x * kept * (1.01 if self.wrong and there(x) else 1)


class Skipping(nn.Module):
    """Draws which layers it calls, and calls one in training alone."""

    def __init__(self, alike: bool, extra: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(8)])
        self.alike, self.extra = alike, nn.Linear(16, 16) if extra else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            drawn = torch.rand((), dtype=torch.float32 if self.alike else x.dtype)
            if not self.training or drawn < 0.5:
                x = layer(x)
        return self.extra(x) if self.extra and self.training else x


class Routing(nn.Module):
    """Calls the second of two layers, but the first where scores have fewer digits."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(16, 2)
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        nn.init.zeros_(self.scores.weight)
        self.scores.bias = nn.Parameter(torch.tensor([1.0, 1.001]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.scores(x)[0, 0]
        return self.layers[int(second > first)](x)  # type: ignore[no-any-return]


def test_what_takes_another_path_for_rounding_is_told_and_not_accused() -> None:
    told = "0 is not compared: rounding, or chance, changes which modules it calls"
    report = live("bf16", nn.Sequential(Routing(), nn.Linear(16, 4)))
    assert report.ok
    assert told in report.notes
    report = report_of(nn.Sequential(Routing(), nn.Linear(16, 4)))
    assert report.ok
    assert report.notes == ("never called: 0.layers.0",)


def test_what_draws_its_path_at_random_is_not_accused() -> None:
    for model, told in (
        (Skipping(alike=True), ""),  # the same on both, as the CPU draws it
        (Skipping(alike=False), "the model draws at random: compared in eval mode"),
        (
            Skipping(alike=False, extra=True),
            "the model draws at random: not compared, for it calls other modules in eval mode",
        ),
    ):
        report = report_of(model)
        assert report.ok, str(report)
        assert [one for one in report.notes if "never called" not in one] == [told] * bool(told)


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
        assert "keep this module in fp32" in str(report)
        assert DeviceContext(precision="fp32").verify(nn.Sequential(Large()), 300 * SERIES).ok


def doubles(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_three_measures_of_how_far_a_result_is_off() -> None:
    exact, got = doubles(3, -4), doubles(3, -3)
    (one,) = distances(Ran({"output": exact}), Ran({"output": got}))
    assert (one.what, one.count) == ("output", 2)
    assert one.error == pytest.approx(1 / 5)
    assert one.tilt == pytest.approx(4 / 25)
    assert one.peak == pytest.approx(1 / (4 + 5 / math.sqrt(2)))


# name -> exact, got, and what is told: the distance of each, in L2 norm.
TOLD: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, float]]] = {
    "missing": ({"output": doubles(1)}, {}, {"output": math.inf}),
    "another shape": (
        {"output": doubles(1)}, {"output": doubles(1, 1)}, {"output": math.inf},
    ),
    "not finite here": (
        {"output": doubles(1)}, {"output": doubles(math.nan)}, {"output": math.inf},
    ),
    "not finite anywhere, and what follows": (
        {"output": doubles(math.inf), "buffer b": doubles(1)},
        {"output": doubles(1), "buffer b": doubles(2)},
        {"buffer b": 1.0},
    ),
    "zeros": (
        {"output 0": doubles(0, 0), "output 1": doubles(0), "output 2": doubles()},
        {"output 0": doubles(0, 0), "output 1": doubles(1e-3), "output 2": doubles()},
        {"output 0": 0.0, "output 1": math.inf, "output 2": 0.0},
    ),
    "a gradient that is small beside others": (
        {"gradient of a": doubles(1e5), "gradient of b": doubles(1), "output": doubles(1)},
        {"gradient of a": doubles(1e5), "gradient of b": doubles(2), "output": doubles(2)},
        {"gradient of a": 0.0, "output": 1.0},
    ),
    "a gradient that is not": (
        {"gradient of a": doubles(10), "gradient of b": doubles(1)},
        {"gradient of a": doubles(10), "gradient of b": doubles(2)},
        {"gradient of a": 0.0, "gradient of b": 1.0},
    ),
    "small gradients alone": (
        {"gradient of a": doubles(1e-5)}, {"gradient of a": doubles(2e-5)}, {"gradient of a": 1.0},
    ),
    "no gradient but here": (
        {"gradient of a": doubles(0)}, {"gradient of a": doubles(1)}, {"gradient of a": math.inf},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_everything_that_was_computed_is_compared(name: str) -> None:
    exact, got, told = TOLD[name]
    found = {one.what: one for one in distances(Ran(exact), Ran(got))}
    assert {what: one.error for what, one in found.items()} == told
    for one in found.values():
        assert (worst(one, 0.1).beyond > 1) == (one.error > 0.1)


@pytest.mark.parametrize(
    ("off", "allowed"),
    [
        # Of the bound itself; all of it in one direction an eighth; one element 16 times.
        (lambda far: Distance("", 0.01 * far), ("off", 0.01)),
        (lambda far: Distance("", 0.0, 0.01 / 8 * far), ("too large or too small", 0.01 / 8)),
        (lambda far: Distance("", 0.0, 0.0, 0.16 * far), ("off in one element", 0.16)),
    ],
)
def test_what_each_measure_allows(off: Callable[[float], Distance], allowed: Any) -> None:
    assert worst(off(0.99), 0.01).beyond == pytest.approx(0.99)
    found = worst(off(1.01), 0.01)
    assert found.beyond == pytest.approx(1.01)
    assert (found.how, found.allowed) == (allowed[0], pytest.approx(allowed[1]))
    # Six times what rounding alone does, where that is more; and never less than without.
    noise = off(10.0)
    assert worst(off(59), 0.01, noise).beyond == pytest.approx(59 / 60)
    assert worst(off(61), 0.01, noise).beyond == pytest.approx(61 / 60)
    assert worst(off(0.99), 0.01, Distance("", 0.0)).beyond == pytest.approx(0.99)


def test_errors_in_all_directions_may_look_like_one_by_chance() -> None:
    """Five standard deviations of the mean of so many."""
    for count in (4, 100):
        chance = 5 * 0.01 / math.sqrt(count)
        for far in (0.99, 1.01):
            tilted = Distance("", 0.01, chance + far * 0.1 / 8, 0.0, count)
            assert worst(tilted, 0.1).beyond == pytest.approx(far)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_puts_each_result_off_by_up_to_epsilon(dtype: torch.dtype) -> None:
    x, written = torch.linspace(1, 2, 5000, dtype=torch.float64), doubles(0)
    with Rounding(dtype):
        y = torch.add(x, x, alpha=2)
    assert torch.equal(y.to(dtype).double(), y)
    off = (y / (3 * x) - 1) / torch.finfo(dtype).eps
    assert 0.8 < off.max() < 1.6  # where it is rounded, too
    assert -0.8 > off.min() > -1.6
    assert abs(off.mean()) < 0.05
    state = torch.get_rng_state()
    with Rounding(dtype):
        again = torch.add(x, x, alpha=2)
        # No result of an operation: a view, what is written into, and other dtypes.
        others = x.view(50, 100), torch.add(x[:1], 0.1, out=written), x.argmax(), x.float()
        sparse = x.to_sparse()
    assert torch.equal(again, y)
    assert torch.equal(torch.get_rng_state(), state)
    expected = x.view(50, 100), x[:1] + 0.1, x.argmax(), x.float()
    for one, exact in zip(others, expected, strict=True):
        assert torch.equal(one, exact)
    assert sparse.is_sparse


@pytest.mark.parametrize("kind", ADVICE)
def test_a_fault_says_where_it_is_and_how_far_off(kind: str) -> None:
    told = str(Fault("4.norm", "BatchNorm2d", kind, "output", "off", 0.02, 0.001))
    assert told.startswith("4.norm (BatchNorm2d): output is 2.0e-02 off, allowed are 1.0e-03: ")
    assert told.endswith(f": {ADVICE[kind]}.")
    told = str(Fault("", "Net", kind, "output", "off", math.inf, 0.001))
    no_number = kind in ("wrong", "overflow")
    assert told.startswith(f"the model itself (Net): output{' is not finite' * no_number}: ")


def test_a_report_has_a_verdict_a_line_for_each_fault_and_notes() -> None:
    right = Report("cpu", "bf16", (), 7, 0.25, ("never called: a",))
    assert right.ok
    first, note = str(right).splitlines()
    assert first.startswith("cpu computes this model right in bf16: 7 calls of modules")
    assert first.endswith("25% of its bound.")
    assert note == "- note: never called: a"
    fault = Fault("0", "Linear", "wrong", "output", "off", 1.0, 0.1)
    wrong = Report("cpu", "bf16", (fault, fault), 7, 0.25, ())
    assert not wrong.ok
    first, *rest = str(wrong).splitlines()
    assert first.endswith("in bf16: 1 module is off, of 7 calls of modules.")
    assert rest == [f"- {fault}"] * 2
    two = Report("cpu", "bf16", (fault, replace(fault, module="1")), 7, 0.25, ())
    assert str(two).splitlines()[0].endswith("in bf16: 2 modules are off, of 7 calls of modules.")
    short = replace(fault, kind="tf32")
    lines = str(Report("cpu", "fp32", (short, fault, short, short), 7, 0.25, ())).splitlines()
    more = "- 2 results more, of which the same is true"
    assert lines[1:] == [f"- {fault}", f"- {short}", more]


class Outer(nn.Module):
    """Makes something of what a linear layer returns."""

    def __init__(self, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.make = nn.Linear(16, 4), make

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.make(self.inner(x))


def live(precision: str, model: nn.Module, batch: Any = SERIES, **options: Any) -> Report:
    with play("h100", live=True):
        return DeviceContext(precision=precision).verify(model, batch, **options)


def test_what_is_inside_answers_in_the_dtype_that_it_returns_there() -> None:
    right = Outer(lambda y: y * 1.5 if y.dtype is torch.float32 else y)
    assert live("bf16", right).ok, "it never sees fp32"
    wrong = Outer(lambda y: y * 1.5 if y.dtype is torch.bfloat16 else y)
    assert {one.module for one in live("bf16", wrong).faults} == {""}


def test_what_is_given_by_keyword_has_the_dtype_that_it_has_there() -> None:
    class Kept(nn.Module):
        def forward(self, *, y: torch.Tensor) -> torch.Tensor:
            return y * 1.5 if y.dtype is torch.float32 else y

    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 4), Kept()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(y=self.first(x))

    assert live("bf16", Passing()).ok


def test_what_has_no_gradient_inside_has_one_behind_it() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 4)

        def forward(self, words: torch.Tensor) -> torch.Tensor:
            y = self.table(words)
            return backward(lambda g: g * 1.001)(y) if there(y) else y

    assert {one.what for one in report_of(Looking(), WORDS).faults} == {
        "gradient at output 0 of table, call 0"
    }


def test_errors_of_a_device_are_told_but_for_a_lack_of_memory() -> None:
    def fails(x: torch.Tensor, weight: torch.Tensor) -> None:
        if seen:
            raise RuntimeError(text)
        seen.append(x)

    for text in ("no kernel", "CUDA out of memory"):
        seen: list[torch.Tensor] = []
        model = Own(fails)
        if text == "no kernel":
            report = report_of(
                model, loss=lambda model, x: model(x) if there(x) else model(x).sum()
            )
            assert [(one.kind, one.module) for one in report.faults] == [("fails", "")]
            assert (report.worst, report.notes) == (0.0, ())
        else:
            with pytest.raises(RuntimeError, match="out of memory"):
                report_of(model, loss=lambda model, x: model(x) if there(x) else model(x).sum())


class Weighing(nn.Module):
    """Its first input has no gradient; that of the second has few zeros as its last digits."""

    def __init__(self) -> None:
        super().__init__()
        weights = torch.linspace(1, 2, 15)
        self.register_buffer("weights", torch.cat([weights, 1e-3 - weights.sum(0, keepdim=True)]))

    def forward(self, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x * self.weights * (mask.detach() < 9)


class Cancelling(nn.Module):
    """The gradient of its weight is a sum that nearly cancels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.ones(1, 1)), Weighing()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x[0, 0], (torch.ones_like(x[0, :1]).T @ self.weight)[:, 0])


def test_a_gradient_has_the_dtype_of_its_own_input() -> None:
    report = live("bf16", Cancelling(), loss=lambda model, batch: model(batch).sum())
    assert report.ok, str(report)


class Spectral(nn.Module):
    """Complex weights, inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = Faulty(Mixing(), lambda y: y)
        self.out = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.fft.irfft(self.mix(torch.fft.rfft(x))))


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 9, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_complex_numbers_are_compared_in_both_parts() -> None:
    model = Spectral()
    assert report_of(model).ok
    for fault in (lambda y: y.real + 1.001j * y.imag, lambda y: 1.001 * y.real + 1j * y.imag):
        model.mix.fault = fault
        assert {one.module for one in report_of(model).faults} == {"mix"}


class Counting(nn.Module):
    """Counts in a tensor that it is given."""

    def forward(self, x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        steps += 1
        return x * steps


def test_what_a_module_writes_into_its_inputs_is_not_there_in_the_next_replay() -> None:
    batch = SERIES, torch.tensor(1)
    report = report_of(Counting(), batch, loss=lambda model, given: model(*given).square().mean())
    assert report.ok
    assert report.notes == ()
    assert batch[1] == 1


class Many(nn.Module):
    """Takes its inputs by place and by keyword, and returns all kinds of things."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, *, y: torch.Tensor, at: torch.Tensor) -> Any:
        return {"a": self.linear(x) * y, "rest": (at, None, [3, x + y])}


class Calling(nn.Module):
    """Calls another module somehow, on the device perhaps in another way."""

    def __init__(self, otherwise: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.inner, self.other = Many(), Many()
        self.otherwise = otherwise or self.plainly

    @staticmethod
    def plainly(model: Calling, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        found = model.inner(x, y=x, at=at)
        return found["a"] + 2 * found["rest"][2][1] * (found["rest"][0] + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        call = self.otherwise if there(x) else self.plainly
        return call(self, x, torch.zeros(1, dtype=torch.int64, device=x.device))


def with_gradient(which: int) -> Callable[..., Any]:
    """One of the two outputs of the inner module gets another gradient."""

    def call(model: Calling, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        found = model.inner(x, y=x, at=at)
        outputs = [found["a"], found["rest"][2][1]]
        outputs[which] = backward(lambda g: g * 1.001)(outputs[which])
        return outputs[0] + 2 * outputs[1]

    return call


WAYS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "once more": (
        lambda model, x, at: model.plainly(model, x, at) + model.inner(x, y=x, at=at)["a"],
        "path", "calls inner where the reference does not",
    ),
    "another module": (
        lambda model, x, at: model.other(x, y=x, at=at)["a"], "path", "does not call inner",
    ),
    "by place": (
        lambda model, x, at: model.inner(x * 1.001, y=x, at=at)["a"],
        "wrong", "input 0 of inner, call 0",
    ),
    "by keyword": (
        lambda model, x, at: model.inner(x, y=x * 1.001, at=at)["a"],
        "wrong", "input 1 of inner, call 0",
    ),
    "no float": (
        lambda model, x, at: model.inner(x, y=x, at=at + 1)["a"],
        "wrong", "input 2 of inner, call 0",
    ),
    "another shape by place": (
        lambda model, x, at: model.inner(x[:1], y=x, at=at)["a"],
        "path", "gives inner other shapes than in the reference",
    ),
    "another shape by keyword": (
        lambda model, x, at: model.inner(x, y=x[:1], at=at)["a"],
        "path", "gives inner other shapes than in the reference",
    ),
    "a gradient": (with_gradient(0), "wrong", "gradient at output 0 of inner, call 0"),
    "the gradient behind it": (with_gradient(1), "wrong", "gradient at output 1 of inner, call 0"),
}  # fmt: skip


def test_what_is_called_alike_is_not_accused() -> None:
    for precision in ("fp32", "bf16"):
        report = live(precision, nn.Sequential(Calling()))
        assert report.ok, str(report)
        assert report.modules == 4  # both, the inner one, and that one's layer
        assert report.notes == ("never called: 0.other.linear",)


class Scaled(nn.Module):
    """Takes its factor by name."""

    def forward(self, x: torch.Tensor, *, factor: float) -> torch.Tensor:
        return x * factor


class Tripled(nn.Module):
    """Gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x, factor=3.0)
        return y


def test_the_same_numbers_are_drawn_on_both() -> None:
    report = report_of(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), torch.randn(3, 4))
    assert report.ok, str(report)
    assert report.notes == ()


def test_arguments_by_name_reach_the_innermost() -> None:
    report = report_of(nn.Sequential(Tripled()), torch.randn(3, 4))
    assert report.ok, str(report)
    assert report.modules == 3


@pytest.mark.parametrize("way", WAYS)
def test_a_module_that_calls_another_otherwise_is_named(way: str) -> None:
    otherwise, kind, what = WAYS[way]
    report = report_of(Calling(otherwise))
    assert {(one.module, one.kind) for one in report.faults} == {("", kind)}, str(report)
    assert len(str(report).splitlines()) == 1 + len(report.faults) + len(report.notes)
    assert what in {one.what for one in report.faults}
    assert not [note for note in report.notes if "draws" in note]


@pytest.mark.parametrize("by_keyword", [True, False])
def test_what_is_before_another_module_gets_its_gradient_through_that(by_keyword: bool) -> None:
    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.inner = nn.Parameter(torch.randn(16)), Many()

        def forward(self, x: torch.Tensor) -> Any:
            weight = backward(lambda g: g * 1.001)(self.weight) if there(x) else self.weight
            one, other = (x, x * weight) if by_keyword else (x * weight, x)
            return self.inner(one, y=other, at=torch.zeros(1, dtype=torch.int64))

    assert {one.what for one in report_of(Before()).faults} == {"gradient of weight"}


class Own(nn.Module):
    """A weight of its own, and nothing inside."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.weight, self.call = nn.Parameter(torch.randn(16)), call

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(x, self.weight) if there(x) else x * self.weight


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda x, w: x * w * 1.001, {"output", "gradient of input 0", "gradient of weight"}),
        (lambda x, w: backward(lambda g: g * 1.001)(x) * w, {"gradient of input 0"}),
        (lambda x, w: x * backward(lambda g: g * 1.001)(w), {"gradient of weight"}),
        (lambda x, w: x.detach() * w, {"gradient of input 0"}),
        (lambda x, w: (x * w, x), {"output"}),
    ],
)
def test_a_fault_is_told_by_what_it_makes_wrong(call: Callable[..., Any], what: set[str]) -> None:
    for repeats in (1, 3):
        report = report_of(nn.Sequential(Own(call)), repeats=repeats)
        faults = report.faults
        assert report.notes == ()
        assert {one.what for one in faults} == what
        assert len(faults) == len(what), "each once"
        assert {(one.module, one.type, one.kind) for one in faults} == {("0", "Own", "wrong")}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_each_precision_has_its_bound(precision: Any) -> None:
    for fault, ok in ((1.0, True), (1.1, False)):
        model = nn.Sequential(Faulty(nn.Linear(16, 4), lambda y, fault=fault: y * fault))
        report = live(precision, model, repeats=1)
        assert report.ok is ok, str(report)
        assert 0 < report.worst <= 1


def test_the_bound_is_one_and_the_worst_below_it_is_told() -> None:
    """An eighth of 4e-6 for all of it; what is multiplied by 1 + n 2**-23 is exactly so far off."""
    many = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))

    def scaled(*ulps: int) -> Report:
        factors = [1 + n * 2.0**-23 for n in ulps]
        rows = [Own(lambda x, w, f=f: x * w * f) for f in factors]
        for row in rows:
            nn.init.ones_(row.weight)
        return report_of(nn.Sequential(*rows), many, repeats=1)

    report = scaled(0)
    assert (report.ok, report.modules) == (True, 2)
    assert report.worst < 0.1
    report = scaled(3, 0, 2)
    assert report.ok
    assert report.worst == pytest.approx(3 * 2.0**-23 / 5e-7, rel=0.1)
    report = scaled(3, 6)
    assert {one.module for one in report.faults} == {"1"}
    assert report.worst == pytest.approx(3 * 2.0**-23 / 5e-7, rel=0.1)
    assert report.modules == 3


def test_every_call_of_a_module_counts() -> None:
    layer = nn.Identity()
    report = report_of(nn.Sequential(layer, layer, nn.Sequential(nn.Identity())))
    assert (report.modules, report.worst, report.notes) == (5, 0.0, ())


class Cancels(nn.Module):
    """What no device computes well in fp32; and something else that may be wrong."""

    def __init__(self, factor: float = 1.0, other: float = 1.0) -> None:
        super().__init__()
        self.factor, self.other = factor, other

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x + 1e4 - 1e4
        return (y * self.factor, x * self.other) if there(x) else (y, x)


def test_what_rounding_alone_does_is_not_accused() -> None:
    assert report_of(Cancels()).ok
    assert {one.what for one in report_of(Cancels(other=1.01)).faults} == {
        "output 1", "gradient of input 0",
    }  # fmt: skip
    (fault, *_) = report_of(Cancels(factor=2.0)).faults
    assert (fault.what, fault.kind) == ("output 0", "wrong")
    assert 1e-4 < fault.allowed < 0.1


def test_what_is_written_into_an_input_is_there_for_what_follows() -> None:
    class Filling(nn.Module):
        def forward(self, x: torch.Tensor) -> None:
            x += 1

    class Filled(nn.Module):
        def __init__(self, factor: float, by_keyword: bool) -> None:
            super().__init__()
            self.fill, self.factor, self.by_keyword = Filling(), factor, by_keyword

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = torch.zeros_like(x)
            self.fill(x=scale) if self.by_keyword else self.fill(scale)
            return x * scale * (self.factor if there(x) else 1)

    for by_keyword in (True, False):
        assert report_of(Filled(1.0, by_keyword)).ok
        assert {one.module for one in report_of(Filled(1.01, by_keyword)).faults} == {""}


def test_an_activation_that_works_in_place_is_named_alone() -> None:
    model = Residual()
    nn.init.ones_(model.gamma)
    model.act = Faulty(model.act, lambda y: y * 1.001)
    assert {one.module for one in report_of(model, IMAGES[:, :1].expand(-1, 4, -1, -1)).faults} == {
        "act"
    }


def test_the_reference_knows_nothing_of_the_autocast_around_it() -> None:
    model = Outer(lambda y: y * 2 if torch.is_autocast_enabled("cpu") else y)
    with torch.autocast("cpu", torch.bfloat16):
        assert report_of(model).ok
    with torch.inference_mode():
        faults = report_of(Faulty(nn.Linear(16, 4), backward(lambda g: g * 1.001))).faults
    assert {one.module for one in faults} == {""}


LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "small": lambda y: 1e-30 * y.sum(),
    "none": lambda y: y.detach().sum(),
    "zero": lambda y: 0 * y.sum(),
    "infinite": lambda y: math.inf * y.sum(),
    "not a number": lambda y: (0 * y).sqrt().sum(),
    "of some": lambda y: y[0].square().mean(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_compared_whatever_the_loss(loss: str) -> None:
    for fault, found in ((lambda g: g, set()), (lambda g: g * 1.1, {"0"})):
        model = nn.Sequential(Faulty(nn.Linear(16, 4), backward(fault)), nn.Linear(4, 4))
        report = report_of(model, loss=lambda model, batch: LOSSES[loss](model(batch)))
        assert {one.module for one in report.faults} == found, str(report)


def test_modules_are_given_the_gradient_that_the_loss_makes() -> None:
    def wrong_if_even(g: torch.Tensor) -> torch.Tensor:
        return g * (1.1 if g.min() == g.max() else 1)

    model = nn.Sequential(Faulty(nn.Linear(16, 4), backward(wrong_if_even)))
    assert report_of(model).ok
    assert not report_of(model, loss=lambda model, batch: model(batch).mean()).ok


def test_a_verdict_does_not_depend_on_the_random_state() -> None:
    model, reports = nn.Sequential(nn.Linear(16, 4), Drawing()), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        reports.append(report_of(model, loss=lambda model, batch: model(batch).detach().sum()))
        drawn = torch.rand(())
        torch.manual_seed(seed)
        assert drawn == torch.rand(())
    assert reports[0] == reports[1]


def test_images_lie_as_the_plan_says() -> None:
    def wrong_if_last(y: torch.Tensor) -> torch.Tensor:
        return y * (1.1 if y.is_contiguous(memory_format=torch.channels_last) else 1)

    model = nn.Sequential(Faulty(nn.ReLU(), wrong_if_last))
    for shape, layout, ok in (
        ((2, 3, 4, 4), torch.channels_last, False),
        ((2, 3, 4, 4), torch.contiguous_format, True),
        ((2, 3, 4), torch.channels_last, True),
        ((2, 3, 4, 4, 4), torch.channels_last, True),
    ):
        place = Place(FP32.device, FP32.autocast, torch.float32, layout, 1)
        given = {"loss": mean_square, "move": FP32._moved, "plan": "fp32"}
        assert verify(model, torch.randn(shape), place, **given).ok is ok


class Short(nn.Linear):
    def __init__(self, short: Callable[..., Any], factor: float = 1.0) -> None:
        super().__init__(16, 8, bias=False)
        self.short, self.factor = short, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not there(x):
            return super().forward(x)
        return self.factor * planted.Products.apply(x, self.weight, self.short)  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize(
    ("kind", "short"),
    [
        ("tf32", lambda x: planted.cut(x, 13, 1 << 12)),
        ("tf32", lambda x: planted.cut(x, 13, 0)),
        ("bf16", lambda x: x.bfloat16().float()),
        ("bf16", lambda x: planted.cut(x, 16, 0)),
        ("wrong", lambda x: planted.cut(x, 15, 0)),
        ("", lambda x: x),
    ],
)
def test_shorter_products_are_measured(kind: str, short: Callable[..., Any]) -> None:
    report = report_of(nn.Sequential(nn.Linear(16, 16), Short(short)))
    assert {(one.module, one.kind) for one in report.faults} == ({("1", kind)} if kind else set())
    assert (kind in ("tf32", "bf16")) == ("fp32='ieee'" in str(report))
    report = report.accepting("tf32")  # as under DeviceContext(fp32="tf32")
    assert report.ok == (kind in ("tf32", ""))
    assert {one.kind for one in report.limits} == ({"tf32"} if kind == "tf32" else set())
    report = report_of(nn.Sequential(Short(short, factor=1.01)))
    assert {one.kind for one in report.faults} == {"wrong"}, "and something else is off, too"


def test_what_keeps_something_from_call_to_call_is_told_and_not_accused() -> None:
    class Warming(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * self.calls

    report = report_of(nn.Sequential(nn.Linear(16, 4), Warming()))
    assert report.ok, str(report)
    assert report.notes == (
        "1 is not compared: it keeps something from call to call, or draws outside torch",
    )


def test_other_numbers_of_samples_are_tried() -> None:
    model = nn.Sequential(Faulty(nn.Linear(16, 4), lambda y: y * (1.1 if y.numel() > 90 else 1)))
    assert report_of(model).ok
    assert report_of(model, sizes=(1, 2)).ok
    (fault, *_) = report_of(model, sizes=(1, 4)).faults
    assert fault.module == "0"
    assert report_of(model, sizes=(4,)).modules == 2 * report_of(model).modules
    rows = {"x": torch.arange(3), "names": ["a", "b", "c"], "scale": torch.tensor(2.0)}
    assert resized(rows, 2)["names"] == ["a", "b"]
    assert resized(rows, 5)["x"].tolist() == [0, 1, 2, 0, 1]
    assert resized(rows, 5)["scale"] == 2
    with pytest.raises(ValueError, match="first dimension"):
        report_of(model, sizes=(3,), batch=torch.tensor(1.0))


def test_what_is_not_reached_in_time_is_counted() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 4)))
    report = report_of(model, budget_s=0.0)
    assert (report.modules, report.ok, report.faults) == (0, False, ())
    assert str(report).startswith("Nothing of this model was compared on cpu in fp32.")
    assert report.notes == ("1 calls of modules were not reached in 0 s",)
    assert report_of(model, budget_s=100.0).notes == ()


def test_of_modules_alike_one_is_compared() -> None:
    def sampled(model: nn.Module, batch: Any = SERIES) -> Report:
        place = Place(FP32.device, FP32.autocast, torch.float32, torch.contiguous_format, 1)
        return verify(
            model, batch, place, loss=mean_square, move=FP32._moved, plan="fp32", sampled=True
        )

    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), nn.GELU())

    assert sampled(nn.Sequential(*(block() for _ in range(5)))).modules == 4
    last = nn.Sequential(block(), block(), Faulty(nn.Linear(16, 16), lambda y: 1.1 * y))
    assert {one.module for one in sampled(last).faults} == {"2"}
    shared = block()  # its calls are counted where they are passed by
    assert sampled(nn.Sequential(shared, block(), shared, nn.Linear(16, 4), nn.GELU())).ok


def test_what_vanishes_or_cancels_in_a_dtype_is_a_limit_on_any_device() -> None:
    class Tiny(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 1e-8

    with play("t4", live=True):
        model = nn.Sequential(nn.Linear(16, 16, bias=False), Tiny())
        report = DeviceContext(precision="fp16").verify(model, SERIES)
    assert report.ok, str(report)
    assert {(one.module, one.kind) for one in report.limits} >= {("1", "underflow")}
    report = report_of(Cancels())
    assert report.ok
    assert {one.kind for one in report.limits} == {"rounds"}
    assert "limit: the model itself (Cancels): output 0 is " in str(report)
    many = Report("cpu", "fp32", (), 7, 0.25, (), 5 * report.limits)
    told = [line for line in str(many).splitlines() if line.startswith("- limit: ")]
    assert len(told) == 4
    assert told[-1].endswith(f"{len(many.limits) - 3} results more, closer than these")


def test_what_a_module_is_given_and_cannot_hold_is_overflow() -> None:
    class Keeping(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float() * 1e5

    with play("t4", live=True):
        model = nn.Sequential(Keeping(), nn.Linear(16, 4))
        report = DeviceContext(precision="fp16").verify(model, 1 + SERIES.abs())
    assert {(one.module, one.kind) for one in report.faults} == {("1", "overflow")}, str(report)


def test_a_long_one_shows_how_far_it_is_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown() -> str:
        with Progress("verify", 2) as bar:
            bar.step("layer1.a-long-name")
            bar.step("x")
        return capsys.readouterr().err

    assert shown() == ""
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    assert shown() == "", "no terminal"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    first, second, cleared, end = shown().split("\r")[1:]
    assert first == "verify: 1 of 2, layer1.a-long-name"
    assert second == "verify: 2 of 2, x".ljust(len(first))
    assert (cleared.strip(), end) == ("", "")
    monkeypatch.setattr("sys.stderr", None)  # as under pythonw
    with Progress("verify", 1) as bar:
        bar.step("x")


class Upcasting(nn.Module):
    """Asks for float32 by all the ways that models have, and is right only with exact numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float() * torch.rsqrt(x.to(torch.float32).square().mean(-1, keepdim=True) + 1e-6)
        angle = torch.arange(8, dtype=torch.float32) + torch.zeros(8) + torch.tensor(0.5)
        turned = torch.view_as_complex(wide.unflatten(-1, (8, 2))) * torch.polar(
            torch.ones_like(angle), angle
        )
        y = torch.view_as_real(turned).flatten(-2) @ self.weight.float()
        return y.softmax(-1, dtype=torch.float32).type_as(x) + y.half().float() * 0


def test_the_reference_is_exact_where_a_model_asks_for_fewer_bits() -> None:
    torch.manual_seed(0)
    report = report_of(nn.Sequential(Upcasting(), nn.Linear(16, 4)))
    assert report.ok, str(report)
    assert report.modules == 3
    double = SERIES.double()
    with Wide():
        made = double.float(), torch.zeros(3), torch.tensor(0.1), double.half() + SERIES
        mixed = SERIES @ double.mT
        written = torch.zeros(7, 16, dtype=torch.float32).add_(double[0])
    assert {one.dtype for one in (*made, mixed, written)} == {torch.float64}
    assert torch.equal(made[0], double)
    assert torch.equal(written, double[0])
    torch.manual_seed(0)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    with Wide():
        assert torch.equal(torch.rand(3, dtype=torch.float32), drawn.double())
    assert torch.zeros(1).dtype is torch.float32


def test_verify_does_not_import_the_compiler() -> None:
    """It takes seconds, and leaves threads behind."""
    code = (
        "import sys, torch, portable_amp\n"
        "ctx = portable_amp.DeviceContext('cpu', precision='fp32')\n"
        "assert ctx.verify(torch.nn.Linear(4, 2), torch.ones(4, 4)).ok\n"
        "ctx.tuned(torch.nn.Linear(4, 2), torch.ones(4, 4), cache=False)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
