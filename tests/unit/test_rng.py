from __future__ import annotations

import random

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
    with pytest.warns(StateWarning, match="2 cuda device"):
        set_rng_state(saved)
    with play("a100", count=1), pytest.warns(StateWarning, match="2 cuda device"):
        set_rng_state(saved)


def test_foreign_state_is_refused() -> None:
    with pytest.raises(ValueError, match="not a state of rng_state"):
        set_rng_state({"cuda": []})
