"""What a run came to, as one HTML page for phone, screen and paper that needs no network."""

from __future__ import annotations

import io
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from cv_classification.config import InputError
from cv_classification.data import Classes, Sample, write_text
from cv_classification.decode import read_image
from cv_classification.metrics import measure

TEMPLATE = Path(__file__).with_suffix(".html")
CURVES = (
    {"loss": "training loss", "log_loss": "log loss"},
    {"macro_f1": "macro F1", "accuracy": "accuracy"},
    {"lr": "learning rate"},
)
CONFUSED, WRONG = 60, 48  # classes and images shown, at most: no phone bears thousands


class Judged(NamedTuple):
    """Labelled images, and what a model said of them: probs (N, C) float32, on the CPU."""

    samples: Sequence[Sample]
    probs: torch.Tensor
    classes: Classes


def calibration(
    probs: torch.Tensor, labels: Sequence[int], bins: int = 15
) -> tuple[float, list[tuple[float, float, int, float, float]]]:
    """probs: (N, C) in [0, 1], labels: N indexes -> expected calibration error, bins with images.

    A bin is `low, high, images, confidence, accuracy`: those whose highest probability is in
    (low, high], its mean, and the share that is right. The error is the distance of a bin's
    accuracy from its confidence, averaged over the images.
    """
    confidence, guesses = probs.double().max(1)
    right = (guesses == torch.tensor(labels)).double()
    places = (confidence * bins).ceil().long().clamp(1, bins) - 1
    rows, error = [], 0.0
    for place in places.unique().tolist():
        here = places == place
        said, was = float(confidence[here].mean()), float(right[here].mean())
        rows.append((place / bins, (place + 1) / bins, int(here.sum()), said, was))
        error += abs(said - was) * float(here.double().mean())
    return error, rows


def write_report(
    path: Path,
    title: str,
    settings: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    judged: Judged,
    about: str,
) -> None:
    """Write one file of numbers, curves, classes, confusions, calibration, mistakes and settings.

    `history` has the rows of metrics.jsonl; `about` says on which images the model was judged.
    """
    samples, probs, classes = judged
    labels, every = [sample.label for sample in samples], range(len(classes.names))
    confidence, guesses = probs.max(1)
    error, bins = calibration(probs, labels)
    # Of what never occurs there is no precision or recall: not a number, and no warning either.
    scores = precision_recall_fscore_support(labels, guesses, labels=every, zero_division=math.nan)
    rows = list(zip(every, *(values.tolist() for values in scores), strict=True))
    rows.sort(key=lambda row: (math.isnan(row[3]), row[3]))
    surest = confidence.argsort(descending=True, stable=True).tolist()
    wrong = [i for i in surest if guesses[i] != labels[i]]
    page = jinja2.Template(TEMPLATE.read_text("utf-8"), autoescape=True).render(
        title=title,
        about=about,
        numbers={**measure(probs, labels), "calibration_error": error},
        history=history,
        nan=math.nan,
        curves=[(columns, _curves(history, columns)) for columns in CURVES if history],
        names=classes.names,
        classes=rows,
        shown=sorted(row[0] for row in rows[:CONFUSED]),
        counts=confusion_matrix(labels, guesses, labels=every).tolist(),
        bins=bins,
        reliability=_reliability(bins),
        images=len(samples),
        wrong=len(wrong),
        mistakes=[
            (samples[i], int(guesses[i]), probs[i].tolist(), _thumbnail(samples[i].path))
            for i in wrong[:WRONG]
        ],
        settings=yaml.safe_dump(dict(settings), allow_unicode=True, sort_keys=False),
    )
    # The name of a file may be no UTF-8; it then has surrogates in it, which cannot be written.
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))


def _curves(history: Sequence[Mapping[str, float]], columns: Mapping[str, str]) -> str:
    figure = Figure((4, 2.6), layout="constrained")
    axes = figure.subplots()
    epochs = [row["epoch"] for row in history]
    for key, name in columns.items():
        axes.plot(epochs, [row.get(key, math.nan) for row in history], ".-", label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.legend()
    return _svg(figure)


def _reliability(bins: Sequence[tuple[float, float, int, float, float]]) -> str:
    figure = Figure((4, 2.6), layout="constrained")
    axes = figure.subplots()
    for low, high, _, _, accuracy in bins:
        axes.bar(low, accuracy, high - low, align="edge", color="C0", edgecolor="w")
    axes.plot([0, 1], [0, 1], "k--")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability it gave", ylabel="share right")
    return _svg(figure)


def _svg(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{b64encode(file.getvalue()).decode()}"


def _thumbnail(path: Path) -> str | None:
    """A small picture of the file, or None where that has gone since."""
    try:
        image = Image.fromarray(read_image(path))
    except InputError:
        return None
    image.thumbnail((160, 160))
    file = io.BytesIO()
    image.save(file, "JPEG")
    return f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"
