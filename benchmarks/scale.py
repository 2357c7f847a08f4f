"""From 1,000 to 100,000 images: what starting and loading cost per image. And two processes.

    python benchmarks/scale.py [--out FOLDER]

The images are hard links to 50 small JPEGs, so that the files' own cost is the same throughout.
The two processes train the example on the CPU, each with one thread, against one with one thread.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import measure

from cv_classification.augment import Transform, find_preset
from cv_classification.config import check_config
from cv_classification.images import Draws, ImageDataset, read_split

COUNTS = (1_000, 10_000, 100_000)
CLASSES, SIZE, LOADED, ROUNDS = 10, 64, 500, 5


def measured(
    folder: Path, files: list[Path], count: int
) -> tuple[dict[str, float], Callable[[], None]]:
    """Costs per image of a data set of so many; and what loads the same number of any."""
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
    for number in range(count):
        os.link(
            files[number % len(files)], folder / f"class{number % CLASSES}" / f"{number:06}.jpg"
        )
    config = check_config({"data": {"path": folder}}, "")
    start = time.perf_counter()
    data = read_split(config)
    began = time.perf_counter() - start
    transform = Transform(find_preset("none"), SIZE)
    tracemalloc.start()
    copies = [sample._replace(path=Path(str(sample.path))) for sample in data.train]
    dataset = ImageDataset(copies, transform)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    draws = Draws([sample.label for sample in data.train], ((0,),), config)
    start = time.perf_counter()
    order = list(draws)
    shuffled = time.perf_counter() - start

    def load() -> None:
        for draw in (order * (LOADED // len(order) + 1))[:LOADED]:
            dataset[draw]

    found = {
        "images": count,
        "start_us": 1e6 * began / count,
        "bytes": size / len(copies),
        "order_us": 1e6 * shuffled / len(order),
    }
    return found, load


def epoch_seconds(folder: Path, data: Path, processes: int) -> float:
    """Seconds of an epoch of the example."""
    out = folder / f"run{processes}"
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command += ["cv_classification", "train", "device=cpu", "precision=fp32", f"output={out}"]
    command += [f"data.path={data}", "model.name=test_resnet", "model.image_size=96"]
    command += ["train.epochs=4", "data.batch_size=32"]
    paths = os.pathsep.join(("src", "examples"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    return statistics.median(json.loads(line)["seconds"] for line in lines[1:])


def main() -> None:
    """Measure all, and print the table."""
    numbers: list[dict[str, Any]] = []
    loads: dict[str, Callable[[], None]] = {}
    with TemporaryDirectory() as made:
        folder = Path(made)
        files = measure.jpegs(folder, 50, width=128, height=96)
        measured(folder / "few", files, 400)  # warms up
        for count in COUNTS:
            with contextlib.redirect_stdout(io.StringIO()):
                found, loads[str(count)] = measured(folder / str(count), files, count)
            numbers.append(found)
            print(found, flush=True)
        loaded = measure.interleaved(loads, calls=1, rounds=ROUNDS)
        for one in numbers:
            one["load_us"] = 1e6 * loaded[str(one["images"])] / LOADED
        alone = epoch_seconds(folder, folder / "few", 1)
        together = epoch_seconds(folder, folder / "few", 2)
    rows = [
        [f"{one['images']:,}", *(f"{one[name]:.3g}" for name in list(one)[1:])] for one in numbers
    ]
    columns = [
        "images",
        "start, µs each",
        "data set, bytes each",
        "order, µs each",
        "load, µs each",
    ]
    efficiency = alone / together / 2
    text = measure.table(columns, rows)
    text += f"\n\nTwo processes over gloo are {alone / together:.2f} times as fast as one: an "
    text += f"efficiency of {efficiency:.0%} (test_resnet at 96 px, batch 32 in all)."
    measure.tell("scale", text, {"sizes": numbers, "alone_s": alone, "two_s": together})


if __name__ == "__main__":
    main()
