"""A tiny data set and a tiny model, so that the example's whole pipeline runs in a second."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

MODEL = ("model.name=test_resnet", "model.image_size=32")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def write_image(path: Path, shade: int, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-20, 20, (20, 24, 3))
    Image.fromarray((noise + shade).clip(0, 255).astype(np.uint8)).save(path)


def write_tiny(root: Path, per_class: int = 8) -> Path:
    """Three classes of images, dark, grey and bright, in the layout with tables."""
    rows = []
    for target, shade in ((3, 30), (5, 128), (9, 220)):
        for index in range(per_class):
            name = f"naïve {target} 写真 {index}.png"
            write_image(root / "train" / name, shade, seed=100 * target + index)
            rows.append((name, target))
    write_csv(root / "train.csv", ("ID", "target"), rows)
    names = [f"{index}.png" for index in (2, 0, 1)]
    for name, shade in zip(names, (220, 30, 128), strict=True):
        write_image(root / "test" / name, shade, seed=len(name))
    write_csv(root / "sample_submission.csv", ("ID", "target"), [(name, 3) for name in names])
    write_csv(
        root / "meta.csv", ("target", "class_name"), [(3, "dark"), (5, "grey"), (9, "bright")]
    )
    return root


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Beside another busy process, two threads on two cores mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "data")


@pytest.fixture
def settings(tiny: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides for a run on the tiny data, with more of them as keyword `section__key=value`."""

    return partial(overrides, data__path=tiny, output=tmp_path / "run")


def overrides(**more: object) -> list[str]:
    """The settings of a small run, with more of them as keyword `section__key=value`."""
    chosen = {
        "device": "cpu",
        "precision": "fp32",
        "data.batch_size": 4,
        "data.validation": 0.25,
        "train.epochs": 2,
        **{name.replace("__", "."): value for name, value in more.items()},
    }
    return [*MODEL, *(f"{name}={value}" for name, value in chosen.items())]
