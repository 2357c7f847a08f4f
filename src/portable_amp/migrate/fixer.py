"""The fixed text of a file: edits, the imports and the context that they need, and no more."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from portable_amp.migrate.findings import Edit, Finding
from portable_amp.migrate.names import own
from portable_amp.migrate.source import Source

MADE = re.compile(r"(portable_amp\.)?DeviceContext\((precision=[^,()]+)?\)")


def apply(text: str, findings: Sequence[Finding], *, unsafe: bool = False) -> str:
    """The text with its safe fixes, or all; only the lines concerned change."""
    chosen = [
        one
        for one in findings
        if one.edits and (one.fix == "safe" or (unsafe and one.fix == "unsafe"))
    ]
    edits: list[Edit] = []
    taken: list[Finding] = []
    for one in sorted(chosen, key=lambda one: one.edits[0]):
        # Of two that overlap the outer one waits for the next run, unless they only touch.
        if not any(_overlap(a, b) for a in one.edits for b in edits):
            edits += one.edits
            taken.append(one)
    if not taken:
        return text
    source = Source(text)
    precision = next((one.context for one in taken if one.context), "")
    first = min((edit.start for edit in edits if "{ctx}" in edit.new), default=0)
    name = _context_of(source, first)
    make = precision and not name
    needed = {name for one in taken for name in one.imports} | (
        {"DeviceContext"} if make else set()
    )
    used, known = _names(source.tree)
    local = {one: known.get(one) or _free(one, used) for one in needed}
    name = name or _free("ctx", used)
    for old, new in (("ctx", name), *local.items()):
        edits = [edit._replace(new=edit.new.replace(f"{{{old}}}", new)) for edit in edits]
    made = f'{name} = {local["DeviceContext"]}(precision="{precision}")' if make else ""
    edits += _imports(source, local, made)
    fixed = put(text, edits)
    fixed = put(fixed, _unused(Source(text), Source(fixed)))
    ast.parse(fixed)
    return fixed


def put(text: str, edits: Sequence[Edit]) -> str:
    """A text with edits that do not overlap."""
    for edit in sorted(edits, reverse=True, key=lambda edit: (edit.start, edit.end)):
        text = text[: edit.start] + edit.new + text[edit.end :]
    return text


def write(path: Path, data: bytes) -> None:
    """Put a file in place of another, whole or not at all, with the rights that it had."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    made = Path(temporary)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        made.chmod(path.stat().st_mode & 0o7777)
        made.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            made.unlink()
        raise


def _overlap(a: Edit, b: Edit) -> bool:
    return (a.start < b.end and b.start < a.end) or (a.start == b.start and a.end == b.end)


def _names(tree: ast.Module) -> tuple[set[str], dict[str, str]]:
    """The names that a module uses anywhere, and what it took from portable_amp already."""
    used: set[str] = set()
    known: dict[str, str] = {}
    for one in ast.walk(tree):
        if isinstance(one, ast.ImportFrom) and one.module == "portable_amp":
            known |= {alias.name: alias.asname or alias.name for alias in one.names}
        elif isinstance(one, (ast.Import, ast.ImportFrom)):
            used |= {(alias.asname or alias.name).partition(".")[0] for alias in one.names}
        elif isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            used.add(one.name)
        else:
            used.add(str(getattr(one, "id", getattr(one, "arg", ""))))
    return used, known


def _free(name: str, used: set[str]) -> str:
    while name in used:
        name = f"portable_{name}"
    return name


def _context_of(source: Source, before: int) -> str:
    """The name of a context that the module makes before that place."""
    for one in source.tree.body:
        if source.span(one)[0] > before:
            break
        target = one.targets[0] if isinstance(one, ast.Assign) else None
        made = ast.unparse(one.value) if isinstance(one, ast.Assign) else ""
        if isinstance(target, ast.Name) and MADE.fullmatch(made):
            return target.id
    return ""


def _imports(source: Source, names: dict[str, str], context: str) -> list[Edit]:
    """Edits that import names under other names, and make the context, below the imports."""
    ending = (
        "\r\n"
        if "\r\n" in source.text
        else "\r"
        if "\r" in source.text and "\n" not in source.text
        else "\n"
    )
    top: list[ast.stmt] = []
    for one in source.tree.body:
        docstring = isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)
        shim = isinstance(one, ast.Try) and all(
            isinstance(inner, (ast.Import, ast.ImportFrom)) for inner in one.body
        )
        if (
            not docstring
            and not shim
            and not isinstance(one, (ast.Import, ast.ImportFrom, ast.Pass))
        ):
            break
        top.append(one)
    hidden = [isinstance(one, ast.Pass) for one in top]  # a notebook's magic; %%time stays first
    while top and not all(hidden) and isinstance(top[-1], ast.Pass):
        top.pop()
    edits = []
    there = [one for one in top if isinstance(one, ast.ImportFrom) and one.module == "portable_amp"]
    known = {(alias.name, alias.asname or alias.name) for one in there for alias in one.names}
    missing = names.items() - known
    line = ""
    if missing:
        if there:
            missing |= {(alias.name, alias.asname or alias.name) for alias in there[0].names}
        listed = (
            name if name == local else f"{name} as {local}" for name, local in sorted(missing)
        )
        line = f"from portable_amp import {', '.join(listed)}"
        if there:
            edits.append(Edit(*source.span(there[0]), line))
            line = ""
    if not line and not context:
        return edits
    shared = re.match(r"[ \t]*;[ \t]*", source.text[source.span(top[-1])[1] :]) if top else None
    if shared:  # a statement on the same line needs them already
        end = source.span(top[-1])[1]
        new = f"{ending}{line}{ending}" + (f"{ending}{context}{ending}" if context else "")
        return [*edits, Edit(end, end + shared.end(), new)]
    at = source.line_span(top[-1]) if top else None
    where = at[1] if at else source.span(top[-1])[1] if top else _after_comments(source.text)
    new = (f"{line}{ending}" if line else "") + (f"{ending}{context}{ending}" if context else "")
    if where and source.text[where - 1] not in "\r\n":
        new = ending + new
    edits.append(Edit(where, where, new))
    return edits


def _after_comments(text: str) -> int:
    found = re.match(r"((#[^\r\n]*)?(\r\n|\r|\n))*", text)
    assert found
    return found.end()


def _unused(before: Source, after: Source) -> list[Edit]:
    """Edits that drop torch's names which the fixes left without use."""
    used = [
        {one.id for one in ast.walk(source.tree) if isinstance(one, ast.Name)}
        for source in (before, after)
    ]
    gone = used[0] - used[1]
    text = {one.value for one in ast.walk(after.tree) if isinstance(one, ast.Constant)}
    edits = []
    for one in own(after.tree):
        if not isinstance(one, ast.ImportFrom) or one.module not in (
            "torch",
            "torch.amp",
            "torch.cuda",
            "torch.cuda.amp",
        ):
            continue
        left = [
            alias
            for alias in one.names
            if (alias.asname or alias.name) not in gone or (alias.asname or alias.name) in text
        ]
        lines = after.line_span(one)
        if len(left) == len(one.names) or (
            not left and (lines is None or one not in after.tree.body)
        ):
            continue
        if not left and lines:
            edits.append(Edit(*lines, ""))
        else:
            span = after.span(one)
            for alias in one.names:
                if alias not in left:
                    edits.append(_without(after, alias, span[1]))
    return edits


def _without(source: Source, alias: ast.alias, end: int) -> Edit:
    """Drop one of several imported names, with the comma that goes with it."""
    start, stop = source.span(alias)
    comma = re.compile(r"\s*,[ \t]*").match(source.text, stop, end)
    if comma:
        return Edit(start, comma.end(), "")
    before = re.search(r",\s*$", source.text[:start])
    return Edit(before.start() if before else start, stop, "")
