"""Runs of the example that are shot: imported once, then forked, so that a death costs a second.

usage: python survivor.py FOLDER KILLS SEED ARGUMENTS OF train...

Trains FOLDER/whole without interruption, then runs in FOLDER/shot1, shot2, ... each of which is
killed again and again at random moments and gone on with, until KILLS deaths are reached. Prints a
line of JSON: the deaths, and per run which bits differ from the whole one's.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import cv_classification.report  # noqa: F401  # and matplotlib, which takes longer than training
from cv_classification.__main__ import main
from portable_amp import load_checkpoint


def start(arguments: list[str], log: Path) -> int:
    """Fork a process that runs the example; its number."""
    child = os.fork()
    if child:
        return child
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        os._exit(main(arguments))


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """The places in two nested states whose bits differ, times of day left out."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{where}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [
            found
            for key in one
            if key not in ("seconds", "output")
            for found in differences(one[key], other[key], f"{where}/{key}")
        ]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} items"]
        return [
            found
            for index, (a, b) in enumerate(zip(one, other, strict=True))
            for found in differences(a, b, f"{where}/{index}")
        ]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [where]


def compare(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs."""
    found = [
        f"{name}{place}"
        for name in ("best.pt", "last.pt")
        for place in differences(load_checkpoint(one / name), load_checkpoint(other / name))
    ]
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, other)
    ]
    left = [path.name for path in other.glob(".*.tmp")]
    return [*found, *differences(*rows, "metrics"), *left]


def survive(folder: Path, kills: int, seed: int, arguments: list[str]) -> dict[str, Any]:
    """See the module."""
    torch.set_num_threads(1)
    dice, deaths, found, log = random.Random(seed), 0, {}, folder / "log.txt"
    began = time.monotonic()
    _, status = os.waitpid(start([*arguments, f"output={folder / 'whole'}"], log), 0)
    assert status == 0, log.read_text()
    whole = time.monotonic() - began
    while deaths < kills:
        run = folder / f"shot{len(found)}"
        resumed = [*arguments, f"output={run}", "--resume", "auto"]
        while True:
            child = start(resumed, log)
            time.sleep(dice.uniform(0.02, 1.0) * whole)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0, log.read_text()
                break
            deaths += 1
        found[run.name] = compare(folder / "whole", run)
    return {"deaths": deaths, "differences": found}


if __name__ == "__main__":
    told = survive(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    print(json.dumps(told))
