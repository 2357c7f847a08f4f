"""The example under torchrun: two processes on CPU, over gloo, against one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cv_classification.__main__ import main
from cv_classification.config import Config
from cv_classification.images import Draws, evaluation_draws
from portable_amp import Ranks, load_checkpoint

from . import survivor
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
}  # fmt: skip
DIE_ONCE = """
import os, signal, sys
from pathlib import Path
import cv_classification.train as training
from cv_classification.__main__ import main
original, mark = training.take_step, Path(sys.argv[1])
def step(run, *args):
    if os.environ["RANK"] == "1" and run.progress.updates == 5 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(run, *args)
training.take_step = step
sys.exit(main(sys.argv[2:]))
"""


def torchrun(*words: str, restarts: int = 0, status: int = 0) -> str:
    done = subprocess.run(
        [
            sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", "2", "--max-restarts", str(restarts), *words,
        ],
        env=environment(), capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert (done.returncode == 0) is (status == 0), done.stdout + done.stderr
    return done.stdout if status == 0 else done.stderr


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


def test_two_processes_train_as_one(settings: Settings, tmp_path: Path) -> None:
    assert main(["train", *settings(output=tmp_path / "one", **COMPARABLE)]) == 0
    said = torchrun("-m", "cv_classification", "train", *settings(**COMPARABLE))
    assert said.count("18 images to train on, 6 to validate") == 1
    assert_close(tmp_path / "one", tmp_path / "run")
    assert (tmp_path / "run/report.html").is_file()
    # The shards of a model, and of the optimizer, are saved as a whole.
    sharded = settings(output=tmp_path / "sharded", train__sharded="true", **COMPARABLE)
    torchrun("-m", "cv_classification", "train", *sharded)
    assert_close(tmp_path / "one", tmp_path / "sharded")


@pytest.mark.parametrize("sharded", ["false", "true"])
def test_a_killed_worker_is_brought_back(sharded: str, settings: Settings, tmp_path: Path) -> None:
    more = {**COMPARABLE, "train__save_every": 1, "train__sharded": sharded}
    torchrun("-m", "cv_classification", "train", *settings(output=tmp_path / "whole", **more))
    script = tmp_path / "die_once.py"
    script.write_text(DIE_ONCE, "utf-8")
    mark = tmp_path / "died"
    arguments = [str(script), str(mark), "train", "--resume", "auto", *settings(**more)]
    torchrun(*arguments, restarts=1)
    assert mark.exists()
    assert survivor.compare(tmp_path / "whole", tmp_path / "run") == []
    if sharded == "true":
        return
    mark.unlink()  # without restarts the death ends the run
    assert "SIGKILL" in torchrun(
        *[word.replace("/run", "/again") for word in arguments], restarts=0, status=1
    )


def test_processes_that_cannot_share(settings: Settings) -> None:
    said = torchrun("-m", "cv_classification", "train", *settings(data__batch_size=3), status=2)
    assert "data.batch_size=3 is of all 2 processes together" in said


@pytest.mark.parametrize("count", [1, 5, 6, 17])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_no_image_is_lost_or_doubled(count: int, world: int) -> None:
    shares = [
        evaluation_draws(count, (1, 2), 2, share=Ranks(rank, rank, world)) for rank in range(world)
    ]
    assert len({len(share) for share in shares}) == 1
    together = [draw for share in shares for draw in share]
    once = evaluation_draws(count, (1, 2), 2)
    assert sorted(set(together)) == sorted(set(once))
    assert len(together) - len(once) < world
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
