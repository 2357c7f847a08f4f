"""What the drop-ins cost, against torch's own in the same run.

    python benchmarks/dropins.py [--out FOLDER]

accelerate and Fabric are in the table where they are installed.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import measure
import torch

from portable_amp import DeviceContext, ScalerShim, choose, maybe_autocast
from portable_amp.context import _restore
from portable_amp.testing import machine

CPU = torch.device("cpu")


def context(precision: Any) -> DeviceContext:
    """One for a CPU with bf16 instructions, as what is computed makes no difference here."""
    facts = machine("cpu-avx512bf16").capabilities
    return _restore(CPU, facts, choose(precision, facts), "fallback")


def entering(region: Callable[[], Any]) -> Callable[[], None]:
    """Enter and leave what the function returns."""

    def enter() -> None:
        with region():
            pass

    return enter


def others(on: bool) -> dict[str, Callable[[], None]]:
    """Accelerate's and Fabric's regions."""
    found = {}
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(mixed_precision="bf16" if on else "no", cpu=True)
        found["accelerate"] = entering(accelerator.autocast)
    except ImportError:
        pass
    try:
        from lightning_fabric import Fabric

        fabric = Fabric(accelerator="cpu", precision="bf16-mixed" if on else "32-true")
        found["Fabric"] = entering(fabric.autocast)
    except ImportError:
        pass
    return found


# The same for all: where tensors lie in memory makes a difference of its own.
WEIGHTS = [torch.randn(256, 256, requires_grad=True) for _ in range(2)]
IMAGES = torch.randn(32, 256)


def step_with(scaler: Any) -> Callable[[], None]:
    """One optimizer step on two parameters; without a scaler where it is None."""
    optimizer = torch.optim.SGD(WEIGHTS, lr=1e-6)

    def step() -> None:
        loss = (IMAGES @ WEIGHTS[0] @ WEIGHTS[1]).float().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()

    return step


def calls_of(scaler: Any) -> Callable[[], None]:
    """What surrounds the optimizer, and an optimizer that does nothing but be called."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    loss = torch.zeros(1)

    def call() -> None:
        if scaler is None:
            optimizer.step()
        else:
            scaler.scale(loss)
            scaler.step(optimizer)
            scaler.update()

    return call


def imports() -> dict[str, float]:
    """Milliseconds of importing portable_amp's names after torch: the median of five."""
    code = (
        "import time, torch; start = time.perf_counter(); "
        "from portable_amp import DeviceContext, maybe_autocast, ScalerShim, clear_cache; "
        "print(time.perf_counter() - start)"
    )
    run = [sys.executable, "-c", code]
    with tempfile.TemporaryDirectory() as folder:  # as installed: with compiled files
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": folder}
        times = [float(subprocess.check_output(run, env=env)) for _ in range(6)][1:]
    return {"ours": statistics.median(times)}


def main() -> None:
    """Measure everything, and print the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    on, off = context("bf16"), context("fp32")
    batch = torch.randn(8, 8), torch.zeros(8, dtype=torch.long)
    quick, slow = {"calls": 2000, "rounds": 25}, {"calls": 50, "rounds": 51}
    rows: list[tuple[str, dict[str, float], str]] = [
        (
            "autocast on: enter and leave",
            measure.interleaved(
                {
                    "torch": entering(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
                    "ours": entering(on.autocast),
                    **others(on=True),
                },
                **quick,
            ),
            "0.65",
        ),
        (
            "autocast off: enter and leave",
            measure.interleaved(
                {
                    "torch": entering(lambda: torch.autocast("cpu", enabled=False)),
                    "ours": entering(off.autocast),
                    **others(on=False),
                },
                **quick,
            ),
            "0.2",
        ),
        (
            "maybe_autocast: enter and leave",
            measure.interleaved(
                {
                    "torch": entering(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
                    "ours": entering(lambda: maybe_autocast("cpu", dtype=torch.bfloat16)),
                },
                **quick,
            ),
            "1.05",
        ),
        (
            "ScalerShim, enabled: a training step",
            measure.interleaved(
                {
                    "torch": step_with(torch.amp.GradScaler("cpu")),
                    "ours": step_with(ScalerShim("cpu", enabled=True)),
                },
                **slow,
            ),
            "1.02",
        ),
        (
            "ScalerShim, disabled: a training step without one",
            measure.interleaved(
                {"torch": step_with(None), "ours": step_with(ScalerShim("cpu", enabled=False))},
                **slow,
            ),
            "1.1",
        ),
        (
            "ScalerShim, disabled: the three calls and SGD of one number",
            measure.interleaved(
                {
                    "torch": calls_of(None),
                    "ours": calls_of(ScalerShim("cpu", enabled=False)),
                    "torch's GradScaler": calls_of(torch.amp.GradScaler("cpu", enabled=False)),
                },
                calls=500,
                rounds=25,
            ),
            "1.1",
        ),
        (
            "ctx.to of two tensors: two `.to`",
            measure.interleaved(
                {
                    "torch": lambda: (batch[0].to(CPU), batch[1].to(CPU)),
                    "ours": lambda: off.to(batch),
                },
                **quick,
            ),
            "+5 us",
        ),
    ]
    lines: list[list[Any]] = []
    for name, seconds, target in rows:
        base, rest = seconds["torch"], dict(seconds)
        rest.pop("torch")
        ours = rest.pop("ours")
        beyond = ", ".join(f"{other} {time / base:.2f}" for other, time in rest.items()) or "-"
        lines.append(
            [name, f"{base * 1e6:.2f}", f"{ours * 1e6:.2f}", f"{ours / base:.2f}", target, beyond]
        )
    started = imports()["ours"]
    lines.append(
        ["import, beyond `import torch`", "-", f"{started * 1e6:.0f}", "-", "20000 us", "-"]
    )
    columns = ["what", "torch's own, us", "ours, us", "ratio", "target", "others' ratios"]
    result = {"rows": {name: seconds for name, seconds, _ in rows}, "import": started}
    measure.tell("dropins", measure.table(columns, lines), result)


if __name__ == "__main__":
    main()
