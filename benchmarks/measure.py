"""Timing things side by side: interleaved, medians, ratios; and what ran it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import portable_amp


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, calls: int, rounds: int
) -> dict[str, float]:
    """Seconds per call of each: the median of rounds in which every one has its turn."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            if turn:  # the first round warms up
                seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(times) for name, times in seconds.items()}


def jpegs(folder: Path, count: int, width: int = 500, height: int = 400) -> list[Path]:
    """So many JPEG files of smooth noise, about as hard to decode as photographs."""
    random = np.random.default_rng(0)
    paths = [folder / f"{number:04}.jpg" for number in range(count)]
    for path in paths:
        coarse = random.integers(256, size=(height // 8, width // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        fine = np.asarray(picture, np.int16) + random.integers(-12, 13, (height, width, 1))
        Image.fromarray(fine.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def machine() -> dict[str, Any]:
    """Where it was measured."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": portable_amp.probe("cpu").name,
        "card": card,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "portable_amp": portable_amp.__version__,
        "date": date.today().isoformat(),
    }


def table(columns: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def tell(name: str, text: str, result: dict[str, Any]) -> None:
    """Print the table; with `--out FOLDER` write it and its numbers there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    where = machine()
    place = (
        f"{where['card'] or where['processor']}, {where['cores']} cores, {where['threads']} "
        f"threads, torch {where['torch']}, Python {where['python']}, {where['date']}"
    )
    page = f"{text}\n\n{place}\n"
    print(page)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.md").write_text(page, "utf-8")
        data = json.dumps({"machine": where, **result}, indent=2)
        (out / f"{name}.json").write_text(data + "\n", "utf-8")
