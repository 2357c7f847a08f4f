"""A line on the terminal for what takes longer than two seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType

QUIET_S = 2.0


class Progress:
    """How far something is, on standard error; nothing where that is no terminal.

    >>> with Progress("verify", 2) as progress:
    ...     progress.step("layer1")
    """

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.at = what, total, 0
        self.started, self.shown = time.perf_counter(), 0

    def step(self, name: str) -> None:
        """One more is done, of this name."""
        self.at += 1
        if time.perf_counter() - self.started > QUIET_S and sys.stderr and sys.stderr.isatty():
            line = f"{self.what}: {self.at} of {self.total}, {name}"[:78]
            self._show(line)

    def _show(self, line: str) -> None:
        print(f"\r{line:{self.shown}}", end="", file=sys.stderr, flush=True)
        self.shown = len(line)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.shown:
            self._show("")
            print("\r", end="", file=sys.stderr, flush=True)
