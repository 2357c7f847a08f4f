"""Run the library's tests over several versions of torch, and print what passed as a table.

usage: python tools/torch_matrix.py [WHAT ...] [--output FILE] [-k EXPRESSION] [-- PYTEST ARGUMENTS]

WHAT is one of these, in any mix:
  3.10:2.4.1        this Python and this torch, in an environment made for it under .torch/
  2.4.1             this torch, with the lowest Python found here that has a wheel of it
  /path/to/python   an interpreter that has torch, numpy, pytest and hypothesis
Nothing: a list from the floor to the newest torch, over every supported Python.

Unit, property and conformance tests and the doctests of src run, one version after the other. The
tests of the example, the docs and the package are left out: they need more than torch.

Environments are made with uv where it is installed, else with venv and pip, from the registry they
are set up for. On Linux that torch brings CUDA along, 3 to 6 GB a version; with uv,
UV_TORCH_BACKEND=cpu takes PyTorch's small builds instead. Nothing beyond the standard library is
needed here.

Exit status: 0 all green, 1 a test failed somewhere, 2 something could not run.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".torch"

# Which wheels of torch there are for Linux: releases, the first and the last minor of Python 3.
# A new release is one line here, and one in DEFAULT.
WHEELS = {
    "2.4.0 2.4.1": (10, 12),
    "2.5.0 2.5.1 2.6.0 2.7.0 2.7.1 2.8.0": (10, 13),
    "2.9.0 2.9.1 2.10.0 2.11.0 2.12.0 2.12.1 2.13.0 2.14.0 2.14.1": (10, 14),
    "2.15.0": (11, 14),
}
PYTHONS = {
    torch: tuple(f"3.{minor}" for minor in range(first, last + 1))
    for releases, (first, last) in WHEELS.items()
    for torch in releases.split()
}
"""torch -> the Pythons that it and portable-amp both run on."""

# Where something changed: 2.5 MPS autocast, 2.6 safe loading and torch.accelerator, 2.8 the scaler
# on MPS, 2.9 the accelerator's memory, 2.11 what the CPU says of itself.
DEFAULT = (
    "3.10:2.4.1",
    "3.11:2.5.1",
    "3.12:2.6.0",
    "3.13:2.8.0",
    "3.12:2.9.1",
    "3.11:2.11.0",
    "3.13:2.13.0",
    "3.11:2.15.0",
)

PATHS = ("src", "tests/unit", "tests/property", "tests/conformance")
LEFT_OUT = ("tests/unit/test_docs.py", "tests/unit/test_package.py")
NEEDED = ("torch", "numpy", "pytest", "hypothesis")


class CannotRunError(Exception):
    """What was asked for cannot be run; the text says why, in one line."""


@dataclass(frozen=True)
class Outcome:
    """What one run of pytest came to."""

    passed: int = 0
    failed: int = 0
    """Failures and errors."""
    skipped: int = 0
    trouble: str = ""
    """Why there are no such numbers, empty where there are."""

    @property
    def red(self) -> bool:
        """A test failed, or pytest itself did."""
        return self.failed > 0 or bool(self.trouble)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    torch: str
    python: str
    outcome: Outcome | None = None
    """None where it could not run."""
    seconds: float = 0.0


# --- what was asked for ----------------------------------------------------------------------


def parse(what: str) -> Path | tuple[str, str]:
    """An interpreter's path, or (Python, torch); Python is "" where any will do.

    Raises:
        CannotRunError: it is neither, or there is no such wheel.
    """
    if any(sep in what for sep in (os.sep, os.altsep) if sep) or Path(what).is_file():
        if not Path(what).is_file():
            raise CannotRunError(
                f"{what!r} is not there; give the path of a python, or {DEFAULT[0]}."
            )
        # Not resolved: the link is what makes it the environment's python.
        return Path(what).absolute()
    python, _, torch = what.rpartition(":")
    if not re.fullmatch(r"(3\.\d+)?", python) or not re.fullmatch(r"\d+(\.\d+)*", torch):
        raise CannotRunError(
            f"{what!r} is not PYTHON:TORCH such as {DEFAULT[0]}, a version of torch, or the path "
            "of an interpreter."
        )
    if torch not in PYTHONS:
        raise CannotRunError(
            f"{what!r}: no torch {torch} is known here; nearest: {', '.join(nearest(torch))}. "
            "Any other: give an interpreter that has it."
        )
    if python and python not in PYTHONS[torch]:
        raise CannotRunError(
            f"{what!r}: torch {torch} and portable-amp have no Python {python} in common; "
            f"they have {', '.join(PYTHONS[torch])}."
        )
    return python, torch


def nearest(torch: str) -> list[str]:
    """The two or three known versions around this one, oldest first."""

    def numbers(version: str) -> tuple[int, ...]:
        return tuple(map(int, version.split(".")))

    same = [known for known in PYTHONS if numbers(known)[:2] == numbers(torch)[:2]]
    below = [known for known in PYTHONS if numbers(known) < numbers(torch)]
    above = [known for known in PYTHONS if numbers(known) > numbers(torch)]
    return same or [*below[-1:], *above[:1]]


# --- interpreters and environments -----------------------------------------------------------


def version_of(python: str | Path) -> str:
    """The "3.10" of an interpreter, "" where it does not start (pyenv's stand-ins may not)."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@functools.cache
def find_python(version: str) -> str | None:
    """An interpreter of this version on this machine: this one, on PATH, or in pyenv's folder."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [sys.executable, shutil.which(f"python{version}")]
    candidates += map(str, sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True))
    return next((c for c in candidates if c and version_of(c) == version), None)


def make_environment(python: str, torch: str) -> Path:
    """The interpreter of .torch/pyXY-torchX.Y.Z, which is made unless it is there and complete.

    Raises:
        CannotRunError: there is no such Python, or an installation failed.
    """
    uv = shutil.which("uv")
    if not python:
        found = [version for version in PYTHONS[torch] if find_python(version)]
        python = found[0] if found else PYTHONS[torch][0]
    base = find_python(python)
    if not (base or uv):
        raise CannotRunError(
            f"'{python}:{torch}': there is no Python {python} here, and no uv to fetch it; install "
            f"either, or give another one: {', '.join(PYTHONS[torch])}."
        )
    folder = ENVIRONMENTS / f"py{python.replace('.', '')}-torch{torch}"
    windows = os.name == "nt"
    inside = folder / ("Scripts/python.exe" if windows else "bin/python")
    stamp = folder / ".complete"
    packages = [f"torch=={torch}", "numpy", *pins(), "-e", f"{ROOT}[testing]"]
    want = "\n".join((*packages, os.environ.get("UV_TORCH_BACKEND", ""), testing_extra()))
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == want and version_of(inside):
        return inside

    say(f"making {folder}")
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(exist_ok=True)
    if uv:
        install([uv, "venv", "-q", "--python", base or python, str(folder)], folder)
        install([uv, "pip", "install", "-q", "--python", str(inside), *packages], folder)
    else:
        install([str(base), "-m", "venv", str(folder)], folder)
        pip = [str(inside), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        install([*pip, *packages], folder)
    stamp.write_text(want, encoding="utf-8")
    return inside


def pins() -> list[str]:
    """The tested pytest and Hypothesis, so that their releases do not pass for torch's faults.

    numpy stays free: the newest that each Python has worked with every torch in DEFAULT.
    """
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if re.match(r"(pytest|hypothesis)==", line)]


def testing_extra() -> str:
    """The line of pyproject.toml that says what the tests need; tomllib came with Python 3.11."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return next(line for line in text.splitlines() if line.startswith("testing = "))


def install(command: list[str], folder: Path) -> None:
    """Run one step of the installation; its words reach the user.

    Raises:
        CannotRunError: it failed.
    """
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise CannotRunError(f"{folder.name} could not be made: see above; {shlex.join(command)}")


def describe(python: Path) -> tuple[str, str]:
    """(torch, Python) of an interpreter.

    Raises:
        CannotRunError: it lacks something the tests need.
    """
    code = (
        "import sys, importlib.util as u, importlib.metadata as m; "
        f"lacking = [name for name in {NEEDED} if u.find_spec(name) is None]; "
        "print(','.join(lacking), m.version('torch') if 'torch' not in lacking else '', "
        "'%d.%d' % sys.version_info[:2], sep='|')"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotRunError(f"'{python}' does not start: {error.strerror}.") from None
    if done.returncode or done.stdout.count("|") != 2:
        raise CannotRunError(f"'{python}' is no Python from 3.10 on: it did not answer.")
    lacking, torch, version = done.stdout.strip().split("|")
    if lacking:
        raise CannotRunError(
            f"'{python}' has no {lacking.replace(',', ', ')}; install {' '.join(NEEDED)} there."
        )
    return torch, version


# --- runs ------------------------------------------------------------------------------------


def pytest_arguments(extra: Sequence[str]) -> list[str]:
    """What pytest is told; paths among `extra` take the place of the usual ones."""
    named = [word for word in extra if word and (ROOT / word.split("::")[0]).exists()]
    ignored = [f"--ignore={path}" for path in LEFT_OUT]
    # Of what a failed test captured stderr only: torch.compile logs thousands of lines. No cache:
    # "the last failed" of one torch says nothing of the next.
    quiet = ["-q", "--tb=short", "--show-capture=stderr", "-p", "no:cacheprovider"]
    return [*quiet, *([] if named else PATHS), *ignored, *extra]


def run_tests(python: Path, extra: Sequence[str]) -> Outcome:
    """Run pytest with this interpreter and pass its output on to stderr."""
    command = [str(python), "-m", "pytest", *pytest_arguments(extra)]
    # Some tests start a Python of their own: it is to find the package, installed or not.
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    lines = []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout
        for line in process.stdout:
            sys.stderr.write(line)
            lines.append(line)
    return read_summary(lines, process.returncode)


def read_summary(lines: Sequence[str], status: int) -> Outcome:
    """What pytest's output and its exit status say; no green without a test that passed."""
    # Such as "1 failed, 421 passed, 9 skipped in 63.21s (0:01:03)", plain or between "=".
    count = r"(?:\d+ [a-z]+|no tests ran)"
    ends = (re.match(rf"=*\s*({count}(?:, {count})*) in [\d.]+s\b", line) for line in lines)
    summary = [found[1] for found in ends if found][-1:]
    counts: dict[str, int] = {}
    for number, word in re.findall(r"(\d+) ([a-z]+)", "".join(summary)):
        counts[word.removesuffix("s")] = int(number)
    trouble = ""
    if not summary:
        trouble = f"pytest ended with status {status} and no summary"
    elif status == 5 or (status == 0 and not counts.get("passed")):
        trouble = "no test ran"
    elif status not in (0, 1, 2) or (status and not counts.keys() & {"failed", "error"}):
        trouble = f"pytest ended with status {status}"
    return Outcome(
        passed=counts.get("passed", 0),
        failed=counts.get("failed", 0) + counts.get("error", 0),
        skipped=counts.get("skipped", 0),
        trouble=trouble,
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""

    def cells(row: Row) -> Iterator[str]:
        yield row.torch
        yield row.python
        if row.outcome is None:
            yield from ("could not run", "", "", "")
            return
        yield str(row.outcome.passed)
        yield f"{row.outcome.failed}" + f" ({row.outcome.trouble})" * bool(row.outcome.trouble)
        yield str(row.outcome.skipped)
        yield f"{row.seconds:.0f}"

    head = ["torch", "Python", "passed", "failed", "skipped", "seconds"]
    body = [head, ["---"] * len(head), *(list(cells(row)) for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in body)


def say(text: str) -> None:
    """One line for who watches; stdout is for the table."""
    print(f"torch_matrix: {text}", file=sys.stderr, flush=True)


def run_one(asked: Path | tuple[str, str], extra: Sequence[str]) -> Row:
    """Make what is needed, run the tests, and tell."""
    python, torch = ("", "") if isinstance(asked, Path) else asked
    try:
        interpreter = asked if isinstance(asked, Path) else make_environment(python, torch)
        torch, python = describe(interpreter)
    except CannotRunError as error:
        say(str(error))
        return Row(torch or str(asked), python)
    say(f"torch {torch}, Python {python}")
    start = time.monotonic()
    outcome = run_tests(interpreter, extra)
    return Row(torch.partition("+")[0], python, outcome, time.monotonic() - start)


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        raise CannotRunError(f"{message}; --help shows what there is.")


def read_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and what is for pytest."""
    argv, extra = list(argv), []
    if "--" in argv:
        cut = argv.index("--")
        argv, extra = argv[:cut], argv[cut + 1 :]
    parser = Parser(
        prog="torch_matrix.py",
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2].partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [WHAT ...] [--output FILE] [-k EXPRESSION] [-- PYTEST ARGUMENTS]",
    )
    parser.add_argument("what", nargs="*", metavar="WHAT", default=list(DEFAULT))
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the table there, too")
    parser.add_argument("-k", metavar="EXPRESSION", help="only tests that match; pytest's own -k")
    options = parser.parse_args(argv)
    # In one word, so that an expression is never taken for a path.
    return options, [*([f"-k{options.k}"] if options.k else []), *extra]


def main(argv: Sequence[str]) -> int:
    """Run it all; the exit status."""
    try:
        options, extra = read_arguments(argv)
        asked = [parse(what) for what in options.what]
        output = options.output
        if output and (output.is_dir() or not output.absolute().parent.is_dir()):
            raise CannotRunError(f"--output {output}: name a file, in a folder that exists.")
    except CannotRunError as error:
        say(str(error))
        return 2
    rows: list[Row] = []
    try:
        for one in asked:
            rows.append(run_one(one, extra))
    except KeyboardInterrupt:
        say(f"stopped after {len(rows)} of {len(asked)}")
        return 130
    finally:
        # Also what ran before an interruption: it took minutes.
        if rows:
            print(table(rows), end="", flush=True)
            if output:
                output.write_text(table(rows), encoding="utf-8")
    if any(row.outcome and row.outcome.red for row in rows):
        return 1
    return 2 if any(row.outcome is None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
