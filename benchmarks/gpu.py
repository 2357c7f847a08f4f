"""What only a card can show: how much of an epoch it is busy, and what clearing its cache costs.

    python benchmarks/gpu.py [--out FOLDER]

The epoch is the example's, of a ResNet-50 under the tuned plan, from a warm cache of images.
Where there is no CUDA device it says so, and measures nothing.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import measure
import torch
import training
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from portable_amp import DeviceContext


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the spans (start, end) lasts."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def busy(folder: Path, count: int) -> dict[str, float]:
    """The share of an epoch in which a kernel or a copy runs, and its images per second."""
    files = measure.jpegs(folder, count)
    epoch = training.ways_of("resnet50", files, folder)["tuned, cache"]
    for _ in range(2):  # fills the cache, and warms up
        epoch()
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        epoch()
    seconds = time.perf_counter() - start
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in seen.events()
        if event.device_type is DeviceType.CUDA
    ]
    return {"busy": covered(spans) / 1e6 / seconds, "images_per_second": count / seconds}


def clearing(ctx: DeviceContext) -> dict[str, float]:
    """Seconds per training step that clears no cache, a cache under pressure, and always."""
    layers = [torch.nn.Linear(2048, 2048) for _ in range(8)]
    model = ctx.to(torch.nn.Sequential(*layers))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1e-3), ctx.scaler()
    batch = ctx.to(torch.randn(256, 2048))

    def step() -> None:
        with ctx.autocast():
            loss = model(batch).square().mean()
        scaler.backward_step(loss, optimizer)

    def under_pressure() -> None:
        step()
        ctx.clear_cache(min_pressure=0.9)

    def always() -> None:
        step()
        ctx.clear_cache()

    ways = {"never": step, "under pressure": under_pressure, "always": always}
    return measure.interleaved(ways, calls=20, rounds=15)


def main() -> None:
    """Measure both, and print the table."""
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return
    warnings.simplefilter("ignore")
    with TemporaryDirectory() as made:
        epoch = busy(Path(made), training.MODELS["resnet50"])
    steps = clearing(DeviceContext())
    rows = [
        ["an epoch: busy", f"{epoch['busy']:.0%}"],
        ["an epoch: images per second", f"{epoch['images_per_second']:.0f}"],
        *(
            [f"a step, cache cleared {way}, over never", f"{seconds / steps['never']:.2f}"]
            for way, seconds in steps.items()
        ),
    ]
    measure.tell("gpu", measure.table(["what", "value"], rows), {**epoch, "steps": steps})


if __name__ == "__main__":
    main()
