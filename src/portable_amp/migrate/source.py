"""Python text, its tree, and where in the text a node stands."""

from __future__ import annotations

import ast
import re
import warnings


class Source:
    """A parsed text; positions count code points.

    Raises:
        SyntaxError: it is not Python.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            try:
                self.tree = ast.parse(text)
            except (ValueError, RecursionError, MemoryError) as error:
                raise SyntaxError(str(error) or "nested too deeply") from error
        self._lines = re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+$", text)
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))

    def offset(self, line: int, column: int) -> int:
        """Where in the text: `line` from 1, `column` in bytes of UTF-8, as ast counts."""
        if line > len(self._lines):
            return len(self.text)
        content = self._lines[line - 1]
        if not content.isascii():
            column = len(content.encode()[:column].decode())
        return self._starts[line - 1] + column

    def span(self, node: ast.expr | ast.stmt | ast.keyword | ast.alias) -> tuple[int, int]:
        """Where a node begins and ends."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self.offset(node.lineno, node.col_offset)
        return start, self.offset(node.end_lineno, node.end_col_offset)

    def column(self, node: ast.expr | ast.stmt) -> int:
        """The column of a node, from 1, in code points."""
        return self.offset(node.lineno, node.col_offset) - self._starts[node.lineno - 1] + 1

    def line_span(self, node: ast.stmt) -> tuple[int, int] | None:
        """The whole lines of a statement, line ends included; None if it shares one."""
        start, end = self._starts[node.lineno - 1], self._starts[node.end_lineno or node.lineno]
        inner = self.span(node)
        rest = self.text[inner[1] : end].strip()
        if self.text[start : inner[0]].strip() or (rest and not rest.startswith("#")):
            return None
        return start, end
