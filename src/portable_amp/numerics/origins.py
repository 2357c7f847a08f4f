"""Where each value that is not finite comes from: which operation, of which module, made it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from portable_amp.nested import map_tensors
from portable_amp.numerics import watch
from portable_amp.numerics.calls import SIXTEEN, is_float, single
from portable_amp.numerics.watch import EMPTY, Watch, extremes, numbers


@dataclass(frozen=True)
class Origin:
    """Where a value that is not finite comes from."""

    kind: str
    """"made" by an operation from finite values; "given": it was in a parameter, a buffer or the
    batch; "constant": the program put it there, as masks do."""
    order: int
    """Of what was found in a pass."""
    module: str
    """The module's name in the model; "" is the model itself, "the loss" what no module runs."""
    operation: str
    """torch's name of it; of what was given, its own name."""
    node: str = ""
    """In the backward pass, the node of the graph; else ""."""
    value: str = "nan"
    """"inf", "-inf" or "nan"."""
    dtype: torch.dtype = torch.float32
    of: str = ""
    """What the operation was given, in words."""
    becomes: str = ""
    """Where an infinity of a constant, or that was given, becomes NaN."""
    precise: bool | None = None
    """It is finite if computed in fp32; None: that could not be asked."""

    @property
    def rank(self) -> tuple[int, int]:
        """What a result is put down to comes first."""
        return ("made", "given", "constant").index(self.kind), self.order


# Part of the names of what answers a row that is masked throughout with NaN: the mask is no error,
# the row is.
_SOFTMAX = ("softmax", "logsumexp", "attention")


@dataclass
class Tracer:
    """Knows of each value that is not finite where it comes from, by the memory it is in."""

    watch: Watch = field(init=False)
    origins: dict[int, Origin] = field(default_factory=dict)
    found: int = 0

    def given(self, name: str, module: str, one: torch.Tensor) -> None:
        """Look at a tensor that the pass begins with."""
        for part in numbers(one):
            if value := nonfinite(part):
                self._put(part, Origin("given", 0, module, name, "", value, part.dtype))

    def see(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, and look at what it returns."""
        given = numbers((args, kwargs))
        before = {watch.memory_of(one) for one in given}
        writes = function._schema.is_mutable
        output = function(*args, **kwargs)
        name = _name(function)
        for one in numbers(output):
            memory = watch.memory_of(one)
            if memory in before and not writes:  # a view
                continue
            value = "" if name in EMPTY else nonfinite(one)
            if value:
                self._put(one, self._origin(function, args, kwargs, given, one, value))
            elif memory not in before:
                self.origins.pop(memory, None)
        return output

    def of(self, one: torch.Tensor | None) -> Origin | None:
        """Where what is not finite in it comes from; None where all is."""
        for part in numbers(one):
            if value := nonfinite(part):
                unknown = Origin("made", self.found, watch.LOSS, "?", "", value, part.dtype)
                return self.origins.get(watch.memory_of(part), unknown)
        return None

    def _put(self, one: torch.Tensor, origin: Origin) -> None:
        self.found += 1
        if memory := watch.memory_of(one):
            self.origins[memory] = origin

    def _origin(
        self, function: Any, args: Any, kwargs: Any, given: list[torch.Tensor],
        one: torch.Tensor, value: str,
    ) -> Origin:  # fmt: skip
        module, node = self.watch.here()
        name = _name(function)
        new = Origin("made", self.found, module, name, node, value, one.dtype)
        sources = []
        largest = 0.0
        written = watch.memory_of(one)
        for part in given:
            memory = watch.memory_of(part)
            if memory == written:  # it is what it was no more
                if memory in self.origins:
                    sources.append(self.origins[memory])
            elif was := nonfinite(part):
                constant = replace(new, kind="constant", value=was)
                sources.append(self.origins.get(memory, constant))
            else:
                largest = max(largest, *map(abs, extremes(part)))
        if not sources and any(map(_no_number, (*args, *kwargs.values()))):
            return replace(new, kind="constant")
        first = min(sources, key=lambda source: source.rank, default=None)
        if first is None or first.kind == "made":
            return first or self._made(new, function, args, kwargs, largest)
        if _finite(function, args, kwargs, _tamed) is False:  # it is bad without them, too
            return self._made(new, function, args, kwargs, largest)
        if value != "nan" or any(source.value == "nan" or source.becomes for source in sources):
            return first
        if any(part in name for part in _SOFTMAX) and all(one.value == "-inf" for one in sources):
            return replace(new, of="a row that -inf masks throughout")
        return replace(first, becomes=f"{name} in {module or 'the model itself'}")

    @staticmethod
    def _made(new: Origin, function: Any, args: Any, kwargs: Any, largest: float) -> Origin:
        precise = None
        if new.dtype in SIXTEEN:
            precise = _finite(function, args, kwargs, single)
        return replace(new, of=f"finite values up to {largest:.3g}", precise=precise)


def _finite(
    function: Any, args: Any, kwargs: Any, change: Callable[[torch.Tensor], torch.Tensor]
) -> bool | None:
    """Whether it gives finite values for other inputs; None: it cannot be asked."""
    if function._schema.is_mutable or torch.Tag.nondeterministic_seeded in function.tags:
        return None
    if kwargs.get("dtype") in SIXTEEN and change is single:
        kwargs = {**kwargs, "dtype": torch.float32}
    try:
        output = function(*map_tensors(change, args), **map_tensors(change, kwargs))
    except Exception:  # it takes no such dtype, or there is no memory left: this is a luxury
        return None
    return not any(map(nonfinite, numbers(output)))


def _tamed(one: torch.Tensor) -> torch.Tensor:
    """With 1 where it is not finite: a value that few operations make anything bad of."""
    return torch.where(one.isfinite(), one, 1) if is_float(one) else one


def _name(function: Any) -> str:
    name: str = function.overloadpacket.__name__
    return name


def _no_number(argument: Any) -> bool:
    return isinstance(argument, float) and not math.isfinite(argument)


def nonfinite(one: torch.Tensor) -> str:
    """What there is in it: "nan", else "inf", else "-inf", else ""."""
    low, high = extremes(one)
    if math.isnan(low):
        return "nan"
    if math.isinf(high):
        return "inf" if high > 0 else "-inf"
    return "-inf" if math.isinf(low) else ""
