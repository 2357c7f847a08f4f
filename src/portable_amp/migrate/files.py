"""Which files there are, and how their text is read and put back: scripts and notebooks."""

from __future__ import annotations

import io
import json
import os
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

SKIPPED = {"__pycache__", "node_modules", "build", "dist", "site-packages", "venv"}
MAGIC = re.compile(r"^\s*(%[%\w]|[!?]|\w[\w, ]*=\s*[%!])|^[^#'\"]*\?\s*$")
FOREIGN = re.compile(r"%%(?!(time|timeit|capture|prun)\b)")
CELL, LINE = "# portable-amp: cell {}", "pass  # portable-amp: line {}"


class UnreadableError(ValueError):
    """A file cannot be checked; the message says why, without its name."""


def find(paths: Sequence[str], exclude: Sequence[str]) -> list[Path]:
    """The scripts and notebooks of files and folders, each once, sorted.

    A folder's links are not followed, nor its hidden folders or environments entered.

    Raises:
        FileNotFoundError: a path does not exist.
    """
    found: dict[Path, None] = {}
    for name in paths:
        path = Path(name)
        if path.is_dir():
            found.update(dict.fromkeys(sorted(_walk(path, exclude))))
        elif path.exists():
            found[path] = None
        else:
            raise FileNotFoundError(name)
    return list(found)


def excluded(path: Path, patterns: Sequence[str]) -> bool:
    """Whether a pattern names the file, or a folder above it."""
    names = [path.as_posix(), *path.parts]
    return any(fnmatch(name, pattern) for name in names for pattern in patterns) or any(
        path.as_posix().startswith(pattern.rstrip("/") + "/") for pattern in patterns
    )


def _walk(root: Path, exclude: Sequence[str]) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = [
            one
            for one in folders
            if not one.startswith(".")
            and one not in SKIPPED
            and not (here / one / "pyvenv.cfg").exists()
            and not excluded(here / one, exclude)
        ]
        for name in files:
            path = here / name
            known = path.suffix in (".py", ".ipynb") and not path.is_symlink()
            if known and not excluded(path, exclude):
                yield path


@dataclass
class Script:
    """The text of a Python file, byte for byte."""

    data: bytes

    def __post_init__(self) -> None:
        try:
            self.encoding, _ = tokenize.detect_encoding(io.BytesIO(self.data).readline)
            self.text = self.data.decode(self.encoding)  # without the mark of utf-8-sig
        except (SyntaxError, UnicodeDecodeError, LookupError) as error:
            raise UnreadableError(f"cannot be decoded: {error}") from error

    def with_text(self, text: str) -> bytes:
        """The file with another text."""
        return text.encode(self.encoding)

    def place(self, line: int) -> tuple[str, int]:
        """What to add to the path for a line of the text, and which line that is there."""
        return "", line


class Notebook:
    """The code cells of a Jupyter notebook as one text, so that names reach from cell to cell."""

    def __init__(self, data: bytes) -> None:
        try:
            self.json: Any = json.loads(data)
            cells = self.json["cells"]
            self.cells = {i: cell for i, cell in enumerate(cells) if cell["cell_type"] == "code"}
            sources = {i: "".join(cell["source"]) for i, cell in self.cells.items()}
            sources = {i: source for i, source in sources.items() if not FOREIGN.match(source)}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UnreadableError(f"is no notebook: {error}") from error
        self.data, self.magic = data, list[str]()
        self.starts: list[tuple[int, int]] = []
        lines: list[str] = []
        for index, source in sources.items():
            lines.append(CELL.format(index))
            self.starts.append((len(lines), index))
            lines += [self._hide(one) if MAGIC.search(one) else one for one in source.split("\n")]
        self.text = "\n".join(lines) + "\n"

    def _hide(self, line: str) -> str:
        self.magic.append(line.lstrip())
        return line.removesuffix(self.magic[-1]) + LINE.format(len(self.magic) - 1)

    def with_text(self, text: str) -> bytes:
        """The notebook with another text in its cells.

        Raises:
            UnreadableError: it cannot be written the way that it was.
        """
        hidden = re.compile(re.escape(LINE).replace(r"\{\}", r"(\d+)") + "$", re.M)
        text = hidden.sub(lambda found: self.magic[int(found[1])], text)
        _, *parts = re.split(re.escape(CELL).replace(r"\{\}", r"(\d+)") + "\n", text)
        dump = self._style()
        for index, source in zip(parts[::2], parts[1::2], strict=True):
            cell, source = self.cells[int(index)], source.removesuffix("\n")
            whole = isinstance(cell["source"], str)
            if source != "".join(cell["source"]):
                cell["source"] = source if whole else source.splitlines(keepends=True)
        return dump()

    def _style(self) -> Callable[[], bytes]:
        for indent in (1, 2, 4, None, "\t"):
            for plain in (False, True):
                for end in ("\n", ""):

                    def dump(indent: Any = indent, plain: bool = plain, end: str = end) -> bytes:
                        text = json.dumps(self.json, indent=indent, ensure_ascii=plain) + end
                        return text.encode("utf-8")

                    if dump() == self.data:
                        return dump
        raise UnreadableError("is a notebook that cannot be written back as it is laid out")

    def place(self, line: int) -> tuple[str, int]:
        """What to add to the path for a line of the text, and which line that is there."""
        start, index = max(one for one in self.starts if one[0] < line)
        return f":cell {index + 1}", line - start


def read(path: Path) -> Script | Notebook:
    """A file, ready to be checked.

    Raises:
        UnreadableError: it cannot be.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror}") from error
    return Notebook(data) if path.suffix == ".ipynb" else Script(data)
