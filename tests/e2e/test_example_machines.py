"""The example trains on a machine of each kind and plan, and live on one of each kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cv_classification.__main__ import main
from portable_amp import choose
from portable_amp.testing import MACHINES, Played, play

pytestmark = pytest.mark.usefixtures("one_thread")

Settings = Callable[..., list[str]]
EVERYWHERE = {"device": "null", "precision": "auto", "train__epochs": 1, "data__workers": 0}


def check(played: Played, output: Path) -> None:
    plan = choose("auto", played.machine.capabilities)
    assert bool(played.asked("scale")) is plan.scaler
    assert bool(played.asked("autocast", dtype=plan.dtype)) is plan.autocast
    assert bool(played.asked("pin_memory")) is played.pins
    assert not played.asked("copy", non_blocking=True, pinned=False)
    (row,) = (output / "metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(row)["loss"] < 10
    assert (output / "best.pt").is_file()


# What else machines differ in decides the plan, and nothing beyond it in the example.
EACH = {
    (row.hardware.device_type, choose("auto", row.capabilities).name): row.key for row in MACHINES
}


@pytest.mark.parametrize("amp_machine", EACH.values(), indirect=True)
def test_training_on_each_kind_of_machine(
    amp_machine: Played, settings: Settings, tmp_path: Path
) -> None:
    assert main(["train", *settings(**EVERYWHERE)]) == 0
    check(amp_machine, tmp_path / "run")


@pytest.mark.parametrize("key", ["t4", "a100", "mi250", "arc-a770", "m2-macos15"])
def test_training_with_live_tensors(key: str, settings: Settings, tmp_path: Path) -> None:
    with play(key, live=True) as played:
        assert main(["train", *settings(**EVERYWHERE)]) == 0
        check(played, tmp_path / "run")
        assert played.memory.peak > 0
        assert main(["evaluate", str(tmp_path / "run" / "best.pt")]) == 0


def test_an_average_is_kept_on_a_live_device(settings: Settings, tmp_path: Path) -> None:
    with play("a100", live=True) as played:
        assert main(["train", *settings(**EVERYWHERE, train__ema=0.9)]) == 0
        check(played, tmp_path / "run")
