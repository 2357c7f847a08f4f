"""What recording a trace costs: a training step with it over one without, of three models.

    python benchmarks/trace.py

Each pair of steps is taken one after the other, in either order; told are the median of the pairs'
ratios and its quartiles, and bytes per step. Source of the numbers in docs/how-to.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn

from portable_amp import DeviceContext
from portable_amp.numerics import tracefile

PAIRS = 40


def perceptron() -> tuple[nn.Module, torch.Tensor]:
    """784-1024-1024-10, 128 samples."""
    layers = nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    return nn.Sequential(*layers), torch.randn(128, 784)


def convolutional() -> tuple[nn.Module, torch.Tensor]:
    """Timm's resnet10t, 8 images of 128 pixels."""
    return timm.create_model("resnet10t", num_classes=10), torch.randn(8, 3, 128, 128)


def transformer() -> tuple[nn.Module, torch.Tensor]:
    """Four layers of 256 with 4 heads, 8 texts of 128."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return encoder, torch.randn(8, 128, 256)


def stepping(
    make: Callable[[], tuple[nn.Module, torch.Tensor]],
) -> tuple[nn.Module, Callable[[], None]]:
    """A model, and what trains it for one step."""
    torch.manual_seed(0)
    model, batch = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def seconds(step: Callable[[], None]) -> float:
    """That it takes."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def main() -> int:
    """Print a line for each model."""
    ctx = DeviceContext("cpu", precision="fp32")
    for make in (perceptron, convolutional, transformer):
        (traced, step), (_, plain) = stepping(make), stepping(make)
        ratios, alone = [], []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace")
            with ctx.trace(traced, path) as trace:
                for pair in range(PAIRS + 3):
                    if pair % 2:
                        with_it, without = seconds(step), seconds(plain)
                    else:
                        without, with_it = seconds(plain), seconds(step)
                    if pair >= 3:
                        ratios.append(with_it / without)
                        alone.append(without)
            size = path.stat().st_size / trace.recorded
            calls = len(tracefile.read(path).steps[0].calls)
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{make.__name__}: {middle:.2f} ({low:.2f} to {high:.2f}) of "
            f"{statistics.median(alone) * 1000:.1f} ms, {calls} calls, {size / 1000:.1f} kB a step"
        )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    return 0


if __name__ == "__main__":
    sys.exit(main())
