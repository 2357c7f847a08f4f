"""The tests of tests/accelerator, in a process of their own: torch keeps a new device for good."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from portable_amp import DeviceError
from portable_amp.testing.accelerator import new_accelerator

ROOT = Path(__file__).parents[2]
HOOKS = "_setup_privateuseone_for_python_backend"


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, HOOKS),
    reason=f"torch {torch.__version__} takes no plugin device in Python; 2.10 and later do",
)
def test_everything_holds_on_a_new_accelerator() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/accelerator"],
        cwd=ROOT,
        env={**os.environ, "PORTABLE_AMP_ACCELERATOR_TESTS": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    last_lines = "\n".join((done.stdout + done.stderr).splitlines()[-60:])
    assert done.returncode == 0, last_lines
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, last_lines
    assert int(passed[1]) > 50, last_lines  # it did collect them


def test_they_are_not_collected_here() -> None:
    assert "test_accelerator" not in sys.modules
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"


def test_a_torch_without_plugins_in_python_says_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.utils.backend_registration, HOOKS, raising=False)
    with pytest.raises(DeviceError) as caught:
        new_accelerator("fakegpu")
    assert str(caught.value) == (
        f"new_accelerator('fakegpu') is refused: torch {torch.__version__} takes no plugin device "
        "written in Python. torch 2.10 and later do; portable_amp.testing.machine() works on every "
        "version."
    )
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"


@pytest.mark.parametrize("name", ["cuda", "nn", "FakeGPU", "fake gpu", ""])
def test_a_name_that_torch_could_not_take_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.utils.backend_registration, HOOKS, None, raising=False)
    with pytest.raises(DeviceError, match=r"must be a new lower-case name\. 'fakegpu' works here"):
        new_accelerator(name)
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"
