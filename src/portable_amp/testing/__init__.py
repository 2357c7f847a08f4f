"""Machines as values, to test decisions about hardware that is not at hand."""

from portable_amp.testing.machines import MACHINES, Machine, machine

__all__ = ["MACHINES", "Machine", "machine"]
