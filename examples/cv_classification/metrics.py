"""How good predictions are: accuracy, macro F1, log loss, and F1 per class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from sklearn.metrics import accuracy_score, f1_score
from torch.nn import functional as F

from cv_classification.data import Classes
from cv_classification.tracking import Row


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


def score(row: Row, monitor: str) -> float:
    """What is monitored, higher is better."""
    return -row[monitor] if monitor == "log_loss" else row[monitor]


def stale_epochs(history: list[Row], monitor: str) -> int:
    """How many epochs ago the best one was: by what is monitored, then by log loss; never NaN."""
    pairs = [(score(row, monitor), -row["log_loss"]) for row in history]
    scores = [tuple(-math.inf if math.isnan(x) else x for x in pair) for pair in pairs]
    return len(scores) - 1 - scores.index(max(scores)) if scores else 0
