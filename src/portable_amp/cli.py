"""The command line: portable-amp doctor | check | fix | trace."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import NoReturn


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, and ends with exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 well, 1 found something, 2 could not run."""
    from portable_amp import __version__
    from portable_amp.errors import PortableAmpError

    parser = _OneLineParser("portable-amp", description=__doc__)
    parser.add_argument("--version", action="version", version=f"portable-amp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    doctor = commands.add_parser(
        "doctor",
        help="what this machine has, what precision='auto' does on it, and a real training step",
        description="Exit code 0: a training step ran on each device found; 1: on some it failed.",
    )
    _add_doctor(doctor)
    # They parse and never import torch, or what they read.
    from portable_amp.migrate import commands as migrate
    from portable_amp.numerics import program

    migrate.add_arguments(commands)
    program.add_arguments(commands)
    options = parser.parse_args(arguments)
    if options.command == "doctor" and not options.thorough:
        for name in ("markdown", "device", "seconds", "only", "seed", "in_process"):
            if getattr(options, name) not in (None, False):
                doctor.error(f"--{name.replace('_', '-')} is about --thorough")
    try:
        if options.command == "doctor":
            code = _doctor(options)
        else:
            code = program.run(options) if options.command == "trace" else _migrate(options)
        if sys.stdout:  # it may be closed
            sys.stdout.flush()  # else a reader that left would show when Python ends
    except PortableAmpError as error:
        print(f"portable-amp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _migrate(options: argparse.Namespace) -> int:
    from portable_amp.migrate import commands, settings

    try:
        return commands.run(options)
    except settings.SettingsError as error:
        why = str(error)
    except FileNotFoundError as error:
        why = f"there is no {str(error)!r}"
    print(f"portable-amp: {why}", file=sys.stderr)
    return 2


def _add_doctor(doctor: argparse.ArgumentParser) -> None:
    output = doctor.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the findings as JSON")
    add = doctor.add_argument_group(
        "--thorough",
        "about 100 operations against float64 on the CPU; exit code 0: no fault, 1: a fault",
    ).add_argument
    add("--thorough", action="store_true", help="try them, each device in turn")
    output.add_argument("--markdown", action="store_true", help="a block to paste into a report")
    add("--device", help="the one to try, such as cuda:1; by default all that are here")
    add("--seconds", type=_seconds, help="in all (default: 120)")
    add("--only", metavar="OPERATION", help="the one to try, such as 'conv2d 3x3'")
    add("--seed", type=int, help="of weights and inputs (default: 0)")
    add(
        "--in-process",
        action="store_true",
        help="no process of their own, for a debugger: a crash ends all",
    )


def _seconds(text: str) -> float:
    try:
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}: a number above 0 works here")


def _doctor(options: argparse.Namespace) -> int:
    from portable_amp import doctor

    if options.thorough:
        given = {
            name: getattr(options, name)
            for name in ("device", "seconds", "only", "seed")
            if getattr(options, name) is not None
        }
        found = doctor.certificate(in_process=options.in_process, **given)
        told = doctor.certified(found, as_markdown=options.markdown)
    else:
        found = doctor.diagnose()
        told = doctor.report(found)
    print(json.dumps(found, indent=2) if options.json else told)
    return 0 if found["ok"] else 1
