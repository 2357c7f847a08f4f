"""A run and its checkpoints: all that must be kept to go on as if never interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from cv_classification import parallel
from cv_classification.config import Config, InputError, check_same_run
from cv_classification.images import Split
from cv_classification.model import Classifier, describe, load_weights, read_state
from cv_classification.optimize import Schedule
from cv_classification.tracking import Row
from portable_amp import (
    DeviceContext,
    ScalerShim,
    ranks,
    rng_state,
    save_checkpoint,
    set_rng_state,
)

ADVICE = "a smaller train.lr, or train.max_norm=1, may keep it finite"


@dataclass
class Progress:
    """How far a run is."""

    epoch: int = 0
    batches: int = 0
    """Done in this epoch, by each process."""
    updates: int = 0
    """Steps the optimizer has taken."""
    loss: float = 0.0
    """Sum of this epoch's finite losses."""
    finite: int = 0
    lost: int = 0
    """Losses in a row that were not finite."""
    history: list[Row] = field(default_factory=list)


@dataclass
class Run:
    """All that a checkpoint keeps, and what it is kept for."""

    config: Config
    ctx: DeviceContext
    data: Split
    model: Classifier
    net: nn.Module
    """What the loop calls: `model`, or a wrapper that several processes share."""
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: ScalerShim
    criterion: nn.Module
    ema: ModelEmaV3 | None
    progress: Progress = field(default_factory=Progress)
    group: int = 1
    """Batches whose gradients make the next step."""

    @property
    def judged(self) -> Classifier:
        """The model that is validated and kept as the best."""
        return self.model if self.ema is None else self.ema.module

    def forward_backward(
        self, part: tuple[torch.Tensor, torch.Tensor], weight: float
    ) -> Callable[[], torch.Tensor]:
        """Add up the gradients of a batch, or of a part with its `weight`; what gives its loss."""
        images, targets = part
        with self.ctx.autocast():
            logits = self.net(images)
        loss: torch.Tensor = self.criterion(logits, targets) * (weight / self.group)
        seen = self.ctx.fetch(loss)  # before the backward pass, which nobody has to wait for then
        self.scaler.scale(loss).backward()
        return seen

    def save(self, name: str = "last.pt", *, best: bool = False) -> None:
        """Write a checkpoint; every process must call it, and the first one writes.

        Raises:
            InputError: the weights are not finite any more; the last good checkpoint is kept.
            CheckpointError: the disk is full, or not ours to write to; the same.
        """
        sharded = self.config.train.sharded
        weights, moments = parallel.get_states(self.model, self.optimizer, sharded=sharded)
        state = {
            **describe(self.config, self.data.classes, self.data.digest),
            "model": self.judged.state_dict() if best and self.ema else weights,
        }
        if not best:
            state |= {
                "optimizer": moments,
                "schedule": self.schedule.state_dict(),
                "scaler": self.scaler.state_dict(),
                "ema": self.ema.module.state_dict() if self.ema else None,
                "rng": parallel.gather(rng_state()),
                "progress": asdict(self.progress),
            }
        if ranks().is_main:
            for key, value in state["model"].items():
                if not bool(value.isfinite().all()):
                    raise InputError(f"{key!r} is not finite any more, and not saved; {ADVICE}")
            save_checkpoint(self.config.output / name, state)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of the same run.

        Raises:
            InputError: it is of another model, or of other data or settings.
            CheckpointError: it is missing, damaged, or not safe to load.
        """
        state = read_state(path, "optimizer", "progress")
        check_same_run(state["config"], self.config)
        if state["split"] != self.data.digest:
            raise InputError(f"{self.config.data.path} has changed since {str(path)!r} was written")
        parallel.set_states(
            self.model, self.optimizer, state, path, sharded=self.config.train.sharded
        )
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            load_weights(self.ema.module, state["ema"], path)
        set_rng_state(state["rng"][ranks().rank % len(state["rng"])])
        self.progress = Progress(**state["progress"])
