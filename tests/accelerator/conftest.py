"""Tests on a new accelerator: `PORTABLE_AMP_ACCELERATOR_TESTS=1 pytest tests/accelerator`.

torch never forgets a new device, so they are not collected along with the others;
tests/e2e/test_accelerator_process.py runs them in a process of their own.
"""

from __future__ import annotations

import os

import pytest

from portable_amp.testing.accelerator import Accelerator, new_accelerator

collect_ignore_glob = ["test_*.py"]
if os.environ.get("PORTABLE_AMP_ACCELERATOR_TESTS"):
    collect_ignore_glob = []
    new_accelerator()


@pytest.fixture(autouse=True)
def accelerator() -> Accelerator:
    """The device as it is by default; a test asks again for other options."""
    return new_accelerator()
