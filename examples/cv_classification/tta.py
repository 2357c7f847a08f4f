"""Predictions: class probabilities, averaged over views of each image, and the submission."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from cv_classification.augment import Transform, find_preset
from cv_classification.config import InputError, check_output
from cv_classification.data import COLUMNS, Sample, read_rows, read_unlabelled, write_table
from cv_classification.device import make_context, tuned
from cv_classification.images import (
    Batches,
    ImageDataset,
    ahead,
    check_images,
    evaluation_draws,
    make_loader,
)
from cv_classification.model import Ensemble, Trained, load_trained
from cv_classification.parallel import gather, tell
from portable_amp import DeviceContext, seed_everything, split_on_oom

Groups = list[Sequence[str]]
"""Names of views; those of a group go through the model together."""

DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout}
DROPOUTS |= {F.feature_alpha_dropout}


def rotate(images: torch.Tensor, degrees: float) -> torch.Tensor:
    """Turned counter-clockwise, edges drawn out: (N, C, S, S) -> the same, float32."""
    images = images.float()
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = images.new_tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


# Axes are counted from the end: torch.fliplr would flip the channels of a batch.
VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda images: images,
    "fliplr": lambda images: images.flip(-1),
    "flipud": lambda images: images.flip(-2),
    "rotate180": lambda images: images.flip(-1, -2),
    "transpose": lambda images: images.transpose(-1, -2),
    "rotate+5": partial(rotate, degrees=5.0),
    "rotate-5": partial(rotate, degrees=-5.0),
    "rotate+15": partial(rotate, degrees=15.0),
    "rotate-15": partial(rotate, degrees=-15.0),
}


def stack_views(images: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """images: (N, C, S, S), 0 to 255 -> (V, N, C, S, S), one view per name.

    Bytes stay bytes, which a Classifier takes too, unless a view has to interpolate.
    """
    views = [VIEWS[name](images) for name in names]
    # Not torch.stack, which would lay them out channels first, whatever the images are.
    together = torch.cat(views) if len(views) > 1 else views[0]
    return together.view(len(names), *images.shape)


def merge(logits: torch.Tensor) -> torch.Tensor:
    """logits: (V, N, C) -> probabilities (N, C) float32 in [0, 1], the mean over V views."""
    return logits.float().softmax(-1).mean(0)


@dataclass
class Looks:
    """What one prediction looks at of each image."""

    model: nn.Module
    ctx: DeviceContext
    views: Sequence[str]
    passes: int
    groups: Groups = field(default_factory=list)

    def mean(self, images: torch.Tensor, weight: float) -> torch.Tensor:
        """images: (N, C, S, S) -> probabilities (N, classes) float32, over views and passes."""
        seen = torch.zeros((), device=self.ctx.device)
        for _ in range(self.passes):
            for group in self.groups:
                stacked = stack_views(images, group)
                with self.ctx.autocast():
                    logits = self.model(stacked.flatten(0, 1))
                logits = logits.unflatten(0, stacked.shape[:2])
                seen = seen + merge(logits) * (len(group) / len(self.views))
        return seen / self.passes


class Dropping(TorchFunctionMode):
    """Within it all dropout drops, in evaluation too; `seen` is whether there was any.

    The functions of torch are asked, not its layers: many models call them without one.
    """

    seen = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call it, with `training` where it drops."""
        kwargs = kwargs or {}
        if func in DROPOUTS and kwargs["p"] > 0:
            self.seen, kwargs = True, {**kwargs, "training": True}
        return func(*args, **kwargs)


def probabilities(
    model: nn.Module,
    batches: Batches,
    ctx: DeviceContext,
    views: Sequence[str] = ("identity",),
    *,
    passes: int = 0,
    together: bool = False,
) -> torch.Tensor:
    """Probabilities (N, C) float32 on the CPU, by the index of the sample.

    The model takes images as a Classifier does, bytes too.
    The mean over `views`, over the random views that the loader draws of a sample, and over so many
    `passes` with dropout; `together` with the other processes, each of which has its share.
    What overflows in 16 bits is computed again in float32, and told.

    Raises:
        InputError: passes are asked for, and the model has no dropout; or it gives no finite
            numbers.
    """
    for one in (ctx, DeviceContext(ctx.device, precision="fp32")):
        probs = _probabilities(model, batches, one, views, passes, together=together)
        lost = int((~probs.isfinite().all(1)).sum())
        if not lost:
            return probs
        what = f"the model's answers to {lost} of {len(probs)} images are not finite"
        if not one.plan.autocast:
            break
        tell(f"{what} in {one.plan.name}; computing them again in fp32")
    raise InputError(f"{what}; training with a smaller train.lr may keep them so")


@torch.inference_mode()
def _probabilities(
    model: nn.Module,
    batches: Batches,
    ctx: DeviceContext,
    views: Sequence[str],
    passes: int,
    *,
    together: bool,
) -> torch.Tensor:
    # Some, such as LeViT, keep in evaluation what they computed of older weights.
    model.train().eval()
    dropping = Dropping()
    looks = Looks(model, ctx, views, passes or 1)
    indexes, merged = [], []
    for images, _, index in tqdm(ahead(batches, ctx), "predict", len(batches), False, disable=None):
        indexes.append(index)
        # A pass has as many samples as it is fastest with, or a batch: of one view while there
        # are so many images, else of several.
        chunk = ctx.plan.chunk or len(images)
        size = min(chunk, len(images))
        step = max(1, chunk // size)
        looks.groups = [views[at : at + step] for at in range(0, len(views), step)]
        with dropping if passes else contextlib.nullcontext():
            merged += split_on_oom(looks.mean, images, size=size)
        if passes and not dropping.seen:
            raise InputError(f"--mc-dropout {passes}: the model has no layer that drops anything")
    # The only wait for the device.
    mine = torch.cat(indexes), torch.cat(merged).cpu()
    parts = gather(mine) if together else [mine]
    places, probs = (torch.cat(column) for column in zip(*parts, strict=True))
    count = int(places.max()) + 1
    sums = torch.zeros(count, probs.shape[1]).index_add_(0, places, probs)
    return sums / torch.bincount(places, minlength=count)[:, None]


def predict_samples(
    trained: Sequence[Trained],
    samples: Sequence[Sample],
    ctx: DeviceContext,
    *,
    tta: bool,
    passes: int = 0,
) -> torch.Tensor:
    """Probabilities (N, C) float32 in the samples' order, the mean over the models of a run."""
    first, models = trained[0], [one.model for one in trained]
    if passes:
        seed_everything(first.config.seed)
    preset = find_preset(first.config.data.preset)
    # The folds of a run see the same images, decoded once.
    dataset = ImageDataset(samples, Transform(preset, first.model.size))
    batches = make_loader(dataset, evaluation_draws(len(samples)), ctx, first.config)
    views = preset.views if tta else ("identity",)
    model = Ensemble(models) if len(models) > 1 else models[0]
    own = tuned(ctx, model.eval(), first.config)
    return probabilities(own.to(model), batches, own, views, passes=passes)


def predict(
    checkpoint: Path,
    overrides: Sequence[str] = (),
    *,
    data: Path | None = None,
    output: Path | None = None,
    tta: bool = True,
    mc_dropout: int = 0,
    explain: bool = False,
) -> Path:
    """Write submission.csv for the images of sample_submission.csv, and return its path.

    `data` is the folder with sample_submission.csv and test/, or with images only: unless told, the
    one trained on. `output` is submission.csv beside the checkpoint, unless told. The folds of a
    run predict together.

    Raises:
        InputError: checkpoint or data cannot be used; nothing was written.
        PortableAmpError: the checkpoint is unreadable, or there is no such device.
    """
    trained = load_trained(checkpoint, overrides)
    first = trained[0]
    ctx = make_context(first.config)
    print(ctx.explain() if explain else ctx.summary())
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    submission = output or folder / "submission.csv"
    check_output(submission)
    samples = check_images(read_unlabelled(data or first.config.data.path))
    probs = predict_samples(trained, samples, ctx, tta=tta, passes=mc_dropout)
    targets = first.classes.targets
    guesses = [targets[guess] for guess in probs.argmax(1).tolist()]
    rows = [(one.id, guess) for one, guess in zip(samples, guesses, strict=True)]
    write_table(submission, COLUMNS, rows, lambda file: check_submission(file, samples, targets))
    print(f"{len(rows)} predictions: {submission}")
    return submission


def check_submission(file: Path, samples: Sequence[Sample], targets: Sequence[int]) -> None:
    """See that a submission has exactly these images, in this order, and only these targets.

    Raises:
        InputError: it has not.
    """
    rows = read_rows(file)
    if [name for name, _ in rows] != [sample.id for sample in samples]:
        raise InputError(f"{file} has other IDs than the sample, or another order")
    unknown = {target for _, target in rows} - set(targets)
    if unknown:
        raise InputError(f"{file} has the target {min(unknown)}, which is no class")
