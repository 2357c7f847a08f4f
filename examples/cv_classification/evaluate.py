"""How good predictions are: accuracy, macro F1, log loss, and F1 per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from sklearn.metrics import accuracy_score, f1_score
from torch.nn import functional as F

from cv_classification.config import InputError
from cv_classification.data import Classes, read_labelled
from cv_classification.images import check_images, read_split
from cv_classification.model import load_trained
from cv_classification.tta import predict_samples
from portable_amp import DeviceContext


def measure(probs: torch.Tensor, labels: Sequence[int]) -> dict[str, float]:
    """probs: (N, C) in [0, 1], labels: N indexes -> accuracy, macro F1, log loss.

    Macro F1 is the mean over the classes that occur, in labels or predictions.
    """
    guesses = probs.argmax(1).tolist()
    log_loss = F.nll_loss(probs.clamp_min(1e-12).log(), torch.tensor(labels))
    return {
        "accuracy": float(accuracy_score(labels, guesses)),
        "macro_f1": float(f1_score(labels, guesses, average="macro", zero_division=0)),
        "log_loss": float(log_loss),
    }


def report(probs: torch.Tensor, labels: Sequence[int], classes: Classes) -> str:
    """The measures as text, with a line per class: its name, F1, and number of images."""
    guesses, every = probs.argmax(1).tolist(), range(len(classes.names))
    scores = f1_score(labels, guesses, labels=every, average=None, zero_division=0)
    lines = [f"{name}: {value:.4f}" for name, value in measure(probs, labels).items()]
    for label, (name, score) in enumerate(zip(classes.names, scores, strict=True)):
        lines.append(f"  {name}: F1 {score:.4f}, {list(labels).count(label)} images")
    return "\n".join(lines)


def evaluate(
    checkpoint: Path,
    overrides: Sequence[str] = (),
    *,
    data: Path | None = None,
    images: Path | None = None,
    tta: bool = False,
    skip_bad: bool = False,
    explain: bool = False,
) -> None:
    """Print how good a checkpoint is: on its validation images, or on a labelled folder or CSV.

    Raises:
        InputError: checkpoint or data cannot be used.
        PortableAmpError: the checkpoint is unreadable, or there is no such device.
    """
    trained = load_trained(checkpoint, overrides)
    ctx = DeviceContext(trained.config.device, precision=trained.config.precision)
    print(ctx.explain() if explain else ctx.summary())
    if data is None:
        found = read_split(trained.config, skip_bad=skip_bad)
        samples = found.validation
        if found.digest != trained.split:
            raise InputError(
                f"{trained.config.data.path} has changed since {str(trained.path)!r} was trained, "
                "so which images it never saw is not known; --data names others"
            )
    else:
        samples, _ = read_labelled(data, images, trained.classes)
        samples = check_images(samples, skip_bad=skip_bad)
    probs = predict_samples(trained, samples, ctx, tta=tta)
    print(f"{trained.path} on {len(samples)} images{', averaged over views' if tta else ''}")
    print(report(probs, [sample.label for sample in samples], trained.classes))
