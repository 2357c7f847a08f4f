"""ctx.tuned: what it measures, what it leaves alone, and what it keeps."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import os
import re
import subprocess
import sys
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from portable_amp import (
    DeviceContext,
    PrecisionFallbackWarning,
    PrecisionPlan,
    UnsupportedPrecisionError,
    choose,
    distributed,
    rng_state,
    tuning,
)
from portable_amp.backends import backend_for
from portable_amp.copies import mean_square
from portable_amp.distributed import of_rank_0
from portable_amp.plan_cache import cache_folder, keep, numeric_modes, recall, signature
from portable_amp.testing import machine
from portable_amp.tuning import Candidate, _Result, decide, differs, gain, tune
from support import playing


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PORTABLE_AMP_CACHE", str(tmp_path / "of/mine" / "plans"))
    return tmp_path / "of/mine" / "plans"


class Clock:
    """Stands for the module `time`: a millisecond passes at each look, and what a step says."""

    def __init__(self) -> None:
        self.now, self.idle, self.tick = 0.0, 0.0, 1e-3
        self.steps: Counter[str] = Counter()

    def perf_counter(self) -> float:
        self.now += self.tick
        return self.now

    def thread_time(self) -> float:
        return self.now - self.idle

    def get_clock_info(self, name: str) -> Any:
        return type("", (), {"resolution": 1e-9})

    def __deepcopy__(self, memo: Any) -> Clock:
        return self


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(tuning, "time", fake)
    return fake


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def context(precision: str = "auto") -> DeviceContext:
    return DeviceContext("cpu", precision=precision)


def test_it_measures_every_candidate_and_says_so() -> None:
    tuned = context().tuned(network(), IMAGES)
    assert tuned.plan.request == "tuned"
    assert [line.split(":")[0] for line in tuned.plan.evidence][:2] == [
        "fp32 contiguous",
        "bf16 contiguous",
    ]
    assert any("channels_last" in line for line in tuned.plan.evidence)
    assert all(" ms" in line or "out, " in line for line in tuned.plan.evidence)
    assert all(line in tuned.explain() for line in tuned.plan.evidence)
    assert tuned.agreed() is tuned


def test_a_precision_that_was_asked_for_is_kept() -> None:
    plain = context("fp32").tuned(network(), IMAGES)
    assert [line.split(":")[0] for line in plain.plan.evidence] == [
        "fp32 contiguous",
        "fp32 channels_last",
    ]
    assert (plain.plan.name, plain.plan.request) == ("fp32", "tuned fp32")
    assert plain.agreed() is plain
    assert plain.tuned(network(), IMAGES, cache=False).plan.request == "tuned fp32"
    assert context("fp32").tuned(network(), IMAGES).plan.request == "tuned fp32"  # kept
    assert context().tuned(network(), IMAGES).plan.request == "tuned"
    with playing("cpu-avx512bf16"):
        half = DeviceContext("cpu", precision="bf16").tuned(network(), IMAGES)
        assert half.plan.evidence[0] == "fp32 contiguous: out, bf16 was asked for"
        assert (half.plan.name, half.plan.request) == ("bf16", "tuned bf16")
        with pytest.raises(RuntimeError, match="bf16 contiguous: out, ValueError: not in 16 bits"):
            DeviceContext("cpu", precision="bf16").tuned(Fussy("fails"), torch.ones(3, 4))


@pytest.mark.parametrize(
    ("key", "change", "names"),
    [
        ("a100", {}, "fp32 bf16 fp16"),
        ("a100", {"grad_scaler": False}, "fp32 bf16"),
        ("a100", {"autocast": False, "grad_scaler": False}, "fp32"),
        ("rx6800", {}, "fp32 fp16"),  # bf16 is absent
        ("t4", {}, "fp32 bf16 fp16"),  # bf16 is emulated, and may be faster all the same
        ("cpu-avx512bf16", {}, "fp32 bf16"),  # fp16 is emulated
    ],
)
def test_what_is_worth_a_measurement(key: str, change: dict[str, Any], names: str) -> None:
    can = dataclasses.replace(machine(key).capabilities, **change)
    found = [one.name for one in tuning.candidates(nn.Linear(4, 2), can)]
    assert found == [f"{name} contiguous" for name in names.split()]
    images = [one.name for one in tuning.candidates(nn.Conv2d(3, 8, 3), can)]
    assert images == found + [name.replace("contiguous", "channels_last") for name in found]


def test_a_model_without_images_has_one_layout() -> None:
    tuned = context().tuned(nn.Linear(4, 2), torch.randn(3, 4))
    assert not any("channels_last" in line for line in tuned.plan.evidence)


@pytest.mark.parametrize("training", [True, False])
def test_model_gradients_and_random_state_stay_bit_for_bit(training: bool) -> None:
    model = network().train(training)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model.state_dict())
    strides = {name: one.stride() for name, one in model.named_parameters()}
    torch.manual_seed(3)
    state = rng_state()["torch"]
    context().tuned(model, IMAGES, cache=False)
    assert torch.equal(rng_state()["torch"], state)
    for name, one in model.state_dict().items():
        assert torch.equal(one, before[name]), name
    assert {name: one.stride() for name, one in model.named_parameters()} == strides
    assert all(module.training is training for module in model.modules())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[6].weight.grad is None


class Fussy(nn.Module):
    """Fails, or computes something else, under autocast."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(4, 2), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            if self.how == "fails":
                raise ValueError("not in 16 bits")
            if self.how == "memory":
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")
            if self.how == "nan":
                return self.linear(x) * float("nan")
            return self.linear(x) * (1.5 if self.how == "loss" else 1.0)
        return self.linear(x)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("fails", "bf16 contiguous: out, ValueError: not in 16 bits"),
        ("memory", "bf16 contiguous: out, RuntimeError: [enforce fail] DefaultCPUAllocator"),
        ("nan", "bf16 contiguous: out, its loss or gradient is infinite or NaN"),
        ("loss", "bf16 contiguous: out, its loss is 1"),
    ],
)
def test_what_fails_or_computes_something_else_is_out(how: str, told: str) -> None:
    tuned = context().tuned(Fussy(how), torch.ones(3, 4))
    assert tuned.plan.name == "fp32"
    assert tuned.plan.evidence[1].startswith(told)


def test_a_model_that_fails_in_fp32_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="cannot be measured: RuntimeError"):
        context().tuned(nn.Linear(4, 2), torch.ones(3, 5))


class Drifting(nn.Module):
    """Off fp32 by 4 % in 16 bits, and by 8 % with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.frozen = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.frozen.training
        last = x.is_contiguous(memory_format=torch.channels_last)
        half = torch.is_autocast_enabled("cpu")
        return self.frozen(self.convolution(x)).float() * (1.0 + 0.02 * half * (1 + last))


def test_each_is_compared_with_fp32_and_modes_of_its_parts_are_kept() -> None:
    model = Drifting().train()
    model.frozen.eval()
    evidence = context().tuned(model, IMAGES).plan.evidence
    assert " ms" in evidence[1]
    assert " ms" in evidence[2]
    assert evidence[3].startswith("bf16 channels_last: out, its loss is 8")


def measured(name: str, seconds: float, out: str = "") -> Candidate:
    dtype, layout = name.split()
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return Candidate(kinds[dtype], layout, out, [seconds] * 3)


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ([("fp32 contiguous", 1.0), ("bf16 contiguous", 0.5)], "bf16 contiguous"),
        ([("fp32 contiguous", 1.0), ("bf16 contiguous", 0.99)], "fp32 contiguous"),
        ([("fp32 contiguous", 1.0), ("bf16 channels_last", 0.2)], "bf16 channels_last"),
        ([("fp32 contiguous", 1.0), ("bf16 contiguous", 0.1, "wrong")], "fp32 contiguous"),
    ],
)
def test_the_fastest_wins_and_the_simple_one_where_it_makes_no_odds(
    found: list[Any], best: str
) -> None:
    plan = decide([measured(*one) for one in found])
    layout = "channels_last" if plan.memory_format is torch.channels_last else "contiguous"
    assert f"{plan.name} {layout}" == best


def result(loss: float, *gradients: list[float]) -> _Result:
    return _Result(
        loss,
        {
            name: torch.tensor(one)
            for name, one in zip("ab"[: len(gradients)], gradients, strict=True)
        },
    )


@pytest.fixture
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is replayed, where steps are counted."""
    monkeypatch.setattr(tuning.Proof, "judge", lambda *_: ("", "right"))


def test_what_differs_from_fp32() -> None:
    one = result(1.0, [1.0, 0.0], [0.1, 0.0])
    assert differs(one, None, torch.float32) == ""
    for dtype, loss, whole, part in (
        (torch.bfloat16, 0.04, 0.15, 0.04),
        (torch.float16, 0.004, 0.02, 0.008),
        (torch.float32, 0.0009, 0.009, 0.004),
    ):
        near = result(1.0 + loss, [1.0, whole], [0.1, part])
        assert differs(near, one, dtype) == ""
        assert "its loss is" in differs(result(1 + 2 * loss, *([1.0, 0.0], [0.1, 0.0])), one, dtype)
        assert "its gradient is" in differs(result(1.0, [1.0, 2 * whole], [0.1, 0.0]), one, dtype)
        # Twice as long is as wrong as another direction.
        assert "its gradient is" in differs(result(1.0, [2.0, 0.0], [0.1, 0.0]), one, dtype)
        assert "its gradient of b is" in differs(
            result(1.0, [1.0, 0.0], [0.1, 1.5 * part]), one, dtype
        )
    assert "6.0% off" in differs(result(1.06, [1.0, 0.0], [0.1, 0.0]), one, torch.bfloat16)
    tiny = result(1.0, [1.0, 0.0], [0.001, 0.0])
    assert differs(result(1.0, [1.0, 0.0], [0.0, 0.001]), tiny, torch.float32) == ""
    assert "NaN" in differs(result(float("nan"), [1.0]), one, torch.bfloat16)
    assert "NaN" in differs(result(1.0, [1.0, float("inf")], [0.1]), None, torch.float32)
    assert "other parameters" in differs(result(1.0, [1.0, 0.0]), one, torch.bfloat16)
    none = result(1.0, [0.0, 0.0], [0.0, 0.0])
    assert differs(none, none, torch.float32) == ""
    assert "its gradient is" in differs(one, none, torch.float32)


def test_a_layout_with_a_known_fault_is_out_untried() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1, 2), nn.ReLU(), nn.Conv2d(8, 16, 3))
    tried: list[bool] = []
    model.register_forward_pre_hook(
        lambda _, inputs: tried.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    evidence = context().tuned(model.train(), IMAGES, cache=False).plan.evidence
    assert not any(tried)
    assert [line.partition(": out, 0, a 1x1")[0] for line in evidence if "oneDNN#6035" in line] == [
        "fp32 channels_last",
        "bf16 channels_last",
    ]
    context().tuned(model.eval(), IMAGES, cache=False)  # the fault is the backward pass's
    assert any(tried)
    for fine in (nn.Conv2d(16, 8, 1, 2), nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, 2)):
        assert backend_for("cpu").channels_last_fault(fine.train()) == ""
    assert "pytorch#175189" in backend_for("mps").channels_last_fault(model)


@pytest.mark.parametrize(
    ("per_sample", "chunk"),
    [
        ({}, None),
        ({8: 1.0, 4: 0.99, 2: 2.0}, 8),
        ({8: 1.0, 4: 0.5, 2: 0.6, 1: 0.49}, 4),
        ({8: 1.0, 4: 0.97, 2: 0.95}, 2),
    ],
)
def test_the_largest_chunk_wins_where_it_makes_no_odds(
    per_sample: dict[int, float], chunk: int | None
) -> None:
    rows = {size: [seconds] * 3 for size, seconds in per_sample.items()}
    plan = decide([measured("fp32 contiguous", 1.0)], rows)
    assert plan.chunk == chunk
    assert any("samples per second" in line for line in plan.evidence) == bool(per_sample)


class Crowded(nn.Module):
    """Slow with more than two samples, and unable to take a single one."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.linear, self.clock = nn.Linear(4, 2), clock

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:
            raise ValueError("BatchNorm-like: more than one value is needed")
        self.clock.now += 0.05 * (len(x) > 2) * len(x)
        return self.linear(x)


def test_inference_learns_its_chunk_and_training_does_not(clock: Clock) -> None:
    found = context().tuned(Crowded(clock).eval(), torch.ones(8, 4), cache=False).plan
    assert found.chunk == 2
    assert "8: " in found.evidence[-1]
    assert " 1: " not in found.evidence[-1]
    assert context().tuned(Crowded(clock).train(), torch.ones(8, 4), cache=False).plan.chunk is None
    assert context().tuned(Crowded(clock).eval(), torch.ones(8, 4)).plan.chunk == 2
    assert context().tuned(Crowded(clock).eval(), torch.ones(8, 4)).plan.chunk == 2  # kept


def test_compiling_is_a_candidate_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(nn.Module, "compile", faster, raising=True)
    model = Crowded(clock).eval()
    assert not context().tuned(model, torch.ones(3, 4)).plan.compiled
    plan = context().tuned(model, torch.ones(3, 4), compile=True).plan  # not the one that was kept
    assert plan.compiled
    assert "fp32 contiguous compiled: " in plan.evidence[-2]
    assert type(model) is Crowded


def faster(model: nn.Module) -> None:
    """As `nn.Module.compile`: in place."""
    model.__class__ = Swift


class Swift(Crowded):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_the_winner_and_its_compiled_self_are_compared_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    races = 0

    def race(runs: list[Any], clock: Any) -> None:
        nonlocal races
        races += 1
        clock.warmed(1)
        for run in runs:  # in the second race the machine is ten times as slow
            bf16 = run.candidate.dtype is torch.bfloat16
            run.candidate.seconds[:] = [(1.0 if bf16 else 2.0) * 10.0 ** (races - 1)] * 3
            run.shares[:] = [1.0]

    monkeypatch.setattr(tuning, "_race", race)
    monkeypatch.setattr(nn.Module, "compile", lambda model: None)
    with playing("cpu-avx512bf16"):
        ctx = DeviceContext("cpu")
        plan = ctx.tuned(nn.Linear(4, 2).eval(), torch.ones(3, 4), cache=False, compile=True).plan
    assert (races, plan.name, plan.compiled) == (2, "bf16", False)


def test_a_compiler_that_fails_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: nn.Module) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(nn.Module, "compile", fails)
    plan = context().tuned(nn.Linear(4, 2), torch.ones(3, 4), cache=False, compile=True).plan
    assert not plan.compiled
    assert (
        plan.evidence[-1] == f"{plan.name} contiguous compiled: out, RuntimeError: no C++ compiler"
    )


def test_a_tuned_context_lays_out_modules_and_images() -> None:
    plan = decide([measured("fp32 contiguous", 1.0), measured("bf16 channels_last", 0.1)])
    ctx = context()
    ctx.__dict__["plan"] = plan
    model, (images, labels) = ctx.to(network()), ctx.to((IMAGES, torch.zeros(2)))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, IMAGES)
    assert labels.is_contiguous()


def test_what_was_found_is_kept_and_found_again(cache: Path) -> None:
    calls = 0

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return mean_square(model, batch)

    model, batch = nn.Linear(4, 2), torch.ones(3, 4)
    first = context().tuned(model, batch, loss=loss)
    (kept,) = cache.glob("*.json")
    measured_with = calls
    assert measured_with
    again = context().tuned(model, batch, loss=loss)
    assert calls == measured_with
    assert (again.plan.dtype, again.plan.evidence) == (first.plan.dtype, first.plan.evidence)
    assert "kept" in again.plan.reason
    assert again.tuned(model, batch, loss=loss).plan == again.plan  # open to all, as before
    assert calls == measured_with
    context().tuned(model, torch.ones(5, 4), loss=loss)
    assert calls > measured_with
    assert len([*cache.glob("*.json")]) == 2
    for damage in ("", "{", "[]", '{"dtype": "fp8"}'):
        kept.write_text(damage, "utf-8")
        before = calls
        context().tuned(model, batch, loss=loss)
        assert calls > before


def test_a_cache_that_cannot_be_written_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PORTABLE_AMP_CACHE", str(tmp_path / "file" / "plans"))
    assert context().tuned(nn.Linear(4, 2), torch.ones(3, 4)).plan.request == "tuned"


def test_a_full_disk_leaves_nothing_half_written(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert context().tuned(nn.Linear(4, 2), torch.ones(3, 4)).plan.request == "tuned"
    assert [*cache.iterdir()] == []


def test_rank_0_decides_and_fails_for_all(tmp_path: Path) -> None:
    assert of_rank_0(lambda: 3) == 3
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/peers", rank=0, world_size=1
    )
    try:
        assert of_rank_0(lambda: 4) == 4
        with pytest.raises(RuntimeError, match="rank 0 failed: ZeroDivisionError"):
            of_rank_0(lambda: 1 // 0)
    finally:
        torch.distributed.destroy_process_group()


class Scripted(nn.Module):
    """Takes as long as the script says: of which candidate, and at which of its steps."""

    def __init__(self, clock: Clock, seconds: Callable[[str, int], float]) -> None:
        super().__init__()
        self.linear, self.clock, self.seconds = nn.Conv2d(3, 2, 1), clock, seconds
        self.steps: Counter[str] = Counter()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = x.is_contiguous(memory_format=torch.channels_last)
        name = "bf16" if torch.is_autocast_enabled("cpu") else "fp32"
        name += " channels_last" if last else " contiguous"
        self.clock.now += self.seconds(name, self.clock.steps[name])
        self.clock.steps[name] += 1
        return self.linear(x)


def scripted(
    clock: Clock, seconds: Callable[[str, int], float], *, train: bool = True, **options: Any
) -> PrecisionPlan:
    """The plan for a model that follows the script; steps 0 and 1 are the check and the warm-up."""
    model = Scripted(clock, seconds).train(train)
    return context().tuned(model, IMAGES, **{"cache": False, "budget_s": 1e6, **options}).plan


def name_of(plan: PrecisionPlan) -> str:
    last = plan.memory_format is torch.channels_last
    return f"{plan.name} {'channels_last' if last else 'contiguous'}"


EACH = ("fp32 contiguous", "bf16 contiguous", "fp32 channels_last", "bf16 channels_last")
MEASURED = 2  # the first step of training that counts


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("quick", EACH[1:])
@pytest.mark.usefixtures("unproved")
def test_what_is_twice_as_fast_is_found(clock: Clock, quick: str, train: bool) -> None:
    clock.tick = 0.0
    plan = scripted(clock, lambda name, step: 0.1 if name == quick else 0.2, train=train)
    assert (name_of(plan), plan.settled) == (quick, True)
    assert plan.reason == (
        "measured: 100 ms, 2.00 times as fast (2.00 to 2.00) as fp32 contiguous; right"
    )
    assert f"{quick}: 100 ms, 2.00 times as fast (2.00 to 2.00)" in plan.evidence


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("stalled", EACH)
@pytest.mark.parametrize("at", range(1, 6))
def test_a_stall_neither_wins_nor_is_told_as_a_gain(
    clock: Clock, stalled: str, at: int, train: bool
) -> None:
    def seconds(name: str, step: int) -> float:
        return (0.1 if name == EACH[0] else 0.11) * (110 if (name, step) == (stalled, at) else 1)

    plan = scripted(clock, seconds, train=train)
    assert name_of(plan) == "fp32 contiguous"
    told = " ".join([plan.reason, *plan.evidence])
    assert all(float(one) < 2 for one in re.findall(r"([\d.e+]+) times as fast", told)), told
    assert ("noise hides the answer" in plan.reason) is not plan.settled


@settings(max_examples=60)
@given(
    truth=st.tuples(*[st.sampled_from([0.5, 0.8, 1.0, 1.02, 1.2, 3.0])] * 4),
    stalls=st.tuples(*[st.tuples(st.integers(0, 12), st.floats(1, 100))] * 4),
    jitter=st.lists(st.floats(0.99, 1.01), min_size=5, max_size=5),
    drift=st.floats(-0.01, 0.01),
    train=st.booleans(),
)
def test_whatever_noise_the_plan_kept_is_the_plain_one_or_truly_faster(
    truth: tuple[float, ...],
    stalls: tuple[tuple[int, float], ...],
    jitter: list[float],
    drift: float,
    train: bool,
) -> None:
    clock = Clock()
    took = dict(zip(EACH, truth, strict=True))
    stall = dict(zip(EACH, stalls, strict=True))

    def seconds(name: str, step: int) -> float:
        at, by = stall[name]
        total = sum(clock.steps.values())
        slower = (by if step == at else 1) * jitter[total % 5] * (1 + drift) ** total
        return took[name] * slower

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "time", clock)
        kept = name_of(scripted(clock, seconds, train=train))
    assert kept == EACH[0] or took[kept] < took[EACH[0]], (kept, took)


@pytest.mark.parametrize("by", [0.97, 1.03])
def test_a_machine_that_becomes_faster_or_slower_favours_no_candidate(
    clock: Clock, by: float
) -> None:
    plan = scripted(clock, lambda name, step: 1.0 * by ** sum(clock.steps.values()))
    assert name_of(plan) == "fp32 contiguous"
    assert "noise" not in plan.reason or not plan.settled


def noisy(name: str, step: int) -> float:
    return 0.1 if name == EACH[0] or step % 2 else 0.01


def test_where_noise_hides_the_answer_it_is_said_and_not_kept(clock: Clock, cache: Path) -> None:
    plan = scripted(clock, noisy, cache=True)
    assert (name_of(plan), plan.settled) == ("fp32 contiguous", False)
    assert "noise hides the answer (bf16 contiguous may be faster than fp32 con" in plan.reason
    assert re.fullmatch(r"bf16 contiguous: [\d.]+ ms, too noisy to compare", plan.evidence[1])
    assert not [*cache.glob("*")]
    assert scripted(clock, lambda name, step: 0.1, cache=True).settled
    assert len([*cache.glob("*.json")]) == 1


def test_a_busy_processor_settles_nothing(clock: Clock, cache: Path) -> None:
    def seconds(name: str, step: int) -> float:
        took = 0.1 if name == "bf16 contiguous" else 0.2
        clock.idle += took * 0.3
        return took

    plan = scripted(clock, seconds, cache=True)
    assert (name_of(plan), plan.settled) == ("fp32 contiguous", False)
    assert "(the processor ran other programs for 30% of a step)" in plan.reason
    assert not [*cache.glob("*")]


@pytest.mark.parametrize(
    ("base", "other", "told"),
    [
        ([2.0], [1.0], (2.0, 0.0, math.inf)),
        ([], [], (1.0, 0.0, math.inf)),
        ([2.0, 2.0], [1.0, 1.0, 7.0], (2.0, 2.0, 2.0)),
        ([2.0] * 5, [1.0, 1.0, 1.0, 1.0, 0.5], (2.0, 2.0, 4.0)),
        ([2.0] * 9, [1.0] * 8 + [0.01], (2.0, 2.0, 2.0)),
        ([2.0] * 8, [1.0] * 7 + [4.0], (2.0, 0.5, 2.0)),
    ],
)
def test_gains_are_paired(base: list[float], other: list[float], told: tuple[float, ...]) -> None:
    found = gain(base, other)
    assert (found.median, found.low, found.high) == pytest.approx(told)


def test_a_gain_is_for_good_and_never_more_than_a_million() -> None:
    found = gain([1e9] * 5, [1e-9] * 5)
    assert found.median == found.low == found.high == pytest.approx(1e6, rel=1e-9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.median = 1.0  # type: ignore[misc]


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), max_size=25))
def test_the_median_is_in_its_interval_and_the_reverse_comparison_is_the_inverse(
    pairs: list[tuple[float, float]],
) -> None:
    one, two = [a for a, _ in pairs], [b for _, b in pairs]
    there, back = gain(one, two), gain(two, one)
    assert there.low <= there.median * (1 + 1e-9)
    assert there.median <= there.high * (1 + 1e-9)
    assert there.median * back.median == pytest.approx(1)
    assert not (there.clear and back.clear)


def test_two_rounds_that_disagree_tell_nothing() -> None:
    assert not gain([2.0, 2.0], [1.0, 1.5]).clear
    assert gain([2.0, 2.0], [1.0, 1.01]).clear
    assert not gain([2.0, 2.0, 2.0], [1.0, 1.0, 2.1]).clear
    wide = gain([2.0] * 5, [1.9, 1.0, 0.5, 0.2, 0.1])  # always faster, nobody knows by how much
    assert (wide.low > 1, wide.clear, str(wide)) == (True, False, "too noisy to compare")


@pytest.mark.usefixtures("unproved")
def test_the_seconds_it_may_take(clock: Clock) -> None:
    # Not one round begins after budget_s: check, warm-up, and the round that always is.
    scripted(clock, lambda name, step: 1.0, budget_s=0)
    assert set(clock.steps.values()) == {MEASURED + 1}
    clock.steps.clear()
    scripted(clock, lambda name, step: 1.0, budget_s=10)  # 8 for check and warm-up
    assert set(clock.steps.values()) == {MEASURED + 1}
    clock.steps.clear()
    start = clock.now
    scripted(clock, lambda name, step: 1.0)
    assert tuning.MOST_STEPS < clock.now - start < 30
    assert set(clock.steps.values()) == {MEASURED + 4}
    start = clock.now
    clock.steps.clear()
    scripted(clock, lambda name, step: 1.0, train=False)
    assert tuning.MOST_STEPS_BEFORE_CHUNKS < clock.now - start < 30
    assert {clock.steps[name] for name in EACH[1:]} == {4}  # the check, and three rounds
    clock.steps.clear()
    clock.tick = 0.0  # no time passes
    scripted(clock, lambda name, step: 0.0)
    assert set(clock.steps.values()) == {MEASURED + tuning.ROUNDS}
    clock.steps.clear()
    scripted(clock, lambda name, step: 0.004)  # 24 steps are less than a fifth of a second
    assert 0.2 < sum(clock.steps.values()) * 0.004 < 0.25


@pytest.mark.parametrize(("before", "rounds"), [(7.44, 2), (7.46, 1)])
@pytest.mark.usefixtures("unproved")
def test_a_minute_is_what_it_may_take_by_default(clock: Clock, before: float, rounds: int) -> None:
    clock.tick = 0.0  # check and warm-up of four candidates, and one round: 60 s
    model = Scripted(clock, lambda name, step: before if step < MEASURED else 0.1)
    context().tuned(model, IMAGES, cache=False)
    assert clock.steps[EACH[0]] == MEASURED + rounds


@pytest.mark.usefixtures("unproved")
def test_what_is_clearly_slower_is_measured_no_more(clock: Clock) -> None:
    slow = dict(zip(EACH, (0.1, 0.3, 0.1, 0.13), strict=True))
    scripted(clock, lambda name, step: slow[name])
    assert clock.steps["bf16 contiguous"] == clock.steps["bf16 channels_last"] == MEASURED + 2
    assert clock.steps["fp32 contiguous"] == clock.steps["fp32 channels_last"] > MEASURED + 4
    clock.steps.clear()
    scripted(clock, lambda name, step: 1.0 if name == EACH[0] else 0.2)
    assert clock.steps[EACH[0]] > MEASURED + 4  # all the others are paired with it


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.usefixtures("unproved")
def test_the_first_steps_do_not_count(clock: Clock, train: bool) -> None:
    clock.tick, first = 0.0, MEASURED if train else 1

    def seconds(name: str, step: int) -> float:
        return 5.0 if name == EACH[0] and step < first else 0.1

    plan = scripted(clock, seconds, train=train)
    assert plan.evidence[0] == "fp32 contiguous: 100 ms"
    assert plan.evidence[1] == "bf16 contiguous: 100 ms, 1.00 times as fast (1.00 to 1.00)"


def test_the_first_pass_of_a_chunk_does_not_count(clock: Clock) -> None:
    seen: set[int] = set()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        size = len(batch)
        clock.now += 5.0 if size not in seen else 0.1 * size if size > 1 else 0.01
        seen.add(size)
        return mean_square(model, batch)

    model = nn.Linear(4, 2).eval()
    plan = context().tuned(model, torch.ones(4, 4), loss=loss, cache=False).plan
    assert plan.chunk == 1
    assert plan.settled


def test_noise_hides_a_chunk(clock: Clock) -> None:
    calls = 0

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        clock.now += 0.1 * len(batch) if len(batch) == 4 or calls % 2 else 0.01
        return mean_square(model, batch)

    model = nn.Linear(4, 2).eval()
    plan = context().tuned(model, torch.ones(4, 4), loss=loss, cache=False).plan
    assert (plan.chunk, plan.settled) == (4, False)
    assert "samples in a pass may be faster than 4 samples in a pass" in plan.reason


@pytest.mark.usefixtures("unproved")
def test_the_device_is_waited_for_before_and_after_each_step(clock: Clock) -> None:
    events = ""

    def wait() -> None:
        nonlocal events
        events += "w"

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal events
        events += "s"
        return mean_square(model, batch)

    def look() -> float:
        nonlocal events
        events += "t"
        clock.now += 1e-3
        return clock.now

    clock.perf_counter = look  # type: ignore[method-assign]
    ctx = context()
    for training in (True, False):
        events = ""
        tune(
            nn.Linear(4, 2).train(training), torch.ones(2, 4), ctx.device, ctx.capabilities,
            loss=loss, budget_s=1.0, wait=wait, move=lambda value, layout: value,
        )  # fmt: skip
        (checked,) = re.findall(r"^(?:t?[sw]*?w)t?(?=wts)", events)
        timed = events[len(checked) :]
        assert events.count("s") > 10
        assert timed.count("s") == len(re.findall("wtswt", timed))


def test_a_plan_is_forgotten_on_request_and_never_written_unasked(
    clock: Clock, cache: Path
) -> None:
    def plan(**options: Any) -> tuple[PrecisionPlan, bool]:
        clock.steps.clear()
        quick = scripted(clock, lambda name, step: 0.1, **options)
        return quick, bool(clock.steps)

    plan(cache=False)
    assert not cache.exists()
    assert plan(cache=True)[1]
    (path,) = cache.iterdir()
    kept, measured = plan(cache=True)
    assert not measured
    assert f"kept from an earlier run in {str(path)!r}: delete it, or" in kept.reason
    stamp = path.read_bytes()
    path.write_bytes(stamp.replace(b"measured: ", b"invented: "))
    assert "invented" in plan(cache=True)[0].reason
    assert plan(cache=False)[1]
    assert b"invented" in path.read_bytes()
    assert plan(cache="renew")[1]
    assert b"invented" not in path.read_bytes()
    scripted(clock, noisy, cache="renew")  # what is no longer sure is gone
    assert not [*cache.iterdir()]
    with pytest.raises(ValueError, match="cache='always': True, False or 'renew' work here"):
        plan(cache="always")


@pytest.mark.parametrize(
    "change",
    [
        {"chunk": "4"}, {"chunk": 0}, {"chunk": True}, {"chunk": -2}, {"compiled": "no"},
        {"evidence": "text"}, {"dtype": ["fp32"]}, {"dtype": "fp8"}, {"layout": None},
        {"fp32_modules": "head"},
    ],
    ids=str,
)  # fmt: skip
def test_a_kept_plan_of_other_types_is_none(cache: Path, change: dict[str, Any]) -> None:
    good = {
        "request": "tuned", "dtype": "fp32", "layout": "contiguous", "reason": "", "evidence": [],
        "chunk": None, "compiled": False, "fp32_modules": [],
    }  # fmt: skip
    cache.mkdir(parents=True)
    (cache / "key.json").write_text(json.dumps(good))
    assert recall("key")
    (cache / "key.json").write_text(json.dumps({**good, **change}))
    assert recall("key") is None
    (cache / "key.json").write_text("[" * 100_000)
    assert recall("key") is None
    (cache / "key.json").write_bytes(b"\xff\xfe")
    assert recall("key") is None


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PORTABLE_AMP_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert context().tuned(nn.Linear(4, 2), torch.ones(3, 4)).plan.settled
    assert context().tuned(nn.Linear(4, 2), torch.ones(3, 4), cache="renew").plan.settled


def other_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return mean_square(model, batch) * 2


def key(
    change: Callable[[nn.Module], object] = lambda model: None, batch: Any = IMAGES, **options: Any
) -> str:
    model = network()
    change(model)
    given = {"loss": mean_square, **options}
    return signature(model, batch, given.pop("can", context().capabilities), **given)


class OtherReLU(nn.ReLU):
    pass


CHANGES: dict[str, Callable[[], str]] = {
    "a layer's class": lambda: key(lambda model: model.__setitem__(2, nn.GELU())),
    "a layer's own class": lambda: key(lambda model: model.__setitem__(2, OtherReLU())),
    "a stride": lambda: key(lambda model: setattr(model[0], "stride", (2, 2))),
    "a padding": lambda: key(lambda model: setattr(model[0], "padding", (0, 0))),
    "dropout": lambda: key(lambda model: setattr(model[3], "p", 0.1)),
    "a setting that no repr tells": lambda: key(lambda model: setattr(model[3], "how", "fast")),
    "a frozen weight": lambda: key(lambda model: model[0].weight.requires_grad_(False)),
    "the mode of one layer": lambda: key(lambda model: model[1].eval()),
    "the mode": lambda: key(lambda model: model.eval()),
    "weights channels last": lambda: key(lambda model: model.to(memory_format=torch.channels_last)),
    "weights in float64": lambda: key(lambda model: model.double()),
    "a layer's size": lambda: key(lambda model: model.__setitem__(6, nn.Linear(8, 4))),
    "the batch's size": lambda: key(batch=torch.ones(3, 3, 8, 8)),
    "the batch's dtype": lambda: key(batch=IMAGES.double()),
    "a sparse batch": lambda: key(batch=IMAGES.to_sparse()),
    "the batch's layout": lambda: key(batch=IMAGES.to(memory_format=torch.channels_last)),
    "another tensor": lambda: key(batch=(IMAGES, torch.ones(2))),
    "the loss": lambda: key(loss=other_loss),
    "the dtype": lambda: key(dtype=torch.float32),
    "compiling": lambda: key(compiled=True),
    "the device's name": lambda: key(can=dataclasses.replace(context().capabilities, name="B")),
    "its type": lambda: key(can=dataclasses.replace(context().capabilities, device_type="xpu")),
    "its facts": lambda: key(can=dataclasses.replace(context().capabilities, evidence=("x",))),
}


def test_the_key_is_that_of_the_same_model_in_another_process() -> None:
    script = "import test_tuning as t; print(t.key())"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    told = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    if torch.get_num_threads() == 1 or "OMP_NUM_THREADS" not in os.environ:
        assert told.stdout.strip() == key() == key()


def closing_over(held: Any) -> Callable[..., torch.Tensor]:
    return lambda model, batch: held(model, batch) if callable(held) else mean_square(model, batch)


class Scaled:
    def __init__(self, by: Any, and_by: Any = 1.0) -> None:
        self.by, self.and_by = by, and_by

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return mean_square(model, batch) * self.by

    def method(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return mean_square(model, batch)


class Halved(Scaled):
    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return mean_square(model, batch) / self.by


def nested(number: int) -> Callable[..., torch.Tensor]:
    scope: dict[str, Any] = {"mean_square": mean_square}
    exec(f"loss = lambda m, b: (lambda x: x * {number})(mean_square(m, b))", scope)
    return scope["loss"]  # type: ignore[no-any-return]


def by_default(model: nn.Module, batch: Any, *, by: float = 1.0) -> torch.Tensor:
    return mean_square(model, batch) * by


def written(module: str, what: str) -> Callable[..., torch.Tensor]:
    scope: dict[str, Any] = {"__name__": module}
    exec(f"def loss(model, batch): return {what}", scope)
    return scope["loss"]  # type: ignore[no-any-return]


LOSSES: dict[str, list[Any]] = {
    "a partial's arguments": [partial(by_default, by=1.0), partial(by_default, by=2.0)],
    "a partial's function": [partial(mean_square), partial(other_loss)],
    "a flag that it closes over": [closing_over(True), closing_over(False)],
    "a function that it closes over": [closing_over(mean_square), closing_over(other_loss)],
    "a partial in a closure": [closing_over(partial(by_default, by=by)) for by in (1.0, 2.0)],
    "a model that it closes over": [closing_over(nn.Linear(4, out)) for out in (2, 3)],
    "a setting of such a model": [closing_over(nn.CrossEntropyLoss(label_smoothing=by))
                                  for by in (0.0, 0.1)],
    "a tensor's shape": [closing_over(torch.ones(n)) for n in (2, 3)],
    "a nested function": [nested(1), nested(2)],
    "a setting of what is called": [Scaled(1.0), Scaled(2.0)],
    "which setting it is": [Scaled(1.0, 2.0), Scaled(2.0, 1.0)],
    **{f"a setting, {one!r} or {other!r}": [Scaled(one), Scaled(other)] for one, other in (
        (False, True), (1, 2), (1j, 2j), ("a", "b"), (b"a", b"b"), (None, [1]))},
    "the name of a partial's argument": [partial(by_default, by=1.0), partial(by_default, at=1.0)],
    "the class that it closes over": [closing_over(Scaled), closing_over(Halved)],
    "the class of what it closes over": [closing_over([1]), closing_over((1,))],
    "the module of a function": [written(module, "model(batch)") for module in "ab"],
    "the class of what is called": [Scaled(1.0), Halved(1.0)],
    "the class of a method's object": [Scaled(1.0).method, Halved(1.0).method],
    "a function that is not Python's": [closing_over(max), closing_over(min)],
}  # fmt: skip


@pytest.mark.parametrize("part", LOSSES)
def test_the_key_has_each_part_of_a_loss(part: str) -> None:
    one, other = LOSSES[part]
    assert key(loss=one) == key(loss=one)
    assert key(loss=one) != key(loss=other)


def test_the_key_is_the_same_for_the_same_loss_made_again() -> None:
    def counting() -> Callable[..., torch.Tensor]:
        calls, seen = 0, []

        def loss(model: nn.Module, batch: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            seen.append(loss)  # it holds itself
            return mean_square(model, batch)

        loss(network(), IMAGES)
        return loss

    first = counting()
    before = key(loss=first)
    first(network(), IMAGES)
    assert key(loss=first) == before == key(loss=counting())
    assert len({key(loss=closing_over(Scaled(1.0))) for _ in range(3)}) == 1
    logs: list[list[Any]] = [[], []]  # whose methods are told apart by their addresses alone
    assert len({key(loss=closing_over(log.append)) for log in logs}) == 1


@pytest.mark.parametrize("part", CHANGES)
def test_the_key_has_each_part(part: str) -> None:
    assert CHANGES[part]() != key()


class Named(nn.Module):
    """The same layers under other names, of which one is used."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name, held in zip(names, (nn.ReLU(), nn.Tanh()), strict=True):
            setattr(self, name, held)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x)  # type: ignore[no-any-return]


class Tanh(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh()


class Weights(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Parameter(torch.ones(2)))


def test_the_key_has_the_names_and_the_code_of_a_model() -> None:
    def of(model: nn.Module) -> str:
        return signature(model, IMAGES, context().capabilities, loss=mean_square)

    assert of(Named("one", "two")) == of(Named("one", "two")) != of(Named("two", "one"))
    assert of(Weights("one", "two")) != of(Weights("two", "one"))
    plain = of(Tanh())
    with pytest.MonkeyPatch.context() as patch:  # as a notebook's cell that is run again
        patch.setattr(Tanh, "forward", lambda self, x: x.sigmoid())
        assert of(Tanh()) != plain


def at(name: str) -> tuple[Any, str]:
    """What is set below torch, and the last part of its name."""
    *parts, last = name.split(".")
    where: Any = torch
    for part in parts:
        where = getattr(where, part, None)
    return where, last


# What torch computes with: its name when it is read, how it is set where that is a function.
SWITCHES: dict[str, Any] = {
    "get_default_dtype": (torch.set_default_dtype, torch.float64),
    "are_deterministic_algorithms_enabled": (torch.use_deterministic_algorithms, True),
    "is_deterministic_algorithms_warn_only_enabled": (
        lambda to: torch.use_deterministic_algorithms(to, warn_only=to), True),
    "is_anomaly_enabled": (torch.autograd.set_detect_anomaly, True),
    **{f"backends.cuda.{name}_sdp_enabled": (getattr(torch.backends.cuda, f"enable_{name}_sdp"),
                                             False)
       for name in ("flash", "mem_efficient", "math", "cudnn")
       if hasattr(torch.backends.cuda, f"enable_{name}_sdp")},
    **{f"backends.{name}": (None, value)
       for name, value in (
           ("cuda.matmul.allow_fp16_reduced_precision_reduction", False),
           ("cuda.matmul.allow_bf16_reduced_precision_reduction", False),
           ("cuda.matmul.allow_fp16_accumulation", True), ("mkldnn.enabled", False),
           ("mkldnn.deterministic", True), ("cudnn.enabled", False), ("cudnn.benchmark", True),
           ("cudnn.deterministic", True))},
}  # fmt: skip


# Of float32, which one reader tells: new and old names of the same.
FLOAT32: dict[str, Any] = {
    "get_float32_matmul_precision": (torch.set_float32_matmul_precision, "high"),
    "backends.cudnn.allow_tf32": (None, False),
    **{f"backends.{name}.fp32_precision": (None, "tf32")
       for name in ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv",
                    "mkldnn.rnn")},
}  # fmt: skip


def told_of(name: str) -> list[str]:
    start = "float32 of" if name in FLOAT32 else f"{name}="
    return [line for line in numeric_modes() if line.startswith(start)]


@pytest.mark.parametrize("name", [name for name in (*SWITCHES, *FLOAT32) if hasattr(*at(name))])
def test_the_key_has_each_numeric_mode(name: str) -> None:
    setter, value = (SWITCHES | FLOAT32)[name]
    where, last = at(name)
    set_to, before = setter or partial(setattr, where, last), getattr(where, last)
    before = before() if callable(before) else before
    if value == before:  # other settings, once they are said, set it too
        value = not before if isinstance(before, bool) else "ieee"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old names
        plain, all_plain = told_of(name), key()
        set_to(value)
        try:
            assert told_of(name) != plain
            assert key() != all_plain
        finally:
            set_to(before)
    assert told_of(name) == plain


@pytest.mark.parametrize("name", ["preferred_linalg_library", "preferred_blas_library"])
def test_the_key_has_each_preferred_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.backends.cuda, name):
        return  # 2.4
    plain = key()
    monkeypatch.setattr(torch.backends.cuda, name, lambda: "other")
    assert key() != plain


@pytest.mark.parametrize(
    "name",
    [
        # torch's own; those of cuBLAS and of NVIDIA's libraries; oneDNN's, by its two names.
        *("ATEN_CPU_CAPABILITY", "PYTORCH_MPS_FAST_MATH", "PYTORCH_MPS_PREFER_METAL"),
        *("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"),
        *("DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE"),
        *("DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA"),
    ],
)
def test_the_key_has_what_libraries_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = key()
    monkeypatch.setenv(name, "other")
    assert key() != plain


def test_plans_are_kept_where_the_user_says_or_caches_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cache_folder() == tmp_path / "of/mine" / "plans"
    monkeypatch.delenv("PORTABLE_AMP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "portable-amp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "portable-amp"


@given(
    st.builds(
        PrecisionPlan,
        request=st.sampled_from(["tuned", "tuned fp32"]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        reason=st.text(max_size=5),
        evidence=st.lists(st.text(max_size=5), max_size=2).map(tuple),
        memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
        chunk=st.none() | st.integers(1, 4),
        compiled=st.booleans(),
    )
)
def test_a_plan_that_is_kept_is_the_same_when_recalled(plan: PrecisionPlan) -> None:
    keep("law", plan)
    again = recall("law")
    assert again is not None
    assert again.reason.startswith(plan.reason)
    assert dataclasses.replace(again, reason=plan.reason) == plan


def test_the_key_has_onednn_threads_and_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = key()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TF32, which it sets, too
        with torch.backends.mkldnn.flags(enabled=False):
            assert key() != plain
    assert key() == plain
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert key() != plain
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert key() != plain
    monkeypatch.undo()
    monkeypatch.setattr(os, "cpu_count", lambda: 77)
    assert key() != plain
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "3.0.0")
    assert key() != plain


MIXED = """
import torch
from portable_amp.plan_cache import numeric_modes
seen = [numeric_modes()]
for name, value in (
    ("", "tf32"), (".mkldnn.matmul", "bf16"), (".cudnn.conv", "ieee"),
    (".cuda.matmul", "ieee"),
):
    where = torch.backends
    for part in filter(None, name.split(".")):
        where = getattr(where, part, None)
    if hasattr(where, "fp32_precision"):
        where.fp32_precision = value
        seen.append(numeric_modes())
        assert seen[-1] != seen[-2], name
print(len(seen))
"""


def test_the_key_has_the_new_settings_of_fp32_and_survives_their_mixture_with_the_old() -> None:
    told = subprocess.run([sys.executable, "-c", MIXED], capture_output=True, text=True, check=True)
    assert int(told.stdout) == (5 if hasattr(torch.backends, "fp32_precision") else 1)


class Holding(nn.Module):
    def __init__(self, held: Any = None) -> None:
        super().__init__()
        self.part = nn.Linear(4, 2)
        self.part.held = held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x)


def test_a_model_that_cannot_be_copied_is_said_to_be_one() -> None:
    model = Holding(threading.Lock())
    told = (
        r"^the model cannot be copied, and copies are measured: 'part\.held' of it, of type "
        r"lock, raises TypeError: cannot pickle '_thread\.lock' object\. Measure the model before"
    )
    with pytest.raises(RuntimeError, match=told):
        context().tuned(model, torch.ones(3, 4))


def test_results_of_an_earlier_pass_are_no_obstacle() -> None:
    model = Holding()
    model.part.held = model(torch.ones(3, 4))
    assert context().tuned(model, torch.ones(3, 4), cache=False).plan.settled
    assert not model.part.held.is_leaf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and common
        normed = torch.nn.utils.weight_norm(nn.Linear(4, 2))
    normed(torch.ones(3, 4))
    assert context().tuned(normed, torch.ones(3, 4), cache=False).plan.settled


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_have_no_fp32_to_compare_with(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=rf"it has weights in {dtype}, .*float\(\) first"):
        context().tuned(nn.Linear(4, 2).to(dtype), torch.ones(3, 4, dtype=dtype))


@pytest.mark.parametrize(
    "model",
    [
        nn.LazyLinear(2),
        nn.LazyBatchNorm1d(affine=False),  # lazy in its buffers alone
        nn.Linear(4, 2, device="meta"),
    ],
    ids=["lazy", "lazy-buffers", "meta"],
)
def test_a_model_without_weights_is_refused(model: nn.Module) -> None:
    with pytest.raises(RuntimeError, match=r"cannot be measured: .*(lazy|meta)"):
        context().tuned(model, torch.ones(3, 4))


class Doubling(nn.Module):
    """Writes into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.data.mul_(2)
        return self.linear(x)


def test_the_batch_stays_as_it_is() -> None:
    batch = torch.ones(3, 4, requires_grad=True)
    plan = context().tuned(Doubling(), batch, cache=False).plan
    assert torch.equal(batch, torch.ones(3, 4))
    assert batch.grad is None
    assert not any("out, its loss" in line for line in plan.evidence)


def test_a_batch_without_tensors_is_the_models_own_affair() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3, 4)

        def forward(self, words: Any) -> torch.Tensor:
            return self.table(torch.tensor([len(word) for word in words["words"]]))

    ctx = context()
    plan = ctx.tuned(Words().eval(), [{"words": ["a", "bb"]}], cache=False,
                     loss=lambda model, batch: model(batch[0]).square().mean()).plan  # fmt: skip
    assert plan.chunk is None


def test_what_surrounds_the_call_makes_no_odds() -> None:
    model, batch = nn.Linear(4, 2), torch.ones(3, 4)
    alone = [
        line.split(":")[0] for line in context().tuned(model, batch, cache=False).plan.evidence
    ]
    seen: list[bool] = []
    backward: list[bool] = []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        found = mean_square(model, batch)
        found.register_hook(lambda _: backward.append(torch.is_autocast_enabled("cpu")))
        return found

    for around in (
        torch.inference_mode, torch.no_grad, partial(torch.autocast, "cpu", torch.bfloat16),
        torch.autograd.detect_anomaly,
    ):  # fmt: skip
        seen.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what detecting anomalies costs
            with around():
                plan = context().tuned(model, batch, loss=loss, cache=False).plan
        assert [line.split(":")[0] for line in plan.evidence] == alone
        assert all(" ms" in line for line in plan.evidence)
        assert set(seen) == {False, True}
    assert set(backward) == {False}


def test_a_compiled_model_is_measured_as_it_was() -> None:
    model = nn.Linear(4, 2)
    wrapped = torch.compile(model, backend=never)
    assert context().tuned(wrapped, torch.ones(3, 4), cache=False).plan.settled


def never(graph: Any, inputs: Any) -> Any:
    raise AssertionError("compiled")


def test_the_copies_are_given_back() -> None:
    copies: list[weakref.ref[nn.Module]] = []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        copies.append(weakref.ref(model))
        return mean_square(model, batch)

    context().tuned(network(), IMAGES, loss=loss, cache=False)
    gc.collect()
    assert copies
    assert not any(one() for one in copies)


@pytest.mark.parametrize(
    ("others", "dtype", "common"),
    [
        (["a100", "a100"], "bf16", "bf16"),
        (["a100", "t4"], "bf16", "fp32"),
        (["a100", "t4"], "fp16", "fp16"),
        (["a100", "t4"], "fp32", "fp32"),
        (["t4", "t4"], "bf16", "bf16"),  # emulated, and measured to be fastest
    ],
)
def test_ranks_that_differ_take_a_plan_that_all_can_compute(
    monkeypatch: pytest.MonkeyPatch, others: list[str], dtype: str, common: str
) -> None:
    cards = [machine(name).capabilities for name in others]
    monkeypatch.setattr(distributed, "_of_all_ranks", lambda mine: cards)
    measured = choose(dtype, machine("a100").capabilities)
    measured = dataclasses.replace(measured, request="tuned", reason="measured")
    plan = distributed.common_to_ranks(measured, cards[0])
    assert (plan.name, plan.request) == (common, "tuned")
    assert plan.fell_back is (common != dtype)
    assert (plan is measured) is (common == dtype)


def test_it_is_said_where_ranks_cannot_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [machine(name).capabilities for name in ("a100", "t4")]
    monkeypatch.setattr(distributed, "_of_all_ranks", lambda mine: cards)
    plan = dataclasses.replace(choose("bf16", cards[0]), request="tuned")
    monkeypatch.setattr("portable_amp.context.of_rank_0", lambda decide: plan)
    with pytest.warns(PrecisionFallbackWarning, match="'tuned' on cpu becomes fp32: the ranks ha"):
        context().tuned(nn.Linear(4, 2), torch.ones(3, 4))
    with pytest.raises(UnsupportedPrecisionError):
        DeviceContext("cpu", unsupported="raise").tuned(nn.Linear(4, 2), torch.ones(3, 4))


RECORDED = Path(__file__).parents[2] / "docs/explanation/evidence/tuned.json"


@pytest.mark.skipif(not RECORDED.exists(), reason="runs without the repository's docs")
def test_the_plans_of_recorded_models_are_found_again_within_the_steps_promised() -> None:
    random, settled = Random(0), 0
    for row in json.loads(RECORDED.read_text("utf-8"))["models"]:
        clock, took = Clock(), row["seconds"]
        clock.tick = 0.0

        def seconds(name: str, step: int, took: dict[str, float] = took) -> float:
            if name not in took:
                raise ValueError("was out")
            return took[name] * random.lognormvariate(0, 0.01)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tuning, "time", clock)
            plan = scripted(clock, seconds, train=row["training"])
        assert took[name_of(plan)] < 1.03 * min(took.values()), row
        settled += plan.settled
        assert clock.now < 30 * max(took.values()), row
    assert settled >= 20  # of 24


def test_the_quantiles_are_students() -> None:
    below = (
        lambda t: 0.5 + math.atan(t) / math.pi,
        lambda t: 0.5 + t / (2 * math.sqrt(2 + t**2)),
        lambda t: 0.5 + (math.atan(t / 3**0.5) + t / 3**0.5 / (1 + t**2 / 3)) / math.pi,
    )  # its distribution, for 1, 2 and 3 degrees of freedom
    for share, quantile in zip(below, tuning.STUDENT, strict=True):
        assert share(quantile) == pytest.approx(0.975, abs=1e-4)
