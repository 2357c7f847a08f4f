"""Training: one plain loop, which runs as it is on whatever device there is."""

from __future__ import annotations

import json
import math
import time

import torch
from timm.optim import create_optimizer_v2, list_optimizers  # type: ignore[attr-defined]
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch.nn import functional as F
from tqdm import tqdm

from cv_classification.augment import Transform, find_preset
from cv_classification.config import Config, InputError, check_folder, check_same_run, nearest
from cv_classification.data import write_text
from cv_classification.evaluate import measure
from cv_classification.images import Batches, Draws, ImageDataset, make_loader, read_split
from cv_classification.model import (
    Classifier,
    Trained,
    build_model,
    check_model,
    describe,
    load_weights,
    read_state,
)
from cv_classification.tta import probabilities
from portable_amp import (
    DeviceContext,
    ScalerShim,
    ranks,
    rng_state,
    save_checkpoint,
    seed_everything,
    set_rng_state,
)

Row = dict[str, float]
"""One epoch in numbers, as metrics.jsonl has it."""


def train(
    config: Config, *, resume: bool = False, skip_bad: bool = False, explain: bool = False
) -> Trained:
    """Train, and return the best epoch's model; checkpoints and metrics lie in `config.output`.

    `resume` goes on after that folder's last whole epoch, as if never interrupted; `skip_bad`
    leaves out images that cannot be read; `explain` says why the device is used as it is.

    Raises:
        InputError: settings or data cannot be used, and nothing was written; or the loss is NaN.
        PortableAmpError: there is no such device or precision, or a checkpoint is unreadable.
    """
    ctx = check(config, resume=resume)
    print(ctx.explain() if explain else ctx.summary())
    last, best = config.output / "last.pt", config.output / "best.pt"
    state = read_state(last, "optimizer", "history") if resume else {}
    if resume:
        check_same_run(state["config"], config)
    data = read_split(config, skip_bad=skip_bad)
    if resume and state["split"] != data.digest:
        raise InputError(f"{config.data.path} has changed since {str(last)!r} was written")
    print(f"{len(data.train)} images to train on, {len(data.validation)} to validate")

    seed_everything(config.seed)
    model = ctx.to(build_model(config.model, len(data.classes.names)))
    preset = find_preset(config.data.preset)
    augmented = ImageDataset(data.train, Transform(preset, model.size, training=True))
    plain = ImageDataset(data.validation, Transform(preset, model.size, training=False))
    draws = Draws(len(data.train), config.seed)
    batches = make_loader(augmented, draws, ctx, config)
    held_out = make_loader(plain, Draws(len(data.validation)), ctx, config)
    labels = [sample.label for sample in data.validation]
    optimizer = create_optimizer_v2(
        model.net,  # the bare network, whose no_weight_decay() the factory asks
        opt=config.train.optimizer,
        lr=config.train.lr,
        weight_decay=config.train.weight_decay,
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.train.schedule,
        num_epochs=config.train.epochs,
        warmup_epochs=config.train.warmup_epochs,
        warmup_lr=config.train.lr / 100,
        decay_rate=1.0,
        step_on_epochs=False,
        updates_per_epoch=math.ceil(len(batches) / config.train.accumulate),
    )
    scaler = ctx.scaler()
    history: list[Row] = []
    if resume:
        load_weights(model, state["model"], last)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        scaler.load_state_dict(state["scaler"])
        set_rng_state(state["rng"])
        history = state["history"]

    trained = Trained(model, config, data.classes, data.digest, best)
    config.output.mkdir(parents=True, exist_ok=True)
    for epoch in range(len(history), config.train.epochs):
        stale = stale_epochs(history, config.train.monitor)
        if stale >= (config.train.patience or math.inf):
            print(f"stopped early, {stale} epochs after the best")
            break
        began = time.perf_counter()
        draws.epoch = epoch
        updates = int(history[-1]["updates"]) if history else 0
        loss, updates = train_epoch(
            model, batches, optimizer, scheduler, updates, scaler, ctx, config
        )
        row = {"epoch": epoch, "updates": updates, "lr": optimizer.param_groups[0]["lr"]}
        row |= {"loss": loss, **measure(probabilities(model, held_out, ctx), labels)}
        history.append({**row, "seconds": time.perf_counter() - began})
        # The best first: a run interrupted between the two repeats this epoch when resumed.
        if stale_epochs(history, config.train.monitor) == 0:
            save_checkpoint(best, describe(trained))
        state = {
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "scaler": scaler.state_dict(),
            "rng": rng_state(),
            "history": history,
        }
        save_checkpoint(last, {**describe(trained), **state})
        lines = [json.JSONEncoder().encode(row) + "\n" for row in history]
        write_text(config.output / "metrics.jsonl", "".join(lines))
        print(", ".join(f"{name} {value:.4g}" for name, value in history[-1].items()))
        ctx.clear_cache(min_pressure=0.9)

    load_weights(model, read_state(best)["model"], best)
    return trained


def train_epoch(
    model: Classifier,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler,
    updates: int,
    scaler: ScalerShim,
    ctx: DeviceContext,
    config: Config,
) -> tuple[float, int]:
    """One pass over the data -> its mean loss, and the optimizer's updates so far.

    Raises:
        InputError: the loss is not finite any more.
    """
    settings = config.train
    model.train()
    total = torch.zeros((), device=ctx.device)
    for index, batch in enumerate(tqdm(batches, desc="train", leave=False, disable=None)):
        images, labels = ctx.to(batch)
        with ctx.autocast():
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=settings.label_smoothing)
        total += loss.detach()  # on the device: reading it here would wait for every step

        # Batches are all of one size, so each counts the same in its group; the last group of an
        # epoch may be short.
        first = index - index % settings.accumulate
        group = min(settings.accumulate, len(batches) - first)
        if index + 1 < first + group:
            scaler.scale(loss / group).backward()
            continue
        result = scaler.backward_step(loss / group, optimizer, max_norm=settings.max_norm)
        if result.stepped:
            updates += 1
            scheduler.step_update(updates)
    mean = float(total / len(batches))
    # With a scaler a step may overflow and be skipped; without one the weights are lost.
    if not math.isfinite(mean) and not scaler.is_enabled():
        raise InputError(
            f"train.lr={settings.lr}: the loss has become {mean}; a smaller one, or "
            "train.max_norm=1, may keep it finite"
        )
    return mean, updates


def stale_epochs(history: list[Row], monitor: str) -> int:
    """How many epochs ago the best one was: by what is monitored, then by log loss."""
    sign = -1 if monitor == "log_loss" else 1
    scores = [(sign * row[monitor], -row["log_loss"]) for row in history]
    return len(scores) - 1 - scores.index(max(scores)) if scores else 0


def check(config: Config, *, resume: bool = False) -> DeviceContext:
    """Find what is wrong with the settings before anything slow is done, or anything written.

    Raises:
        InputError: a name is unknown, or the output is in the way.
        PortableAmpError: there is no such device or precision.
    """
    if ranks().world_size > 1:
        raise InputError("this example trains in one process; start it without torchrun")
    ctx = DeviceContext(config.device, precision=config.precision)
    find_preset(config.data.preset)
    check_model(config.model)
    optimizers = [str(name) for name in list_optimizers()]
    if config.train.optimizer not in optimizers:
        hint = nearest(config.train.optimizer, optimizers)
        raise InputError(f"train.optimizer={config.train.optimizer!r} is none of timm; {hint}")
    check_folder(config.output)
    if not resume and (config.output / "last.pt").exists():
        raise InputError(
            f"{str(config.output)!r} already holds a run; --resume goes on with it, output=... "
            "begins another"
        )
    return ctx
