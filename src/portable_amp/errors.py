"""Exceptions and warning categories; each exception is also one of Python's own."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "DeviceError",
    "DistributedError",
    "GradientWarning",
    "MachineError",
    "PortableAmpError",
    "PortableAmpWarning",
    "PrecisionFallbackWarning",
    "ScaleCollapseWarning",
    "StateWarning",
    "TraceError",
    "UnsupportedPrecisionError",
]


def shown(value: object) -> str:
    """What was given, for a message: in one line of at most 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


class PortableAmpError(Exception):
    """The base of every exception this library raises on purpose."""


class DeviceError(PortableAmpError, RuntimeError):
    """The device does not exist, or this machine does not have it."""


class UnsupportedPrecisionError(PortableAmpError, ValueError):
    """The precision is unknown, or refused because this machine cannot honour it."""


class CheckpointError(PortableAmpError, RuntimeError):
    """The checkpoint cannot be written or read: truncated, unsafe, or not a checkpoint."""


class DistributedError(PortableAmpError, RuntimeError):
    """The launcher's environment is incomplete, or the device has no way to talk to its peers."""


class MachineError(PortableAmpError, LookupError):
    """The testing kit has no such machine, version of torch or option."""


class TraceError(PortableAmpError, RuntimeError):
    """A trace cannot be written or read: no such file, damaged, or no trace."""


class PortableAmpWarning(UserWarning):
    """The base of every warning this library gives."""


class PrecisionFallbackWarning(PortableAmpWarning):
    """A precision that was asked for is replaced by a safe one."""


class GradientWarning(PortableAmpWarning):
    """Gradients are infinite or NaN, or are computed in fp16 without loss scaling."""


class ScaleCollapseWarning(PortableAmpWarning):
    """The loss scale keeps falling: every gradient is infinite or NaN."""


class StateWarning(PortableAmpWarning):
    """Saved state is missing or does not fit this machine, so something starts fresh."""
