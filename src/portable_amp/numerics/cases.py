"""Which operation in which dtype, layout and size is tried, in which order, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from portable_amp.capabilities import Capabilities, Support
from portable_amp.numerics.layouts import LAYOUTS
from portable_amp.numerics.operation import Operation
from portable_amp.numerics.operations import OPERATIONS

BY_NAME = {one.name: one for one in OPERATIONS}
_16_BITS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_AUTOCAST = " autocast"

_LAYOUT_COST = {
    "contiguous": 0, "channels_last": 0, "strided view": 2, "transposed": 3, "expanded": 3,
    "far apart": 5,
}  # fmt: skip
_SIZE_COST = {"odd": 0, "large": 0, "empty": 1, "small": 2, "one": 2}
_ILL_POSED = {("batch_norm 1d", "expanded")}
"""Of samples that are all alike no statistic is left but rounding."""


@dataclass(frozen=True)
class Case:
    """What is run."""

    operation: str
    precision: str
    """"fp32", "bf16 autocast", "bf16" (weights and inputs), ..."""
    layout: str
    size: str

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return _16_BITS.get(self.precision.removesuffix(_AUTOCAST), torch.float32)

    @property
    def autocast(self) -> bool:
        """Weights and inputs stay in float32."""
        return self.precision.endswith(_AUTOCAST)


@dataclass(frozen=True)
class Row:
    """What came of one case."""

    device: str
    operation: str
    precision: str
    layout: str
    size: str
    shape: list[int]
    """Of the first input, as the operation sees it."""
    seed: int
    status: str
    """One of `STATUSES`."""
    what: str = ""
    """Which result is furthest off: "output", "gradient of input 0", ..."""
    also: list[str] = field(default_factory=list)
    """Which others are off."""
    direction: str = ""
    """"forward" or "backward"."""
    how: str = ""
    error: float | None = None
    """Against float64; None where it is not finite."""
    allowed: float | None = None
    repeat: int = 0
    """In which run: 1, or 2 where the first was right."""
    says: str = ""
    """An error's words."""


STATUSES = {
    "right": "",
    "wrong": "it computes something else",
    "fails": "it raises an error where the CPU does not",
    "crashes": "the process ends",
    "hangs": "no answer",
    "missing": "not implemented on this device",
    "memory": "skipped: memory",
    "untried": "skipped: it crashed in another size",
    "raises": "not defined: the CPU raises an error, too",
}
FAULTS = ("wrong", "fails", "crashes", "hangs")


def precisions(can: Capabilities) -> dict[str, int]:
    """What to try on such a device, and how late: first what is native."""
    found = {"fp32": 0}
    for name, dtype in _16_BITS.items():
        support = can.support(dtype)
        if support is Support.ABSENT or dtype in can.missing_dtypes:
            continue
        late = 1 if support is Support.NATIVE else 6
        if can.autocast:
            found[name + _AUTOCAST] = late
        found[name] = late + 2
    return found


def cases(can: Capabilities, only: str | None = None) -> list[Case]:
    """All that is tried on such a device, the most telling first."""
    found = []
    for precision, late in precisions(can).items():
        for operation in OPERATIONS:
            if only not in (None, operation.name):
                continue
            for layout, size in _forms(operation, precision):
                cost = late + _LAYOUT_COST[layout] + _SIZE_COST[size]
                found.append((cost, Case(operation.name, precision, layout, size)))
    return [case for _, case in sorted(found, key=lambda one: one[0])]


def _forms(operation: Operation, precision: str) -> Iterator[tuple[str, str]]:
    if precision in _16_BITS and not operation.narrow:
        return
    for size, shape in operation.shapes().items():
        for layout in LAYOUTS.values():
            if size in ("one", "empty", "small") and _LAYOUT_COST[layout.name]:
                continue
            if layout.name == "expanded" and size == "large":
                continue  # a sum of hundreds of equal terms is rounded to one side
            if layout.name == "far apart" and (size != "odd" or precision != "fp32"):
                continue
            if layout.fits(shape) and (operation.name, layout.name) not in _ILL_POSED:
                yield layout.name, size


def row_of(case: Case, device: torch.device, seed: int, **found: Any) -> Row:
    """What came of that case."""
    shape = BY_NAME[case.operation].shapes()[case.size]
    return Row(device=str(device), **vars(case), shape=[*shape], seed=seed, **found)
