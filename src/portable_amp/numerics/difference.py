"""What two traces say of each other, to be read by people and programs."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from portable_amp.numerics.tracefile import DIRECTIONS, Stats

ROWS = 8
"""That are printed."""


def shown_name(name: str) -> str:
    """The name of a module or parameter, in one line."""
    return (name if name.isprintable() else repr(name)) or "the model itself"


@dataclass
class Row:
    """One thing that differs by more than is allowed."""

    step: int
    module: str
    what: str
    distance: float
    """Relative, of most elements (L2); inf where one of the two alone is not finite."""
    allowed: float

    def __str__(self) -> str:
        far = f"{self.distance:.1e} apart, allowed are {self.allowed:.1e}"
        if math.isinf(self.distance):
            far = "not finite in one of them"
        return f"step {self.step}, {shown_name(self.module)}: {self.what}: {far}"


@dataclass
class Verdict:
    """Whether two runs agree, and where they first do not."""

    kind: str = "same"
    """"same", or what differs first: "weights" (before the first step), "inputs" (of the model),
    "forward", "random" (dropout), "loss", "backward", "rates", "update" (of the weights), "buffer";
    "unequal": there is nothing to compare."""
    step: int | None = None
    module: str | None = None
    text: str = ""
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steps: int = 0
    """That were compared."""
    worst: float = 0.0
    """The largest distance that was allowed, in parts of what is."""

    @property
    def same(self) -> bool:
        """Nothing differs by more than is allowed."""
        return self.kind == "same"

    def blame(self, kind: str, row: Row, text: str) -> None:
        """That is what differs first."""
        self.kind, self.step, self.module = kind, row.step, row.module
        self.text = f"step {row.step}: {text}" if row.step else text
        self.rows.append(row)

    def note(self, text: str) -> None:
        """Something to know, told once."""
        if text not in self.notes:
            self.notes.append(text)

    def __str__(self) -> str:
        rows = [*map(str, self.rows[:ROWS]), *(f"note: {note}" for note in self.notes)]
        return "\n- ".join([self.text, *rows])

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: null."""
        made = {"same": self.same, **asdict(self)}
        for row in made["rows"]:
            row["distance"] = row["distance"] if math.isfinite(row["distance"]) else None
        return made


def distance(a: Stats, b: Stats, least: float = 0.0, *, robust: bool = True) -> float:
    """The relative L2 distance, estimated; inf where one alone is not finite.

    Args:
        a: one of them.
        b: the other.
        least: the root mean square is taken for no smaller than that.
        robust: of most elements, whatever becomes of single ones.
    """
    finite = math.isfinite(a.largest), math.isfinite(b.largest)
    if not all(finite):
        return math.inf if any(finite) else 0.0
    size = max(a.rms, b.rms, least)
    if not size:
        return 0.0
    pairs = zip(a.projections, b.projections, strict=True)
    apart = sorted(abs(p - q) for p, q in pairs if p or q)  # of few elements some have none
    far = math.sqrt(sum(one * one for one in apart) / max(len(apart), 1))
    if robust and len(apart) == DIRECTIONS:
        far = statistics.median(apart)
    return max(far, abs(a.rms - b.rms)) / size
