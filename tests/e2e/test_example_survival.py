"""What befalls real runs: killed, stopped, out of disk or memory, not finite, moved elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings as settings_of_laws

import cv_classification.train as training
from cv_classification.__main__ import main
from cv_classification.lock import locked
from portable_amp import load_checkpoint
from portable_amp.testing import play

from . import survivor

pytestmark = pytest.mark.usefixtures("one_thread")

Settings = Callable[..., list[str]]
HERE = Path(__file__).parent
EVERYTHING = {
    "data__preset": "documents", "data__mixup": 0.2, "data__balance": "sampler",
    "train__epochs": 3, "train__accumulate": 2, "train__max_norm": 1.0, "train__ema": 0.9,
    "train__save_every": 1, "train__validation_views": 2, "model__drop_rate": 0.3,
}  # fmt: skip
NO_BATCH_NORM = {"model__name": "test_vit", "model__image_size": 160}


def environment() -> dict[str, str]:
    root = HERE.parents[1]
    paths = os.pathsep.join(str(root / name) for name in ("src", "examples", "tests"))
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_killed_at_any_moment(settings: Settings, tmp_path: Path) -> None:
    arguments = ["train", *(word for word in settings(**EVERYTHING) if "output=" not in word)]
    kills = max(10, settings_of_laws().max_examples // 40)  # 400 at night
    command = [sys.executable, "-W", "ignore", str(HERE / "survivor.py"), str(tmp_path)]
    command += [str(kills), "7"]
    done = subprocess.run(
        [*command, *arguments], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["deaths"] >= kills
    assert told["differences"]
    assert not any(told["differences"].values()), told


def test_the_comparison_can_fail() -> None:
    one = {"model": {"a": torch.zeros(2)}, "history": [{"loss": 1.0, "seconds": 3.0}]}
    other = {"model": {"a": torch.tensor([0.0, 1e-7])}, "history": [{"loss": 1.0, "seconds": 4.0}]}
    assert survivor.differences(one, one) == []
    assert survivor.differences(one, other) == ["/model/a"]
    assert survivor.differences({"a": [1, 2]}, {"a": [1]}) == ["/a: 2 and 1 items"]


@pytest.mark.parametrize(("name", "where"), [("SIGTERM", "train"), ("SIGINT", "validation")])
def test_a_signal_saves_and_leaves(
    name: str, where: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    number = getattr(signal, name)
    more = EVERYTHING | {"train__save_every": "null"}
    assert main(["train", *settings(output=tmp_path / "whole", **more)]) == 0
    target = {"train": "take_step", "validation": "measure"}[where]
    original, calls = getattr(training, target), []

    def signalled(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, target, signalled)
        assert main(["train", *settings(**more)]) == 128 + number
    said = capsys.readouterr().err
    assert said == f"stopped by {name}; `train --resume` goes on from here\n"
    progress = load_checkpoint(tmp_path / "run/last.pt")["progress"]
    # In the middle of the first epoch; or at the end of the second, before its numbers.
    expected = (0, 2) if where == "train" else (1, 4)
    assert (progress["epoch"], progress["updates"]) == expected
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert main(["train", "--resume", *settings(**more)]) == 0
    assert survivor.compare(tmp_path / "whole", tmp_path / "run") == []


def test_workers_leave_ctrl_c_to_the_trainer(settings: Settings, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "import cv_classification.train as training\n"
        "from cv_classification.__main__ import main\n"
        "original = training.take_step\n"
        "def signalled(*args):\n"
        "    training.take_step = original\n"
        "    os.killpg(0, signal.SIGINT)\n"
        "    return original(*args)\n"
        "training.take_step = signalled\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["train", *settings(data__workers=2, train__accumulate=2)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment(), capture_output=True,
        text=True, check=False, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert load_checkpoint(tmp_path / "run/last.pt")["progress"]["updates"] == 2


SLOW = """
import sys, time
import cv_classification.train as training
from cv_classification.__main__ import main
usual = training.take_step
def take_step(*args):
    print("step", flush=True)
    time.sleep(600)
    return usual(*args)
training.take_step = take_step
sys.exit(main(sys.argv[1:]))
"""


def test_two_trainings_do_not_share_a_folder(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(locked, "__defaults__", (0.5,))
    first = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SLOW, "train", *settings(data__workers=1)],
        env=environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert first.stdout is not None
        assert any(line.startswith("step") for line in first.stdout)
        writing = tmp_path / "run/.last.pt.00.tmp"
        writing.touch()
        for more in ((), ("--resume", "auto")):
            assert main(["train", *more, *settings()]) == 2
            said = capsys.readouterr().err
            assert said == (
                f"'{tmp_path / 'run'}' is in use: process {first.pid} on {socket.gethostname()} "
                "trains\n"
            )
        assert main(["train", *settings(data__folds=2, output=tmp_path / "run")]) == 2
        assert writing.exists()
    finally:
        first.kill()
        first.communicate()
    assert main(["train", *settings()]) == 0  # a lock dies with its process, but for its name
    assert not list((tmp_path / "run").glob(".*"))


def test_what_a_refusal_locked_is_as_it_was(settings: Settings, tiny: Path, tmp_path: Path) -> None:
    (tiny / "train.csv").write_text("ID,target\n")
    assert main(["train", *settings(output=tmp_path / "new/deep/run")]) == 2
    assert not (tmp_path / "new").exists()


def test_what_killed_processes_left_is_removed(settings: Settings, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", *settings(train__epochs=1)]) == 0
    names = [".submission.csv.00.tmp", ".report.html.00.tmp", ".other.csv.00.tmp"]
    for name in names:
        (run / name).touch()
        os.utime(run / name, (0, 0))
    (run / ".submission.csv.01.tmp").touch()  # a living one's
    assert main(["predict", str(run)]) == main(["report", str(run)]) == 0
    assert sorted(path.name for path in run.glob(".*")) == [names[2], ".submission.csv.01.tmp"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip(f"a file system of a few MB cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_last_checkpoint(
    settings: Settings, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = settings(output=small_disk / "run", train__save_every=1)
    assert main(["train", *settings(output=tmp_path / "whole", train__save_every=1)]) == 0
    ballast, original, calls = small_disk / "ballast", training.take_step, []

    def fill(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            free = shutil.disk_usage(small_disk).free
            ballast.write_bytes(b"x" * (free - 10_000))
        return original(*args)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(training, "take_step", fill)
        assert main(["train", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("cannot write ")
    assert load_checkpoint(small_disk / "run/last.pt")["progress"]["updates"] == 3
    assert not list((small_disk / "run").glob(".*"))
    ballast.unlink()
    assert main(["train", "--resume", *arguments]) == 0
    assert survivor.compare(tmp_path / "whole", small_disk / "run") == []


def test_a_batch_that_does_not_fit_is_split(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = NO_BATCH_NORM | {"train__epochs": 2, "train__label_smoothing": 0.1, "train__lr": 1e-3}
    assert main(["train", *settings(output=tmp_path / "whole", **more)]) == 0
    refused, fitted = [], []

    def crowded(module: Any, args: Any) -> None:
        size = len(args[0])
        if module.training:
            (refused if size > 1 else fitted).append(size)
            if size > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    build = training.build_model

    def small(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)
        model.register_forward_pre_hook(crowded)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(training, "build_model", small)
        assert main(["train", *settings(**more)]) == 0
    assert refused == [4, 2]  # not again: the size that fitted is remembered
    assert len(fitted) == 2 * 4 * 4
    whole, parts = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "run"))
    assert whole["progress"]["updates"] == parts["progress"]["updates"] == 8
    for name, value in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], value, rtol=1e-3, atol=1e-4)


def test_out_of_memory_on_a_device(settings: Settings, tmp_path: Path) -> None:
    more = {
        "device": "null", "precision": "auto", "train__epochs": 1, "data__batch_size": 8,
        "model__image_size": 64,
    }  # fmt: skip
    with play("t4", live=True) as played:
        assert main(["train", *settings(output=tmp_path / "whole", **more)]) == 0
        peak = played.memory.peak
    with play("t4", live=True, memory=int(0.8 * peak)) as played:
        assert main(["train", *settings(**more)]) == 0
        assert played.memory.peak <= 0.8 * peak
    whole, parts = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "run"))
    assert whole["progress"]["updates"] == parts["progress"]["updates"] > 0


def spoil(monkeypatch: pytest.MonkeyPatch, updates: Callable[[int], bool]) -> None:
    """Make the loss NaN in the steps that `updates` picks."""
    make_loss = training.make_loss

    class Spoilt(torch.nn.Module):
        def __init__(self, *args: Any) -> None:
            super().__init__()
            self.usual, self.calls = make_loss(*args), 0

        def sums(self, *args: Any) -> Any:
            self.calls += 1
            loss, mass = self.usual.sums(*args)
            return (loss * torch.nan if updates(self.calls) else loss), mass

    monkeypatch.setattr(training, "make_loss", Spoilt)


def test_a_loss_that_is_not_finite_is_told_and_skipped(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spoil(monkeypatch, lambda call: call in (2, 3))
    assert main(["train", *settings(train__epochs=2)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss nan")]
    assert len(told) == 2
    assert told[0].startswith("loss nan after 1 updates, scale 1, of naïve ")
    assert told[0].count(".png") == 4
    state = load_checkpoint(tmp_path / "run/last.pt")
    assert state["progress"]["updates"] == 6
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


def test_a_loss_that_stays_lost_ends_the_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spoil(monkeypatch, lambda call: call > 5)
    assert main(["train", *settings(train__epochs=9, train__give_up_after=3)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "the loss was not finite 3 times in a row, and the last good checkpoint is kept" in said
    assert (
        "; the loss: in the forward pass, mul puts nan there. It reaches the loss; a smaller"
        in said
    )
    state = load_checkpoint(tmp_path / "run/last.pt")
    assert state["progress"]["epoch"] == 1
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


def test_weights_that_are_lost_are_not_saved(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    original, calls = training.take_step, []

    def poisoned(run: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            next(run.model.buffers()).fill_(torch.nan)
        return original(run, *args)

    monkeypatch.setattr(training, "take_step", poisoned)
    assert main(["train", *settings(train__epochs=3)]) == 2
    assert "is not finite any more, and not saved" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run/last.pt")["progress"]["epoch"] == 1


@pytest.mark.filterwarnings("default::portable_amp.StateWarning")
def test_a_run_changes_its_device_and_keeps_its_scale(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def scaler() -> Any:
        return load_checkpoint(tmp_path / "run/last.pt")["scaler"]

    gpu = {"device": "null", "precision": "auto"}
    # The schedule is of six epochs throughout; patience ends the first two parts.
    arguments = {"train__epochs": 3}
    with play("t4", live=True):
        stop_after(1, settings(**gpu, **arguments))
        before = scaler()
    assert before["_growth_tracker"] > 0
    stop_after(2, ["--resume", *settings(**arguments)])
    assert "random state of 1 cuda" in capsys.readouterr().out
    assert scaler()["scale"] == before["scale"]
    assert scaler()["_growth_tracker"] == before["_growth_tracker"]
    with play("t4", live=True) as played:
        assert main(["train", "--resume", *settings(**gpu, **arguments)]) == 0
        assert played.asked("scale")
    assert scaler()["scale"] == before["scale"]
    assert scaler()["_growth_tracker"] == before["_growth_tracker"] + 4
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3


def stop_after(epoch: int, arguments: list[str]) -> None:
    """Train until so many epochs are done, and leave as SIGTERM would."""
    with pytest.MonkeyPatch.context() as patch:
        original = training.train_epoch

        def stopping(run: Any, *args: Any) -> None:
            if run.progress.epoch == epoch:
                os.kill(os.getpid(), signal.SIGTERM)
                # Held until the epoch is trained: nothing of it is to be done here.
                args[-1].release()
            original(run, *args)

        patch.setattr(training, "train_epoch", stopping)
        assert main(["train", *arguments]) == 143
