"""Test-time augmentation: the example against image by image, view by view; and against ttach.

    python benchmarks/tta.py [--out FOLDER]

1,000 JPEGs (500 for the slow models) at 224 px, two views, 17 classes, random weights; in slices of
50 images, on which every way has its turn. "image by image" clears the cache after each pass, as
the project did that the example was made of. ttach is measured where it is installed.
"""

from __future__ import annotations

import copy
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
MODELS = {"test_resnet": 1000, "resnet18": 500, "vit_tiny_patch16_224": 500}
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
            contexts = {"fp32": plain}
            contexts["tuned fp32"] = plain.tuned(first, batch, cache=False)
            contexts["tuned"] = DeviceContext().tuned(first, batch, cache=False)
            models = {way: ctx.to(copy.deepcopy(first)) for way, ctx in contexts.items()}
            transform = Transform(find_preset("none"), SIZE)
            seconds: dict[str, float] = {}
            results: dict[str, list[torch.Tensor]] = {}
            for start in range(0, images, SLICE):
                picked = [files[i % len(files)] for i in range(start, start + SLICE)]
                dataset = ImageDataset([Sample(path.name, path, 0) for path in picked], transform)
                batches = make_loader(dataset, evaluation_draws(SLICE), plain, config)
                ways: dict[str, Callable[[], torch.Tensor]] = {
                    way: partial(probabilities, models[way], batches, ctx, VIEWS)
                    for way, ctx in contexts.items()
                }
                ways["image by image"] = partial(image_by_image, first, dataset, SLICE, plain)
                if ttach:
                    ways["ttach"] = partial(by_ttach, first, batches, plain)
                order = [*ways.items()]
                turn = start // SLICE % len(order)
                for way, function in order[turn:] + order[:turn]:
                    began = time.perf_counter()
                    results.setdefault(way, []).append(function())
                    seconds[way] = seconds.get(way, 0.0) + time.perf_counter() - began
            probs = {way: torch.cat(parts) for way, parts in results.items()}
            right, off = probs["image by image"], 0.0
            for way in ("fp32", "tuned fp32"):
                off = max(off, float((probs[way] - right).abs().max()))
                assert off <= 1e-5, (name, way, off)
                assert torch.equal(probs[way].argmax(1), right.argmax(1)), (name, way)
            plan = contexts["tuned"].plan
            layout = str(plan.memory_format).removeprefix("torch.").removesuffix("_format")
            numbers.append({
                "model": name, "plan": plan.name, "layout": layout, "chunk": plan.chunk,
                "seconds": seconds, "largest_difference": off, "sizes": SIZES,
                "plain": curve(plain, first), "tuned": curve(contexts["tuned"], models["tuned"]),
            })  # fmt: skip
            bases = [seconds[way] for way in ("image by image", "ttach") if way in seconds]
            ratios = [f"{base / seconds[way]:.2f}" for way in contexts for base in bases]
            rows.append([name, f"{plan.name} {layout}, {plan.chunk}", *ratios, f"{off:.0e}"])
            print(*rows[-1], flush=True)
    others = ["image by image", "ttach"] if ttach else ["image by image"]
    columns = ["model", "tuned plan, chunk"]
    columns += [f"{way} / {other}" for way in contexts for other in others]
    text = measure.table([*columns, "largest difference"], rows)
    counts = ", ".join(map(str, MODELS.values()))
    text += f"\n\nSpeed-ups at {SIZE} px over {counts} images; views: {', '.join(VIEWS)}."
    measure.tell("tta", text, {"images": MODELS, "models": numbers})


if __name__ == "__main__":
    main()
