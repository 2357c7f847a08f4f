"""Handwritten digits, which come with scikit-learn."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from demo_images import Picture, Pictures

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def digits() -> Pictures:
    """The 1,797 digits as PNG files of 32 x 32 pixels; a quarter is for the test."""
    found = load_digits()

    def pictures(part: list[int]) -> Iterator[Picture]:
        for index in sorted(part):
            small = Image.fromarray((found.images[index] * 255 / 16).round().astype(np.uint8))
            file = io.BytesIO()
            small.resize((32, 32), Image.Resampling.BICUBIC).save(file, "PNG")
            yield f"digit-{index:04}.png", int(found.target[index]), file.getvalue()

    every = range(len(found.images))
    parts = train_test_split(every, test_size=0.25, random_state=0, stratify=found.target)
    return Pictures(NAMES, *map(pictures, parts))
