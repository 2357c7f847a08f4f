"""How far the plan of ctx.tuned is from the best: regret, and the speed-up over what others do.

    [MODELS=resnet18,vit_tiny_patch16_224] python benchmarks/tuned.py [--out FOLDER]

Twelve timm models of different families, training and inference. Each is tuned, and then every
candidate that computes what fp32 does is measured again, by itself. accelerate, Fabric and timm's
training script compute contiguous fp32 unless told otherwise: that is the speed-up's base.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
import warnings
from typing import Any

import measure
import timm
import torch

from portable_amp import DeviceContext
from portable_amp.copies import LAYOUTS, copier, mean_square
from portable_amp.tuning import NAMES, _Run, candidates

MODELS = {
    "test_resnet": 160,
    "resnet18": 128,
    "vit_tiny_patch16_224": 224,
    "mobilenetv3_small_050": 128,
    "convnext_atto": 128,
    "regnetx_002": 128,
    "efficientnet_lite0": 128,
    "ghostnet_050": 128,
    "levit_128s": 224,
    "mobilevit_xxs": 128,
    "edgenext_xx_small": 128,
    "repvgg_a0": 128,
}
BATCH, SECONDS = 16, 3.0


def again(ctx: DeviceContext, model: torch.nn.Module, images: torch.Tensor) -> dict[str, float]:
    """Seconds per step of every candidate that stays near fp32; interleaved, the median."""
    prepared = functools.cache(
        copier(model, images, DeviceContext(ctx.device, precision="fp32").to)
    )
    reference, runs = None, list[_Run]()
    for one in candidates(model, ctx.capabilities):
        run = _Run(one, prepared, ctx.device, mean_square, ctx.synchronize, training=model.training)
        result = run.check(reference)
        reference = reference or result
        runs += [] if one.out else [run]
    for run in runs:
        run.timed()  # warms up
        run.candidate.seconds += filter(None, [run.timed()])
    first = {run.candidate.name: run.candidate.seconds[0] for run in runs}
    # What is twice as slow as the best at the first step is not the best.
    hopeful = [run for run in runs if first[run.candidate.name] < 2 * min(first.values())]
    for _ in range(max(5, min(50, int(SECONDS / sum(first.values()))))):
        for run in hopeful:
            run.candidate.seconds += filter(None, [run.timed()])
    return {run.candidate.name: statistics.median(run.candidate.seconds) for run in runs}


def main() -> None:
    """Measure all, and print the table."""
    warnings.simplefilter("ignore")
    ctx = DeviceContext()
    layouts = {layout: name for name, layout in LAYOUTS.items()}
    rows: list[list[Any]] = []
    numbers = []
    some = os.environ.get("MODELS", ",".join(MODELS)).split(",")
    for name, size in ((name, MODELS[name]) for name in some):
        images = torch.randn(BATCH, 3, size, size)
        for training in (True, False):
            model = timm.create_model(name, num_classes=17).train(training)
            start = time.perf_counter()
            plan = ctx.tuned(model, images, cache=False).plan
            cost = time.perf_counter() - start
            chosen = f"{NAMES[plan.dtype]} {layouts[plan.memory_format]}"
            seconds = again(ctx, model, images)
            best = min(seconds, key=seconds.__getitem__)
            regret = seconds[chosen] / seconds[best]
            gain = seconds["fp32 contiguous"] / seconds[chosen]
            half = seconds.get("bf16 contiguous")
            mixed = half / seconds[chosen] if half else None
            steps = cost / max(seconds.values())
            numbers.append(
                {"model": name, "training": training, "chosen": chosen, "best": best,
                 "regret": regret, "gain": gain, "over_bf16": mixed, "cost_s": cost, "steps": steps,
                 "seconds": seconds, "settled": plan.settled}
            )  # fmt: skip
            mode = "training" if training else "inference"
            row = [name, size, mode, chosen, best, f"{regret:.2f}", f"{gain:.2f}"]
            row += [f"{mixed:.2f}" if mixed else "-", f"{steps:.0f}"]
            rows.append(row)
            print(*row, flush=True)
    regrets = [one["regret"] for one in numbers]
    columns = [
        "model",
        "px",
        "mode",
        "chosen",
        "best",
        "regret",
        "over fp32",
        "over bf16",
        "steps of the slowest",
    ]
    text = measure.table(columns, rows)
    text += f"\n\nRegret: median {statistics.median(regrets):.3f}, worst {max(regrets):.3f}. "
    hidden = sum(not one["settled"] for one in numbers)
    text += f"Noise hid the answer for {hidden} of {len(numbers)}. "
    text += f"Batches of {BATCH}. Over fp32: how much faster than contiguous fp32, the default of "
    text += (
        "accelerate, Fabric and timm's training script; over bf16: than what they do when asked "
    )
    text += "for bf16 (-: it is not near enough to fp32)."
    measure.tell("tuned", text, {"batch": BATCH, "models": numbers})


if __name__ == "__main__":
    main()
