"""The command line: python -m cv_classification train | evaluate | predict | report | demo."""

from __future__ import annotations

import argparse
import io
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from cv_classification.config import InputError, check_path, load_config
from cv_classification.demo import DEMOS, demo
from cv_classification.evaluate import evaluate
from cv_classification.interrupt import Interrupted
from cv_classification.train import train
from cv_classification.tta import predict
from portable_amp import PortableAmpError, is_oom_error


def check_count(text: str) -> int:
    """The number, at least 1, that a word of the command line is.

    Raises:
        ValueError: it is none.
    """
    if (number := int(text)) < 1:
        raise ValueError
    return number


COMMANDS = {
    "train": "train a model",
    "evaluate": "tell how good a model is, on its validation images or on others",
    "predict": "write submission.csv, each prediction averaged over views of the image",
    "report": "write report.html: curves, confusions, the images that are taken for others",
    "demo": "write images, train, predict, and score: the whole pipeline in some minutes",
}
LOGGERS = ("portable_amp", "py.warnings", "timm")
SETTING = re.compile(r"[A-Za-z_][\w.]*=", re.ASCII)
INT: dict[str, Any] = {"type": int, "default": 0}
COUNT: dict[str, Any] = {"type": check_count, "default": 0}
PATH: dict[str, Any] = {"type": check_path}
FLAG: dict[str, Any] = {"action": "store_true"}
RESUME: dict[str, Any] = {"choices": ["always", "auto"], "default": ""}
# An option, the commands that have it, its help, and what else argparse is told of it.
OPTIONS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("checkpoint", "evaluate predict report", "a checkpoint, or the folder of a run", PATH),
    ("--config", "train", "YAML file with the settings", PATH),
    ("--resume", "train", "go on with the run in `output`; auto: if there is one", RESUME),
    ("--data", "evaluate predict report", "data folder, or a table of labelled images", PATH),
    ("--images", "evaluate report", "folder of the images that a table names", PATH),
    ("--output", "predict report", "the file to write, by default beside the checkpoint", PATH),
    ("--tta", "evaluate report", "average over the preset's views", FLAG),
    ("--no-tta", "predict", "see each image once", {"action": "store_false", "dest": "tta"}),
    ("--mc-dropout", "evaluate predict report", "average over so many passes with dropout", COUNT),
    (
        "--skip-bad-images",
        "train evaluate report",
        "go on without them",
        {**FLAG, "dest": "skip_bad"},
    ),
    ("--preset", "demo", "default %(default)s", {"choices": [*DEMOS], "default": "digits"}),
    ("--out", "demo", "folder, default %(default)s", {**PATH, "default": Path("runs/demo")}),
    ("--seed", "demo", "default %(default)s", INT),
    (
        "--explain",
        "train evaluate predict report demo",
        "say why the device is used as it is",
        FLAG,
    ),
)


class Parser(argparse.ArgumentParser):
    """One that reports a mistake in one line, as everything here does."""

    def error(self, message: str) -> NoReturn:
        """Raise it, for `main` to print."""
        raise InputError(f"{message}; {self.prog} --help tells more")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 1 where a demo misses its mark, 2 on bad input."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files and classes may not be printable
        sys.stdout.reconfigure(errors="backslashreplace")
    # Standard error is for what went wrong; what was decided, and why, belongs to the output, and
    # so do the warnings of decoders.
    notices = logging.StreamHandler(sys.stdout)
    for name in LOGGERS:
        logging.getLogger(name).addHandler(notices)
    logging.captureWarnings(True)
    try:
        return run(argv)
    # OSError: the disk is full, or a folder is not ours to write to.
    except (InputError, PortableAmpError, OSError) as error:
        # What a worker of the loader raises comes with that process's traceback before it.
        return refuse(str(error).rpartition(f"{type(error).__name__}: ")[2])
    except (RuntimeError, MemoryError) as error:
        if is_oom_error(error) or isinstance(error, MemoryError):
            return refuse(f"out of memory: {error}; a smaller data.batch_size may fit")
        if "DataLoader worker" not in str(error):
            raise
        return refuse(f"{error}; it may have run out of memory: fewer data.workers may fit")
    except Interrupted as stop:
        print(f"{stop}; `train --resume` goes on from here", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        logging.captureWarnings(False)
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(notices)


def refuse(why: str) -> int:
    """Say in one line why it cannot be done; the exit status."""
    line = " ".join(why.split())
    print(line if len(line) <= 1000 else f"{line[:1000]} ...", file=sys.stderr)
    return 2


def run(argv: Sequence[str] | None) -> int:
    """Parse and dispatch.

    Raises:
        InputError: what was asked for cannot be done.
        PortableAmpError: nor by the device.
    """
    args, overrides = parse(sys.argv[1:] if argv is None else argv)
    options = {name: value for name, value in vars(args).items() if name != "command"}
    if args.command == "train":
        config = load_config(options.pop("config"), overrides)
        print(f"best model: in {train(config, **options)}")
    elif args.command == "evaluate":
        evaluate(overrides=overrides, **options)
    elif args.command == "report":
        checkpoint, html = options["checkpoint"], options.pop("output")
        folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
        evaluate(overrides=overrides, html=html or folder / "report.html", **options)
    elif args.command == "predict":
        predict(overrides=overrides, **options)
    elif not demo(overrides=overrides, **options):
        return 1
    return 0


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the settings: words like `a.b=c`, wherever they stand, and what is left."""
    words = list(argv)
    for at, word in enumerate(words):  # alone it means always, which argparse cannot tell apart
        if word == "--resume" and words[at + 1 : at + 2] not in (["always"], ["auto"]):
            words[at] = "--resume=always"
    valued = [option for option, _, _, more in OPTIONS if more.get("action") is None]
    settings: list[str] = []
    rest: list[str] = []
    for last, word in zip(["", *words], words, strict=False):
        (settings if SETTING.match(word) and last not in valued else rest).append(word)
    args, left = make_parser().parse_known_args(rest)
    return args, settings + left


def make_parser() -> Parser:
    """The commands, and their options by the names of their functions' arguments."""
    parser = Parser(
        prog="python -m cv_classification",
        description=__doc__,
        epilog="Settings are given as key=value or section.key=value, such as train.lr=1e-4.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, epilog=parser.epilog)
        for option, users, told, details in OPTIONS:
            if name in users.split():
                command.add_argument(option, help=told, **details)
    return parser


if __name__ == "__main__":
    sys.exit(main())
