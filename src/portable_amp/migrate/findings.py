"""What a scan finds, and what each rule says: plain data, with no syntax trees in it."""

from __future__ import annotations

from typing import Literal, NamedTuple

Level = Literal["error", "warning", "info"]
Applicability = Literal["safe", "unsafe", "advice"]


class Edit(NamedTuple):
    """Replace `text[start:end]`, in code points of the decoded source, by `new`."""

    start: int
    end: int
    new: str


class Finding(NamedTuple):
    """One place. Lines and columns count from 1, columns in code points."""

    path: str
    line: int
    column: int
    end_line: int
    code: str
    level: Level
    message: str
    platforms: dict[str, str]
    """Platform (CUDA, ROCm, MPS, XPU, CPU) -> what happens there, in a few words."""
    fix: Applicability
    edits: tuple[Edit, ...] = ()
    """What `fix` changes at this place; nothing where only advice is given."""
    imports: tuple[str, ...] = ()
    """Names of portable_amp that the edits use."""
    context: str = ""
    """The precision of the DeviceContext that the edits use, written as `{ctx}` in `Edit.new`."""
