"""What a verification found, to be read by people and programs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

ADVICE = {
    "wrong": "this device computes something else: report it, with torch's version and this module",
    "tf32": "products of fp32 are taken in TF32 here: DeviceContext(fp32='ieee') for fp32 proper",
    "bf16": "products of fp32 are taken in bf16 here: DeviceContext(fp32='ieee') for fp32 proper",
    "overflow": "a value is beyond what this dtype holds: keep this module in fp32, or take bf16",
    "underflow": "values are below what this dtype holds, on any device",
    "rounds": "sums that nearly cancel are that far off in this dtype, on any device",
    "fails": "it raises an error on the device alone",
    "path": "it calls other modules, or with other shapes, than on the CPU",
}
"""What to do, by the kind of fault or limit."""
SHORT_PRODUCTS = ("tf32", "bf16")
"""Kinds that are torch's default on some devices."""
LIMITS = ("underflow", "rounds")
"""Kinds that are no fault of the device."""
MOST_LINES = 3
"""Limits that are printed."""


@dataclass(frozen=True)
class Fault:
    """One module that computes something else than it should."""

    module: str
    """Its name in the model; "" is the model itself, apart from the modules inside."""
    type: str
    kind: str
    """One of `ADVICE`."""
    what: str
    """Which result: "output", "gradient of weight", "buffer running_var", ..."""
    how: str
    """In which measure: "off" (relative L2 distance), "too large or too small" (all of it), or
    "off in one element"."""
    error: float
    """Against float64; inf where it is not finite."""
    allowed: float

    def __str__(self) -> str:
        name = self.module or "the model itself"
        far = ""
        if math.isfinite(self.error):
            far = f" is {self.error:.1e} {self.how}, allowed are {self.allowed:.1e}"
        elif self.kind in ("wrong", "overflow"):
            far = " is not finite"
        return f"{name} ({self.type}): {self.what}{far}: {ADVICE[self.kind]}."


@dataclass(frozen=True)
class Report:
    """Whether the device computes what it should, module by module."""

    device: str
    plan: str
    faults: tuple[Fault, ...]
    modules: int
    """Calls of modules that were compared."""
    worst: float
    """The largest distance among those that are right, in parts of what is allowed."""
    notes: tuple[str, ...]
    """What could not be compared, and why."""
    limits: tuple[Fault, ...] = ()
    """What is off because of the dtype, as it would be on any device; no faults."""

    def accepting(self, kind: str) -> Report:
        """The same where this kind is what was asked for: no fault, but a limit."""
        asked = tuple(one for one in self.faults if one.kind == kind)
        rest = tuple(one for one in self.faults if one.kind != kind)
        return replace(self, faults=rest, limits=self.limits + asked)

    @property
    def ok(self) -> bool:
        """Something was compared, and no module computes something else."""
        return self.modules > 0 and not self.faults

    def __str__(self) -> str:
        calls = f"{self.modules} calls of modules"
        if self.ok:
            first = f"{self.device} computes this model right in {self.plan}: {calls}, "
            first += f"the worst at {self.worst:.0%} of its bound."
        elif not self.faults:
            first = f"Nothing of this model was compared on {self.device} in {self.plan}."
        else:
            named = len({fault.module for fault in self.faults})
            first = f"{self.device} does NOT compute this model right in {self.plan}: "
            first += f"{named} {'module is' if named == 1 else 'modules are'} off, of {calls}."
        limits = sorted(self.limits, key=lambda one: one.error, reverse=True)
        rows = [str(one) for one in self.faults if one.kind not in SHORT_PRODUCTS]
        for kind in SHORT_PRODUCTS:  # of each convolution and linear layer there is
            alike = [str(one) for one in self.faults if one.kind == kind]
            rows += alike[:1]
            if alike[1:]:
                rows.append(f"{len(alike) - 1} results more, of which the same is true")
        rows += [f"limit: {one}" for one in limits[:MOST_LINES]]
        if limits[MOST_LINES:]:
            rows.append(f"limit: {len(limits) - MOST_LINES} results more, closer than these")
        rows += [f"note: {note}" for note in self.notes]
        return "\n- ".join([first, *rows])
