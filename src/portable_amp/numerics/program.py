"""`portable-amp trace record` and `compare`: a stranger's program, run unchanged and recorded."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from portable_amp.errors import TraceError

_RUNNERS = ("portable_amp", "runpy", "<frozen runpy>")


def add_arguments(commands: argparse._SubParsersAction[Any]) -> None:
    """The command and its two options."""
    trace = commands.add_parser(
        "trace", help="record a training run, and find where two runs first differ"
    )
    actions = trace.add_subparsers(dest="action", required=True, metavar="record | compare")
    record = actions.add_parser(
        "record",
        help="run a program, and record what it trains",
        description="The exit code is the program's own. 2: the file cannot be written.",
    )
    record.add_argument("--steps", type=int, default=20, metavar="N", help="20 without it")
    record.add_argument("out", metavar="OUT", help="the file to write")
    record.add_argument(
        "program", nargs=argparse.REMAINDER, metavar="SCRIPT | -m MODULE", help="and its arguments"
    )
    compare = actions.add_parser(
        "compare",
        help="where two recorded runs first differ",
        description="Exit code 0: they agree; 1: they differ; 2: a file cannot be used.",
    )
    compare.add_argument("files", nargs=2, metavar="FILE")
    compare.add_argument("--json", action="store_true", help="print the verdict as JSON")


def run(options: argparse.Namespace) -> int:
    """Do one of the two; the exit code.

    Raises:
        TraceError: a file cannot be used.
    """
    if options.action == "record":
        return _record(options.out, options.program, options.steps)
    from portable_amp.numerics import compare, tracefile

    one, other = map(tracefile.read, options.files)
    verdict = compare.compare(one, other)
    print(json.dumps(verdict.as_dict(), indent=2) if options.json else verdict)
    return 0 if verdict.same else 1


def _record(out: str, program: list[str], steps: int) -> int:
    as_module = program[:1] == ["-m"]
    program = program[as_module:]
    if not program or program[0].startswith("-"):
        raise TraceError("what to run? record [--steps N] OUT SCRIPT, or OUT -m MODULE")
    if steps < 1:
        raise TraceError(f"--steps {steps}: a number from 1 on")
    if not as_module and not Path(program[0]).exists():
        raise TraceError(f"there is no program {program[0]!r}")
    from portable_amp.numerics.trace import Trace

    trace = Trace(None, out, steps=steps)
    trace.__enter__()  # by hand: what the program raises is told as if it ran alone
    before, here = (sys.argv, sys.path[:]), os.getpid()
    sys.argv = program
    sys.path[0] = str(Path.cwd()) if as_module else str(Path(program[0]).resolve().parent)
    try:
        if as_module:
            runpy.run_module(program[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program[0], run_name="__main__")
        error: BaseException | None = None
    except BaseException as raised:
        error = raised
    finally:
        sys.argv, sys.path[:] = before
    failed = None if error is None or isinstance(error, SystemExit) else type(error)
    trace.__exit__(failed, error, None)
    if not trace.recorded and os.getpid() == here:  # a process that it forked ends here, too
        print(f"portable-amp: no step of training was seen in {program[0]!r}", file=sys.stderr)
    if isinstance(error, SystemExit):
        raise error
    if error is not None:
        error.__traceback__ = _own(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _own(traceback: TracebackType | None) -> TracebackType | None:
    """Without the frames that are not the program's."""
    own = traceback
    while own and _is_runner(own.tb_frame.f_globals.get("__name__", "")):
        own = own.tb_next
    return own or traceback


def _is_runner(module: str) -> bool:
    return module.partition(".")[0] in _RUNNERS
