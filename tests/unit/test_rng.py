from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import torch

from portable_amp import (
    StateWarning,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    seed_everything,
    set_rng_state,
)
from portable_amp.testing import play


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.normal()), float(torch.rand(()))


def test_a_seed_repeats_everything() -> None:
    seed_everything(3)
    first = draw()
    assert draw() != first
    seed_everything(3)
    assert draw() == first


@pytest.mark.parametrize(
    "seed",
    [-1, 2**32, 1.0, "1", None, True, np.bool_(1), np.float64(1), np.int8(-1), [1], torch.ones(())],
)
def test_what_is_no_seed_is_refused(seed: object) -> None:
    with pytest.raises(ValueError, match="whole number from 0"):
        seed_everything(seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [np.int64(5), np.uint8(5), 0, 2**32 - 1])
def test_whole_numbers_of_numpy_are_seeds(seed: int) -> None:
    returned = seed_everything(seed)
    assert type(returned) is int
    first = draw()
    seed_everything(int(seed))
    assert draw() == first


def test_state_comes_back_through_a_checkpoint(tmp_path: object) -> None:
    seed_everything(5)
    draw()
    path = f"{tmp_path}/state.pt"
    save_checkpoint(path, {"rng": rng_state()})
    expected = [draw() for _ in range(3)]
    set_rng_state(load_checkpoint(path)["rng"])
    assert [draw() for _ in range(3)] == expected


def test_every_device_of_every_backend_is_saved() -> None:
    with play("a100", count=2) as played:
        for index, generator in enumerate(played.generators):
            generator.manual_seed(index)
        saved = rng_state()
        seed_everything(9)
        assert not torch.equal(saved["cuda"][1], torch.cuda.get_rng_state(1))
        set_rng_state(saved)
        assert [g.initial_seed() for g in played.generators] == [0, 1]


def test_mps_has_one_generator() -> None:
    with play("m2-macos14") as played:
        played.generators[0].manual_seed(7)
        saved = rng_state()
        seed_everything(9)
        set_rng_state(saved)
        assert played.generators[0].initial_seed() == 7


def test_another_machine_is_told_what_cannot_be_restored() -> None:
    with play("a100", count=2):
        saved = rng_state()
    saved["xpu"] = saved["cuda"][:1]
    with pytest.warns(StateWarning) as caught:
        for _ in range(2):
            set_rng_state(saved)
    told = [str(warning.message) for warning in caught]
    assert len(told) == 2
    assert "2 cuda device" in told[0]
    assert "1 xpu device" in told[1]
    del saved["xpu"]
    with play("a100", count=1), pytest.warns(StateWarning, match="2 cuda device"):
        set_rng_state(saved)


def test_what_fits_is_restored_beside_what_does_not() -> None:
    with play("max1550") as played:
        played.generators[0].manual_seed(7)
        saved = {**rng_state(), "cuda": [torch.get_rng_state()]}
        seed_everything(9)
        with pytest.warns(StateWarning, match="1 cuda device"):
            set_rng_state(saved)
        assert played.generators[0].initial_seed() == 7


def test_a_device_whose_generator_cannot_be_set_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with play("max1550"), monkeypatch.context() as patch:
        saved = rng_state()
        patch.delattr(torch.xpu, "set_rng_state")
        with pytest.warns(StateWarning, match="1 xpu device"):
            set_rng_state(saved)
        patch.delattr(torch.xpu, "get_rng_state")
        assert "xpu" not in rng_state()


@pytest.mark.parametrize("key", ["t4", "max1550", "m2-macos15", "ascend-910b", "gaudi2"])
def test_the_state_of_each_kind_of_device_comes_back(key: str) -> None:
    with play(key, count=1) as played:
        saved = rng_state()
        module = getattr(torch, played.kind)
        before = module.get_rng_state()
        seed_everything(7)
        assert not torch.equal(module.get_rng_state(), before)
        set_rng_state(saved)
        assert torch.equal(module.get_rng_state(), before)


def test_seeding_does_not_wake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are forked afterwards could not use it any more."""
    asked: list[str] = []
    with play("a100"), monkeypatch.context() as patch:
        for name in ("is_available", "device_count", "init", "current_device"):
            patch.setattr(torch.cuda, name, lambda *_, name=name: asked.append(name))
        seed_everything(5)
    assert not asked


def test_numpy_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    seed_everything(5)
    with_numpy = rng_state()
    first, second = draw(), draw()
    set_rng_state(with_numpy)
    assert draw() == first
    monkeypatch.delitem(sys.modules, "numpy")
    assert seed_everything(5) == 5
    without = rng_state()
    assert without.keys() == {"python", "torch"}
    for state in (without, with_numpy):
        set_rng_state(state)
    monkeypatch.undo()
    set_rng_state(without)
    assert draw() == (first[0], second[1], first[2])  # NumPy's has gone on from where it was


@pytest.mark.parametrize("missing", ["python", "torch"])
def test_foreign_state_is_refused(missing: str) -> None:
    saved = rng_state()
    del saved[missing]
    for state in (saved, {"cuda": []}):
        with pytest.raises(ValueError, match="not a state of rng_state"):
            set_rng_state(state)
