"""Two steps side by side: which value of one is which of the other, and who made it."""

from __future__ import annotations

from dataclasses import dataclass, field

from portable_amp.numerics.tracefile import Call, Step

Key = tuple[str, int, str, int]
"""Name of a module, number of its call, "in" or "out", and place among its inputs or outputs."""


@dataclass(frozen=True)
class Pair:
    """The same value of the two: its places in `a.values` and `b.values`."""

    at: int
    to: int
    maker: Step
    """The step that tells who made it."""
    again: bool
    """The first one has been paired already."""

    def cause(self) -> Cause:
        """What made it."""
        return cause_forward(self.maker, self.to if self.again else self.at)


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
        there = _keys(self.b)
        pairs = {(at, there[key]): None for key, at in _keys(self.a).items() if key in there}
        seen: set[int] = set()
        for at, to in sorted(pairs, key=lambda pair: (max(pair), pair)):
            # One run may return the tensor that was given, where the other one makes a new one.
            self.values.append(Pair(at, to, self.b if at in seen else self.a, at in seen))
            seen.add(at)
        for which, one, other in (("first", self.a, self.b), ("second", self.b, self.a)):
            known = {(call.name, call.number) for call in other.calls}
            alone = [call for call in one.calls if (call.name, call.number) not in known]
            if alone:
                named = ", ".join(dict.fromkeys(_shown(call.name) for call in alone[:4]))
                self.notes.append(f"called in the {which} run only: {len(alone)} calls, of {named}")

    def types(self, name: str) -> set[str]:
        """What a module is in either."""
        return {call.type for step in (self.a, self.b) for call in step.calls if call.name == name}

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


def _shown(name: str) -> str:
    return name or "the model itself"


def _named(call: Call) -> str:
    again = f", call {call.number}" if call.number > 1 else ""
    return f"{_shown(call.name)} ({call.type}{again})"


def cause_forward(step: Step, at: int) -> Cause:
    """The innermost module that returned it; or the one that made it between calls of others."""
    for call in reversed(step.calls):  # what is inside of a call comes after it
        if at in call.outputs and at not in call.inputs:
            return Cause(call.name, "output", _named(call))
    for call in step.calls:
        if at in call.inputs:
            if call.parent is None:
                return Cause(call.name, "input", _named(call), batch=True)
            parent = step.calls[call.parent]
            what = f"what its own forward gives {_named(call)}"
            return Cause(parent.name, what, _named(parent))
    return Cause("", "value", "")


def causes_backward(step: Step, at: int) -> tuple[str, str]:
    """The module whose backward pass made the gradient at a value, and how to say it."""
    takers = [place for place, call in enumerate(step.calls) if at in call.inputs]
    inner = [p for p in takers if not any(step.calls[q].parent == p for q in takers)]
    if inner:
        calls = [step.calls[place] for place in inner]
        named = " or ".join(dict.fromkeys(map(_named, calls)))
        return calls[0].name, f"the gradient of the input of {named}"
    makers = [place for place, call in enumerate(step.calls) if at in call.outputs]
    outer = step.calls[makers[0]]  # its caller uses it
    if outer.parent is None:
        return outer.name, f"the gradient that the loss gives {_named(outer)}"
    parent = step.calls[outer.parent]
    text = f"the gradient that {_named(parent)} itself gives the output of {_named(outer)}"
    return parent.name, text


def cause_of_parameter(step: Step, name: str) -> tuple[str, list[Call]]:
    """The module that a parameter belongs to, or the next one outside that was called."""
    prefix, colon, rest = name.rpartition(": ")
    parts = rest.split(".")[:-1]
    while True:
        owner = prefix + colon + ".".join(parts)
        calls = [call for call in step.calls if call.name == owner]
        if calls or not parts:
            return owner, calls
        parts.pop()
