"""The example's loop: what it computes, what it keeps, and that it can be interrupted."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cv_classification.images as images
import cv_classification.train as training
from cv_classification.__main__ import main
from cv_classification.config import Config, TrainConfig, load_config
from cv_classification.data import Classes, Sample, read_unlabelled
from cv_classification.images import Split, read_split
from cv_classification.interrupt import Interruptions
from cv_classification.model import load_trained
from cv_classification.run import Progress, Run
from cv_classification.tta import predict_samples, probabilities
from portable_amp import DeviceContext, ScalerShim, load_checkpoint, split_on_oom, tuning

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


class CountingSchedule:
    def __init__(self) -> None:
        self.seen: list[int] = []

    def step(self, updates: int) -> None:
        self.seen.append(updates)


def linear_batches(count: int, size: int = 5) -> Any:
    random = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 4, generator=random),
            torch.randint(3, (size,), generator=random),
            torch.arange(size),
        )
        for _ in range(count)
    ]


def run_epoch(
    model: Any, batches: Any, scaler: ScalerShim, **settings: Any
) -> tuple[Progress, list[int]]:
    schedule: Any = CountingSchedule()
    config = Config(train=TrainConfig(**settings))
    samples = [Sample(f"{index}.png", Path(f"{index}.png")) for index in range(5)]
    data = Split(samples, [], Classes((0, 1, 2), ("a", "b", "c")), "", None)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.train.lr)
    criterion = training.make_loss(config.train, [0] * 6 + [1] * 3 + [2], 3)
    run = Run(config, CPU, data, model, model, optimizer, schedule, scaler, criterion, None)
    training.train_epoch(run, batches, Interruptions())
    return run.progress, schedule.seen


@pytest.mark.parametrize(("count", "accumulate"), [(4, 2), (5, 2), (7, 3), (2, 5), (3, 1)])
def test_accumulated_steps_are_those_of_the_large_batch(count: int, accumulate: int) -> None:
    model, reference = Linear(), Linear().train()
    reference.load_state_dict(model.state_dict())
    batches = linear_batches(count)
    progress, seen = run_epoch(
        model, batches, CPU.scaler(), accumulate=accumulate, lr=0.5, label_smoothing=0.1
    )

    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5)
    criterion, losses = nn.CrossEntropyLoss(label_smoothing=0.1), []
    for start in range(0, count, accumulate):
        group = batches[start : start + accumulate]
        images = torch.cat([images for images, _, _ in group])
        whole = criterion(reference(images), torch.cat([labels for _, labels, _ in group]))
        optimizer.zero_grad()
        whole.backward()
        optimizer.step()
        losses.append(whole.item())

    torch.testing.assert_close(model.state_dict(), reference.state_dict())
    assert progress.loss == pytest.approx(sum(losses))
    assert progress.updates == progress.finite == len(seen) == -(-count // accumulate)
    assert progress.batches == count


WEIGHED = {"class_weights": "balanced", "label_smoothing": 0.1, "lr": 1.0, "optimizer": "SGD"}
WEIGHED["weight_decay"] = 0.0


def shares(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As mixup leaves them, but the same however the batch is cut."""
    one_hot = nn.functional.one_hot(labels, 3).float()
    return images, 0.7 * one_hot + 0.3 * torch.tensor([0.0, 0.2, 0.8])


@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("way", ["parts", "accumulated", "parts of accumulated"])
def test_a_mean_is_over_all_that_a_step_sees(
    way: str, mixed: bool, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Linear()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parts = linear_batches(2, 6)
    whole = [tuple(torch.cat(column) for column in zip(*parts, strict=True))]
    data = parts if "accumulated" in way else whole
    if mixed:
        monkeypatch.setattr(training, "make_mixup", lambda *args: shares)
    images, labels, _ = whole[0]
    criterion = training.make_loss(TrainConfig(loss=loss, **WEIGHED), [0] * 6 + [1] * 3 + [2], 3)
    reference = Linear().train()
    reference.load_state_dict(before)
    images, targets = shares(images, labels) if mixed else (images, labels)
    value = criterion(reference(images), targets)
    value.backward()

    def cut(*args: Any, **options: Any) -> Any:
        return split_on_oom(*args, size=4 if "parts" in way else None, **options)

    monkeypatch.setattr(training, "split_on_oom", cut)
    progress, _ = run_epoch(model, data, CPU.scaler(), accumulate=len(data), loss=loss, **WEIGHED)
    for name, parameter in reference.named_parameters():
        moved = before[name] - model.state_dict()[name]
        torch.testing.assert_close(moved, parameter.grad, rtol=1e-5, atol=1e-6)
    assert progress.loss == pytest.approx(value.item(), rel=1e-5)


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
    progress, seen = run_epoch(model, batches, ScalerShim("cpu", enabled=True))
    assert progress.updates == progress.finite == 2
    assert seen == [1, 2]
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


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
        "best.pt", "last.pt", "metrics.jsonl", "report.html", "submission.csv",
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
    assert load_trained(tmp_path / "b")[0].classes.names == ("bright", "dark", "grey")


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
    run = training.train(config)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    last = load_checkpoint(run / "last.pt")["model"]
    best = weights_of(run / "best.pt")
    assert any(not torch.equal(best[name], value) for name, value in last.items())
    # What is over stays over.
    training.train(config, resume="always")
    assert_same_bits(weights_of(run / "best.pt"), best)
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
    for lost in ({"macro_f1": math.nan}, {"log_loss": math.nan, "macro_f1": 1.0}):
        later = [{**history[0], **lost}, *history[1:]]
        assert training.stale_epochs(later, "macro_f1") == 1 + ("log_loss" in lost) * 2
        assert training.stale_epochs(later, "log_loss") == 1


def test_every_epoch_has_an_order_of_its_own(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_epoch, orders = training.train_epoch, []

    def watched(run: Any, batches: Any, *rest: Any) -> None:
        orders.append(list(batches.sampler))
        train_epoch(run, batches, *rest)

    monkeypatch.setattr(training, "train_epoch", watched)
    assert main(["train", *settings()]) == 0
    assert len(orders) == 2
    assert orders[0] != orders[1]
    assert not {seed for _, _, seed in orders[0]} & {seed for _, _, seed in orders[1]}


def test_a_data_set_smaller_than_a_batch_is_trained_on(settings: Settings, tmp_path: Path) -> None:
    assert main(["train", *settings(data__batch_size=64, train__epochs=1)]) == 0
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text())["updates"] == 1


def test_prediction_leaves_the_model_as_it_is(settings: Settings, tmp_path: Path) -> None:
    config = load_config(None, settings(train__epochs=1, model__drop_rate=0.5))
    (trained,) = load_trained(training.train(config))
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4, 3, 32, 32), generator=random, dtype=torch.uint8)
    batches: Any = [(images, torch.zeros(4), torch.arange(4))]
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


def test_a_trained_model_needs_its_first_weights_no_more(
    settings: Settings, tmp_path: Path
) -> None:
    import timm

    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    chosen = settings(model__weights=weights, model__tune="head", train__epochs=1)
    assert main(["train", *chosen]) == 0
    weights.unlink()
    assert main(["evaluate", str(tmp_path / "run")]) == 0


def test_folds_are_trained_and_predict_together(
    tiny: Path, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", *settings(data__folds=3, train__epochs=1)]) == 0
    assert sorted(path.name for path in run.iterdir()) == ["fold0", "fold1", "fold2"]
    every = {path.name for path in (tiny / "train").iterdir()}
    held_out = [
        {sample.id for sample in read_split(one.config).validation} for one in load_trained(run)
    ]
    assert sum(map(len, held_out)) == len(every)
    assert set().union(*held_out) == every

    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0  # each fold on what it never saw
    assert "on 24 validation images" in capsys.readouterr().out
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").is_file()
    assert main(["predict", str(run), "--no-tta"]) == 0
    samples = read_unlabelled(tiny)
    together = predict_samples(load_trained(run), samples, CPU, tta=False)
    each = [predict_samples([one], samples, CPU, tta=False) for one in load_trained(run)]
    torch.testing.assert_close(together, torch.stack(each).mean(0))
    assert not torch.equal(each[0], each[1])
    # What is finished stays as it is; one more fold can be trained alone.
    before = (run / "fold1/best.pt").read_bytes()
    assert main(["train", "--resume", "auto", *settings(data__folds=3, train__epochs=1)]) == 0
    assert (run / "fold1/best.pt").read_bytes() == before


def test_the_average_of_the_weights_is_what_is_kept(settings: Settings, tmp_path: Path) -> None:
    """Slow, it is behind the last weights; without any decay it is those."""
    paths = {}
    for decay in (0.999, 1e-9):
        paths[decay] = tmp_path / str(decay)
        chosen = settings(output=paths[decay], train__ema=decay, train__epochs=1)
        assert main(["train", *chosen]) == 0
    first, last = (load_checkpoint(paths[decay] / "last.pt") for decay in paths)
    assert_same_bits(first["model"], last["model"])  # training itself does not see it
    kept, new = (weights_of(paths[decay] / "best.pt") for decay in paths)
    weight = "net.conv1.0.weight"
    torch.testing.assert_close(new[weight], last["model"][weight])
    moved = (first["model"][weight] - kept[weight]).abs().max()
    assert moved > 1e-4


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.9999])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_short_run_is_not_judged_by_its_first_weights(decay: float, resumed: bool) -> None:
    """After 108 updates towards 1, an average without a warm-up would be at 0.01, at 0.9999."""
    model = nn.Linear(1, 1)
    average = training.make_average(model, decay)
    expected = 0.0
    for step in range(1, 109):
        if resumed and step == 50:
            old, average = average, training.make_average(model, decay)
            average.module.load_state_dict(old.module.state_dict())
        nn.init.constant_(model.weight, min(1.0, step / 54))
        average.update(model, step=step)
        slow = min(decay, 1 - step ** (-2 / 3)) if step > 1 else 0.0
        expected = slow * expected + (1 - slow) * min(1.0, step / 54)
    assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)
    assert average.module.weight.item() > 0.9


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"data__mixup": 0.4, "data__batch_size": 64, "data__validation": 0.2}, "pair images"),
        ({"data__batch_size": 1}, "BatchNorm"),
    ],
)
def test_batches_that_cannot_be_trained_on(
    more: dict[str, Any], said: str, settings: Settings, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["train", *settings(**more)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "run").exists()


def test_mixup_and_focal_loss_train(settings: Settings, tmp_path: Path) -> None:
    chosen = settings(
        data__mixup=0.4, data__cutmix=1.0, train__loss="focal", train__class_weights="balanced",
        train__schedule="onecycle", train__optimizer="SGD", data__balance="copies",
    )  # fmt: skip
    assert main(["train", *chosen]) == 0
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["updates"] for row in rows] == [4, 8]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_trackers_are_told(
    name: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        assert main(["train", *settings(tracking=f"[{name}]")]) == 0
    if name == "wandb":
        assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [event.step for event in events.Scalars("loss")] == [0, 1]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(
        [row["loss"] for row in rows]
    )


def test_an_image_that_breaks_in_a_worker_is_one_line(
    settings: Settings,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(images, "check_images", lambda samples, *, skip_bad: samples)
    for path in (tiny / "train").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    assert main(["train", *settings(data__workers=1)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(str(tiny / "train"))
    assert "truncated or damaged" in line


def test_a_tuned_run_measures_trains_and_predicts(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PORTABLE_AMP_CACHE", str(tmp_path / "plans"))
    # Plans are kept however busy the machine that tests is.
    monkeypatch.setattr(tuning, "SETTLED", float("inf"))
    monkeypatch.setattr(tuning, "OURS", 0.0)
    assert main(["train", *settings(precision="tuned", train__epochs=1)]) == 0
    assert "training: " in capsys.readouterr().out
    assert main(["predict", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "prediction: " in printed
    assert "measured: " in printed
    assert len([*(tmp_path / "plans").glob("*.json")]) == 2
    assert main(["predict", str(tmp_path / "run")]) == 0
    assert "kept from an earlier run" in capsys.readouterr().out
