"""Test-time augmentation: the example against image by image, view by view; and against ttach.

    python benchmarks/tta.py [--out FOLDER]

1,000 JPEGs (200 for the slow models) at 224 px, two views, 17 classes, random weights; in slices of
50 images, on which every way has its turn. "image by image" clears the cache after each pass, as
the project did that the example was made of. ttach is measured where it is installed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import measure
import torch

from cv_classification.augment import Transform, find_preset
from cv_classification.config import check_config
from cv_classification.data import Sample
from cv_classification.images import ImageDataset, evaluation_draws, make_loader
from cv_classification.model import build_model
from cv_classification.tta import probabilities
from portable_amp import DeviceContext

try:
    import ttach
except ImportError:
    ttach = None

SLICE, SIZE, BATCH = 50, 224, 32
VIEWS = ("identity", "fliplr")
MODELS = {"test_resnet": 1000, "resnet18": 200, "vit_tiny_patch16_224": 200}
SIZES = (1, 2, 4, 8, 16, 32, 64)


@torch.inference_mode()
def image_by_image(
    model: torch.nn.Module, dataset: ImageDataset, count: int, ctx: DeviceContext
) -> torch.Tensor:
    """Probabilities (N, C) the slow way."""
    found = []
    for draw in evaluation_draws(count):
        image = dataset[draw][0][None].to(ctx.device)
        seen = []
        for view in (image, image.flip(-1)):
            seen.append(model(view).softmax(-1).cpu())
            ctx.clear_cache()
        found.append(torch.stack(seen).mean(0))
    return torch.cat(found)


@torch.inference_mode()
def by_ttach(model: torch.nn.Module, batches: Any, ctx: DeviceContext) -> torch.Tensor:
    """Probabilities (N, C) with ttach's wrapper around the same model and loader."""
    flip = ttach.Compose([ttach.HorizontalFlip()])
    whole = torch.nn.Sequential(model, torch.nn.Softmax(-1))
    wrapper = ttach.ClassificationTTAWrapper(whole, flip, merge_mode="mean")
    return torch.cat([wrapper(images.to(ctx.device)).cpu() for images, *_ in batches])


@torch.inference_mode()
def curve(ctx: DeviceContext, model: torch.nn.Module) -> list[float]:
    """Images per second of forward passes, by batch size."""
    rates = []
    for size in SIZES:
        images = ctx.to(torch.randint(256, (size, 3, SIZE, SIZE), dtype=torch.uint8))

        def forward(images: torch.Tensor = images) -> None:
            with ctx.autocast():
                model(images)
            ctx.synchronize()

        rates.append(size / measure.interleaved({"": forward}, calls=1, rounds=5)[""])
    return rates


def main() -> None:
    """Measure all, and print the table."""
    warnings.simplefilter("ignore")
    rows, numbers = [], []
    with TemporaryDirectory() as folder:
        files = measure.jpegs(Path(folder), 50)
        for name, images in MODELS.items():
            config = check_config(
                {"model": {"name": name, "image_size": SIZE}, "data": {"batch_size": BATCH}}, name
            )
            plain = DeviceContext(precision="fp32")
            first = plain.to(build_model(config.model, 17).eval())
            batch = torch.randint(256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
            tuned = plain.tuned(first, batch, cache=False)
            second = tuned.to(build_model(config.model, 17).eval())
            second.load_state_dict(first.state_dict())
            transform = Transform(find_preset("none"), SIZE)
            seconds: dict[str, float] = {}
            results: dict[str, list[torch.Tensor]] = {}
            for start in range(0, images, SLICE):
                picked = [files[i % len(files)] for i in range(start, start + SLICE)]
                dataset = ImageDataset([Sample(path.name, path, 0) for path in picked], transform)
                batches = make_loader(dataset, evaluation_draws(SLICE), plain, config)
                ways: dict[str, Callable[[], torch.Tensor]] = {
                    "image by image": partial(image_by_image, first, dataset, SLICE, plain),
                    "fp32": partial(probabilities, first, batches, plain, VIEWS),
                    "tuned": partial(probabilities, second, batches, tuned, VIEWS),
                }
                if ttach:
                    ways["ttach"] = partial(by_ttach, first, batches, plain)
                for way, function in ways.items():
                    began = time.perf_counter()
                    results.setdefault(way, []).append(function())
                    seconds[way] = seconds.get(way, 0.0) + time.perf_counter() - began
            probs = {way: torch.cat(parts) for way, parts in results.items()}
            off = float((probs["fp32"] - probs["image by image"]).abs().max())
            same = bool((probs["fp32"].argmax(1) == probs["image by image"].argmax(1)).all())
            assert off <= 1e-5, (name, off)
            assert same, name
            slow, other = seconds["image by image"], seconds.get("ttach", float("nan"))
            one = {
                "model": name, "plan": tuned.plan.name, "layout": str(tuned.plan.memory_format),
                "chunk": tuned.plan.chunk, "seconds": seconds, "largest_difference": off,
                "sizes": SIZES, "plain": curve(plain, first), "tuned": curve(tuned, second),
            }  # fmt: skip
            numbers.append(one)
            plan = f"{one['plan']} {str(one['layout']).removeprefix('torch.')}, {one['chunk']}"
            ratios = [
                f"{over / seconds[way]:.2f}" for way in ("fp32", "tuned") for over in (slow, other)
            ]
            rows.append([name, plan, *ratios, f"{off:.0e}"])
            print(*rows[-1], flush=True)
    columns = ["model", "plan, chunk", "fp32 / image by image", "fp32 / ttach"]
    columns += ["tuned / image by image", "tuned / ttach", "largest difference"]
    text = measure.table(columns, rows)
    counts = ", ".join(map(str, MODELS.values()))
    text += f"\n\nSpeed-ups at {SIZE} px over {counts} images; views: {', '.join(VIEWS)}."
    measure.tell("tta", text, {"images": MODELS, "models": numbers})


if __name__ == "__main__":
    main()
