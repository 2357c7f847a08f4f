"""The command line: portable-amp doctor | check | fix | trace."""

from __future__ import annotations

import argparse
import json
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
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    # They parse and never import torch, or what they read.
    from portable_amp.migrate import commands as migrate
    from portable_amp.numerics import program

    migrate.add_arguments(commands)
    program.add_arguments(commands)
    options = parser.parse_args(arguments)
    try:
        if options.command == "doctor":
            code = _doctor(as_json=options.json)
        else:
            code = program.run(options) if options.command == "trace" else _migrate(options)
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


def _doctor(*, as_json: bool) -> int:
    from portable_amp.doctor import diagnose, report

    found = diagnose()
    print(json.dumps(found, indent=2) if as_json else report(found))
    return 0 if found["ok"] else 1
