"""Training: one plain loop, which runs as it is on whatever device there is."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from cv_classification import parallel
from cv_classification.augment import Transform, find_preset
from cv_classification.config import Config, InputError, check_folder
from cv_classification.device import check_batch, make_context, tuned
from cv_classification.evaluate import picture
from cv_classification.images import (
    Batches,
    Draws,
    ImageDataset,
    ahead,
    evaluation_draws,
    make_loader,
    read_split,
)
from cv_classification.interrupt import Interruptions
from cv_classification.lock import locked, sweep
from cv_classification.metrics import measure, score, stale_epochs
from cv_classification.model import build_model, check_model, load_trained
from cv_classification.optimize import (
    check_optimize,
    make_average,
    make_loss,
    make_mixup,
    make_optimizer,
    make_schedule,
)
from cv_classification.parallel import tell
from cv_classification.run import ADVICE, WAY_BACK, Batch, Run
from cv_classification.tracking import Row, Tracker, check_tracking
from cv_classification.tta import predict_samples, probabilities
from portable_amp import DeviceContext, ranks, seed_everything, split_on_oom


def train(
    config: Config, *, resume: str = "", skip_bad: bool = False, explain: bool = False
) -> Path:
    """Train, one model for each fold; return the folder that holds checkpoints, metrics, report.

    `resume` goes on from the last checkpoint, as if never interrupted: "auto" where there is one,
    "always" must find it; `skip_bad` leaves out images that cannot be read; `explain` says why the
    device is used as it is.

    Raises:
        InputError: settings or data cannot be used, and nothing was written; or the loss is NaN.
        PortableAmpError: there is no such device or precision, or a checkpoint is unreadable.
        Interrupted: by Ctrl-C or SIGTERM; what was done is saved.
    """
    ctx = check(config, resume=resume)
    with ExitStack() as stack:
        if ranks().is_main:
            for folder in sorted({config.output, *(one.output for one in folds(config))}):
                stack.enter_context(locked(folder))
            check_held(config, resume=resume)  # another process may have trained until now
        ctx = parallel.join(ctx, config)
        stack.callback(parallel.leave)
        tell(ctx.explain() if explain else ctx.summary())
        for one in folds(config):
            train_one(one, ctx, resume=bool(resume), skip_bad=skip_bad)
    return config.output


def folds(config: Config) -> list[Config]:
    """The runs that a config asks for: itself, or one for each fold, in a folder of its own."""
    if config.data.folds is None or config.data.fold is not None:
        return [config]
    return [
        config.model_copy(
            update={
                "output": config.output / f"fold{fold}",
                "data": config.data.model_copy(update={"fold": fold}),
            }
        )
        for fold in range(config.data.folds)
    ]


def train_one(config: Config, ctx: DeviceContext, *, resume: bool, skip_bad: bool) -> None:
    """Train one model from beginning, or checkpoint, to end; see `train`."""
    data = read_split(config, skip_bad=skip_bad)
    tell(f"{len(data.train)} images to train on, {len(data.validation)} to validate")
    seed_everything(config.seed)
    model = build_model(config.model, len(data.classes.names))
    ctx = tuned(ctx, model.train(), config)
    model = ctx.to(model)
    transform = Transform(find_preset(config.data.preset), model.size)
    stages = transform.stages or ((0,),)
    labels = [sample.label for sample in data.train]
    draws = Draws(labels, stages, config)
    batches = make_loader(ImageDataset(data.train, transform, data.cache), draws, ctx, config)
    check_batch(min(batches.batch_size or 1, len(draws)), model, config)
    views = config.train.validation_views
    held_out = make_loader(
        ImageDataset(data.validation, transform, data.cache),
        evaluation_draws(
            len(data.validation), stages[-1] if views > 1 else (0,), views, share=ranks()
        ),
        ctx,
        config,
    )
    net = parallel.spread(model, ctx, config)
    optimizer = make_optimizer(model, config.train)
    updates = math.ceil(len(batches) / config.train.accumulate)
    schedule = make_schedule(optimizer, config.train, updates)
    ema = make_average(model, config.train.ema) if config.train.ema else None
    criterion = ctx.to(make_loss(config.train, labels, len(data.classes.names)))
    run = Run(config, ctx, data, model, net, optimizer, schedule, ctx.scaler(), criterion, ema)
    seed_everything(config.seed + ranks().rank)  # dropout and mixup differ between processes
    last = config.output / "last.pt"
    if resume and last.exists():  # a fold may not have begun
        run.load(last)
        run.restore_best()

    progress, settings = run.progress, config.train
    if ranks().is_main:
        for name in ("best.pt", "last.pt", "metrics.jsonl"):  # only who holds the lock writes them
            sweep(config.output / name, age=0.0)
    tracker = Tracker(config, len(progress.history)) if ranks().is_main else None
    with Interruptions() as interruptions:
        while progress.epoch < settings.epochs:
            stale = stale_epochs(progress.history, settings.monitor)
            if stale >= (settings.patience or math.inf):
                tell(f"stopped early, {stale} epochs after the best")
                break
            began = time.perf_counter()
            draws.epoch = progress.epoch
            draws.done = progress.batches * (batches.batch_size or 1)
            interruptions.hold = True
            train_epoch(run, batches, interruptions)
            run.save()
            interruptions.release()  # what follows is only repeated when resumed
            probs = probabilities(run.judged, held_out, ctx, together=True)
            row: Row = {"epoch": progress.epoch, "updates": progress.updates}
            row |= {"lr": optimizer.param_groups[0]["lr"]}
            row |= {"loss": progress.loss / max(progress.finite, 1)}
            row |= measure(probs, [sample.label for sample in data.validation])
            progress.history.append({**row, "seconds": time.perf_counter() - began})
            schedule.end_epoch(score(row, settings.monitor))
            progress.epoch, progress.batches = progress.epoch + 1, 0
            progress.loss, progress.finite = 0.0, 0
            # The best first: a run killed between the two repeats the validation when resumed.
            if stale_epochs(progress.history, settings.monitor) == 0:
                run.save("best.pt", best=True)
            if tracker:
                tracker.log(progress.history)
            run.save()
            tell(", ".join(f"{name} {value:.4g}" for name, value in progress.history[-1].items()))
            ctx.clear_cache(min_pressure=0.9)
    if tracker:
        tracker.close()
        best = load_trained(config.output)
        probs = predict_samples(best, data.validation, ctx, tta=False)
        about = f"the best epoch, on {len(data.validation)} validation images"
        picture(config.output / "report.html", best, data.validation, probs, about)


def train_epoch(run: Run, batches: Batches, interruptions: Interruptions) -> None:
    """What is left of an epoch: forward, backward, one optimizer step per group of batches.

    Raises:
        InputError: the loss stays infinite or NaN.
        Interrupted: after a step, and saved.
    """
    ctx, net, progress, settings = run.ctx, run.net, run.progress, run.config.train
    mix = make_mixup(run.config.data, len(run.data.classes.names))
    net.train()
    losses: list[Callable[[], torch.Tensor]] = []
    names: list[int] = []
    first = progress.batches
    quiet = None if ranks().is_main else True
    shown = tqdm(ahead(batches, ctx), "train", len(batches), False, disable=quiet)
    for index, (images, labels, indexes) in enumerate(shown, first):
        # The last group of an epoch may be short.
        start = index - index % settings.accumulate
        run.group = min(settings.accumulate, len(batches) - start)
        batch = mix(images.float(), labels) if mix else (images, labels)
        losses += split_on_oom(run.forward_backward, batch, parameters=net)
        names += indexes.tolist()
        if index + 1 < start + run.group:
            continue

        world, stop = ranks().world_size, bool(interruptions.asked)
        # Class weights are shared by all images of the step, whichever part each came in.
        loss, mass = torch.stack([seen() for seen in losses]).sum(0).tolist()
        loss, mass, asked = parallel.total(loss, mass, float(stop), device=ctx.device)
        if take_step(run, loss / mass, names, batch, world * len(names) / mass):
            progress.updates += 1
            run.schedule.step(progress.updates)
            if run.ema:
                run.ema.update(run.model, step=progress.updates)
        losses, names, progress.batches = [], [], index + 1
        if asked or (settings.save_every and progress.updates % settings.save_every == 0):
            run.save()
        if asked:
            interruptions.release(signal.SIGTERM)


def take_step(run: Run, loss: float, names: list[int], batch: Batch, factor: float) -> bool:
    """One optimizer step, if the loss is finite, and the scaler finds the gradients so.

    `factor` makes of the gradients of a plain mean those of the weighted one.

    Raises:
        InputError: it was not finite too many times in a row.
    """
    progress, settings, scaler = run.progress, run.config.train, run.scaler
    if math.isfinite(loss):
        progress.loss, progress.finite, progress.lost = progress.loss + loss, progress.finite + 1, 0
    else:
        progress.lost += 1
        files = ", ".join(run.data.train[name].path.name for name in names[:8])
        tell(
            f"loss {loss} after {progress.updates} updates, scale {scaler.get_scale():g}, "
            f"of {files}{', ...' if len(names) > 8 else ''}"
        )
        if progress.lost >= settings.give_up_after:
            raise InputError(
                f"train.lr={settings.lr}: the loss was not finite {progress.lost} times in a row, "
                f"and the last good checkpoint is kept; {run.lost_in(batch)}{ADVICE}"
            )
        if not scaler.is_enabled():  # an enabled one finds it by itself, and lowers the scale
            run.optimizer.zero_grad()
            return False
    if factor != 1:
        grads = [one.grad for one in run.net.parameters() if one.grad is not None]
        torch._foreach_mul_(grads, factor)
    if settings.max_norm is not None:
        scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.net.parameters(), settings.max_norm)
    scaler.step(run.optimizer)
    scaler.update()
    run.optimizer.zero_grad()
    return scaler.last_step is not None and scaler.last_step.stepped


def check(config: Config, *, resume: str = "") -> DeviceContext:
    """Find what is wrong with the settings before anything slow is done, or anything written.

    Raises:
        InputError: a name is unknown, settings contradict each other, or the output is in the way.
        PortableAmpError: there is no such device or precision.
    """
    ctx = make_context(config)
    data, settings = config.data, config.train
    sizes = {len(stage) for stage in find_preset(data.preset).stages}
    check_model(config.model)
    check_optimize(settings)
    check_tracking(config)
    check_folder(config.output)
    if (data.mixup or data.cutmix) and data.batch_size // ranks().world_size % 2:
        raise InputError(f"data.batch_size={data.batch_size}: mixup and cutmix pair images; even")
    if data.offline and len(sizes) > 1:
        raise InputError(
            f"data.offline=true: the stages of the preset {data.preset!r} differ in the number of "
            "their groups, so an epoch would have no length; online works"
        )
    if data.fold is not None and data.fold >= (data.folds or 0):
        raise InputError(f"data.fold={data.fold}: data.folds={data.folds} has no such fold")
    if settings.ema and settings.sharded:
        raise InputError("train.ema and train.sharded: an average of shards is not supported")
    check_held(config, resume=resume)
    return ctx


def check_held(config: Config, *, resume: str) -> None:
    """See that what the output holds is to be gone on with, and only that.

    Raises:
        InputError: it holds a run, or others than this one, or none to go on with.
    """
    own = {one.output for one in folds(config)}
    names = ("last.pt", "best.pt", "fold*/last.pt", "fold*/best.pt")
    held = {path.parent for name in names for path in config.output.glob(name)}
    if held - own:
        raise InputError(f"{str(min(held - own))!r} is of a run with other folds; output=... works")
    if held and not resume:
        raise InputError(
            f"{str(config.output)!r} already holds a run; --resume goes on with it, output=... "
            "begins another"
        )
    if not held and resume == "always":
        raise InputError(f"{str(config.output)!r} holds no run to resume")
    for lost in (one / "last.pt" for one in held if not (one / "last.pt").exists()):
        raise InputError(f"{str(lost)!r} is missing; {WAY_BACK.format(lost.with_name('best.pt'))}")
