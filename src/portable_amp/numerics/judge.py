"""How far two results are from each other, and how far each dtype allows them to be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from portable_amp.numerics.replay import Ran

BOUNDS = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""The largest relative distance (L2) of one module's result or gradient, by what it computes in.

Source: 17 models, five seeds (docs/explanation/trust.md). Forward the largest were a sixth of it in
fp32, and 38 % in 16 bits. Backward, sums that cancel go beyond; there SLACK decides.
"""
TILT = 0.125
"""All of it may be so much too large or too small, in parts of that: rounding is not one-sided."""
PEAK = 16
"""One element may be so many times as far off, in units of itself and of the root mean square."""
SLACK = 6
"""What a result may be off beyond what rounding each operation's result makes it."""
NOTHING = 1e-11
"""A result so small beside what was given is what float64 leaves of a sum that is 0, such as of an
image of one colour less its mean: no number to compare with. It is measured by what was given."""
MAGNIFIED = 64
"""And so many times as much is right: a norm divides what rounding leaves by a small root.

Source: the gradient of a LayerNorm of one element is 4.5 times the bound (torch 2.15, AMD EPYC).
"""
NEGLIGIBLE = 1e-3
"""A gradient smaller than this part of the largest of its module is not looked at."""


@dataclass(frozen=True)
class Distance:
    """Of one result of one replay from the exact one, in three measures."""

    what: str
    """Which result: "output", "gradient of weight", "buffer running_var", ..."""
    error: float
    """The L2 norm of the difference over that of the exact result; inf if not finite."""
    tilt: float = 0.0
    """By what factor all of it is too large or too small, less 1."""
    peak: float = 0.0
    """The largest difference of an element, over its size and the root mean square of all."""
    count: int = 1
    """Of elements."""
    lost: float = 0.0
    """The share of elements that are zero, and should not be."""

    def measures(self, bound: float, noise: Distance | None = None) -> list[Measure]:
        """Each measure and what is allowed, or what rounding alone made of it, if that is more."""
        made = noise or Distance("", 0.0)
        chance = 5 * self.error / math.sqrt(self.count)
        return [
            Measure("off", self.error, max(bound, SLACK * made.error)),
            Measure(
                "too large or too small",
                self.tilt - chance,
                max(TILT * bound, SLACK * made.tilt),
            ),
            Measure("off in one element", self.peak, max(PEAK * bound, SLACK * made.peak)),
        ]


@dataclass(frozen=True)
class Measure:
    """One way to be off."""

    how: str
    found: float
    allowed: float

    @property
    def beyond(self) -> float:
        """How many times as much as is allowed."""
        return self.found / self.allowed


def worst(distance: Distance, bound: float, noise: Distance | None = None) -> Measure:
    """The measure in which it is furthest beyond what is allowed."""
    return max(distance.measures(bound, noise), key=lambda one: one.beyond)


def distances(exact: Ran, got: Ran) -> Iterator[Distance]:
    """Of everything that was computed."""
    norms = {what: _norm(one) for what, one in exact.found.items()}
    largest = max([0.0, *(norm for what, norm in norms.items() if is_backward(what))])
    for what, one in exact.found.items():
        other = got.found.get(what)
        if other is None or other.shape != one.shape:
            yield Distance(what, math.inf)
            continue
        if not bool((finite := one.isfinite()).all()):  # a mask of -inf: the rest is compared
            if not bool(finite.any()):
                continue
            one, other = one[finite], other[finite]
        if not bool(other.isfinite().all()):
            yield Distance(what, math.inf)
        elif norms[what] < NOTHING * exact.given < math.inf and (norms[what] or is_backward(what)):
            yield Distance(what, float(other.norm()) / exact.given / MAGNIFIED)
        elif not is_backward(what) or norms[what] >= NEGLIGIBLE * largest:
            yield _distance(what, one, other, norms[what])


def is_backward(what: str) -> bool:
    """It is a gradient."""
    return what.startswith("gradient")


def _norm(one: torch.Tensor) -> float:
    norm = float(one.norm())
    return norm if math.isfinite(norm) else float(one[one.isfinite()].norm())


def _distance(what: str, exact: torch.Tensor, got: torch.Tensor, norm: float) -> Distance:
    if not norm:
        return Distance(what, math.inf if bool((got.abs() > 1e-6).any()) else 0.0)
    scale = norm / math.sqrt(exact.numel())
    off = got - exact
    error = float(off.norm()) / norm
    tilt = abs(float((off * exact).sum())) / norm**2
    peak = float((off.abs() / (exact.abs() + scale)).max())
    lost = int(((got == 0) & (exact != 0)).sum()) / exact.numel()
    return Distance(what, error, tilt, peak, exact.numel(), lost)
