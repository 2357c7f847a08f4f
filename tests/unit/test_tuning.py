"""ctx.tuned: what it measures, what it leaves alone, and what it keeps."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from portable_amp import DeviceContext, rng_state, tuning
from portable_amp.backends import backend_for
from portable_amp.distributed import of_rank_0
from portable_amp.plan_cache import CACHE_VARIABLE
from portable_amp.tuning import Candidate, _Result, decide, differs, mean_square
from support import playing


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "plans"))
    return tmp_path / "plans"


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


def test_what_differs_from_fp32() -> None:
    one = result(1.0, [1.0, 0.0], [0.1, 0.0])
    assert differs(one, None, torch.float32) == ""
    for dtype, loss, whole, part in (
        (torch.bfloat16, 0.04, 0.15, 0.04),
        (torch.float16, 0.04, 0.15, 0.04),
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
    [({}, None), ({8: 1.0, 4: 0.99, 2: 2.0}, 8), ({8: 1.0, 4: 0.5, 2: 0.6, 1: 0.49}, 4)],
)
def test_the_largest_chunk_wins_where_it_makes_no_odds(
    per_sample: dict[int, float], chunk: int | None
) -> None:
    plan = decide([measured("fp32 contiguous", 1.0)], per_sample)
    assert plan.chunk == chunk
    assert any("samples per second" in line for line in plan.evidence) == bool(per_sample)


class Crowded(nn.Module):
    """Slow with more than two samples, and unable to take a single one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:
            raise ValueError("BatchNorm-like: more than one value is needed")
        time.sleep(0.005 * (len(x) > 2) * len(x))
        return self.linear(x)


def test_inference_learns_its_chunk_and_training_does_not() -> None:
    found = context().tuned(Crowded().eval(), torch.ones(8, 4), cache=False).plan
    assert found.chunk == 2
    assert "8: " in found.evidence[-1]
    assert " 1: " not in found.evidence[-1]
    assert context().tuned(Crowded().train(), torch.ones(8, 4), cache=False).plan.chunk is None
    assert context().tuned(Crowded().eval(), torch.ones(8, 4)).plan.chunk == 2
    assert context().tuned(Crowded().eval(), torch.ones(8, 4)).plan.chunk == 2  # kept


def test_compiling_is_a_candidate_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", faster, raising=True)
    model = Crowded().eval()
    plan = context().tuned(model, torch.ones(3, 4), cache=False, compile=True).plan
    assert plan.compiled
    assert "fp32 contiguous compiled: " in plan.evidence[-2]
    assert type(model) is Crowded
    assert not context().tuned(model, torch.ones(3, 4), cache=False).plan.compiled


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
        for run in runs:  # in the second race the machine is ten times as slow
            bf16 = run.candidate.dtype is torch.bfloat16
            run.candidate.seconds[:] = [(1.0 if bf16 else 2.0) * 10.0 ** (races - 1)]

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
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "plans"))
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
