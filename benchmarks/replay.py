"""How far each module of healthy models is from float64, alone; in each dtype.

    [MODELS=resnet10t,diffusion] [SEEDS=5] python benchmarks/replay.py [--out FOLDER]

In fp32, bf16 and fp16, with CUDA's autocast rules and this CPU's numbers (a live played H100),
training and evaluation. The bounds of
`numerics/judge.py` follow from it.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import measure
import torch

from portable_amp import DeviceContext
from portable_amp.numerics import walk
from portable_amp.numerics.judge import BOUNDS, distances, is_backward, worst
from portable_amp.testing import play

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from zoo import ZOO

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def one(name: str, short: str, seed: int, training: bool) -> dict[str, Any]:
    """Verify one model, and note how far each result is off, of leaves and of what has others."""
    dtype = DTYPES[short]
    torch.manual_seed(seed)
    model, batch = ZOO[name]()
    model.train(training)
    found = {"leaf forward": 0.0, "leaf backward": 0.0, "rest forward": 0.0, "rest backward": 0.0}
    beyond = [0.0]

    def noting(exact: Any, got: Any) -> Any:
        answered = any(" of " in what and ", call " in what for what in exact.found)
        for far in distances(exact, got):
            kind = "rest" if answered else "leaf"
            kind += " backward" if is_backward(far.what) else " forward"
            found[kind] = max(found[kind], far.error)
            beyond.append(worst(far, BOUNDS[dtype]).beyond)
            yield far

    vars(walk)["distances"] = noting
    try:
        start = time.perf_counter()
        with play("h100", live=True):
            report = DeviceContext(precision=short).verify(model, batch, repeats=1)
        seconds = time.perf_counter() - start
    finally:
        vars(walk)["distances"] = distances
    return {
        "model": name, "seed": seed, "training": training, **found,
        "beyond": max(beyond), "faults": [str(fault) for fault in report.faults],
        "limits": len(report.limits), "calls": report.modules, "seconds": seconds,
        "notes": list(report.notes),
        "limit": max([limit.error for limit in report.limits], default=0.0),
    }  # fmt: skip


def main() -> None:
    """Measure all, and print a table for each dtype."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    some = os.environ.get("MODELS", ",".join(ZOO)).split(",")
    seeds = range(int(os.environ.get("SEEDS", "5")))
    numbers, tables = [], []
    columns = ["model", "leaf forward", "leaf backward", "rest forward", "rest backward"]
    for short, dtype in DTYPES.items():
        rows: list[list[Any]] = []
        for name in some:
            # Every other seed in evaluation.
            runs = [one(name, short, seed, training=seed % 2 == 0) for seed in seeds]
            numbers += [{"dtype": short, **run} for run in runs]
            most = [f"{max(run[kind] for run in runs):.1e}" for kind in columns[1:]]
            limits = max(run["limits"] for run in runs)
            accused = sum(len(run["faults"]) for run in runs)
            rows.append([name, *most, limits, accused])
            print(short, *rows[-1], f"{sum(run['seconds'] for run in runs):.0f} s", flush=True)
            for text in sorted({text for run in runs for text in run["faults"]}):
                print("   ", text, flush=True)
        told = measure.table([*columns, "limits", "faults"], rows)
        tables.append(f"{short}, allowed {BOUNDS[dtype]:.1e}:\n\n{told}")
    measure.tell("replay", "\n\n".join(tables), {"runs": numbers})


if __name__ == "__main__":
    main()
