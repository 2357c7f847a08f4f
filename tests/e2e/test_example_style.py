"""The example's promises about itself: no word of devices, one door to albumentations."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import cv_classification
from cv_classification.config import load_config
from cv_classification.train import check

SOURCES = sorted(Path(cv_classification.__path__[0]).glob("*.py"))


def test_nothing_branches_on_a_device() -> None:
    assert len(SOURCES) > 8
    for path in SOURCES:
        assert not re.search("cuda|mps|xpu", path.read_text("utf-8")), path


def lines_of_code(text: str) -> int:
    """Lines that hold more than a comment, a docstring, or nothing."""
    used: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.string.strip() and token.type != tokenize.COMMENT:
            used.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            used.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(used)


def test_it_can_be_read_in_an_evening() -> None:
    assert lines_of_code('"""Doc."""\n\n# why\nx = """a\nb"""\n') == 2
    assert sum(lines_of_code(path.read_text("utf-8")) for path in SOURCES) < 2500
    assert max(len(path.read_text("utf-8").splitlines()) for path in SOURCES) < 300


def test_the_bundled_settings_are_valid() -> None:
    found = sorted(SOURCES[0].parent.glob("configs/*.yaml"))
    assert [path.name for path in found] == ["digits.yaml", "documents.yaml"]
    for path in found:
        check(load_config(path, ["device=cpu", "precision=fp32"]))


def test_one_module_imports_albumentations() -> None:
    users = [path.name for path in SOURCES if "import albumentations" in path.read_text("utf-8")]
    assert users == ["augment.py"]
