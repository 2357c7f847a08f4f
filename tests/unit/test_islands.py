"""Modules that stay in fp32, and plans that replay refuses: what `tuned` may choose."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import planted
from portable_amp import DeviceContext, tuning
from portable_amp.numerics import proof
from portable_amp.numerics.islands import Island, is_inside, islands, keep_in_fp32
from portable_amp.numerics.report import Fault, Report
from portable_amp.plan_cache import keep, recall
from portable_amp.precision import PrecisionPlan
from portable_amp.testing import play

X = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))


class Scores(nn.Module):
    """As attention, with scores beyond what fp16 holds."""

    def __init__(self, size: float = 300.0) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.q.weight *= size
            self.k.weight *= size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2)
        mixed: torch.Tensor = scores.softmax(-1) @ x
        return mixed


class Growing(nn.Module):
    """Gives the next module more than fp16 holds, if it may."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1e5


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), Scores(), nn.Linear(16, 4))


def dtypes(model: Any) -> list[torch.dtype]:
    with torch.autocast("cpu", torch.bfloat16):
        return [model[:at](X).dtype for at in range(1, len(model) + 1)]


def test_an_island_computes_in_fp32_whatever_is_around() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16)), nn.Linear(16, 4))
    half, single = torch.bfloat16, torch.float32
    assert dtypes(model) == [half, half, half]
    keep_in_fp32(model, ["1"], "cpu")
    assert dtypes(model) == [half, single, half]
    with torch.autocast("cpu", torch.bfloat16):
        model(X).sum().backward()
    assert model[0].weight.grad is not None
    for copied in (copy.deepcopy(model), again(model)):
        assert dtypes(copied) == [half, single, half]
        island: Any = vars(copied[1])["forward"]
        assert island.forward.__self__ is copied[1], "of the copy"
    keep_in_fp32(model, ["1"], "cpu")
    assert not isinstance(vars(model[1])["forward"].forward, Island), "once"
    keep_in_fp32(model, ["0"], "cpu")
    assert dtypes(model) == [single, half, half]
    keep_in_fp32(model, [], "cpu")
    assert dtypes(model) == [half, half, half]
    assert "forward" not in {key for one in model.modules() for key in vars(one)}
    keep_in_fp32(model, ["0", "9"], "cpu")  # another model
    assert dtypes(model) == [half, half, half]


def again(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_forward_of_somebody_else_is_put_back() -> None:
    model: Any = nn.Sequential(nn.Linear(16, 16))

    def other(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    model[0].forward = other
    keep_in_fp32(model, ["0"], "cpu")
    assert torch.equal(model(X), 2 * X)
    keep_in_fp32(model, [], "cpu")
    assert model[0].forward is other


def test_an_island_is_compiled_in_one_graph() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    keep_in_fp32(model, ["1"], "cpu")
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(X), model(X))


def report(*faults: Fault, limits: tuple[Fault, ...] = ()) -> Report:
    return Report("cpu", "fp16", faults, 1, 0.0, (), limits)


def fault(module: str, kind: str = "overflow", error: float = 1.0) -> Fault:
    return Fault(module, "Linear", kind, "output", "off", error, 0.1)


def test_the_fewest_modules_are_looked_for() -> None:
    asked = []

    def verified(names: tuple[str, ...]) -> Report:
        asked.append(names)
        if not names:
            rounds = fault("d", "rounds", 0.2), fault("e", "rounds", 0.05)
            return report(fault("a.b"), fault("a.b.c"), fault("f", "wrong"), limits=rounds)
        return report(*([fault("g")] if "g" not in names else []))

    assert islands(verified) == ("a.b", "d", "g")
    assert asked == [(), ("a.b", "d"), ("a.b", "d", "g")]
    assert islands(lambda names: report()) == ()
    assert islands(lambda names: report(fault("a"), fault(""))) == ("",)
    endless = islands(lambda names: report(fault(f"m{len(names)}")))
    assert len(endless) == 8
    assert is_inside("a.b.c", ["a.b"])
    assert is_inside("a", [""])
    assert not is_inside("a.b", ["a.b"])
    assert not is_inside("a.bc", ["a.b"])
    assert not is_inside("", [""])


def test_what_16_bits_do_not_hold_is_kept_in_fp32() -> None:
    model = network()
    with play("t4", live=True):
        plain = DeviceContext(precision="fp16")
        assert not plain.verify(model, X).ok
        ctx = plain.with_fp32_modules(model, X)
        assert ctx.plan.fp32_modules == ("1",)
        assert ctx.verify(model, X).ok
        assert "Kept in fp32: 1; fp16 does not hold them." in ctx.explain()
        assert "Kept in fp32" not in plain.explain()
        assert ctx.agreed().plan.fp32_modules == ("1",)
        there, x = ctx.to(copy.deepcopy(model)), ctx.to(X)
        with ctx.autocast():
            assert there(x).isfinite().all()
            assert there[:2](x).dtype is torch.float32
        there = plain.to(there)
        with plain.autocast():
            assert not there(x).isfinite().all()
        grown = nn.Sequential(Growing(), nn.Linear(16, 16), Growing(), nn.LayerNorm(16))
        assert plain.with_fp32_modules(grown, 1 + X.abs()).plan.fp32_modules == ("1", "2")
        whole = plain.with_fp32_modules(Scores(), X)
        assert (whole.plan.name, whole.plan.fp32_modules) == ("fp32", ())
        assert whole.plan.reason == "fp16 does not hold what the model itself computes"
        fine = DeviceContext(precision="fp32")
        assert fine.with_fp32_modules(model, X).plan == fine.plan


def test_an_island_that_is_wrong_is_found() -> None:
    model = network()
    planted.plant_in(model[1].q, planted.after(lambda y, _: y * 1.0001))
    with play("t4", live=True):
        ctx = DeviceContext(precision="fp16")
        assert {one.module for one in ctx.verify(model, X).faults} == {"1"}, "fp16 hides it"
        ctx = ctx.with_fp32_modules(network(), X)
        assert {one.module for one in ctx.verify(model, X).faults} == {"1.q"}, "it is in fp32 now"


def test_a_plan_that_is_kept_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTABLE_AMP_CACHE", str(tmp_path))
    keep("key", PrecisionPlan("tuned", torch.float16, "", fp32_modules=("a", "b.c")))
    kept = recall("key")
    assert kept is not None
    assert kept.fp32_modules == ("a", "b.c")


def tuned(model: nn.Module, batch: Any = X, precision: str = "auto", **options: Any) -> Any:
    return DeviceContext(precision=precision).tuned(model, batch, cache=False, **options).plan


@pytest.mark.parametrize("train", [True, False])
def test_tuned_measures_16_bits_with_modules_in_fp32(train: bool) -> None:
    with play("t4", live=True):
        plan = tuned(network().train(train), precision="fp16")
    assert (plan.name, plan.fp32_modules) == ("fp16", ("1",))
    assert any(line.startswith("fp16 contiguous but for 1: ") for line in plan.evidence)


def images() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    return model, torch.randn(6, 3, 8, 8)


def quick(monkeypatch: pytest.MonkeyPatch, *order: str) -> None:
    """The race is decided: these are faster, the first the fastest."""

    def race(runs: list[Any], clock: Any) -> None:
        for run in runs:
            name = run.candidate.name
            seconds = 0.1 * (1 + order.index(name)) if name in order else 10.0
            run.candidate.seconds += [seconds] * 5
            run.shares += [1.0]
        clock.warmed(1)

    monkeypatch.setattr(tuning, "_race", race)


def test_what_is_wrong_does_not_win(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch, "fp32 channels_last")
    model, batch = images()
    assert tuned(model, batch).memory_format is torch.channels_last

    def wrong(y: torch.Tensor, _: Any) -> torch.Tensor:
        last = y.is_contiguous(memory_format=torch.channels_last)
        return planted.backward(y, lambda g: g * (1.005 if last else 1.0))

    planted.plant_in(model[0], planted.after(wrong))
    plan = tuned(model, batch)
    assert plan.memory_format is torch.contiguous_format
    assert plan.reason.endswith("; 5 calls of modules replayed, right")
    (told,) = (line for line in plan.evidence if line.startswith("fp32 channels_last: out"))
    assert "out, replay finds it wrong: 0 (Planted): gradient of " in told
    assert "out, replay" not in "".join(tuned(model.eval(), batch).evidence), "nobody trains"


def test_a_device_that_is_wrong_in_all_is_refused() -> None:
    """Which fp32 on the same device would not show."""
    model, batch = images()
    planted.plant_in(model[1], planted.after(lambda y, _: y * 1.005))
    with pytest.raises(RuntimeError, match=r"fp32 contiguous: out, replay finds it wrong: 1 \(Pl"):
        tuned(model, batch)


def test_products_in_tf32_are_told_and_accepted() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    planted.plant_in(model[0], planted.shortened(13))
    plan = tuned(model)
    assert plan.name == "fp32"
    assert "3 calls of modules replayed, right, but products of fp32 are taken in TF32" in (
        plan.reason
    )


def test_what_cannot_be_replayed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) != 6:
                raise ValueError("six samples, always")
            made: torch.Tensor = self.linear(x)
            return made

    six = torch.randn(6, 16)
    assert tuned(Whole().train(), six).reason.endswith(
        "; not replayed: ValueError: six samples, always"
    )
    monkeypatch.setattr(proof, "MOST_PARAMETERS", 10)
    planted_in = nn.Linear(16, 4)
    planted.plant_in(planted_in, planted.after(lambda y, _: y * 1.005))
    plan = tuned(planted_in, six)
    assert plan.reason.endswith("; not replayed: 68 parameters in float64")
    with play("t4", live=True), pytest.raises(RuntimeError, match="fp16 contiguous: out, its loss"):
        tuned(network(), precision="fp16")
