"""Presets: how images of one kind are fitted to the model, augmented, and viewed at prediction."""

from __future__ import annotations

import os
import random
from inspect import signature
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field, ValidationError

from cv_classification.config import InputError, Section, nearest, read_yaml

# On import albumentations asks a server for its newest version, and waits where there is none.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
import albumentations as A

PRESETS = Path(__file__).with_name("presets.yaml")
KINDS = {k: v for k, v in vars(A).items() if isinstance(v, type) and hasattr(v, "apply_to_images")}


def _check(step: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Try a transform on a blank image: only what it makes tells that Normalize makes floats."""
    ((name, arguments),) = step.items()
    if name not in KINDS:
        raise InputError(f"albumentations has no transform {name!r}; {nearest(name, KINDS)}")
    try:
        transform = KINDS[name](**arguments, strict=True)
        transform.p = 1.0
        made = A.Compose([transform])(image=np.zeros((256, 256, 3), np.uint8))["image"]
    except Exception as error:  # each refuses in its own way
        why = " ".join(str(error).split()).partition(" For further")[0]
        raise InputError(f"{name}: {why}") from error
    if made.dtype != np.uint8 or made.shape[2:] != (3,):
        raise InputError(f"{name}: does not make an 8-bit RGB image of one")
    return step


Some = Field(min_length=1)
# What cv_classification.tta has.
View = Literal[
    "identity", "fliplr", "flipud", "rotate180", "transpose",
    "rotate+5", "rotate-5", "rotate+15", "rotate-15",
]  # fmt: skip
Step = Annotated[
    dict[str, dict[str, Any]], Field(min_length=1, max_length=1), AfterValidator(_check)
]
Stage = Annotated[tuple[tuple[Step, ...], ...], Some]


class Preset(Section):
    """One kind of images; presets.yaml tells what each means."""

    keep_aspect: bool
    fill: Annotated[int, Field(strict=True, ge=0, le=255)]
    views: Annotated[tuple[View, ...], Some]
    stages: Annotated[tuple[Stage, ...], Some]


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InputError: there is none, or it is wrong.
    """
    presets = read_yaml(PRESETS)
    if name not in presets:
        raise InputError(f"data.preset={name!r} is no preset; {nearest(name, presets)}")
    try:
        return Preset.model_validate(presets[name])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    place, why = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    raise InputError(f"{PRESETS}: preset {name!r}, {place}: {why}")


class Transform:
    """An image fitted to the model, as it is or augmented; a preset's groups are its variants.

    stages: for each stage the numbers of its variants, which are 1 or more.
    """

    def __init__(self, preset: Preset, size: int) -> None:
        def fit(size: int) -> A.BasicTransform:
            if preset.keep_aspect:
                return A.LongestMaxSize(size, area_for_downscale="image")
            return A.Resize(size, size, area_for_downscale="image")

        def build(name: str, arguments: dict[str, Any]) -> A.BasicTransform:
            fill = {"fill": preset.fill} if "fill" in signature(KINDS[name]).parameters else {}
            return KINDS[name](**{**fill, **arguments})

        number = count(1)
        self.stages = tuple(tuple(next(number) for _ in stage) for stage in preset.stages)
        # Padded last, so that what turns an image sees its edges, as a scanner does; and larger
        # before, as what is turned is fitted once more.
        last = [fit(size), A.PadIfNeeded(size, size, fill=preset.fill)]
        first = fit(3 * size // 2 if preset.keep_aspect else size)
        self._variants = [A.Compose(last)] + [
            A.Compose([first, *(build(*item) for step in group for item in step.items()), *last])
            for group in chain.from_iterable(preset.stages)
        ]

    def __call__(self, image: npt.NDArray[np.uint8], variant: int = 0) -> npt.NDArray[np.uint8]:
        """image: (H, W, 3) uint8 -> (size, size, 3) uint8; variant 0 is fitted and no more."""
        fitted: npt.NDArray[np.uint8] = self._variants[variant](image=image)["image"]
        return fitted

    def set_random_seed(self, seed: int) -> None:
        """Make what is drawn next a function of `seed`.

        Compose.set_random_seed() of albumentations 2.0.8 gives each of its transforms a generator
        with the *same* seed: they all toss the same coin, and of the eight ways to flip and
        transpose an image two are left. One generator that all share has no such fault.
        """
        shared = np.random.default_rng(seed), random.Random(seed)
        for variant in self._variants:
            variant.set_random_state(*shared)
