"""What a run's folder may have lost or gathered: told in one line, or put right."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cv_classification.images as images
import cv_classification.train as training
from cv_classification.__main__ import main
from portable_amp import load_checkpoint, save_checkpoint

from .test_example_survival import stop_after

pytestmark = pytest.mark.usefixtures("one_thread")

Settings = Callable[..., list[str]]
FULL = {"train__epochs": 2, "train__ema": 0.9}


def refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


GARBAGE: dict[str, list[Any]] = {
    "progress": [
        None,
        3,
        [],
        {"epoch": "1"},
        {"epoch": -1},
        {"history": [{"loss": 1.0}]},
        {"x": 1},
    ],
    "optimizer": [None, 3, {}, {"state": {}, "param_groups": []}, {"param_groups": [{"lr": "x"}]}],
    "schedule": [None, 3, {}, {"base_values": "x"}],
    "scaler": [None, 3, [], {"scale": "x"}],
    "ema": [None, 3, {}, {"x": torch.ones(1)}],
    "rng": [None, 3, [], [None], [3], [{"torch": 3}], [{"cpu": torch.ones(3)}]],
    "model": [None, 3, {}, {"net.conv1.0.weight": torch.ones(1)}],
    "config": [None, 3, {}, {"train": 3}],
    "classes": [None, 3, [], [[1], ["a", "b"]], [["x"] * 3, [1, 2, 3]]],
    "split": [None, 3],
}


def test_a_checkpoint_of_garbage_is_refused_in_one_line(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(1, settings(**FULL))
    last = tmp_path / "run/last.pt"
    whole = load_checkpoint(last)
    for key, values in GARBAGE.items():
        for value in values:
            save_checkpoint(last, {**whole, key: value})
            refused(["train", "--resume", *settings(**FULL)], "", capsys)
            if key in ("model", "config", "classes"):
                refused(["predict", str(last)], "", capsys)
        save_checkpoint(last, {name: value for name, value in whole.items() if name != key})
        refused(["train", "--resume", *settings(**FULL)], f"has no {key!r}", capsys)
    save_checkpoint(last, whole)
    assert main(["train", "--resume", *settings(**FULL)]) == 0


def test_a_lost_checkpoint_has_a_way_back(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *settings(**FULL)]) == 0
    run = tmp_path / "run"
    best, last = run / "best.pt", run / "last.pt"
    best.unlink()
    assert main(["train", "--resume", *settings(**FULL)]) == 0
    assert "best.pt' is lost; the last epoch's model takes its place" in capsys.readouterr().out
    assert main(["predict", str(run)]) == 0

    last.write_bytes(last.read_bytes()[:-1000])
    again = settings(output=tmp_path / "again", model__weights=best, **FULL)
    way = f"a new run begins from the best epoch with output=... model.weights={best}"
    refused(["train", "--resume", *settings(**FULL)], way, capsys)
    last.unlink()
    refused(["train", "--resume", *settings(**FULL)], way, capsys)
    refused(["train", *settings(**FULL)], "already holds a run", capsys)
    assert main(["train", *again, "train.lr=1e-9"]) == 0
    weight = "net.conv1.0.weight"
    old, new = (load_checkpoint(path / "best.pt")["model"] for path in (run, tmp_path / "again"))
    torch.testing.assert_close(old[weight], new[weight])


def test_folds_go_on_where_they_were_stopped(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = settings(data__folds=3, train__epochs=2)
    refused(["train", "--resume", *arguments], "holds no run to resume", capsys)
    usual, seen = training.train_one, []

    def second(config: Any, *rest: Any, **options: Any) -> None:
        seen.append(config)
        if len(seen) == 2:
            stop = training.train_epoch

            def stopping(run: Any, *args: Any) -> None:
                stop(run, *args)
                raise training.Interruptions().release(15)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(training, "train_epoch", stopping)
                usual(config, *rest, **options)
        usual(config, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_one", second)
        assert main(["train", *arguments]) == 143
    run = tmp_path / "run"
    refused(["predict", str(run)], "has 1 of 3 folds", capsys)
    assert main(["train", "--resume", *arguments]) == 0
    assert main(["predict", str(run)]) == 0


def test_folds_are_those_of_one_run(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run, arguments = tmp_path / "run", settings(data__folds=2, train__epochs=1)
    assert main(["train", *arguments]) == 0
    read, decoded = images.read_image, []

    def counted(path: Path, **options: Any) -> Any:
        decoded.append((path, *options))
        return read(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(images, "read_image", counted)
        assert main(["predict", str(run)]) == 0
    assert sorted(path.name for path, *draft in decoded if not draft) == ["0.png", "1.png", "2.png"]

    plain = settings(train__epochs=1)
    refused(["train", *plain], "is of a run with other folds", capsys)
    refused(["train", "--resume", *plain], "is of a run with other folds", capsys)
    shutil.copy(run / "fold0/best.pt", run / "best.pt")
    refused(["predict", str(run)], "holds a run and the folds of another", capsys)
    (run / "best.pt").unlink()
    other = settings(output=tmp_path / "other", data__folds=3, train__epochs=1)
    assert main(["train", *other]) == 0
    for command in ("predict", "evaluate", "report"):
        (tmp_path / "mixed").mkdir(exist_ok=True)
        for fold, source in ((0, run), (1, tmp_path / "other")):
            shutil.copytree(
                source / f"fold{fold}", tmp_path / f"mixed/fold{fold}", dirs_exist_ok=True
            )
        refused([command, str(tmp_path / "mixed")], "is of another run than", capsys)
        (tmp_path / "other/fold1/best.pt").rename(tmp_path / "kept")
        refused([command, str(tmp_path / "other")], "has 2 of 3 folds, without 1", capsys)
        (tmp_path / "kept").rename(tmp_path / "other/fold1/best.pt")
