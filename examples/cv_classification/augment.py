"""Presets: how images of one kind are fitted to the model, augmented, and viewed at prediction."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cv_classification.config import InputError, nearest

# On import albumentations asks a server for its newest version, and waits where there is none.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
import albumentations as A


@dataclass(frozen=True)
class Preset:
    """One kind of images."""

    keep_aspect: bool
    """Fit the longer side and pad to a square; else stretch."""
    fill: int
    """Grey value of what is padded, 0 to 255."""
    train: tuple[tuple[Any, dict[str, Any]], ...]
    """albumentations' classes and their arguments, in order."""
    views: tuple[str, ...]
    """Of `tta.VIEWS`: those that leave the class what it is."""


PRESETS = {
    "none": Preset(keep_aspect=False, fill=0, train=(), views=("identity",)),
    # No flips: a mirrored digit is another one, or none.
    "digits": Preset(
        keep_aspect=False,
        fill=0,
        train=(
            (
                A.Affine,
                {
                    "rotate": (-12, 12),
                    "scale": (0.85, 1.15),
                    "translate_percent": (-0.08, 0.08),
                    "shear": (-8, 8),
                    "p": 1.0,
                },
            ),
        ),
        views=("identity", "rotate+5", "rotate-5"),
    ),
    # Scans and photos of paper, which lie any way round.
    "documents": Preset(
        keep_aspect=True,
        fill=255,
        train=(
            (A.HorizontalFlip, {"p": 0.5}),
            (A.VerticalFlip, {"p": 0.5}),
            (A.Transpose, {"p": 0.5}),
            (A.Rotate, {"limit": (-30, 30), "fill": 255, "p": 0.7}),
            (A.GaussianBlur, {"sigma_limit": (0.2, 1.5), "p": 0.3}),
            (A.GaussNoise, {"std_range": (0.02, 0.15), "p": 0.5}),
        ),
        views=("identity", "fliplr", "flipud", "rotate180", "transpose"),
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InputError: there is none.
    """
    if name not in PRESETS:
        raise InputError(f"data.preset={name!r} is no preset; {nearest(name, PRESETS)}")
    return PRESETS[name]


class Transform:
    """An image (H, W, 3) uint8 fitted to (size, size, 3) uint8, and augmented for training."""

    def __init__(self, preset: Preset, size: int, *, training: bool) -> None:
        fit = (
            [
                A.LongestMaxSize(size, area_for_downscale="image"),
                A.PadIfNeeded(size, size, fill=preset.fill),
            ]
            if preset.keep_aspect
            else [A.Resize(size, size, area_for_downscale="image")]
        )
        steps = [kind(**arguments) for kind, arguments in preset.train] if training else []
        self._compose = A.Compose([*fit, *steps], strict=True)

    def __call__(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        fitted: npt.NDArray[np.uint8] = self._compose(image=image)["image"]
        return fitted

    def set_random_seed(self, seed: int) -> None:
        """Make what is drawn next a function of `seed`.

        Compose.set_random_seed() of albumentations 2.0.8 gives each of its transforms a generator
        with the *same* seed: they all toss the same coin, and of the eight ways to flip and
        transpose an image two are left. One generator that all share has no such fault.
        """
        self._compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
