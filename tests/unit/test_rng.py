from __future__ import annotations

import random
from collections.abc import Callable

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
from support import playing


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.normal()), float(torch.rand(()))


def test_a_seed_repeats_everything() -> None:
    seed_everything(3)
    first = draw()
    assert draw() != first
    seed_everything(3)
    assert draw() == first


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "1", None, True])
def test_what_is_no_seed_is_refused(seed: object) -> None:
    with pytest.raises(ValueError, match="whole number from 0"):
        seed_everything(seed)  # type: ignore[arg-type]


def test_state_comes_back_through_a_checkpoint(tmp_path: object) -> None:
    seed_everything(5)
    draw()
    path = f"{tmp_path}/state.pt"
    save_checkpoint(path, {"rng": rng_state()})
    expected = [draw() for _ in range(3)]
    set_rng_state(load_checkpoint(path)["rng"])
    assert [draw() for _ in range(3)] == expected


def _fake_rng(monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Tensor]:
    states = {0: torch.tensor([10]), 1: torch.tensor([11])}
    put: Callable[..., None] = lambda state, device: states.__setitem__(device, state)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", put)
    return states


def test_every_device_of_every_backend_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    states = _fake_rng(monkeypatch)
    with playing("a100", count=2):
        saved = rng_state()
        assert [int(one) for one in saved["cuda"]] == [10, 11]
        states.update({0: torch.tensor([0]), 1: torch.tensor([0])})
        set_rng_state(saved)
    assert [int(states[index]) for index in (0, 1)] == [10, 11]


def test_mps_has_one_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[torch.Tensor] = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr(torch.mps, "set_rng_state", got.append)
    with playing("m2-macos14"):
        set_rng_state(rng_state())
    assert [int(one) for one in got] == [7]


def test_another_machine_is_told_what_cannot_be_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_rng(monkeypatch)
    with playing("a100", count=2):
        saved = rng_state()
    with pytest.warns(StateWarning, match="2 cuda device"):
        set_rng_state(saved)
    with playing("a100", count=1), pytest.warns(StateWarning, match="2 cuda device"):
        set_rng_state(saved)


def test_foreign_state_is_refused() -> None:
    with pytest.raises(ValueError, match="not a state of rng_state"):
        set_rng_state({"cuda": []})
