"""Why a module is off: the device, its shorter products, or what the dtype does anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from portable_amp.numerics.judge import BOUNDS, Distance, distances, worst
from portable_amp.numerics.replay import Ran, Task
from portable_amp.numerics.report import Fault
from portable_amp.numerics.rounding import Narrow, Rounding

SHORT: tuple[tuple[str, Callable[[], Narrow]], ...] = (
    ("tf32", lambda: Narrow(10, nearest=True)),
    ("tf32", lambda: Narrow(10, nearest=False)),
    ("bf16", lambda: Narrow(7, nearest=True)),
    ("bf16", lambda: Narrow(7, nearest=False)),
)
"""How products of fp32 may be taken, by the kind of fault that it is."""
ALIKE = 0.1
"""What such products explain is so much closer to them than to the exact result."""
VANISHED = 0.01
"""The share of elements that are zero for underflow to be named."""


def judged(task: Task, dtype: torch.dtype, exact: Ran, got: list[Ran]) -> Iterator[Fault]:
    """A fault for each result that is further off than this dtype makes it on every device.

    And a limit for each that is off by that: see `report.LIMITS`.
    """
    bound = BOUNDS[dtype]
    noisy = {one.what: one for one in distances(exact, task.on_cpu(lambda: Rounding(dtype)))}
    told: set[str] = set()  # once, however often it is repeated
    for ran in got:
        wrong = []
        for one in distances(exact, ran):
            if one.what in told or worst(one, bound).beyond <= 1:
                continue
            told.add(one.what)
            noise = noisy[one.what]
            if not math.isfinite(one.error):
                kind = "overflow" if math.isinf(noise.error) else "wrong"
                yield fault(task, kind, one, bound, noise)
            elif worst(one, bound, noise).beyond > 1:
                wrong.append(one)
            else:
                yield fault(task, "underflow" if noise.lost > VANISHED else "rounds", one, bound)
        kind = _short_products(task, ran, wrong) if wrong and dtype is torch.float32 else "wrong"
        for one in wrong:
            yield fault(task, kind, one, bound, noisy[one.what])


def fault(
    task: Task, kind: str, one: Distance, bound: float, noise: Distance | None = None
) -> Fault:
    """A row of the report: the measure in which it is furthest off."""
    most = worst(one, bound, noise if noise and math.isfinite(noise.error) else None)
    name, type_name = task.call.name, type(task.module).__qualname__
    return Fault(name, type_name, kind, one.what, most.how, most.found, most.allowed)


def _short_products(task: Task, ran: Ran, wrong: list[Distance]) -> str:
    """The kind of products that explain all that is wrong; "wrong" where none does."""
    for kind, region in SHORT:
        like = {one.what: one.error for one in distances(task.on_cpu(region), ran)}
        if all(like.get(one.what, math.inf) <= ALIKE * one.error for one in wrong):
            return kind
    return "wrong"
