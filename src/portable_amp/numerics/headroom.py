"""How far a model is from what fp16 holds, from one pass in fp32: `DeviceContext.headroom`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from portable_amp.copies import Loss, copier, undisturbed
from portable_amp.numerics import watch
from portable_amp.numerics.half import TO_FP16, Half
from portable_amp.numerics.watch import EMPTY, Watch, current_node, extremes, next_number, numbers

LARGEST = torch.finfo(torch.float16).max  # 65504
_VANISHES, _LOSES = -24, -14  # powers of two: fp16's smallest numbers, subnormal and normal
_TOLD = 1e-3
_BINS = 256  # the exponents of fp32, whose bias is 127
_MASK = torch.finfo(torch.float32).max  # of fp16's own finfo.min, where the scores are fp16


@dataclass(frozen=True)
class Room:
    """How far one module is from what fp16 holds."""

    module: str
    """Its name in the model; "" is the model itself, "the loss" what no module runs."""
    type: str
    largest: float
    """The largest magnitude of what it computes in fp16, its operations inside included."""
    operation: str
    """Which one computes that, such as "bmm"."""
    in_fp32: float
    """The largest magnitude of what autocast computes in fp32."""
    gradient: float
    """The largest magnitude of its fp16 gradients, times the scale."""
    underflow: float
    """The share of these, zeros apart, that become zero in fp16."""
    lossy: float
    """The share of these that are kept with less than fp16's 11 bits."""

    @property
    def headroom(self) -> float:
        """By what factor `largest` could grow; below 1 it overflows."""
        return LARGEST / self.largest if self.largest else math.inf

    @property
    def powers(self) -> float:
        """The same in powers of two."""
        return math.log2(self.headroom)

    def __str__(self) -> str:
        name = self.module or "the model itself"
        parts = []
        if self.largest:
            room = f"room for 2^{self.powers:.0f}" if self.headroom >= 1 else "which overflows"
            parts.append(f"{self.operation} up to {self.largest:.3g}, {room}")
        if self.gradient:
            room = ", which overflow" if self.gradient > LARGEST else ""
            room += f", {self.underflow:.1%} vanish" if self.underflow >= _TOLD else ""
            parts.append(f"gradients up to {self.gradient:.3g}{room}")
        return f"{name}{f' ({self.type})' if self.type else ''}: {'; '.join(parts)}."


@dataclass(frozen=True)
class HeadroomReport:
    """Whether fp16 autocast on a GPU would keep a model in range, and with which loss scale."""

    rows: tuple[Room, ...]
    """By module, the least headroom first."""
    scale: float
    """Of the loss, for the gradients."""
    underflow: float
    """The share of all fp16 gradients, zeros apart, that become zero at this scale."""
    lossy: float
    """The share of them that are kept with less than fp16's 11 bits."""
    scales: tuple[float, float] | None
    """The least and the largest loss scale, powers of two, at which no gradient overflows and no
    more than 0.1 % more vanish than at the largest; None: there are no gradients."""
    lost: float
    """The share that vanishes at the largest of these scales."""

    @property
    def ok(self) -> bool:
        """Nothing in the forward pass overflows, and some scale keeps half of the gradients."""
        return all(one.headroom >= 1 for one in self.rows) and self.lost < 0.5

    def __str__(self) -> str:
        over = [one for one in self.rows if one.headroom < 1]
        steep = [one for one in self.rows if one.gradient > LARGEST]
        if over:
            lines = [f"In fp16 this model overflows in {_modules(len(over))}."]
        elif self.ok:
            lines = ["In fp16 this model stays in range."]
        else:
            lines = [f"In fp16 {self.lost:.0%} of this model's gradients vanish at any scale."]
        faint = sorted(self.rows, key=lambda one: -one.underflow)[:2]
        shown = [
            *(over or self.rows)[:4],
            *steep[:2],
            *(one for one in faint if one.underflow >= _TOLD),
        ]
        lines += [f"- {one}" for one in dict.fromkeys(shown)]
        if self.scales:
            low, high = (f"2^{math.log2(one):.0f}" for one in self.scales)
            now = f"{self.underflow:.1%} of the gradients vanish, {self.lossy:.1%} lose bits"
            now += f", and those of {_modules(len(steep))} overflow" if steep else ""
            best = low if low == high else f"{low} to {high}"
            lines.append(f"At loss scale {self.scale:g} {now}. Best: {best}.")
        wide = max(self.rows, key=lambda one: one.in_fp32, default=None)
        if wide and wide.in_fp32 > LARGEST:
            name = wide.module or "the model itself"
            lines.append(
                f"What autocast computes in fp32 goes up to {wide.in_fp32:.3g}, in {name}."
            )
        return "\n".join(lines)


def _modules(count: int) -> str:
    return "1 module" if count == 1 else f"{count} modules"


@dataclass
class _Seen:
    """Of one module."""

    largest: float = 0.0
    operation: str = ""
    in_fp32: float = 0.0
    gradient: float = 0.0
    exponents: torch.Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))


class Gauge:
    """Measures what each operation returns."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.watch = Watch(model, self.see)
        self.half = Half()
        self.seen: dict[str, _Seen] = {}
        self.gradients: set[int] = set()
        """Where there is what a backward pass computed of the loss's gradient."""
        self.counted: set[int] = set()
        """Of these, what was looked at: the rest are views."""

    def backward(self, total: torch.Tensor) -> None:
        """The pass; what it computes of the gradient of this loss is a gradient."""
        start = torch.ones_like(total)
        self.gradients = {watch.memory_of(start)}
        total.backward(start)

    def see(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, and look at what it returns, and at what is cast for it."""
        module, node = self.watch.here()
        given = numbers((args, kwargs))
        before = {watch.memory_of(one) for one in given}
        name = function.overloadpacket.__name__
        output = function(*args, **kwargs)
        found = [] if name in EMPTY else numbers(output)
        seen = self.seen.setdefault(module, _Seen())
        if node:
            half = self.half.nodes.get(current_node()._sequence_nr(), False)
            for one in found:
                self._gradient(seen, one, before, half)
            return output
        half = self.half.forward(function, given, output, next_number())
        for one in found:
            if function._schema.is_mutable or watch.memory_of(one) not in before:  # no view
                self._value(seen, name, one, half)
        if name in TO_FP16:
            for one in given:
                if watch.memory_of(one) not in self.half.memory:
                    self._value(seen, f"what {name} is given is", one, half)
        return output

    def _value(self, seen: _Seen, name: str, one: torch.Tensor, half: bool) -> None:
        most = _magnitude(one)
        if not half:
            seen.in_fp32 = max(seen.in_fp32, most)
        elif most > seen.largest:
            seen.largest, seen.operation = most, name

    def _gradient(self, seen: _Seen, one: torch.Tensor, given: set[int], half: bool) -> None:
        memory = watch.memory_of(one)
        if memory not in given:
            self.counted.discard(memory)
            self.gradients.discard(memory)
            if not given.isdisjoint(self.gradients):
                self.gradients.add(memory)
        if not half or memory not in self.gradients or memory in self.counted:
            return
        self.counted.add(memory)
        seen.gradient = max(seen.gradient, _magnitude(one))
        bits = one.detach().float().contiguous().view(torch.int32)
        exponents = (bits >> 23) & (_BINS - 1)
        seen.exponents += torch.bincount(exponents.flatten(), minlength=_BINS).cpu()


def _magnitude(one: torch.Tensor) -> float:
    """The largest; of what is a mask, or infinite in fp32 already, nothing is said."""
    most = max(map(abs, extremes(one)))
    if most < _MASK:
        return most
    one = one.detach()
    return max(map(abs, extremes(torch.where(one.abs() < _MASK, one, 0))))


def headroom(
    model: torch.nn.Module,
    batch: Any,
    kind: str,
    *,
    loss: Loss,
    scale: float,
    move: Callable[[Any, torch.memory_format], Any],
) -> HeadroomReport:
    """Look at one pass of a copy, forward and backward, in fp32, on a device of this kind."""
    if not 0 < scale < math.inf:
        raise ValueError(f"scale={scale!r}: a loss scale above 0 works here")
    with undisturbed(kind):
        there, mine = copier(model, batch, move)("contiguous")
        gauge = Gauge(there)
        with gauge.watch.watching():
            total = loss(there, mine)
            if total.requires_grad:
                gauge.backward(total)
    return _report(model, gauge.seen, scale)


def _report(model: torch.nn.Module, seen: dict[str, _Seen], scale: float) -> HeadroomReport:
    names = dict(model.named_modules())
    rows = []
    for name, one in seen.items():
        vanish, lossy = _shares(one.exponents, scale)
        kind = type(names[name]).__qualname__ if name in names else ""
        gradient = one.gradient * scale
        row = Room(name, kind, one.largest, one.operation, one.in_fp32, gradient, vanish, lossy)
        rows.append(row)
    rows.sort(key=lambda row: (row.headroom, -row.gradient))
    exponents = sum((one.exponents for one in seen.values()), torch.zeros(_BINS, dtype=torch.int64))
    largest = max((one.gradient for one in seen.values()), default=0.0)
    scales = _scales(exponents, largest)
    lost = _shares(exponents, scales[1])[0] if scales else 0.0
    return HeadroomReport(tuple(rows), scale, *_shares(exponents, scale), scales, lost)


def _shares(exponents: torch.Tensor, scale: float) -> tuple[float, float]:
    """Of gradients at this loss scale, zeros apart: what vanishes in fp16, and what loses bits."""
    powers = torch.arange(_BINS) - 127 + math.log2(scale)
    counts = exponents[1:].double()  # the first are zeros
    all_of_them = max(float(counts.sum()), 1.0)
    vanish = float(counts[powers[1:] < _VANISHES].sum()) / all_of_them
    return vanish, float(counts[powers[1:] < _LOSES].sum()) / all_of_them - vanish


def _scales(exponents: torch.Tensor, largest: float) -> tuple[float, float] | None:
    if not 0 < largest < math.inf:
        return None
    high = 2.0 ** math.floor(math.log2(LARGEST / largest))
    most = _shares(exponents, high)[0] + 1e-3
    low = high
    while low > 1 and _shares(exponents, low / 2)[0] <= most:
        low /= 2
    return low, high
