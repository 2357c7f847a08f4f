"""The project's own code passes its own check."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from portable_amp import cli

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", ["src", "examples", "tools", "docs", "tests"])
def test_the_project_passes(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main(["check", folder])
    assert code == 0, printed.getvalue()


def test_a_fault_is_noticed(tmp_path: Path) -> None:
    fault = tmp_path / "loop.py"
    fault.write_text("import torch\n\nx = torch.zeros(1).cuda()\n", "utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(["check", str(fault)]) == 1
