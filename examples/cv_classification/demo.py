"""The whole pipeline on data that needs no download: handwritten digits, or rendered pages."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from sklearn.metrics import f1_score

from cv_classification.config import InputError, check_folder, load_config
from cv_classification.data import COLUMNS, read_rows, write_table
from cv_classification.train import check, train
from cv_classification.tta import predict
from demo_images import Pictures
from demo_images.digits import digits
from demo_images.documents import documents

DEMOS = {"digits": (digits, 0.99), "documents": (documents, 0.85)}
"""What makes the images, and the macro F1 that the shipped settings reach."""


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
    make, passes = DEMOS[preset]
    data = out / ("data" if preset == "digits" else preset)
    run = next(run for n in itertools.count(1) if not (run := out / f"run{n}").exists())
    shipped = Path(__file__).parent / "configs" / f"{preset}.yaml"
    config = load_config(shipped, [f"seed={seed}", *overrides])
    there = config.data.model_copy(update={"path": data})
    config = config.model_copy(update={"output": run, "data": there})
    check(config)
    write_pictures(data, make())
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


def write_pictures(folder: Path, pictures: Pictures) -> None:
    """Write train/, test/ and their tables; all, or where it is interrupted nothing.

    Does nothing where the folder is already.
    """
    if folder.is_dir():
        return
    check_folder(folder)
    making = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        parts = ("train", "train", pictures.train), ("test", "answers", pictures.test)
        for part, table, content in parts:
            (making / part).mkdir(parents=True)
            rows = []
            for name, target, data in content:
                (making / part / name).write_bytes(data)
                rows.append((name, target))
            write_table(making / f"{table}.csv", COLUMNS, rows)
        write_table(making / "sample_submission.csv", COLUMNS, [(name, 0) for name, _ in rows])
        write_table(making / "meta.csv", ("target", "class_name"), enumerate(pictures.names))
        making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
