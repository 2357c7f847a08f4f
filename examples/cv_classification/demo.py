"""The whole pipeline on data that needs no download: scikit-learn's handwritten digits."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split

from cv_classification.config import InputError, check_folder, load_config
from cv_classification.data import COLUMNS, read_rows, write_table
from cv_classification.train import check, train
from cv_classification.tta import predict

CONFIG = Path(__file__).parent / "configs" / "digits.yaml"
PASSES = 0.99
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def demo(out: Path, overrides: Sequence[str] = (), *, seed: int = 0, explain: bool = False) -> bool:
    """Write digits, train, predict with TTA, and score against answers that training never saw.

    Returns:
        Whether macro F1 on the held-out digits reaches `PASSES`.

    Raises:
        InputError: a setting is wrong; nothing was written.
        PortableAmpError: there is no such device or precision.
    """
    data = out / "data"
    run = next(run for n in itertools.count(1) if not (run := out / f"run{n}").exists())
    config = load_config(CONFIG, [f"seed={seed}", *overrides])
    there = config.data.model_copy(update={"path": data})
    config = config.model_copy(update={"output": run, "data": there})
    check(config)
    write_digits(data)
    submission = predict(train(config, explain=explain).path)
    score = score_submission(submission, data / "answers.csv")
    print(f"data: {data}\ncheckpoints: {run / 'best.pt'}, {run / 'last.pt'}")
    print(f"metrics: {run / 'metrics.jsonl'}\nsubmission: {submission}")
    print(f"macro F1 on {data / 'answers.csv'}, never seen in training: {score:.4f}")
    if score < PASSES:
        print(f"That is below {PASSES}, which this demo reaches when all is well.")
    return score >= PASSES


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
    if folder.is_dir():
        return
    check_folder(folder)
    digits = load_digits()
    pictures = {f"digit-{index:04}.png": image for index, image in enumerate(digits.images)}
    rows = list(zip(pictures, digits.target.tolist(), strict=True))
    parts = train_test_split(rows, test_size=0.25, random_state=0, stratify=digits.target)
    learn, held_out = map(sorted, parts)
    # Made under another name: an interrupted demo leaves no half-written data.
    making = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        for part, kept in (("train", learn), ("test", held_out)):
            (making / part).mkdir(parents=True)
            for name, _ in kept:
                small = Image.fromarray((pictures[name] * 255 / 16).round().astype(np.uint8))
                small.resize((32, 32), Image.Resampling.BICUBIC).save(making / part / name)
        write_table(making / "train.csv", COLUMNS, learn)
        write_table(making / "answers.csv", COLUMNS, held_out)
        unanswered = [(name, 0) for name, _ in held_out]
        write_table(making / "sample_submission.csv", COLUMNS, unanswered)
        write_table(making / "meta.csv", ("target", "class_name"), enumerate(NAMES))
        making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
