"""The contract that every back end keeps, on the new accelerator too."""

from __future__ import annotations

from conformance.test_contract import *  # noqa: F403
from conformance.test_contract import KINDS


def test_the_new_accelerator_is_among_them() -> None:
    assert KINDS == ["fakegpu", "cpu"]
