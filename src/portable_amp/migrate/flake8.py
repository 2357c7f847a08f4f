"""The rules as a plugin of flake8, which takes the prefix PAM."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from portable_amp.migrate.scan import scan


class Plugin:
    """What flake8 asks for each file."""

    def __init__(self, tree: ast.AST, lines: Sequence[str]) -> None:
        self.text = "".join(lines)

    def run(self) -> Iterator[tuple[int, int, str, type[Plugin]]]:
        """Line, column from 0, text, and the plugin, of each finding."""
        for one in scan(self.text):
            yield one.line, one.column - 1, f"{one.code} {one.message}", type(self)
