"""The example under torchrun: two processes on CPU, over gloo, against one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cv_classification.__main__ import main
from cv_classification.config import Config
from cv_classification.images import Draws, evaluation_draws
from portable_amp import Ranks, load_checkpoint

from . import test_example_training as training
from .conftest import overrides, write_tiny
from .survivor import compare
from .test_example_survival import NO_BATCH_NORM, environment

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not torch.distributed.is_available(), reason="this torch has no distributed processes"
    ),
]

Settings = Callable[..., list[str]]
# No BatchNorm, which sees another batch in each process; and no dropout.
COMPARABLE = NO_BATCH_NORM | {
    "train__epochs": 2, "train__label_smoothing": 0.1, "train__max_norm": 1.0,
    "train__lr": 1e-3, "data__preset": "documents", "train__validation_views": 3,
    "train__class_weights": "balanced",
}  # fmt: skip


# Else the restarted processes find the addresses of the dead ones: pytorch#135712.
STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
TORCHRUN = (
    *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"),
    *("--nproc-per-node", "2"),
)
FORKED = """
import json, os, signal, sys
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel
import cv_classification.report
from cv_classification import train
from cv_classification.__main__ import main
from e2e import test_example_training as training
asked, usual = json.loads(sys.argv[1]), train.take_step
def dies_once(run, *rest):
    died = run.config.output / "died"
    if run.progress.updates == 5 and os.environ["RANK"] == "1" and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return usual(run, *rest)
def run(name, *more):
    assert main(["train", *more, f"output={name}", *asked[name]]) == 0
def killed():
    train.take_step = dies_once
    run("killed", "--resume", "auto")
def step():
    torch.manual_seed(0)
    model, parts = training.Linear(), training.linear_batches(2)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    net = DistributedDataParallel(model)
    training.run_epoch(net, parts[rank : rank + 1], training.CPU.scaler(), **training.WEIGHED)
    if rank == 0:
        torch.save(model.state_dict(), "two.pt")
    torch.distributed.destroy_process_group()
for job, *words in ((run, "whole"), (killed,), (run, "sharded"), (step,)):
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="-".join((job.__name__, *words)),
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=3 * (job is killed),
        start_method="fork",
    )
    elastic_launch(config, job)(*words)
run("one")
"""


def torchrun(*words: str) -> str:
    done = subprocess.run(
        [*TORCHRUN, *words],
        env=environment() | STORE, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_close(one: Path, other: Path) -> None:
    mine, theirs = rows(one), rows(other)
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        for name in a.keys() - {"seconds"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
    first, second = (load_checkpoint(run / "best.pt")["model"] for run in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What came of FORKED: torchrun's own agent, but that its processes import nothing anew."""
    folder = tmp_path_factory.mktemp("forked")
    killed = overrides(
        data__path=write_tiny(folder / "usual"), train__epochs=3, train__save_every=2
    )
    table = write_tiny(folder / "data") / "train.csv"
    # One class is rare, and the images to validate are odd in number.
    table.write_text("".join(table.read_text("utf-8").splitlines(keepends=True)[:-4]), "utf-8")
    one = overrides(data__path=folder / "data", **COMPARABLE)
    asked = {
        "whole": killed, "killed": killed, "one": one, "sharded": [*one, "train.sharded=true"]
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, json.dumps(asked)],
        env=environment() | STORE, cwd=folder, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@needs_fork
def test_two_processes_train_as_one(forked: Path) -> None:
    two = overrides(data__path=forked / "data", output=forked / "two", **COMPARABLE)
    said = torchrun("-m", "cv_classification", "train", *two)
    assert said.count("15 images to train on, 5 to validate") == 1
    assert (forked / "two/report.html").is_file()
    assert_close(forked / "one", forked / "two")


@needs_fork
def test_two_processes_that_share_the_weights_train_as_one(forked: Path) -> None:
    assert (forked / "sharded/report.html").is_file()
    assert_close(forked / "one", forked / "sharded")


@needs_fork
def test_two_processes_take_the_mean_over_both(forked: Path) -> None:
    torch.manual_seed(0)
    model, parts = training.Linear(), training.linear_batches(2)
    whole = [tuple(torch.cat(column) for column in zip(*parts, strict=True))]
    training.run_epoch(model, whole, training.CPU.scaler(), **training.WEIGHED)
    two = torch.load(forked / "two.pt", weights_only=True)
    torch.testing.assert_close(two, model.state_dict(), rtol=1e-5, atol=1e-6)


@needs_fork
def test_a_killed_worker_is_brought_back(forked: Path) -> None:
    assert (forked / "killed/died").exists()
    assert compare(forked / "whole", forked / "killed") == []


SLOW = """
import os, sys, time
from cv_classification import train as training
from cv_classification.__main__ import main
usual = training.take_step
def take_step(run, *rest):
    print("rank", os.environ["RANK"], os.getpid(), flush=True)
    time.sleep(0.2)
    return usual(run, *rest)
training.take_step = take_step
sys.exit(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="this system does not tell of dead parents")
def test_ranks_end_with_their_launcher(settings: Settings, tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    arguments = ["train", *settings(train__epochs=500)]
    with (tmp_path / "log.txt").open("w+") as log:
        launcher = subprocess.Popen(
            [*TORCHRUN, str(script), *arguments], env=environment() | STORE, stdout=log, stderr=log
        )
        found: dict[str, str] = {}
        try:
            for _ in range(600):
                text = (tmp_path / "log.txt").read_text()
                found = dict(re.findall(r"rank (\d) (\d+)", text))
                if len(found) == 2 or launcher.poll() is not None:
                    break
                time.sleep(0.1)
            assert len(found) == 2, text
            launcher.kill()
            launcher.wait()
            for _ in range(50):
                alive = [pid for pid in found.values() if running(int(pid))]
                if not alive:
                    break
                time.sleep(0.1)
            assert alive == []
        finally:
            launcher.kill()
            for pid in found.values():
                if running(int(pid)):
                    os.kill(int(pid), signal.SIGKILL)


def running(pid: int) -> bool:
    done = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()[:1] not in ("", "Z")


def test_processes_that_cannot_share(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert main(["train", *settings(data__batch_size=3)]) == 2
    assert "data.batch_size=3 is of all 2 processes together" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 5, 6, 17])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_no_image_is_lost_or_doubled(count: int, world: int) -> None:
    shares = [
        evaluation_draws(count, (1, 2), 3, share=Ranks(rank, rank, world)) for rank in range(world)
    ]
    assert len({len(share) for share in shares}) == 1
    together = [draw for share in shares for draw in share]
    once = evaluation_draws(count, (1, 2), 3)
    assert sorted(set(together)) == sorted(set(once))
    assert len(together) - len(once) < 3 * world
    times = {draw[0]: Counter(together)[draw] for draw in once}
    assert all(Counter(together)[draw] == times[draw[0]] for draw in once)  # or the mean is another
    assert {index for index, _, _ in once} == set(range(count))


@pytest.mark.parametrize("world", [2, 3])
def test_shares_make_up_the_batch(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(rank: int, size: int) -> list[Any]:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))
        draws = Draws([0, 1, 0, 1, 1] * 5, [(1, 2)], Config())
        assert len(list(draws)) == len(draws)
        return list(draws)

    whole = drawn(0, 1)
    shares = [drawn(rank, world) for rank in range(world)]
    size = 6 // world
    for at in range(len(shares[0]) // size):
        batch = [draw for share in shares for draw in share[at * size : (at + 1) * size]]
        assert sorted(batch) == sorted(whole[6 * at : 6 * (at + 1)])
