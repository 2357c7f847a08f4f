"""Two steps side by side: which value of one is which of the other, and who made it."""

from __future__ import annotations

from dataclasses import dataclass, field

from portable_amp.numerics.difference import shown_name
from portable_amp.numerics.tracefile import Call, Step

Key = tuple[str, int, str, int]
"""Name of a module, number of its call, "in" or "out", and place among its inputs or outputs."""


@dataclass(frozen=True)
class Pair:
    """The same value of the two: its places in `a.values` and `b.values`."""

    at: int
    to: int
    again: bool
    """The first one has been paired already: the second run tells who made it."""


@dataclass
class Match:
    """A step of one trace and the same step of the other, aligned by names."""

    a: Step
    b: Step
    values: list[Pair] = field(default_factory=list)
    """In the order of the forward pass."""
    notes: list[str] = field(default_factory=list)
    """What is in one of them only."""

    def __post_init__(self) -> None:
        self.who, self.others = Who(self.a), Who(self.b)
        there = _keys(self.b)
        pairs = {(at, there[key]): None for key, at in _keys(self.a).items() if key in there}
        seen: set[int] = set()
        for at, to in sorted(pairs, key=lambda pair: (max(pair), pair)):
            # One run may return the tensor that was given, where the other one makes a new one.
            self.values.append(Pair(at, to, at in seen))
            seen.add(at)
        for which, one, other in (("first", self.a, self.b), ("second", self.b, self.a)):
            known = {(call.name, call.number) for call in other.calls}
            alone = [call for call in one.calls if (call.name, call.number) not in known]
            if alone:
                named = ", ".join(dict.fromkeys(shown_name(call.name) for call in alone[:4]))
                self.notes.append(f"called in the {which} run only: {len(alone)} calls, of {named}")

    def cause(self, pair: Pair) -> Cause:
        """What made a value."""
        return self.others.made(pair.to) if pair.again else self.who.made(pair.at)

    def types(self, name: str) -> set[str]:
        """What a module is in either."""
        both = (*self.who.named.get(name, []), *self.others.named.get(name, []))
        return {call.type for call in both}

    def roots(self) -> list[int]:
        """The values that the outermost calls return."""
        return [at for call in self.a.calls if call.parent is None for at in call.outputs]


def _keys(step: Step) -> dict[Key, int]:
    found: dict[Key, int] = {}
    for call in step.calls:
        for what, places in (("in", call.inputs), ("out", call.outputs)):
            for place, at in enumerate(places):
                found.setdefault((call.name, call.number, what, place), at)
    return found


@dataclass(frozen=True)
class Cause:
    """What made a value."""

    module: str
    what: str
    place: str
    batch: bool = False
    """Nothing did: it is what the loop gives the model."""

    def __str__(self) -> str:
        if self.what == "output":
            return f"the output of {self.place}"
        return f"{self.place}: {self.what}"


def _named(call: Call) -> str:
    again = f", call {call.number}" if call.number > 1 else ""
    return f"{shown_name(call.name)} ({call.type}{again})"


class Who:
    """Who made, took and owns what in a step."""

    def __init__(self, step: Step) -> None:
        self.calls = step.calls
        self.makers: dict[int, list[Call]] = {}
        self.takers: dict[int, list[Call]] = {}
        self.named: dict[str, list[Call]] = {}
        for call in step.calls:  # what is inside of a call comes after it
            self.named.setdefault(call.name, []).append(call)
            for at in call.outputs:
                self.makers.setdefault(at, []).append(call)
            for at in call.inputs:
                self.takers.setdefault(at, []).append(call)

    def made(self, at: int) -> Cause:
        """The innermost module that returned a value; or who made it between calls of others."""
        for call in reversed(self.makers.get(at, [])):
            if at not in call.inputs:
                return Cause(call.name, "output", _named(call))
        call = self.takers[at][0]
        if call.parent is None:
            return Cause(call.name, "input", _named(call), batch=True)
        parent = self.calls[call.parent]
        what = f"what its own forward gives {_named(call)}"
        return Cause(parent.name, what, _named(parent))

    def gradient(self, at: int) -> tuple[str, str]:
        """The module whose backward pass made the gradient at a value, and how to say it."""
        takers = self.takers.get(at, [])
        outside = {call.parent for call in takers}
        inner = [
            call
            for call in takers
            if not any(self.calls[p] is call for p in outside if p is not None)
        ]
        if inner:
            named = " or ".join(dict.fromkeys(map(_named, inner)))
            return inner[0].name, f"the gradient of the input of {named}"
        outer = self.makers[at][0]  # its caller uses it
        if outer.parent is None:
            return outer.name, f"the gradient that the loss gives {_named(outer)}"
        parent = self.calls[outer.parent]
        text = f"the gradient that {_named(parent)} itself gives the output of {_named(outer)}"
        return parent.name, text

    def owner(self, parameter: str) -> tuple[str, list[Call]]:
        """The module that a parameter belongs to, or the next one outside that was called."""
        prefix, colon, rest = parameter.rpartition(": ")
        parts = rest.split(".")[:-1]
        while True:
            owner = prefix + colon + ".".join(parts)
            calls = self.named.get(owner, [])
            if calls or not parts:
                return owner, calls
            parts.pop()
