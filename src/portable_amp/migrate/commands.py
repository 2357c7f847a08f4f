"""`portable-amp check` and `portable-amp fix`: files in, findings or fixed files out."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from portable_amp.migrate import files, fixer, output, settings
from portable_amp.migrate.findings import Finding
from portable_amp.migrate.scan import relevant, scan

NOQA = re.compile(r"#\s*noqa\b(?P<codes>\s*:\s*[A-Z]+\d+(?:[\s,]+[A-Z]+\d+)*)?", re.I)
MANY = 40  # files from which on a second process is worth its start
Outcome = tuple[str, list[Finding], str]
"""A path, what was found there, and why it could not be checked."""


def add_arguments(commands: argparse._SubParsersAction[Any]) -> None:
    """The two commands and their options."""
    about = {
        "check": "find what ties Python code to CUDA: exit code 0 nothing, 1 something found",
        "fix": "rewrite what ties Python code to CUDA, where that is safe",
    }
    for name, told in about.items():
        command = commands.add_parser(name, help=told, description=told)
        command.add_argument(
            "paths", nargs="+", metavar="PATH", help="file, folder, or - for stdin"
        )
        command.add_argument("--select", metavar="CODES", help="only these rules: PAM1,PAM203")
        command.add_argument("--ignore", metavar="CODES", help="not these rules")
        command.add_argument("--exclude", action="append", default=[], metavar="PATTERN")
        command.add_argument("--stdin-filename", default="<stdin>", metavar="NAME")
        if name == "check":
            formats = list(output.FORMATS)
            command.add_argument("--format", choices=formats, default="text")
            command.add_argument(
                "--jobs", "-j", type=int, default=0, help="processes; 0: all cores"
            )
        else:
            command.add_argument(
                "--diff", action="store_true", help="write nothing; 1: would change"
            )
            command.add_argument("--unsafe-fixes", action="store_true", help="what may change more")


def run(options: argparse.Namespace) -> int:
    """Run one of the two; the exit code: 0 well, 1 found something, 2 could not run.

    Raises:
        SettingsError: settings are not understood.
        FileNotFoundError: a path does not exist.
    """
    named = [path for path in options.paths if path != "-"]
    first = Path(*named[:1])  # with stdin alone, the folder that we are in
    chosen = settings.load(first if first.is_dir() else first.parent)
    for name in ("select", "ignore"):
        given = getattr(options, name)
        if given:
            listed = [word for word in re.split(r"[\s,]+", given) if word]
            setattr(chosen, name, settings.codes(listed, f"--{name}"))
    chosen.exclude += tuple(options.exclude)
    paths = files.find(named, chosen.exclude)
    if "-" in options.paths:
        return _standard_input(options, chosen)
    return (
        _check(paths, chosen, options)
        if options.command == "check"
        else _fix(paths, chosen, options)
    )


def check_text(unit: files.Script | files.Notebook, path: str) -> list[Finding]:
    """The findings of one file, without those that a comment waves through.

    Raises:
        UnreadableError: it is not Python.
    """
    try:
        found = scan(unit.text, path)
    except SyntaxError as error:
        suffix, line = unit.place(error.lineno or 1)
        where = f"{suffix.removeprefix(':')} " if suffix else ""
        raise files.UnreadableError(f"{where}is no Python, line {line}: {error.msg}") from error
    lines = re.split(r"\r\n|\r|\n", unit.text) if found else []
    return [one for one in found if not _waved(one, lines)]


def _waved(finding: Finding, lines: Sequence[str]) -> bool:
    for line in {finding.line, finding.end_line}:
        comment = NOQA.search(lines[line - 1])
        if comment and (not comment["codes"] or finding.code in comment["codes"].upper()):
            return True
    return False


def _placed(unit: files.Script | files.Notebook, finding: Finding) -> Finding:
    suffix, line = unit.place(finding.line)
    end = finding.end_line - finding.line + line
    return finding._replace(path=finding.path + suffix, line=line, end_line=end)


def _one(path: Path) -> Outcome:
    try:
        unit = files.read(path)
        found = check_text(unit, str(path)) if relevant(unit.text) else []
        return str(path), [_placed(unit, one) for one in found], ""
    except files.UnreadableError as error:
        return str(path), [], str(error)


def _outcomes(paths: Sequence[Path], jobs: int) -> Iterator[Outcome]:
    workers = min(jobs or os.cpu_count() or 1, len(paths) // MANY + 1)
    if workers < 2:
        yield from map(_one, paths)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_one, paths, chunksize=16)


def _shown(outcomes: Iterator[Outcome], total: int) -> Iterator[Outcome]:
    """The same, with a bar on a terminal."""
    bar = sys.stderr.isatty() and total > MANY
    for done, outcome in enumerate(outcomes, 1):
        if bar and (done % 10 == 0 or done == total):
            filled = "#" * (30 * done // total)
            print(f"\r[{filled:<30}] {done}/{total}", end="", file=sys.stderr, flush=True)
        yield outcome
    if bar:
        print(file=sys.stderr)


def _check(paths: Sequence[Path], chosen: settings.Settings, options: argparse.Namespace) -> int:
    findings: list[Finding] = []
    failed = []
    for path, found, why in _shown(_outcomes(paths, options.jobs), len(paths)):
        findings += filter(chosen.wants, found)
        if why:
            failed.append(f"{path}: {why}")
    return _tell(findings, failed, options.format)


def _tell(findings: Sequence[Finding], failed: Sequence[str], layout: str) -> int:
    sys.stdout.write(output.FORMATS[layout](findings))
    for line in failed:
        print(f"portable-amp: {line}", file=sys.stderr)
    return 2 if failed else 1 if findings else 0


def _standard_input(options: argparse.Namespace, chosen: settings.Settings) -> int:
    try:
        unit = files.Script(sys.stdin.buffer.read())
        found = [one for one in check_text(unit, options.stdin_filename) if chosen.wants(one)]
    except files.UnreadableError as error:
        print(f"portable-amp: {options.stdin_filename}: {error}", file=sys.stderr)
        return 2
    if options.command == "check":
        return _tell(found, [], options.format)
    text = fixer.apply(unit.text, found, unsafe=options.unsafe_fixes)
    if options.diff:
        sys.stdout.write(_diff(unit.text, text, options.stdin_filename))
        return int(text != unit.text)
    sys.stdout.buffer.write(unit.with_text(text))
    return 0


def _fix(paths: Sequence[Path], chosen: settings.Settings, options: argparse.Namespace) -> int:
    failed, changed, left = 0, 0, 0
    for path in paths:
        try:
            unit = files.read(path)
            found = [one for one in check_text(unit, str(path)) if chosen.wants(one)]
            text = fixer.apply(unit.text, found, unsafe=options.unsafe_fixes)
            left += sum(1 for one in scan(text, str(path)) if chosen.wants(one))
            if text == unit.text:
                continue
            changed += 1
            if options.diff:
                sys.stdout.write(_diff(unit.text, text, str(path)))
            elif path.is_symlink():
                raise files.UnreadableError("is a symbolic link; name the file it leads to")
            else:
                fixer.write(path, unit.with_text(text))
        except (files.UnreadableError, OSError) as error:
            failed += 1
            print(f"portable-amp: {path}: {error}", file=sys.stderr)
    if options.diff:
        return 2 if failed else int(changed > 0)
    print(f"{changed} of {len(paths)} files changed; {left} places are left for you")
    return 2 if failed else 0


def _diff(before: str, after: str, path: str) -> str:
    # A form feed, say, ends no line for those who read the diff.
    old, new = (io.StringIO(text).readlines() for text in (before, after))
    lines = difflib.unified_diff(old, new, path, path)
    return "".join(
        one if one.endswith("\n") else one + "\n\\ No newline at end of file\n" for one in lines
    )
