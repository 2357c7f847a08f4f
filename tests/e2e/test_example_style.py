"""The example's promises about itself: no word of devices, one door to albumentations."""

from __future__ import annotations

import re
from pathlib import Path

import cv_classification
from cv_classification.config import load_config
from cv_classification.train import check

SOURCES = sorted(Path(cv_classification.__path__[0]).glob("*.py"))


def test_nothing_branches_on_a_device() -> None:
    assert len(SOURCES) > 8
    for path in SOURCES:
        assert not re.search("cuda|mps|xpu", path.read_text("utf-8")), path


def test_the_bundled_settings_are_valid() -> None:
    found = sorted(SOURCES[0].parent.glob("configs/*.yaml"))
    assert [path.name for path in found] == ["digits.yaml", "documents.yaml"]
    for path in found:
        check(load_config(path, ["device=cpu", "precision=fp32"]))


def test_one_module_imports_albumentations() -> None:
    users = [path.name for path in SOURCES if "import albumentations" in path.read_text("utf-8")]
    assert users == ["augment.py"]
