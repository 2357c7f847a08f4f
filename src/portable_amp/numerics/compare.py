"""Where two traces first differ by more than their dtypes allow; read and judged without torch.

Errors add up from module to module, so no fixed bound tells a fault from rounding. What does is how
they grow: in the order in which values were computed, each may be further apart than the furthest
one before it by a factor, GROWTH, and no more. The first that is further was made by what is at
fault. Distances are relative and estimated from sums with random signs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from portable_amp.numerics.difference import Row, Verdict, distance, shown_name
from portable_amp.numerics.match import Cause, Match
from portable_amp.numerics.tracefile import Stats, Trace

GROWTH = 5
"""How many times as far apart as all values before it a value may be."""
UNITS = {"float64": 2.0**-15, "float32": 2.0**-15, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""The distance that is nothing, by the coarsest dtype: its unit, or the resolution of the file."""
COARSE = 2.0**-11
"""The unit of TF32."""
TINY = {"float16": 2.0**-14}
"""Below its smallest normal number a dtype has fewer digits."""
KINK = 0.5
"""Of the square root of the distance forward: what gradients are apart where there are branches.

What is not smooth, such as ReLU, takes the other branch where its input is nearly 0: for a share of
the elements, as large as the distance is, the gradient is another one.
"""
PARTED = 0.25
"""Runs that are so far apart are not judged any more: each step takes them further."""
UPDATE = 0.5
"""What the first change of most weights may be apart."""
LOSS_PARTS = 0.05
"""From which on it is told that the losses part."""


def compare(a: Trace, b: Trace) -> Verdict:
    """The first module and step that differ, in the order of execution."""
    judge = _Judge(a, b)
    verdict = judge.verdict
    verdict.notes += [*a.notes, *b.notes]
    judge.weights()
    for one, other in zip(a.steps, b.steps):  # noqa: B905
        if verdict.same and not judge.ended:
            judge.step(Match(one, other))
            verdict.steps += 1
    judge.tell()
    return verdict


@dataclass
class _Gradient:
    place: float
    """In the order of the backward pass."""
    row: Row
    text: str
    whole: float
    """The distance with single elements; that of a parameter is nobody's input."""


class _Judge:
    def __init__(self, a: Trace, b: Trace) -> None:
        self.a, self.b, self.verdict = a, b, Verdict()
        first = [step for trace in (a, b) for step in trace.steps[:2]]
        dtypes = {dtype for step in first for dtype, *_ in step.values}
        dtypes |= {dtype for step in first for dtype, _ in step.gradients.values()}
        self.unit = max([UNITS.get(dtype, 0.0) for dtype in dtypes], default=0.0)
        self.unit = max(self.unit, COARSE if any(s.coarse for s in first) else UNITS["float32"])
        self.tiny = max([TINY.get(dtype, 0.0) for dtype in dtypes], default=0.0)
        self.level = self.unit
        """The furthest so far that was allowed in this step."""
        self.parted = self.ended = self.met = False

    def off(self, row: Row, whole: float = 0.0, *, always: bool = False) -> bool:
        """It is too far apart; else `whole` is what others may start at.

        Runs that have parted are judged by what is not finite, and by what is `always`.
        """
        judged = always or not self.parted or math.isinf(row.distance)
        if judged and row.distance > row.allowed:
            return True
        if judged:
            self.verdict.worst = max(self.verdict.worst, row.distance / row.allowed)
            self.level = max(self.level, whole)
        return False

    def weights(self) -> None:
        """Those before the first step."""
        one, other = self.a.states.get(0, {}), self.b.states.get(0, {})
        both = [name for name in one if name in other]
        rows = [Row(0, n, "before the first step", distance(one[n], other[n]), 0.0) for n in both]
        for row in rows:
            row.allowed = GROWTH * self.unit
        bad = [row for row in rows if row.distance > row.allowed]
        if bad:
            self.verdict.blame(
                "weights", bad[0],
                f"{len(bad)} of {len(both)} weights differ before the first step, first "
                f"{shown_name(bad[0].module)}. Start both from one checkpoint: the same seed draws "
                "other numbers on another device.",
            )  # fmt: skip
            self.verdict.rows += bad[1:]

    def step(self, match: Match) -> None:
        """Forward, loss, backward, update."""
        a, b = match.a, match.b
        self.met = self.met or bool(match.values)
        for note in match.notes:
            self.verdict.note(note)
        drift = self._drift(a.number)
        self.level = max(self.unit, drift)
        self.parted = self.parted or drift > PARTED
        judges = [self._forward, self._loss, self._backward, self._rates, self._buffers]
        judges.append(self._update)
        if a.skipped is not b.skipped:  # as scalers do until the scale fits
            judges, self.ended = judges[:2], True
            which, step = ("first", a) if a.skipped else ("second", b)
            self.verdict.note(
                f"the gradient scaler of the {which} run skipped step {a.number} at a scale of "
                f"{step.scale:g}: from there on their weights differ, and are not compared"
            )
        for judged in judges:
            if self.verdict.same:
                judged(match)

    def _drift(self, step: int) -> float:
        """How far the weights that this step begins with may have come apart."""
        known = [n for n in self.a.states if n in self.b.states and n < step]
        last = max(known, default=0)
        if not last:
            return 0.0
        one, other = self.a.states[last], self.b.states[last]
        apart = [distance(one[n], other[n], robust=False) for n in one if n in other]
        return 2 * max([far for far in apart if math.isfinite(far)], default=0.0)

    def _forward(self, match: Match) -> None:
        for pair in match.values:
            _, shape, one = match.a.values[pair.at]
            _, other_shape, other = match.b.values[pair.to]
            cause = match.cause(pair)
            level = self.unit if cause.batch else self.level
            far = distance(one, other)
            row = Row(match.a.number, cause.module, cause.what, far, GROWTH * level)
            if shape != other_shape and cause.batch:
                text = f"the batches have other shapes: {shape} and {other_shape}"
                return self.verdict.blame("inputs", row, text)
            if shape != other_shape:
                self.verdict.note(f"{cause} has other shapes: {shape} and {other_shape}")
            elif self.off(row, distance(one, other, robust=False), always=cause.batch):
                return self._blame_forward(match, cause, row)
        return None

    def _blame_forward(self, match: Match, cause: Cause, row: Row) -> None:
        kind, text = "forward", f"{cause} is off, and what went in agrees"
        if cause.batch:
            kind = "inputs"
            text = f"what {cause.place} is given differs: the two runs did not get the same batch"
        elif any("drop" in one.lower() for one in match.types(cause.module)):
            kind = "random"
            text = f"{cause} draws at random, and other numbers in each run: compare without it"
        elif math.isinf(row.distance):
            text = f"{cause} is infinite or NaN in one of them, and what went in is not"
        self.verdict.blame(kind, row, text)

    def _loss(self, match: Match) -> None:
        one, other = match.a.loss, match.b.loss
        if one is None or other is None:
            return
        # A sum of what the model returns is as far off as that is, not as what is left of it.
        size = max([match.a.values[at][2].rms for at in match.roots()], default=0.0)
        far = abs(one - other) / (max(abs(one), abs(other), size) or 1.0)
        if not math.isfinite(one - other):
            far = math.inf if math.isfinite(one) or math.isfinite(other) else 0.0
        if abs(one - other) > LOSS_PARTS * max(abs(one), abs(other)):
            self.verdict.note(f"the losses part at step {match.a.number}: {one:.5g}, {other:.5g}")
        if self.off(row := Row(match.a.number, "", "loss", far, GROWTH * self.level)):
            text = f"the loss is off ({one:.6g} and {other:.6g}), and what the model returns agrees"
            self.verdict.blame("loss", row, text)

    def _backward(self, match: Match) -> None:
        self.level = max(self.level, KINK * math.sqrt(self.level))
        found = [*self._of_values(match), *self._of_parameters(match)]
        for one in sorted(found, key=lambda one: one.place):
            one.row.allowed = GROWTH * self.level
            if self.off(one.row, one.whole):
                far = "is off"
                if math.isinf(one.row.distance):
                    far = "is infinite or NaN in one of them"
                text = f"{one.text} {far}, and the gradient that reached it agrees"
                return self.verdict.blame("backward", one.row, text)
        return None

    def _least(self, match: Match) -> float:
        return self.tiny / max(min(match.a.scale, match.b.scale), 1.0)

    def _of_values(self, match: Match) -> Iterator[_Gradient]:
        a, b, least = match.a, match.b, self._least(match)
        partners = {pair.at: pair.to for pair in match.values if not pair.again}
        for place, (at, (_, one)) in enumerate(a.gradients.items()):
            to = partners.get(at)
            if to in b.gradients and a.values[at][1] == b.values[to][1]:
                other = b.gradients[to][1]
                module, text = match.who.gradient(at)
                row = Row(a.number, module, text, distance(one, other, least), 0.0)
                yield _Gradient(place, row, text, distance(one, other, least, robust=False))

    def _of_parameters(self, match: Match) -> Iterator[_Gradient]:
        a, b, least = match.a, match.b, self._least(match)
        places = {at: place for place, at in enumerate(a.gradients)}
        for name, (_, shape, one) in a.parameters.items():
            if name not in b.parameters or shape != b.parameters[name][1]:
                continue
            module, calls = match.who.owner(name)
            outs = [at for call in calls for at in call.outputs if at in a.gradients]
            # Of a sum that cancels, such as a bias before a batch norm, only rounding is left: a
            # gradient is measured against what it would be if nothing cancelled by chance.
            square = 0.0
            for at in outs:
                summed = math.prod(a.values[at][1]) / max(shape[:1] or [1])
                square += a.gradients[at][1].rms ** 2 * summed
            if len(shape) > 1:
                given = [a.values[at][2].rms ** 2 for call in calls for at in call.inputs]
                square *= max(given, default=1.0)
            size = math.sqrt(square) if math.isfinite(square) else 0.0
            far = distance(one, b.parameters[name][2], max(least, size))
            place = max([places[at] for at in outs], default=len(places)) + 0.5
            row = Row(a.number, module, f"gradient of {shown_name(name)}", far, 0.0)
            yield _Gradient(place, row, f"the gradient of {shown_name(name)}", 0.0)

    def _rates(self, match: Match) -> None:
        one, other = match.a.rates, match.b.rates
        if len(one) != len(other):
            counts = f"{len(one)} and {len(other)} groups of parameters"
            self.verdict.note(f"optimizers of {counts} made step {match.a.number}")
            return
        apart = [abs(p - q) / (max(abs(p), abs(q)) or 1.0) for p, q in zip(one, other, strict=True)]
        row = Row(match.a.number, "", "learning rates", max(apart, default=0.0), 1e-4)
        if row.distance > row.allowed:
            self.verdict.blame("rates", row, f"the learning rates differ: {one} and {other}")

    def _buffers(self, match: Match) -> None:
        """Those after this very step, where they were recorded."""
        step = match.a.number
        one, other = (trace.states.get(step, {}) for trace in (self.a, self.b))
        for name in one:
            if name in other and name not in match.a.parameters:
                far = distance(one[name], other[name])
                row = Row(step, name, "buffer after the step", far, GROWTH * self.level)
                if self.off(row):
                    text = f"the buffer {shown_name(name)} is off, and what was computed agrees"
                    return self.verdict.blame("buffer", row, text)
        return None

    def _update(self, match: Match) -> None:
        """How the weights changed in the first step."""
        if match.a.number > 1:
            return
        before, other_before = (trace.states.get(0, {}) for trace in (self.a, self.b))
        after, other_after = (trace.states.get(1, {}) for trace in (self.a, self.b))
        apart = []
        for name in match.a.parameters:
            if all(name in state for state in (before, other_before, after, other_after)):
                one = _change(before[name], after[name])
                other = _change(other_before[name], other_after[name])
                size = max(math.hypot(*one), math.hypot(*other)) or 1.0
                apart.append(math.dist(one, other) / size)
        # Of most: where a gradient is nothing but rounding, Adam makes whole steps of it.
        row = Row(1, "", "change of most weights", statistics.median(apart or [0.0]), UPDATE)
        if self.off(row):
            text = "the gradients agree, and the optimizers change the weights otherwise"
            self.verdict.blame("update", row, text)

    def tell(self) -> None:
        """The verdict in one line."""
        verdict = self.verdict
        one, other = len(self.a.steps), len(self.b.steps)
        if one != other:
            verdict.note(f"{one} and {other} steps: the first {min(one, other)} are compared")
        if not verdict.same:
            return
        if not min(one, other):
            verdict.kind, verdict.text = "unequal", "there is no step to compare"
        elif not self.met:
            verdict.kind, verdict.text = "unequal", "no module is in both: they are other models"
        else:
            verdict.text = (
                f"the two runs agree over {verdict.steps} steps: the furthest is at "
                f"{verdict.worst:.0%} of what is allowed"
            )
            if self.parted:
                verdict.note("the weights came too far apart to judge all of these steps")


def _change(before: Stats, after: Stats) -> list[float]:
    return [q - p for p, q in zip(before.projections, after.projections, strict=True)]
