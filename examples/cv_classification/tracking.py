"""Where the numbers of an epoch go: metrics.jsonl always, TensorBoard and W&B where asked for."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from cv_classification.config import Config, InputError
from cv_classification.data import write_text

Row = dict[str, float]
"""One epoch in numbers."""


def check_tracking(config: Config) -> None:
    """See that what is asked for is installed.

    Raises:
        InputError: it is not.
    """
    for name in config.tracking:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a mere folder, such as W&B makes of its name
            raise InputError(f"tracking={name!r} is not installed here; pip install {name}")


def read_history(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, or none where there is no such file.

    Raises:
        InputError: it is damaged, or of something else.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), 1):
        try:
            rows.append({name: float(value) for name, value in json.loads(line).items()})
            int(rows[-1]["epoch"])
        except Exception as error:  # no JSON, no row, no number
            raise InputError(f"{path}, line {number}: not the numbers of an epoch") from error
    return rows


class Tracker:
    """The listeners of one run; `begin` is the epoch it starts or goes on with."""

    def __init__(self, config: Config, begin: int) -> None:
        self.path: Path = config.output / "metrics.jsonl"
        self.board = self.wandb = None
        if "tensorboard" in config.tracking:
            from torch.utils.tensorboard import SummaryWriter

            # Rows that an interrupted run wrote after its last checkpoint are dropped.
            self.board = SummaryWriter(config.output / "tensorboard", purge_step=begin)
        if "wandb" in config.tracking:
            import wandb

            settings = config.model_dump(mode="json")
            try:
                self.wandb = wandb.init(
                    project="cv_classification", dir=config.output, config=settings
                )
            except Exception as error:  # no key, no network
                raise InputError(f"tracking='wandb' does not start: {error}") from error

    def log(self, history: Sequence[Mapping[str, float]]) -> None:
        """Tell the last row; the file always holds all of them."""
        write_text(self.path, "".join(json.JSONEncoder().encode(row) + "\n" for row in history))
        row, epoch = history[-1], int(history[-1]["epoch"])
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, epoch)
            self.board.flush()
        if self.wandb:
            self.wandb.log(dict(row), step=epoch)

    def close(self) -> None:
        """Let the listeners finish."""
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()
