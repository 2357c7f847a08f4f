"""What tools/mutation.sh found stays true of the sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "docs" / "explanation" / "evidence"
COUNTS = json.loads((EVIDENCE / "mutation.json").read_text("utf-8"))
EXPLAINED = json.loads((EVIDENCE / "mutation-explained.json").read_text("utf-8"))


def source(module: str) -> Path:
    """The file of a module by its short name."""
    src = ROOT / "src"
    return src / f"{module}.py" if "pytest" in module else src / "portable_amp" / f"{module}.py"


@pytest.mark.parametrize("row", EXPLAINED, ids=lambda row: f"{row['module']}: {row['becomes']}")
def test_what_is_explained_is_still_there(row: dict[str, str]) -> None:
    assert set(row) == {"module", "was", "becomes", "kind", "why"}
    assert row["kind"] in ("equivalent", "untested")
    assert row["why"]
    text = " ".join(source(row["module"]).read_text("utf-8").replace("\\", " ").split())
    assert row["was"] in text


@pytest.mark.parametrize("module", COUNTS["modules"])
def test_what_is_counted_adds_up(module: str) -> None:
    assert source(module).is_file()
    found = COUNTS["modules"][module]
    assert found["faults"] == found["equivalent"] + found["killed"] + found["missed"]
    assert 0 <= found["explained"] <= found["missed"]
