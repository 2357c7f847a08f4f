"""The whole pipeline on data that needs no download: handwritten digits, or rendered pages."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split

from cv_classification.config import InputError, load_config
from cv_classification.data import read_rows
from cv_classification.documents import Picture, write_documents, write_pictures
from cv_classification.train import check, train
from cv_classification.tta import predict

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def demo(
    out: Path,
    overrides: Sequence[str] = (),
    *,
    preset: str = "digits",
    seed: int = 0,
    explain: bool = False,
) -> bool:
    """Write images, train, predict without and with TTA, and score against held-out answers.

    Returns:
        Whether macro F1 on images that training never saw is what it should be.

    Raises:
        InputError: a setting is wrong; nothing was written.
        PortableAmpError: there is no such device or precision.
    """
    write, passes = DEMOS[preset]
    data = out / ("data" if preset == "digits" else preset)
    run = next(run for n in itertools.count(1) if not (run := out / f"run{n}").exists())
    shipped = Path(__file__).parent / "configs" / f"{preset}.yaml"
    config = load_config(shipped, [f"seed={seed}", *overrides])
    there = config.data.model_copy(update={"path": data})
    config = config.model_copy(update={"output": run, "data": there})
    check(config)
    write(data)
    train(config, explain=explain)
    plain = predict(run, output=run / "submission-without-tta.csv", tta=False)
    submission = predict(run)
    scores = [score_submission(table, data / "answers.csv") for table in (plain, submission)]
    print(f"data: {data}\ncheckpoints: {run / 'best.pt'}, {run / 'last.pt'}")
    print(f"metrics: {run / 'metrics.jsonl'}\nreport: {run / 'report.html'}")
    print(f"submission: {submission}\nmacro F1 without views: {scores[0]:.4f}")
    print(f"macro F1 on {data / 'answers.csv'}, never seen in training: {scores[1]:.4f}")
    if scores[1] < passes:
        print(f"That is below {passes}, which this demo reaches when all is well.")
    return scores[1] >= passes


def score_submission(submission: Path, answers: Path) -> float:
    """Macro F1 of a submission.

    Raises:
        InputError: the tables are of different images.
    """
    given, right = dict(read_rows(submission)), dict(read_rows(answers))
    if given.keys() != right.keys():
        raise InputError(f"{submission} and {answers} are of different images")
    ids = sorted(right)
    return float(f1_score([right[i] for i in ids], [given[i] for i in ids], average="macro"))


def write_digits(folder: Path) -> None:
    """The 1,797 digits as PNG files of 32 x 32 pixels with their tables; a quarter is held out.

    Does nothing where they are already.
    """
    digits = load_digits()

    def pictures(part: list[int]) -> Iterator[Picture]:
        for index in sorted(part):
            small = Image.fromarray((digits.images[index] * 255 / 16).round().astype(np.uint8))
            file = io.BytesIO()
            small.resize((32, 32), Image.Resampling.BICUBIC).save(file, "PNG")
            yield f"digit-{index:04}.png", int(digits.target[index]), file.getvalue()

    every = range(len(digits.images))
    parts = train_test_split(every, test_size=0.25, random_state=0, stratify=digits.target)
    write_pictures(folder, NAMES, *map(pictures, parts))


DEMOS = {"digits": (write_digits, 0.99), "documents": (write_documents, 0.75)}
"""What writes the images, and the macro F1 that the shipped settings reach."""
