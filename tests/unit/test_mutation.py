"""What tools/mutation.sh found stays true of the sources."""

from __future__ import annotations

import json
import types
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


def test_a_fault_in_a_function_goes_into_the_loaded_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools" / "mutation")
    changed = __import__("trials").changed_functions

    def built(text: str) -> types.CodeType:
        return compile(text, "m.py", "exec")

    source = "X = 1\ndef f(a):\n    return a + X\nclass C:\n    Y = 2\n    def g(self): pass\n"
    pairs = changed(built(source), built(source.replace("a + X", "a - X")))
    assert [old.co_name for old, _ in pairs] == ["f"]
    pairs = changed(built(source), built(source.replace("pass", "return 1")))
    assert [old.co_name for old, _ in pairs] == ["g"]
    for old, new in (("X = 1", "X = 2"), ("Y = 2", "Y = 3"), ("def f(a)", "def f(a, b=1)")):
        assert changed(built(source), built(source.replace(old, new))) is None
