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
        if importlib.util.find_spec(name) is None:
            raise InputError(f"tracking={name!r} is not installed here; pip install {name}")


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
            self.wandb = wandb.init(project="cv_classification", dir=config.output, config=settings)

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
