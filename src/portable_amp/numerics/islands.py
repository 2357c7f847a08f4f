"""Modules that stay in float32 where the rest of a model is computed in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from portable_amp.autocast import maybe_autocast
from portable_amp.nested import map_tensors
from portable_amp.numerics.calls import single
from portable_amp.numerics.report import Report

FAR = 0.1
"""A result that rounding alone puts off by so much is better computed in float32."""
MOST_ROUNDS = 8
"""What is kept in fp32 gives larger numbers to the next module, which may have to be kept, too."""


class Island:
    """A module's own forward pass in float32, whatever region it is called in."""

    def __init__(self, forward: Callable[..., Any], device_type: str) -> None:
        self.forward, self.device_type = forward, device_type

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it there."""
        args, kwargs = map_tensors(single, (args, kwargs))
        with maybe_autocast(self.device_type, enabled=False):
            return self.forward(*args, **kwargs)


def keep_in_fp32(model: torch.nn.Module, names: Iterable[str], device_type: str) -> None:
    """Make islands of these modules, in place, and of no others; "" is the model itself.

    A model that lacks one of them is another one: it is left alone.
    """
    modules = dict(model.named_modules())
    wanted = {*names}
    if not wanted <= modules.keys():
        return
    for name, module in modules.items():
        forward = vars(module).get("forward")
        if isinstance(forward, Island):
            del module.forward
            if getattr(forward.forward, "__func__", None) is not type(module).forward:
                module.forward = forward.forward  # somebody else's
        if name in wanted:
            module.forward = Island(module.forward, device_type)


def is_inside(name: str, names: Iterable[str]) -> bool:
    """Whether a module is within one of these, and not one itself."""
    return any(name != one and (not one or name.startswith(f"{one}.")) for one in names)


def islands(verified: Callable[[tuple[str, ...]], Report]) -> tuple[str, ...]:
    """The fewest modules that have to stay in float32 for a model to be computed right.

    Args:
        verified: the report of the model with these modules kept in float32.
    """
    names: tuple[str, ...] = ()
    for _ in range(MOST_ROUNDS):
        report = verified(names)
        bad = {one.module for one in report.faults if one.kind == "overflow"}
        bad |= {one.module for one in report.limits if one.error > FAR}
        every = {*names, *bad}
        found = tuple(sorted(one for one in every if not is_inside(one, every)))
        if found == names:
            break
        names = found
    return names
