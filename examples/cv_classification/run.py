"""A run and its checkpoints: all that must be kept to go on as if never interrupted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from cv_classification import parallel
from cv_classification.config import Config, InputError, check_same_run
from cv_classification.images import Split
from cv_classification.model import (
    Classifier,
    build_model,
    describe,
    load_weights,
    read_state,
    understood,
)
from cv_classification.optimize import Loss, Schedule, alike, stepped_state
from cv_classification.tracking import Row
from portable_amp import (
    CheckpointError,
    DeviceContext,
    ScalerShim,
    is_oom_error,
    ranks,
    rng_state,
    save_checkpoint,
    set_rng_state,
)

WAY_BACK = "a new run begins from the best epoch with output=... model.weights={}"
MEASURED = {"epoch", "updates", "lr", "loss", "accuracy", "macro_f1", "log_loss"}
Natural = Annotated[int, Field(ge=0)]
Batch = tuple[torch.Tensor, torch.Tensor]
"""Images and their targets."""
ADVICE = "a smaller train.lr, or train.max_norm=1, may keep it finite"


@dataclass
class Progress:
    """How far a run is."""

    epoch: Natural = 0
    batches: Natural = 0
    """Done in this epoch, by each process."""
    updates: Natural = 0
    """Steps the optimizer has taken."""
    loss: float = 0.0
    """Sum of this epoch's finite losses."""
    finite: Natural = 0
    lost: Natural = 0
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
    criterion: Loss
    ema: ModelEmaV3 | None
    progress: Progress = field(default_factory=Progress)
    group: int = 1
    """Batches whose gradients make the next step."""

    @property
    def judged(self) -> Classifier:
        """The model that is validated and kept as the best."""
        return self.model if self.ema is None else self.ema.module

    def forward_backward(self, part: Batch, weight: float) -> Callable[[], torch.Tensor]:
        """Add up the gradients of a batch, or of a part with its `weight`, as if all weighed alike.

        What it returns gives the loss's numerator and denominator (2,); `take_step` divides.
        """
        images, targets = part
        try:
            with self.ctx.autocast():
                logits = self.net(images)
        except ValueError as error:  # of BatchNorm, where no larger part fits
            if len(images) > 1:
                raise
            raise InputError(
                f"out of memory, and one image alone does not work: {error}"
            ) from error
        loss, mass = self.criterion.sums(logits, targets)
        seen = self.ctx.fetch(
            torch.stack([loss.detach(), mass])
        )  # before the backward pass, which nobody has to wait for then
        self.scaler.scale(loss * (weight / len(images) / self.group)).backward()
        return seen

    def lost_in(self, batch: Batch) -> str:
        """Which module makes the loss, or a gradient, of this batch infinite or NaN, in words.

        "" where that cannot be told: the model is in shards, or the batch only fits in parts.
        """

        def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
            total, _ = self.criterion.sums(model(batch[0]), batch[1])
            return total / len(batch[0]) / self.group

        if self.config.train.sharded:
            return ""
        try:
            scale = self.scaler.get_scale()
            found = self.ctx.find_nonfinite(self.model, batch, loss=loss, scale=scale)
            return f"{str(found).removesuffix('.')}; "
        except RuntimeError as error:
            if is_oom_error(error):
                return ""
            raise

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
            InputError: it is of another model, or of other data or settings, or not whole.
            CheckpointError: it is missing, damaged, or not safe to load.
        """
        try:
            state = read_state(path, "optimizer", "schedule", "scaler", "ema", "rng", "progress")
        except CheckpointError as error:
            best = path.with_name("best.pt")
            if not best.exists():
                raise
            raise InputError(f"{error}; {WAY_BACK.format(best)}") from error
        with understood(path):
            self._put_back(state, path)

    def _put_back(self, state: Mapping[str, Any], path: Path) -> None:
        check_same_run(state["config"], self.config)
        if state["split"] != self.data.digest:
            raise InputError(f"{self.config.data.path} has changed since {str(path)!r} was written")
        if [tuple(part) for part in state["classes"]] != [*self.data.classes]:
            raise ValueError("its classes are others")
        progress = TypeAdapter(Progress).validate_python(state["progress"])
        if state["progress"].keys() != asdict(progress).keys():
            raise ValueError("its progress is not told")
        if not all(row.keys() >= MEASURED for row in progress.history):
            raise ValueError("its history lacks numbers")
        sharded = self.config.train.sharded
        if not sharded:
            twin = build_model(self.config.model, len(self.data.classes.names), weights=False)
            wanted, had = self.optimizer.state_dict(), state["optimizer"]
            kept = stepped_state(twin, self.config.train) if progress.updates else wanted["state"]
            if not alike({**wanted, "state": kept}, had) or [
                group["params"] for group in had["param_groups"]
            ] != [group["params"] for group in wanted["param_groups"]]:
                raise ValueError("its optimizer is another, or has other settings")
        parallel.set_states(self.model, self.optimizer, state, sharded=sharded)
        self.schedule.load_state_dict(state["schedule"])
        if not all(isinstance(value, int | float) for value in state["scaler"].values()):
            raise ValueError("its scaler holds no numbers")
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            load_weights(self.ema.module, state["ema"], path)
        set_rng_state(state["rng"][ranks().rank % len(state["rng"])])
        self.progress = progress

    def restore_best(self) -> None:
        """See that there is a best.pt to end with; else the last epoch's model takes its place.

        Every process must call it.

        Raises:
            InputError: there is one, and it cannot be read.
        """
        best = self.config.output / "best.pt"
        if best.exists():  # or it would be found when all is trained
            try:
                read_state(best)
            except (InputError, CheckpointError) as error:
                raise InputError(f"{error}; removed, it is made of the last epoch") from error
        if any(parallel.gather(bool(self.progress.history) and not best.exists())):
            parallel.tell(f"{str(best)!r} is lost; the last epoch's model takes its place")
            self.save("best.pt", best=True)
