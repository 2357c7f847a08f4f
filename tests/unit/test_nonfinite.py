"""`DeviceContext.find_nonfinite`: who makes the first NaN is named, and who passes it on is not."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from portable_amp import DeviceContext
from portable_amp.backends import torch_version
from portable_amp.copies import mean_square
from portable_amp.numerics.nonfinite import NonfiniteReport
from portable_amp.testing import play

# Torch 2.4's own checkpoint warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast")

FP32 = DeviceContext("cpu", precision="fp32")
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
SERIES = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
NAN, INF = torch.nan, torch.inf


class Does(nn.Module):
    """Functional code in a module's own forward, after a layer of its own."""

    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.compute = nn.Linear(8, 8), compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(self.inner(x))


def model(compute: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """The second of three computes this."""
    return nn.Sequential(nn.Linear(8, 8), Does(compute), nn.Linear(8, 8))


class Doubled(torch.autograd.Function):
    """With a gradient that divides by zero."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient / 0


class Weighted(nn.Module):
    """Holds what is multiplied with."""

    def __init__(self, value: float, *, buffer: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        held = torch.full((8,), value)
        if buffer:
            self.register_buffer("held", held)
        else:
            self.held = nn.Parameter(held)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.held


class Attends(nn.Module):
    """Attention by hand, with a mask of -inf made in each of the ways that there are."""

    def __init__(self, way: str, factor: float = 1.0) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.way, self.factor = way, factor
        self.register_buffer("mask", torch.full((5, 5), -INF).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = (self.q(x) * self.factor) @ (self.k(x) * self.factor).transpose(1, 2)
        hidden = self.mask < 0
        if self.way == "buffer":
            scores = scores + self.mask
        elif self.way == "masked_fill":
            scores = scores.masked_fill(hidden, -INF)
        elif self.way == "in place":
            scores = scores.masked_fill_(hidden, float("-inf"))
        elif self.way == "where":
            scores = torch.where(hidden, -INF, scores)
        elif self.way == "log":
            scores = scores + (~hidden).float().log()
        elif self.way == "index":
            scores = scores.clone()
            scores[:, hidden] = -INF
        elif self.way == "all":
            scores = scores + torch.full_like(scores, -INF)
        elif self.way == "sdpa":
            return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), self.mask)
        return scores.softmax(-1) @ self.v(x)


def with_nan_weight() -> nn.Module:
    made = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        made[1].weight[2, 3] = NAN
    return made


def constant_row() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), Does(torch.zeros_like), nn.LayerNorm(8, eps=0.0))


def no_eps(x: torch.Tensor) -> torch.Tensor:
    return x / (x.relu() * 0).norm(dim=-1, keepdim=True)


def guarded_too_late(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, (x * (x > 0)).log(), 0.0)


def probability(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return -(model(batch).softmax(-1) * 0).log().mean()


CAUSES: dict[str, tuple[Callable[[], nn.Module], Any, Any, str, str, str]] = {
    # Of a model, a batch and a loss: the module, the operation and the node that are named.
    "log of negative": (lambda: model(torch.log), X, None, "1", "log", ""),
    "0 / 0": (lambda: model(lambda x: x * 0 / 0), X, None, "1", "div", ""),
    "no eps": (lambda: model(no_eps), X, None, "1", "div", ""),
    "exp": (lambda: model(lambda x: (x * 1e3).exp()), X, None, "1", "exp", ""),
    "product": (lambda: model(lambda x: x * 1e30 * 1e30), X, None, "1", "mul", ""),
    "cumprod": (lambda: model(lambda x: (x * 1e30).cumprod(-1)), X, None, "1", "cumprod", ""),
    "LayerNorm without eps": (constant_row, X, None, "2", "native_layer_norm", ""),
    "all masked": (lambda: Attends("all"), SERIES, None, "", "_softmax", ""),
    "inf - inf": (
        lambda: model(lambda x: torch.full_like(x, INF) - torch.full_like(x, INF)),
        X, None, "1", "full_like", "",
    ),
    "a mask in the loss": (
        lambda: model(lambda x: x.masked_fill(x > 0, -INF)), X, None, "1", "masked_fill", "",
    ),
    "a probability of 0": (lambda: model(torch.relu), X, probability, "the loss", "log", ""),
    "empty": (lambda: model(torch.relu), X[:0], None, "the loss", "mean", ""),
    "weight": (with_nan_weight, X, None, "1", "parameter weight", ""),
    "infinite weight": (
        lambda: Weighted(INF, buffer=False), X, None, "", "parameter held", "",
    ),
    "buffer": (lambda: Weighted(NAN, buffer=True), X, None, "", "buffer held", ""),
    "batch": (lambda: model(torch.relu), X.clone().fill_(NAN), None, "the batch", "tensor 0", ""),
    "sqrt": (lambda: model(lambda x: (x.abs() * 0).sqrt()), X, None, "1", "div", "SqrtBackward0"),
    "power": (lambda: model(lambda x: (x * 0) ** 0.5), X, None, "1", "pow", "PowBackward0"),
    "acos": (lambda: model(lambda x: (x * 0 + 1).acos()), X, None, "1", "rsqrt", "AcosBackward0"),
    "where": (lambda: model(guarded_too_late), X, None, "1", "div", "LogBackward0"),
    "where of inf": (
        lambda: model(lambda x: torch.where(x > 99, (x * 0 + 99).exp(), x)),
        X, None, "1", "exp", "",
    ),
    "own function": (lambda: model(Doubled.apply), X, None, "1", "div", "DoubledBackward"),
    "loss": (
        lambda: model(torch.relu), X, lambda model, x: (model(x) * 0).norm(dim=1).sqrt().sum(),
        "the loss", "div", "SqrtBackward0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("cause", CAUSES)
def test_who_makes_it_is_named(cause: str) -> None:
    torch.manual_seed(0)
    make, batch, loss, module, operation, node = CAUSES[cause]
    report = FP32.find_nonfinite(make(), batch, loss=loss or mean_square)
    assert not report.ok
    assert report.origin is not None
    assert (report.module, report.operation, report.origin.node) == (module, operation, node)
    assert report.reaches == ("a gradient" if node or cause == "where of inf" else "the loss")


def big(factor: float) -> nn.Module:
    made = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        made[2].weight.fill_(factor)
    return made


def gated(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x * 1e3) * (x * 1e3)


def mean(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = model(batch)
    return made.float().mean()


IN_FP16: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, float, str, str, str]] = {
    # Of a model, a batch and a loss scale.
    "layer": (lambda: big(6e4), X * 100, 1.0, "2", "mm", ""),
    "weight beyond": (lambda: big(1e5), X, 1.0, "2", "_to_copy", ""),
    "input beyond": (lambda: big(1.0), X * 1e6, 1.0, "0", "_to_copy", ""),
    "scores": (lambda: Attends("masked_fill", 1e4), SERIES, 1.0, "", "bmm", ""),
    "gate": (lambda: model(gated), X, 1.0, "1", "mul", ""),
    "gradient": (lambda: big(1e3), X, 2.0**14, "2", "mm", "MmBackward0"),
    "square root": (
        lambda: model(lambda x: (x.abs() * 0).sqrt()), X, 1.0, "1", "div", "SqrtBackward0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("cause", IN_FP16)
def test_on_a_played_t4_what_fp16_cannot_hold_is_named(cause: str) -> None:
    torch.manual_seed(0)
    make, batch, scale, module, operation, node = IN_FP16[cause]
    made = make()
    with play("t4", live=True):
        ctx = DeviceContext(precision="fp16")
        there = ctx.to(made)
        report = ctx.find_nonfinite(there, batch, loss=mean, scale=scale)
    assert report.origin is not None
    assert (report.module, report.operation, report.origin.node) == (module, operation, node)
    assert report.origin.dtype is torch.float16
    assert report.origin.precise is (cause != "square root")
    assert ("loss scale" in str(report)) is (cause == "gradient")


def filtered(x: torch.Tensor) -> torch.Tensor:
    """The three largest, as when drawing words."""
    x = x.clone()
    x[x < x.topk(3).values[..., -1:]] = -INF
    return x.softmax(-1)


def guarded(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).log(), 0.0)


def summed(x: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(x < 0, -INF).logsumexp(0, keepdim=True).clamp(-9, 9)


def flows(x: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x, torch.full_like(x, -INF)) + 1 / torch.full_like(x, INF)


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(inplace=True),
        nn.MaxPool2d(3, padding=1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3),
    )  # fmt: skip


class Encoder(nn.Module):
    """Torch's own layer, with its own mask and one of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 8, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, words: torch.Tensor) -> dict[str, Any]:
        mask = torch.full((5, 5), -INF, device=words.device).triu(1)
        padding = torch.zeros(words.shape, device=words.device).masked_fill(words == 0, -INF)
        return {
            "x": self.layer(self.words(words), src_mask=mask, src_key_padding_mask=padding),
            "none": None,
        }


class Checkpointed(nn.Module):
    """Computes again in the backward pass."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.first, self.inner, self.reentrant = nn.Linear(8, 8), inner, reentrant

    def forward(self, x: torch.Tensor) -> Any:
        return checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant)


WORDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]])
INNOCENT: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    **{
        f"attention, {way}": ((lambda way=way: Attends(way)), SERIES)  # type: ignore[misc]
        for way in ("buffer", "masked_fill", "in place", "where", "log", "index", "sdpa")
    },
    "images": (images, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))),
    "lstm": (lambda: nn.LSTM(8, 4, 2, batch_first=True, bidirectional=True), SERIES),
    "encoder": (Encoder, WORDS),
    "filtered": (lambda: model(filtered), X),
    "guarded": (lambda: model(guarded), X),
    "logsumexp": (lambda: model(summed), X),
    "infinities that vanish": (lambda: model(flows), X),
    "log_softmax": (lambda: model(lambda x: (x * 90).log_softmax(-1)), X),
    "one NaN replaced": (lambda: model(lambda x: x.detach().log().nan_to_num() + x), X),
    "checkpoint": (lambda: Checkpointed(nn.Linear(8, 8), False), X),
}


@pytest.mark.parametrize("machine", ["", "t4"])
@pytest.mark.parametrize("name", INNOCENT)
def test_what_is_meant_so_is_not_accused(name: str, machine: str) -> None:
    make, batch = INNOCENT[name]
    torch.manual_seed(0)
    made = make()
    for training in (True, False):
        made.train(training)
        if not machine:
            report = FP32.find_nonfinite(made, batch)
        else:
            with play(machine, live=True):
                report = DeviceContext(precision="fp16").find_nonfinite(made, batch)
        assert report.ok, str(report)
        random_in_training = name in ("images", "encoder")
        assert report.passes == (3 if training and random_in_training else 1)


def test_an_overflow_beside_a_mask_is_found() -> None:
    made = model(lambda x: (x.masked_fill(x > 0, -INF) * -3e38 * 9).softmax(-1))
    report = FP32.find_nonfinite(made, X * 9)
    assert (report.module, report.operation) == ("1", "mul")


def test_memory_that_is_used_again_keeps_no_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    places: dict[int, int] = {}

    def one_place_each(one: torch.Tensor) -> int:
        """The second and later results of 65 numbers share a place."""
        at = one.untyped_storage().data_ptr()
        return places.setdefault(at, min(len(places), 1)) if one.numel() == 65 else at

    def compute(x: torch.Tensor) -> torch.Tensor:
        first = x.detach().new_zeros(65)
        lost = first.log()  # at a place of its own
        again = first + 1  # where that was
        return x + again.div_(0).sum() + lost.numel()

    monkeypatch.setattr("portable_amp.numerics.watch.memory_of", one_place_each)
    report = FP32.find_nonfinite(model(compute), X)
    assert (report.module, report.operation) == ("1", "div_")


def test_what_it_says() -> None:
    said = str(FP32.find_nonfinite(model(torch.log), X))
    assert said.startswith("1 (Does): in the forward pass, log makes nan of finite values up to ")
    assert said.endswith(", in float32. It reaches the loss.")
    said = str(FP32.find_nonfinite(with_nan_weight(), X))
    assert said == "1 (Linear): parameter weight holds nan before the pass. It reaches the loss."
    said = str(FP32.find_nonfinite(model(torch.relu), X))
    assert said == "Finite in 1 pass in fp32, at loss scale 1."
    said = str(FP32.find_nonfinite(images(), torch.randn(2, 3, 8, 8), scale=8.0, passes=2))
    assert said == "Finite in 2 passes in fp32, at loss scale 8."
    said = str(FP32.find_nonfinite(CAUSES["a mask in the loss"][0](), X))
    assert "masked_fill puts -inf there, which becomes nan by addmm in 2." in said
    said = str(FP32.find_nonfinite(Attends("all"), SERIES))
    assert "_softmax makes nan of a row that -inf masks throughout, in float32." in said
    said = str(FP32.find_nonfinite(CAUSES["sqrt"][0](), X))
    assert "in the backward pass, div of SqrtBackward0 makes " in said
    assert said.endswith("It reaches a gradient.")
    with play("t4", live=True):
        said = str(DeviceContext(precision="fp16").find_nonfinite(big(6e4), X * 100))
    assert said.endswith("In fp32 it is finite: keep this module in fp32, or compute in bf16.")


class Stateful(nn.Module):
    """Counts, keeps lists and buffers, and writes into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.count, self.kept = 0, [0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.kept.append(1)
        x += 1
        self.last = self.norm(F.dropout(self.layer(x)))
        random.random()
        return self.last.log()


def test_everything_stays_as_it_was() -> None:
    made, batch = Stateful(), X.clone()
    made.norm(X).sum().backward()
    hooked: list[Any] = []
    made.layer.weight.register_post_accumulate_grad_hook(hooked.append)
    made.layer.weight.grad = torch.ones(8, 8)
    gradients = [one.grad for one in made.parameters()]
    state = copy.deepcopy(made.state_dict())
    versions = [one._version for one in (*made.parameters(), *made.buffers(), batch)]
    keys = {name: set(vars(one)) for name, one in made.named_modules()}
    drawn = torch.get_rng_state(), random.getstate()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        report = FP32.find_nonfinite(made, batch)
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
    assert report.operation == "log"
    assert (made.count, made.kept, hooked) == (0, [0], [])
    assert {name: set(vars(one)) for name, one in made.named_modules()} == keys
    assert all(torch.equal(state[name], one) for name, one in made.state_dict().items())
    for one, gradient in zip(made.parameters(), gradients, strict=True):
        assert one.grad is gradient
    assert versions == [one._version for one in (*made.parameters(), *made.buffers(), batch)]
    assert torch.equal(drawn[0], torch.get_rng_state())
    assert drawn[1] == random.getstate()


def test_a_model_that_fails_is_left_as_it_was() -> None:
    made = Stateful()
    made.layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        FP32.find_nonfinite(made, X)
    assert made.count == 0
    with pytest.raises(TypeError, match="loss= returned a NoneType: a scalar tensor works here"):
        FP32.find_nonfinite(nn.Linear(8, 8), X, loss=lambda *_: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"passes": 0}, {"scale": 0.0}, {"scale": INF}])
def test_what_cannot_be_looked_at(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="1 pass or more, a scale above 0"):
        FP32.find_nonfinite(nn.Linear(8, 8), X, **wrong)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_checkpoint_computes_again(reentrant: bool) -> None:
    made = Checkpointed(Does(lambda x: F.dropout(x.abs() * 0).sqrt()), reentrant)
    report = FP32.find_nonfinite(made, X)
    assert (report.module, report.operation) == ("inner", "div")
    assert all(one.grad is None for one in made.parameters())


def test_a_pass_that_fails_by_chance_is_looked_for() -> None:
    def by_chance(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = model(batch).sum()
        return made / 0 if random.random() < 0.2 else made

    random.seed(0)
    report = FP32.find_nonfinite(nn.Linear(8, 8), X, loss=by_chance, passes=99)
    assert (report.module, report.operation) == ("the loss", "div")
    assert report.passes > 1


class Forces(nn.Module):
    """Its output is a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        energy = (self.layer(x).abs() * 0).sqrt().sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


class Mapped(nn.Module):
    """Runs through torch.func."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.vmap(lambda row: (self.layer(row).abs() * 0).sqrt())(x)
        return rows + torch.func.grad(lambda y: (y**2).sum())(x)


class Complex(nn.Module):
    """Complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(torch.complex64) @ self.weight).log().abs()


class Sparse(nn.Module):
    """A sparse gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 8, sparse=True)
        nn.init.zeros_(self.words.weight)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.words(words).abs().sqrt()


class Scripted(nn.Module):
    """For torch.jit.script."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.log()


def scripted() -> Any:
    return torch.jit.script(Scripted())  # type: ignore[no-untyped-call]


UNUSUAL: dict[str, tuple[Callable[[], nn.Module], Any, str, str]] = {
    "gradient inside": (Forces, X, "", "div"),
    "torch.func": (Mapped, X, "", "div"),
    "complex": (Complex, X, "", "log"),
    "sparse": (Sparse, WORDS, "", "div"),
    "script": (lambda: nn.Sequential(nn.Linear(8, 8), scripted()), X, "1", "log"),
    "shared": (lambda: nn.Sequential(*[Does(torch.log)] * 2), X, "0", "log"),
    "weight_norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        X, "parametrizations.weight.0", "_weight_norm_interface",
    ),
    "spectral_norm": (
        lambda: nn.utils.parametrizations.spectral_norm(Does(torch.log).inner), X, "", "",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_models(name: str) -> None:
    make, batch, module, operation = UNUSUAL[name]
    torch.manual_seed(0)
    made = make()
    if name == "weight_norm":
        with torch.no_grad():
            made.parametrizations.weight.original1[0] = 0
    before = copy.deepcopy(made.state_dict())
    report = FP32.find_nonfinite(made, batch)
    assert (report.module, report.operation) == (module, operation)
    assert all(torch.equal(before[key], one) for key, one in made.state_dict().items())


@pytest.mark.skipif(torch_version() < (2, 6), reason="2.4 runs what was compiled all the same")
def test_what_is_compiled_runs_as_it_is() -> None:
    made = model(lambda x: (x.abs() * 0).sqrt())
    for wrapped in (torch.compile(made), nn.Sequential(torch.compile(made))):
        report: NonfiniteReport = FP32.find_nonfinite(wrapped, X)
        assert report.module.endswith("1")
        assert report.operation == "div"
    made.compile()
    assert FP32.find_nonfinite(made, X).operation == "div"
    assert made._compiled_call_impl is not None


def test_a_float_mask_in_the_batch_is_no_error_and_a_row_that_it_hides_is() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> Any:
            return self.attend(x, x, x, attn_mask=mask)

    mask = torch.full((5, 5), -INF).triu(1)
    assert FP32.find_nonfinite(Masked(), {"x": SERIES, "mask": mask}, loss=keywords).ok
    mask[2] = -INF
    report = FP32.find_nonfinite(Masked(), {"x": SERIES, "mask": mask}, loss=keywords)
    assert (report.module, report.operation) == ("attend", "_softmax")


def keywords(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.as_tensor(model(**batch)[0].square().mean())
