"""Training throughput: the example's loop against plain loops with accelerate and Fabric.

    python benchmarks/training.py [--out FOLDER]

The same model, JPEGs of 500 x 400 px at 224 px, batch, optimizer and order; each way has its turn
in every round, and the median of its epochs counts. On a CPU all in this process, without workers.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import accelerate
import lightning_fabric
import measure
import torch
from torch import nn

from cv_classification.augment import Transform, find_preset
from cv_classification.config import check_config
from cv_classification.data import Classes, Sample
from cv_classification.decode import Cache
from cv_classification.images import Draws, ImageDataset, Split, make_loader
from cv_classification.interrupt import Interruptions
from cv_classification.model import build_model
from cv_classification.optimize import make_loss, make_optimizer, make_schedule
from cv_classification.run import Run
from cv_classification.train import train_epoch
from portable_amp import DeviceContext

# A card is to be kept busy: larger batches, loaded by workers.
CARD = torch.cuda.is_available()
CLASSES, SIZE, BATCH, WORKERS, ROUNDS = 17, 224, *((128, 8) if CARD else (16, 0)), 5
MODELS = {"test_resnet": 192, "resnet18": 48} if not CARD else {"resnet50": 4096}


def plain_loop(model: Any, batches: Any, optimizer: Any, backward: Any) -> None:
    """What a training loop with either of the others looks like."""
    criterion = nn.CrossEntropyLoss()
    for images, labels, _ in batches:
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        backward(loss)
        optimizer.step()


def ways_of(name: str, files: list[Path], folder: Path) -> dict[str, Callable[[], None]]:
    """An epoch of each."""
    data: dict[str, Any] = {"batch_size": BATCH, "workers": WORKERS}
    settings = {
        "model": {"name": name, "image_size": SIZE}, "data": data, "output": folder / name,
        "train": {"optimizer": "AdamW", "schedule": "constant", "epochs": 10**6},
    }  # fmt: skip
    config = check_config(settings, name)
    samples = [Sample(path.name, path, number % CLASSES) for number, path in enumerate(files)]
    labels = [one.label for one in samples]
    transform = Transform(find_preset("none"), SIZE)
    plain = DeviceContext(precision="fp32")

    def loader(ctx: DeviceContext, cache: Cache | None = None) -> Any:
        draws = Draws(labels, transform.stages or ((0,),), config)
        return make_loader(ImageDataset(samples, transform, cache), draws, ctx, config)

    def example(tuned: bool, cache: Cache | None = None) -> Callable[[], None]:
        model = build_model(config.model, CLASSES).train()
        ctx = plain
        if tuned:
            images = torch.randint(256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
            ctx = DeviceContext().tuned(model, images, cache=False)
        model, batches = ctx.to(model), loader(ctx, cache)
        optimizer = make_optimizer(model, config.train)
        names = tuple(map(str, range(CLASSES)))
        split = Split(samples, [], Classes(tuple(range(CLASSES)), names), "", None)
        run = Run(
            config, ctx, split, model, model, optimizer,
            make_schedule(optimizer, config.train, len(batches)), ctx.scaler(),
            make_loss(config.train, labels, CLASSES), None,
        )  # fmt: skip

        def epoch() -> None:
            run.progress.batches = 0
            with Interruptions() as interruptions:
                train_epoch(run, batches, interruptions)
            ctx.synchronize()

        return epoch

    accelerator = accelerate.Accelerator(mixed_precision="no")
    model = build_model(config.model, CLASSES).train()
    hers = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader(plain))
    fabric = lightning_fabric.Fabric(devices=1, precision="32-true")
    model = build_model(config.model, CLASSES).train()
    theirs = fabric.setup(model, torch.optim.AdamW(model.parameters()))
    batches = fabric.setup_dataloaders(loader(plain))
    return {
        "accelerate": lambda: plain_loop(hers[0], hers[2], hers[1], accelerator.backward),
        "Fabric": lambda: plain_loop(theirs[0], batches, theirs[1], fabric.backward),
        "fp32": example(tuned=False),
        "tuned": example(tuned=True),
        "tuned, cache": example(tuned=True, cache=Cache(folder / f"cache-{name}", files, 1.0)),
    }


def main() -> None:
    """Measure all, and print the table."""
    warnings.simplefilter("ignore")
    rows, numbers = [], []
    with TemporaryDirectory() as made:
        folder = Path(made)
        files = measure.jpegs(folder, max(MODELS.values()))
        for name, count in MODELS.items():
            ways = ways_of(name, files[:count], folder)
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(ROUNDS + 1):
                order = [*ways.items()]
                for way, epoch in order[turn % len(order) :] + order[: turn % len(order)]:
                    start = time.perf_counter()
                    epoch()
                    if turn:  # the first round warms up, and fills the cache
                        seconds[way].append(time.perf_counter() - start)
            rates = {way: count / statistics.median(times) for way, times in seconds.items()}
            numbers.append({"model": name, "images": count, "images_per_second": rates})
            base = rates["accelerate"]
            rows.append([name, *(f"{rate / base:.2f}" for rate in rates.values())])
            print(*rows[-1], flush=True)
    text = measure.table(["model", *numbers[0]["images_per_second"]], rows)
    text += "\n\nThroughput over that of the loop with accelerate, at fp32."
    measure.tell("training", text, {"models": numbers})


if __name__ == "__main__":
    main()
