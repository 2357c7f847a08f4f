"""The example's loop: what it computes, what it keeps, and that it can be interrupted."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cv_classification.train as training
from cv_classification.__main__ import main
from cv_classification.config import Config, InputError, TrainConfig, load_config
from cv_classification.model import load_trained
from cv_classification.tta import probabilities
from portable_amp import DeviceContext, ScalerShim, load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

Settings = Callable[..., list[str]]
CPU = DeviceContext("cpu", precision="fp32")


class Linear(nn.Module):
    """A model whose gradients can be worked out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.eval()  # as validation leaves it

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert self.training
        return self.layer(images)


class CountingScheduler:
    def __init__(self) -> None:
        self.seen: list[int] = []

    def step_update(self, updates: int) -> None:
        self.seen.append(updates)


def linear_batches(count: int, size: int = 5) -> Any:
    random = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 4, generator=random), torch.randint(3, (size,), generator=random))
        for _ in range(count)
    ]


def run_epoch(
    model: nn.Module, batches: Any, scaler: ScalerShim, **settings: Any
) -> tuple[float, int, list[int]]:
    scheduler: Any = CountingScheduler()
    config = Config(train=TrainConfig(**settings))
    optimizer = torch.optim.SGD(model.parameters(), lr=config.train.lr)
    loss, updates = training.train_epoch(
        model,
        batches,
        optimizer,
        scheduler,
        0,
        scaler,
        CPU,
        config,  # type: ignore[arg-type]
    )
    return loss, updates, scheduler.seen


@pytest.mark.parametrize(("count", "accumulate"), [(4, 2), (5, 2), (7, 3), (2, 5), (3, 1)])
def test_accumulated_steps_are_those_of_the_large_batch(count: int, accumulate: int) -> None:
    model, reference = Linear(), Linear().train()
    reference.load_state_dict(model.state_dict())
    batches = linear_batches(count)
    loss, updates, seen = run_epoch(
        model, batches, CPU.scaler(), accumulate=accumulate, lr=0.5, label_smoothing=0.1
    )

    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5)
    criterion, losses = nn.CrossEntropyLoss(label_smoothing=0.1), []
    for start in range(0, count, accumulate):
        group = batches[start : start + accumulate]
        images = torch.cat([images for images, _ in group])
        whole = criterion(reference(images), torch.cat([labels for _, labels in group]))
        optimizer.zero_grad()
        whole.backward()
        optimizer.step()
        losses += [whole.item()] * len(group)

    torch.testing.assert_close(model.state_dict(), reference.state_dict())
    assert loss == pytest.approx(sum(losses) / count)
    assert updates == len(seen) == -(-count // accumulate)


def test_gradients_are_clipped() -> None:
    model = Linear()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    run_epoch(model, linear_batches(1), CPU.scaler(), max_norm=0.01, lr=1.0)
    moved = [new - old for new, old in zip(model.parameters(), before, strict=True)]
    assert torch.cat([change.flatten() for change in moved]).norm().item() == pytest.approx(
        0.01, rel=1e-3
    )


def test_the_schedule_waits_for_real_steps() -> None:
    batches = linear_batches(4)
    batches[1][0][0, 0] = torch.inf
    batches[2][0][0, 0] = torch.inf
    model = Linear()
    _, updates, seen = run_epoch(model, batches, ScalerShim("cpu", enabled=True))
    assert updates == 2
    assert seen == [1, 2]
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_a_loss_that_is_lost_ends_the_run_in_words() -> None:
    batches = linear_batches(2)
    batches[0][0][0, 0] = torch.nan
    with pytest.raises(InputError, match=r"train\.lr=0\.001: the loss has become nan"):
        run_epoch(Linear(), batches, CPU.scaler())


def test_train_evaluate_predict(
    tiny: Path, tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", *settings(train__epochs=12, train__lr="3e-3")]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("Device: cpu\nMixed precision: disabled\nAutocast device type: None")
    assert said.err == ""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(12))
    assert [row["updates"] for row in rows] == list(range(4, 52, 4))  # 18 images, and drop_last
    assert rows[-1]["lr"] == 0.0

    assert main(["evaluate", str(run), "--explain"]) == 0
    said = capsys.readouterr()
    best = max(rows, key=lambda row: (row["macro_f1"], -row["log_loss"]))
    assert f"macro_f1: {best['macro_f1']:.4f}\nlog_loss: {best['log_loss']:.4f}" in said.out
    assert "Precision: fp32" in said.out
    assert "  grey: F1 " in said.out

    assert main(["predict", str(run)]) == 0
    with (run / "submission.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["ID", "target"]
    assert [name for name, _ in lines] == ["2.png", "0.png", "1.png"]
    assert [target for _, target in lines] == ["9", "3", "5"]
    assert sorted(path.name for path in run.iterdir()) == [
        "best.pt", "last.pt", "metrics.jsonl", "submission.csv",
    ]  # fmt: skip

    # The same images as a folder per class, by the names that meta.csv gives.
    for name, target in csv.reader((tiny / "train.csv").read_text("utf-8").splitlines()[1:]):
        folder = tmp_path / "folders" / {"3": "dark", "5": "grey", "9": "bright"}[target]
        folder.mkdir(parents=True, exist_ok=True)
        (tiny / "train" / name).rename(folder / name)
    capsys.readouterr()
    assert main(["evaluate", str(run / "best.pt"), "--data", str(tmp_path / "folders")]) == 0
    assert "on 24 images" in capsys.readouterr().out
    folders = settings(data__path=tmp_path / "folders", output=tmp_path / "b", train__epochs=1)
    assert main(["train", *folders]) == 0
    assert load_trained(tmp_path / "b", []).classes.names == ("bright", "dark", "grey")


def test_training_refuses_to_overwrite_a_run(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *settings(train__epochs=1)]) == 0
    assert main(["train", *settings(train__epochs=1)]) == 2
    assert "already holds a run; --resume goes on with it" in capsys.readouterr().err


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_checkpoint(path)["model"]
    return weights


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert differing == []


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupted_run_ends_in_the_same_bits(
    workers: int, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overrides(name: str) -> list[str]:
        return settings(
            output=tmp_path / name, data__preset="documents", data__workers=workers,
            train__epochs=3, train__accumulate=3, train__max_norm=1.0, model__drop_rate=0.3,
        )  # fmt: skip

    assert main(["train", *overrides("whole")]) == 0
    train_epoch, calls = training.train_epoch, []

    def interrupted(*args: Any) -> tuple[float, int]:
        calls.append(1)
        if len(calls) == 3:
            train_epoch(*args)
            raise KeyboardInterrupt
        return train_epoch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_epoch", interrupted)
        assert main(["train", *overrides("parts")]) == 130
    assert len(load_checkpoint(tmp_path / "parts" / "last.pt")["history"]) == 2
    torch.rand(7)  # a new process would be in another random state
    assert main(["train", "--resume", *overrides("parts")]) == 0
    for name in ("last.pt", "best.pt"):
        assert_same_bits(
            weights_of(tmp_path / "whole" / name), weights_of(tmp_path / "parts" / name)
        )
    whole, parts = (
        [
            {name: value for name, value in json.loads(line).items() if name != "seconds"}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "parts")
    )
    assert whole == parts


def test_workers_change_nothing_but_speed(tmp_path: Path, settings: Settings) -> None:
    for workers in (0, 2):
        chosen = settings(
            output=tmp_path / str(workers), data__workers=workers, data__preset="documents"
        )
        assert main(["train", *chosen]) == 0
    assert_same_bits(weights_of(tmp_path / "0/last.pt"), weights_of(tmp_path / "2/last.pt"))


def test_early_stopping_gives_the_best_weights_back(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.9, 0.1, 0.2, 0.3, 0.4])

    def scripted(*_: Any) -> dict[str, float]:
        return {"accuracy": 0.0, "macro_f1": next(scores), "log_loss": 1.0}

    monkeypatch.setattr(training, "measure", scripted)
    config = load_config(None, settings(train__epochs=6, train__patience=2))
    trained = training.train(config)
    run = tmp_path / "run"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    assert_same_bits(trained.model.state_dict(), weights_of(run / "best.pt"))
    last = load_checkpoint(run / "last.pt")["model"]
    best = weights_of(run / "best.pt")
    assert any(not torch.equal(best[name], value) for name, value in last.items())
    # What is over stays over.
    again = training.train(config, resume=True)
    assert_same_bits(again.model.state_dict(), trained.model.state_dict())
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4


def test_what_is_best_is_what_is_monitored() -> None:
    history = [
        {"macro_f1": 0.8, "accuracy": 0.9, "log_loss": 0.3},
        {"macro_f1": 0.9, "accuracy": 0.8, "log_loss": 0.4},
        {"macro_f1": 0.9, "accuracy": 0.7, "log_loss": 0.2},
        {"macro_f1": 0.9, "accuracy": 0.7, "log_loss": 0.2},
    ]
    assert training.stale_epochs(history, "macro_f1") == 1  # the log loss decides, then the first
    assert training.stale_epochs(history, "accuracy") == 3
    assert training.stale_epochs(history, "log_loss") == 1
    assert training.stale_epochs(history[:1], "log_loss") == 0
    assert training.stale_epochs([], "macro_f1") == 0


def test_every_epoch_has_an_order_of_its_own(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_epoch, orders = training.train_epoch, []

    def watched(model: Any, batches: Any, *rest: Any) -> tuple[float, int]:
        orders.append(list(batches.sampler))
        return train_epoch(model, batches, *rest)

    monkeypatch.setattr(training, "train_epoch", watched)
    assert main(["train", *settings()]) == 0
    assert len(orders) == 2
    assert orders[0] != orders[1]
    assert not {seed for _, seed in orders[0]} & {seed for _, seed in orders[1]}


def test_a_data_set_smaller_than_a_batch_is_trained_on(settings: Settings, tmp_path: Path) -> None:
    assert main(["train", *settings(data__batch_size=64, train__epochs=1)]) == 0
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text())["updates"] == 1


def test_prediction_leaves_the_model_as_it_is(settings: Settings, tmp_path: Path) -> None:
    config = load_config(None, settings(train__epochs=1, model__drop_rate=0.5))
    trained = training.train(config)
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4, 3, 32, 32), generator=random, dtype=torch.uint8)
    batches: Any = [(images, torch.zeros(4))]
    trained.model.train()
    first = probabilities(trained.model, batches, CPU)
    assert torch.equal(first, probabilities(trained.model, batches, CPU))
    assert_same_bits(trained.model.state_dict(), before)
    torch.testing.assert_close(first.sum(1), torch.ones(4))


def test_evaluation_is_refused_once_the_data_has_changed(
    tiny: Path, tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *settings(train__epochs=1)]) == 0
    lines = (tiny / "train.csv").read_text("utf-8").splitlines()
    (tiny / "train.csv").write_text("\n".join(lines[:-1]), "utf-8")
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "has changed since" in capsys.readouterr().err
    assert main(["train", "--resume", *settings(train__epochs=1)]) == 2
    assert "has changed since" in capsys.readouterr().err


def test_pretrained_weights_come_from_a_file(settings: Settings, tmp_path: Path) -> None:
    import timm

    from cv_classification.model import build_model

    donor = timm.create_model("test_resnet", num_classes=1000)
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    chosen = settings(model__weights=tmp_path / "weights.pth")
    model = build_model(load_config(None, chosen).model, 3)
    kept = {
        name: value
        for name, value in donor.state_dict().items()
        if not name.startswith(("fc.", "head."))
    }
    got = model.net.state_dict()
    assert kept
    assert all(torch.equal(value, got[name]) for name, value in kept.items())
