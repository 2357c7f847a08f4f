"""`verify` of models as people write them: right, or refused with a reason."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import planted
from portable_amp import DeviceContext
from portable_amp.copies import mean_square
from portable_amp.numerics.report import Report
from portable_amp.numerics.walk import rounded
from portable_amp.testing import play

FP32 = DeviceContext("cpu", precision="fp32")
ROWS = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
WORDS = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))


def report_of(model: nn.Module, batch: Any = ROWS, **options: Any) -> Report:
    return FP32.verify(model, batch, **{"repeats": 1, **options})


def named(report: Report) -> set[str]:
    return {one.module for one in report.faults}


class Calls(nn.Module):
    """A module whose forward pass is a function, of its layer and what it is given."""

    def __init__(self, call: Callable[..., Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.call = layer or nn.Linear(16, 16), call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.layer, *args, **kwargs)


class Wrong(nn.Linear):
    """Off by 1 % where it is not the reference."""

    def __init__(self) -> None:
        super().__init__(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 if x.dtype is torch.float64 else 1.01)


class Cache:
    """Keys of the calls before, as language models hand it from layer to layer."""

    def __init__(self) -> None:
        self.layers: list[torch.Tensor] = []
        self.made: Callable[[], int] = int

    def update(self, keys: torch.Tensor) -> torch.Tensor:
        self.layers.append(keys)
        return torch.cat([one.to(keys) for one in self.layers], 1)


class Attention(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.keys = kind(16, 16) if kind is nn.Linear else kind()

    def forward(self, x: torch.Tensor, *, cache: Cache) -> torch.Tensor:
        keys = cache.update(self.keys(x))
        assert keys.shape[1] in (6, 12)
        return (x @ keys.mT).softmax(-1) @ keys


class Cached(nn.Module):
    def __init__(self, kind: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.first, self.second = Attention(nn.Linear), Attention(kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x, cache=Cache()), cache=Cache())  # type: ignore[no-any-return]


def test_what_is_written_into_an_object_is_not_there_in_the_next_replay() -> None:
    report = report_of(Cached(), WORDS, repeats=2)
    assert (report.ok, report.modules, report.notes) == (True, 5, ()), str(report)
    assert named(report_of(Cached(Wrong), WORDS)) == {"second.keys"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_have_their_own_bound(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), Wrong(), nn.Linear(16, 4)).to(dtype)
    model[2] = model[2].float()
    model.insert(2, Calls(lambda _, x: x.float()))
    model.append(Calls(lambda _, x: x.to(dtype)))
    model[4], model[5] = model[5], model[4]
    assert named(report_of(model, ROWS.to(dtype))) == {"3"}


def test_a_region_of_the_model_itself_is_replayed() -> None:
    def large(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", enabled=False):
            y: torch.Tensor = layer(x.detach().float() * 1e6)
        return x + y * 1e-6

    def short(layer: nn.Module, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    with play("t4", live=True):
        model = nn.Sequential(nn.Linear(16, 16), Calls(large))
        report = DeviceContext(precision="fp16").verify(model, ROWS, repeats=1)
        assert report.ok, str(report)
        model[1].layer = Wrong()
        assert named(DeviceContext(precision="fp16").verify(model, ROWS)) == {"1.layer"}
    seen = list[torch.dtype]()
    layer = nn.Linear(16, 16)
    layer.register_forward_hook(lambda _, args, y: seen.append(y.dtype))
    assert report_of(Calls(short, layer)).ok
    assert seen.count(torch.bfloat16) == 2, "by the model, and alone"


def test_a_gradient_that_a_lower_loss_scale_holds_is_not_accused() -> None:
    with play("t4", live=True):
        ctx = DeviceContext(precision="fp16")
        for factor, kinds in ((50, set()), (1e5, {"overflow"})):
            torch.manual_seed(0)
            rows = ROWS.abs().repeat(2000, 1) * factor
            report = ctx.verify(nn.Linear(16, 4), rows, loss=lambda model, x: model(x).mean())
            assert {one.kind for one in report.faults} == kinds, str(report)


def test_what_draws_at_random_in_evaluation_too_is_not_accused() -> None:
    def sampled(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = layer(x)
        return y + torch.randn_like(y)

    report = report_of(nn.Sequential(Calls(sampled), nn.Linear(16, 4)).eval())
    assert report.notes == ("0 draws at random in eval mode, too: not compared",)
    assert (report.ok, report.modules) == (True, 3), str(report)
    assert named(report_of(Calls(sampled, Wrong()))) == {"layer"}


def test_a_sparse_gradient_is_compared() -> None:
    assert report_of(nn.Embedding(9, 4, sparse=True), torch.arange(9)).ok


def test_a_compiled_module_inside_is_compared_as_it_was() -> None:
    for kind, found in ((nn.Linear(16, 16), set()), (Wrong(), {"1.0"})):
        inner = nn.Sequential(kind, nn.GELU())
        model = nn.Sequential(nn.Linear(16, 16), torch.compile(inner, backend="eager"))
        assert named(report_of(model)) == found
        assert hasattr(model[1], "_orig_mod"), "it stays as it is"


def test_a_loss_may_call_parts_of_the_model() -> None:
    model = nn.ModuleDict({"made": nn.Linear(16, 16), "judge": nn.Sequential(Wrong(), nn.GELU())})

    def loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = model["judge"](model["made"](batch))
        return made.mean()

    report = report_of(model, loss=loss)
    assert (named(report), report.modules) == ({"judge.0"}, 4)
    with pytest.raises(RuntimeError, match="nothing to compare: loss= calls no module"):
        report_of(model, loss=lambda _, batch: batch.mean())


def test_a_gradient_inside_of_the_forward_pass_is_taken() -> None:
    def force(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)[0]

    def mapped(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = torch.func.vmap(torch.func.grad(lambda one: layer(one).sum()))(x)
        return made

    assert report_of(nn.Sequential(Calls(force), nn.Linear(16, 4))).ok
    assert report_of(nn.Sequential(Calls(mapped), nn.Linear(16, 4))).ok
    assert named(report_of(Calls(mapped, Wrong()))) == {""}, "it is a part of what maps it"


@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")  # torch 2.4's own
@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_again_for_the_backward_pass_is_compared(reentrant: bool) -> None:
    def saved(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = checkpoint(layer, x, use_reentrant=reentrant)
        return made

    for kind, found in ((nn.Linear(16, 16), set()), (Wrong(), {"1.layer.1"})):
        inner = nn.Sequential(nn.GELU(), kind)
        report = report_of(nn.Sequential(nn.Linear(16, 16), Calls(saved, inner)))
        assert report.notes == ()
        assert found <= named(report) <= {*found, "1"}, str(report)


def test_what_cannot_be_called_alone_is_told_and_the_rest_compared() -> None:
    class Growing(nn.Module):
        state: Any = None

        def __init__(self) -> None:
            super().__init__()
            self.cell = Wrong()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.state = self.cell(x if self.state is None else x + self.state)
            return self.state  # type: ignore[no-any-return]

    report = report_of(nn.Sequential(Growing(), nn.Linear(16, 4)))
    assert named(report) == {"0.cell"}
    assert report.notes[0].startswith("0 is not compared: called again, alone, it raises ")


def test_what_is_finite_beside_a_mask_is_compared() -> None:
    def masked(factor: float) -> nn.Module:
        def call(_: Any, x: torch.Tensor) -> torch.Tensor:
            far = x if x.dtype is torch.float64 else x * factor
            return far.masked_fill(torch.arange(16) > 8, -torch.inf)

        return nn.Sequential(nn.Identity(), Calls(call, nn.Identity()), nn.Softmax(-1))

    assert report_of(masked(1.0)).ok
    assert named(report_of(masked(1.01))) == {"1"}
    least = [torch.finfo(torch.float64).min, -torch.inf, torch.nan]
    made = rounded(torch.tensor(least, dtype=torch.float64), [torch.float16])
    assert made[0] == -65504
    assert made[1] == -torch.inf
    assert made[2].isnan()


@pytest.mark.parametrize("colour", [0.3, 0.7, 7.3])
def test_images_of_one_colour_are_no_fault(colour: float) -> None:
    def call(layer: nn.Module, x: torch.Tensor, factor: float = 1.0) -> Any:
        return layer(x) + (0 if x.dtype is torch.float64 else factor)

    images = torch.full((4, 8, 8, 8), colour)
    for norm in (nn.BatchNorm2d(8), nn.InstanceNorm2d(8), nn.GroupNorm(4, 8)):
        report = report_of(nn.Sequential(norm), images)
        assert report.ok, str(report)
    assert named(report_of(Calls(call, nn.BatchNorm2d(8)), images)) == {""}


def test_a_gradient_that_is_to_be_zero_is_measured_by_what_was_given() -> None:
    def call(layer: nn.Module, x: torch.Tensor, more: float = 0.0) -> Any:
        still = x if x.dtype is torch.float64 else planted.backward(x, lambda g: g + more)
        return layer(x.detach()) + 0 * still

    assert report_of(nn.Sequential(Calls(call))).ok
    for seed in range(5):  # a norm of one element divides what rounding leaves by a small root
        torch.manual_seed(seed)
        assert report_of(nn.LayerNorm(1), torch.randn(3, 1)).ok
    report = report_of(nn.Sequential(Calls(functools.partial(call, more=1e-3))))
    assert {one.what for one in report.faults} == {"gradient of input 0"}


def test_what_knows_no_float64_is_computed_in_float32() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        quantized = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(nn.Linear(16, 16)), {nn.Linear}
        )
    assert report_of(nn.Sequential(nn.Linear(16, 16), *quantized), backward=False).ok


def test_sentences_of_several_lengths_are_compared_within_their_encoder() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = Calls(
        lambda layer, x: layer(x, src_key_padding_mask=torch.arange(6) >= torch.tensor([[6], [3]])),
        nn.TransformerEncoder(layer, 2),
    ).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of nested tensors
        report = report_of(model, WORDS[:2], backward=False)
    assert report.ok, str(report)
    assert report.modules >= 2


@dataclasses.dataclass
class Nothing:
    loss: None = None


REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "a function": (TypeError, "is a function: a module", lambda: report_of(F.relu)),  # type: ignore[arg-type]
    "no loss": (
        TypeError, "returned a NoneType: a scalar",
        lambda: report_of(nn.Identity(), loss=lambda *_: None),
    ),
    "many losses": (
        TypeError, "returned a Tensor of 64 numbers",
        lambda: report_of(nn.Identity(), loss=lambda model, batch: model(batch)),
    ),
    "no output": (
        RuntimeError, "returns a Nothing without a float tensor: give loss=",
        lambda: report_of(Calls(lambda *_: Nothing())),
    ),
    "lazy": (RuntimeError, "lazy weights; give it one batch", lambda: report_of(nn.LazyLinear(3))),
    "scripted": (RuntimeError, "torch.jit compiled", lambda: report_of(scripted())),
    "no float64": (
        RuntimeError, "in float64 on the CPU, with which all is compared: AssertionError: only",
        lambda: report_of(Calls(float32_only)),
    ),
    **{
        f"repeats {n}": (ValueError, "repeats=", lambda n=n: report_of(nn.Identity(), repeats=n))
        for n in (0, -1, 1.5)
    },
    **{
        f"sizes {n}": (ValueError, "sizes=", lambda n=n: report_of(nn.Identity(), sizes=n))
        for n in (8, (0,), (4, -1))
    },
}  # fmt: skip


def float32_only(_: Any, x: torch.Tensor) -> torch.Tensor:
    assert x.dtype is torch.float32, "only that"
    return x


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return nn.Sequential(torch.jit.script(nn.Linear(16, 4)))


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_verified_is_refused_with_the_reason(what: str) -> None:
    kind, words, call = REFUSED[what]
    with pytest.raises(kind, match=words):
        call()


def test_the_default_loss_is_told_to_be_replaced_for_tuned_and_others_too() -> None:
    with pytest.raises(RuntimeError, match="give loss="):
        mean_square(Calls(lambda *_: None), ROWS)
    for call in (FP32.tuned, FP32.headroom, FP32.find_nonfinite, FP32.verify):
        with pytest.raises(TypeError, match="a module works here"):
            call(F.relu, ROWS)  # type: ignore[operator]
