"""Faults put into models on purpose: where replay names them, and whether a whole-model check does.

    python benchmarks/planted.py [--out FOLDER]

The check is that of `tuning.differs`: loss and gradients, in evaluation, beside the right model's.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import measure
import torch

from portable_amp import DeviceContext
from portable_amp.copies import mean_square
from portable_amp.tuning import TOLERANCE, _Result, differs

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from planted import PLANTED, plant
from zoo import ZOO


def computed(model: torch.nn.Module, batch: Any) -> _Result:
    """Loss and gradient, as `tuned` looks at them."""
    model.zero_grad()
    loss = mean_square(model.eval(), batch)
    loss.backward()
    pairs = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return _Result(float(loss.detach()), pairs)


def main() -> None:
    """Plant each, and print the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, numbers = list[list[Any]](), []
    for what, (name, place, _) in PLANTED.items():
        model, batch, _ = plant(what)
        repeats = 1 + (what == "the second run")
        report = DeviceContext("cpu", precision="fp32").verify(model, batch, repeats=repeats)
        named = {fault.module for fault in report.faults} == {place}
        torch.manual_seed(0)
        right = computed(ZOO[name]()[0], batch)
        wrong = computed(model, batch)
        passes = {
            short: not differs(wrong, right, dtype)
            for short, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        }
        worst = max(fault.error / fault.allowed for fault in report.faults)
        numbers.append({"what": what, "model": name, "module": place, "named": named, **passes})
        told = ["no" if passes[short] else "yes" for short in ("fp32", "bf16")]
        far = f"{worst:.0f}" if worst < 1e5 else "more than 100,000"
        rows.append([what, name, place or "the model itself", far, "yes" if named else "NO", *told])
        print(*rows[-1], flush=True)
    columns = ["fault", "model", "module", "times its bound", "named there"]
    columns += [
        f"loss and gradients beyond {TOLERANCE[dtype]}" for dtype in (torch.float32, torch.bfloat16)
    ]
    measure.tell("planted", measure.table(columns, rows), {"faults": numbers})


if __name__ == "__main__":
    main()
