"""A step of training while it is recorded: calls, and samples that are still on the device."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from portable_amp.numerics.fingerprint import Sample, fetched, sample, stats
from portable_amp.numerics.tracefile import Call, Stats, Step

CALLS = 8
"""Calls of one module in a step that are recorded; later ones are not."""

DEPTH = 8
"""Of containers in containers that are looked into."""


class Pending:
    """A step that is not over."""

    def __init__(self) -> None:
        self.step = Step(0, None, 1.0, [], False)
        self.parameters: dict[str, tuple[Sample, bool]] = {}
        """Their gradients, and whether these have the loss scale in them."""
        self.losses: list[torch.Tensor] = []
        self.told: torch.Tensor | None = None
        """The loss that `Trace.step` was given."""
        self.scale: torch.Tensor | None = None
        self.rates: list[torch.Tensor | float] = []
        self.stepped = False
        """An optimizer has stepped, or a gradient scaler has skipped its step."""
        self.took = False
        """An optimizer has stepped."""
        self.went_back = False
        self._values: list[Sample] = []
        self._gradients: dict[int, Sample] = {}
        self._counts: dict[str, int] = {}
        self._seen: dict[int, tuple[weakref.ref[torch.Tensor], int, int]] = {}

    def enter(self, name: str, module: torch.nn.Module, parent: int | None) -> Call | None:
        """A call begins; None for a wrapper of what is called, and for one too many."""
        if parent is not None and self.step.calls[parent].name == name:
            return None
        number = self._counts[name] = self._counts.get(name, 0) + 1
        if number > CALLS:
            return None
        call = Call(name, number, type(module).__name__, parent, [], [], module.training)
        self.step.calls.append(call)
        return call

    def note(self, given: Any) -> list[int]:
        """The places of the float tensors in it; one that was seen before has its place."""
        return [at for at in map(self._place, _tensors(given)) if at is not None]

    def _place(self, tensor: torch.Tensor) -> int | None:
        version = 0 if tensor.is_inference() else tensor._version
        seen = self._seen.get(id(tensor))
        if seen and seen[0]() is tensor and seen[1] == version:
            return seen[2]
        found = sample(tensor)
        if found is None:
            return None
        at = len(self._values)
        self._values.append(found)
        self._seen[id(tensor)] = weakref.ref(tensor), version, at
        if tensor.requires_grad and not tensor.is_leaf:  # a leaf stays, and would keep the hook
            tensor.register_hook(functools.partial(self._reached, at))
        return at

    def _reached(self, at: int, gradient: torch.Tensor) -> None:
        if at not in self._gradients and not self.step.number:
            found = sample(gradient)
            if found:
                self._gradients[at] = found
                self.went_back = True

    def finished(self, number: int) -> Step:
        """The step in numbers: here it waits for the device."""
        step = self.step
        step.number, step.skipped = number, self.stepped and not self.took
        given = (*self.losses, self.scale, self.told, *self.rates)
        tensors = [one for one in given if isinstance(one, torch.Tensor)]
        numbers = iter([float(one) for one in fetched(one.float().reshape(1) for one in tensors)])
        losses = [next(numbers) for _ in self.losses]
        step.scale = 1.0 if self.scale is None else next(numbers)
        step.loss = sum(losses) / (step.scale or 1.0) if losses else None
        step.loss = step.loss if self.told is None else next(numbers)
        step.rates = [next(numbers) if isinstance(r, torch.Tensor) else r for r in self.rates]
        samples = [*self._values, *self._gradients.values()]
        rows = iter(stats([*samples, *(one for one, _ in self.parameters.values())]))
        step.values = [(one.dtype, one.shape, next(rows)) for one in self._values]
        step.gradients = {
            at: (one.dtype, _divided(next(rows), step.scale)) for at, one in self._gradients.items()
        }
        step.parameters = {
            name: (one.dtype, one.shape, _divided(next(rows), step.scale if scaled else 1.0))
            for name, (one, scaled) in self.parameters.items()
        }
        return step


def _tensors(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """Those in containers; unlike `nested.tensors_in` it makes no new ones, in every call."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    inside: Iterable[Any] = ()
    if isinstance(value, (tuple, list)):
        inside = value
    elif isinstance(value, Mapping):
        inside = value.values()
    elif dataclasses.is_dataclass(value):
        inside = vars(value).values()
    if depth < DEPTH:
        for one in inside:
            yield from _tensors(one, depth + 1)


def _divided(row: Stats, scale: float) -> Stats:
    if scale in (0.0, 1.0):
        return row
    largest, mean, rms = (one / scale for one in row[:3])
    return Stats(largest, mean, rms, row.nonfinite, tuple(p / scale for p in row.projections))
