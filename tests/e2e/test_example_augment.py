"""The example's presets: what they draw, and what is said of wrong ones."""

from __future__ import annotations

import random
import re
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import yaml

import cv_classification.augment as augment
from cv_classification.augment import PRESETS, Transform, View, find_preset
from cv_classification.config import InputError
from cv_classification.tta import VIEWS

NAMES = list(yaml.safe_load(PRESETS.read_text("utf-8")))
AUGMENTING = [name for name in NAMES if name != "none"]
# Half as large again as they are fitted to, as images are while they are turned.
PIXELS = np.random.default_rng(0).integers(0, 256, (36, 36, 3)).astype(np.uint8)


def variants(transform: Transform) -> list[int]:
    return [0, *chain.from_iterable(transform.stages)]


def draw(transform: Transform, variant: int, seed: int) -> npt.NDArray[np.uint8]:
    transform.set_random_seed(seed)
    return transform(PIXELS, variant)


def symmetries(transform: Transform) -> set[bytes]:
    return {draw(transform, 1, seed).tobytes() for seed in range(200)}


def test_the_presets_that_the_documentation_names_are_there() -> None:
    degrees = ["easiest", "still-easy", "basic", "middle", "aggressive", "eda", "turned"]
    assert ["none", "digits", *(f"documents-{degree}" for degree in degrees), "documents"] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_keeps_shape_and_type(name: str) -> None:
    transform = Transform(find_preset(name), 24)
    for shape in ((1, 1), (1, 900), (900, 1), (2, 3), (30, 40), (300, 7)):
        image = np.full((*shape, 3), 77, np.uint8)
        for variant in variants(transform):
            for seed in range(4):  # some transforms are applied with a probability only
                transform.set_random_seed(seed)
                made = transform(image, variant)
                assert made.shape == (24, 24, 3)
                assert made.dtype == np.uint8


@pytest.mark.parametrize("name", AUGMENTING)
def test_every_variant_is_a_function_of_the_seed(name: str) -> None:
    first, second = (Transform(find_preset(name), 24) for _ in range(2))
    for variant in variants(first)[1:]:
        pictures = [draw(first, variant, seed) for seed in range(12)]
        draw(second, variants(second)[-1], 99)  # what was drawn before does not matter
        for seed, picture in reversed(list(enumerate(pictures))):
            assert (draw(second, variant, seed) == picture).all()
        assert len({picture.tobytes() for picture in pictures}) > 4
    assert len({draw(first, 0, seed).tobytes() for seed in range(12)}) == 1


def test_variants_are_numbered_through_the_stages() -> None:
    assert Transform(find_preset("none"), 8).stages == ((1,),)
    assert Transform(find_preset("documents-basic"), 8).stages == ((1, 2, 3),)
    assert Transform(find_preset("documents"), 8).stages == ((1, 2), (3, 4), (5, 6, 7))
    # The numbers are in the order of the file: the first only flips, what comes last drops holes.
    page = Transform(find_preset("documents"), 24)
    assert np.array_equal(np.sort(draw(page, 1, 3), None), np.sort(draw(page, 0, 3), None))
    assert not np.array_equal(np.sort(draw(page, 7, 3), None), np.sort(draw(page, 0, 3), None))


def test_flips_and_transposes_toss_coins_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    easiest = find_preset("documents-easiest")
    fitted = Transform(easiest, 24)(PIXELS)
    eight = {
        np.rot90(np.transpose(fitted, axes), turns).tobytes()
        for axes in ((0, 1, 2), (1, 0, 2))
        for turns in range(4)
    }
    assert symmetries(Transform(easiest, 24)) == eight

    # The fault that set_random_seed() is there for; without it this test would prove nothing.
    def naive(self: Transform, seed: int) -> None:
        for variant in self._variants:
            variant.set_random_seed(seed)

    monkeypatch.setattr(Transform, "set_random_seed", naive)
    assert len(symmetries(Transform(easiest, 24))) == 2


def test_torch_and_numpy_are_left_alone() -> None:
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    draw(Transform(find_preset("documents"), 24), 7, 0)
    after = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert after == before


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("documents")])
def test_what_is_left_empty_is_paper(name: str) -> None:
    """Turned white pages get no black corners; light and noise may darken what is white."""
    transform = Transform(find_preset(name), 32)
    white, darkest = np.full((45, 25, 3), 255, np.uint8), []
    for variant in variants(transform):
        for seed in range(20):
            transform.set_random_seed(seed)
            darkest.append(np.percentile(transform(white, variant), 2))
    assert min(darkest) > 60


def test_a_square_of_white_is_padded_around_what_keeps_its_aspect() -> None:
    black = np.zeros((10, 40, 3), np.uint8)
    page = Transform(find_preset("documents"), 40)(black)
    assert (page[:15] == 255).all()
    assert (page[15:25] == 0).all()
    assert (page[25:] == 255).all()
    assert (Transform(find_preset("digits"), 40)(black) == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_views_are_known_and_begin_with_the_image_itself(name: str) -> None:
    views = find_preset(name).views
    assert views[0] == "identity"
    assert set(views) <= VIEWS.keys() == set(get_args(View))


GOOD: dict[str, Any] = {
    "keep_aspect": True,
    "fill": 255,
    "views": ["identity"],
    "stages": [[[{"HorizontalFlip": {"p": 0.5}}, {"RandomCrop": {"height": 10, "width": 9}}]]],
}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown transform": ({"stages": [[[{"Afine": {}}]]]}, "no transform 'Afine'; did you mean"),
    "a class that is none": ({"stages": [[[{"Compose": {}}]]]}, "no transform 'Compose'"),
    "unknown argument": ({"stages": [[[{"Affine": {"rotat": 3}}]]]}, "Affine: .*'rotat'"),
    "wrong value": ({"stages": [[[{"Affine": {"rotate": "x"}}]]]}, "Affine: .*rotate.*'x'"),
    "missing argument": ({"stages": [[[{"RandomCrop": {}}]]]}, "RandomCrop: .*height"),
    "floats": ({"stages": [[[{"Normalize": {}}]]]}, "Normalize: .*8-bit RGB"),
    "tensors": ({"stages": [[[{"ToTensorV2": {}}]]]}, "ToTensorV2: "),
    "one channel": ({"stages": [[[{"ToGray": {"num_output_channels": 1}}]]]}, "ToGray: "),
    "more images needed": ({"stages": [[[{"FDA": {}}]]]}, "FDA: .*fda_metadata"),
    "two in one": ({"stages": [[[{"Rotate": {}, "Affine": {}}]]]}, "stages.0.0.0: .*at most 1"),
    "no mapping": ({"stages": [[["Rotate"]]]}, "stages.0.0.0: .*dictionary"),
    "no stage": ({"stages": []}, "stages: .*at least 1"),
    "no group": ({"stages": [[]]}, "stages.0: .*at least 1"),
    "no view": ({"views": []}, "views: .*at least 1"),
    "unknown view": ({"views": ["identity", "sideways"]}, "views.1: Input should be 'identity'"),
    "unknown setting": ({"pad": 3}, "pad: Extra inputs"),
    "fill": ({"fill": 256}, "fill: .*255"),
}


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(augment, "PRESETS", tmp_path / "presets.yaml")
    return tmp_path / "presets.yaml"


def test_a_preset_may_crop(presets: Path) -> None:
    presets.write_text(yaml.safe_dump({"mine": GOOD}))
    transform = Transform(find_preset("mine"), 24)
    assert draw(transform, 1, 0).shape == (24, 24, 3)


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_preset_is_told(case: str, presets: Path) -> None:
    change, why = WRONG[case]
    presets.write_text(yaml.safe_dump({"mine": {**GOOD, **change}, "other": GOOD}))
    with pytest.raises(InputError, match=f"preset 'mine', .*{why}") as caught:
        find_preset("mine")
    assert "\n" not in str(caught.value)
    find_preset("other")


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        InputError, match="'documents-middel' is no preset; did you mean 'documents-mi"
    ):
        find_preset("documents-middel")


@pytest.mark.parametrize("text", ["none: [", "none: {}\nnone: {}", "- none", "none: 3", "\0"])
def test_presets_that_are_no_yaml_are_told(text: str, presets: Path) -> None:
    presets.write_text(text)
    with pytest.raises(InputError, match=re.escape(presets.name)):
        find_preset("none")
