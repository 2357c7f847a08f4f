"""What `ctx.verify` costs beside one training step: seconds, and memory at its peak.

    python benchmarks/verify.py [--out FOLDER]

Each in a process of its own; what the process had before, with torch and the model, is left out.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

import measure
import timm
import torch

from portable_amp import DeviceContext
from portable_amp.copies import mean_square

MODELS = {"resnet10t": (64, 4), "resnet18": (128, 8), "vit_small_patch16_224": (224, 4)}
"""timm's models, the width of an image, and images in a batch."""
STEPS = 5


def one(name: str, what: str) -> dict[str, float]:
    """Seconds and MB of a training step, or of a verification, with one thread, in fp32."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    size, count = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=17).train()
    images = torch.randn(count, 3, size, size)
    ctx = DeviceContext("cpu", precision="fp32")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(STEPS if what == "step" else 1):
        start = time.perf_counter()
        if what == "step":
            mean_square(model, images).backward()
            model.zero_grad()
        else:
            assert ctx.verify(model, images, repeats=1).ok
        seconds.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": statistics.median(seconds), "mb": (after - before) / 1024}


def main() -> None:
    """Measure all, and print the table."""
    rows, numbers = list[list[Any]](), {}
    for name, (size, count) in MODELS.items():
        found = {}
        for what in ("step", "verify"):
            command = [sys.executable, __file__, name, what]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[what] = json.loads(done.stdout.splitlines()[-1])
        step, whole = found["step"], found["verify"]
        times = whole["seconds"] / step["seconds"]
        row = [f"{step['seconds']:.2f} s", f"{whole['seconds']:.1f} s", f"{times:.0f}"]
        row += [f"{step['mb']:.0f} MB", f"{whole['mb']:.0f} MB"]
        rows.append([f"{name}, {count} images of {size} px", *row])
        numbers[name] = found
        print(*rows[-1], flush=True)
    columns = ["model", "a training step", "verify(repeats=1)", "times as long"]
    columns += ["a step's memory", "verify's"]
    measure.tell("verify", measure.table(columns, rows), numbers)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in MODELS:
        print(json.dumps(one(*sys.argv[1:3])))
    else:
        main()
