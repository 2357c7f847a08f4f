"""What training minimises and how: the loss, the optimizer, and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.data.mixup import Mixup
from timm.optim import (  # type: ignore[attr-defined]
    create_optimizer_v2,
    list_optimizers,
    param_groups_weight_decay,
)
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from cv_classification.config import DataConfig, InputError, TrainConfig, nearest
from cv_classification.model import Classifier
from cv_classification.plain import brief

TORCH = {name: kind for name, kind in vars(torch.optim).items() if name[0].isupper()}
TIMM_SCHEDULES = ("constant", "cosine", "multistep", "poly", "step", "tanh")
SHORT = {"onecycle": "OneCycleLR", "plateau": "ReduceLROnPlateau"}
# The others of torch take functions or schedulers, which settings cannot hold.
TORCH_SCHEDULES = (
    *("ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR"),
    *("ExponentialLR", "LinearLR", "MultiStepLR", "PolynomialLR", "StepLR", *SHORT.values()),
)

TRIED = 1000  # updates of a schedule, before the first real one


class Loss(nn.Module):
    """logits: (N, C), targets: (N,) int64, or (N, C) float shares of classes -> float32 scalar.

    Cross-entropy, each term times (1 - p)^gamma, and the mean weighted by the targets' classes.
    torch's own is not, given shares: a class would not count the same as all of its share.
    """

    weights: torch.Tensor

    def __init__(self, weights: torch.Tensor, smoothing: float, gamma: float) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.smoothing, self.gamma = smoothing, gamma

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """See the class."""
        loss, mass = self.sums(logits, targets)
        return loss / mass

    def sums(
        self, logits: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean's numerator and denominator, which add up over the parts of a batch."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weights = self.weights.to(logits.dtype)
        soft = targets.is_floating_point()
        if not soft and not self.gamma:
            options: Any = {"label_smoothing": self.smoothing, "reduction": "sum"}
            return F.cross_entropy(logits, targets, weights, **options), weights[targets].sum()
        shares = (targets if soft else F.one_hot(targets, len(weights))).to(logits.dtype)
        smooth = shares * (1 - self.smoothing) + self.smoothing / len(weights)
        logs = logits.log_softmax(-1)
        missing = (-logs.expm1()).clamp_min(1e-12)  # at 0 the power may be infinitely steep
        return -(smooth * weights * missing**self.gamma * logs).sum(), (shares * weights).sum()


def make_loss(config: TrainConfig, labels: Sequence[int], classes: int) -> Loss:
    """The loss; "balanced" weighs each class by N / (C * its labels), and 0 without any."""
    weights = torch.ones(classes)
    if config.class_weights == "balanced":
        counts = torch.bincount(torch.tensor(labels), minlength=classes)
        weights = torch.where(counts > 0, len(labels) / (classes * counts), 0.0)
    gamma = config.focal_gamma if config.loss == "focal" else 0.0
    return Loss(weights, config.label_smoothing, gamma)


def make_optimizer(model: Classifier, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of what is trainable; no weight decay on biases and norms.

    Raises:
        InputError: it cannot be had on this machine, or not with these settings.
    """
    name, lr, decay = config.optimizer.removeprefix("torch."), config.lr, config.weight_decay
    net: Any = model.net  # the bare network, which knows more that is not to decay
    with _refused(f"optimizer={config.optimizer!r}"):
        if name not in TORCH:
            return create_optimizer_v2(net, opt=name, lr=lr, weight_decay=decay)
        spared: set[str] = getattr(net, "no_weight_decay", set)()
        groups = param_groups_weight_decay(net, decay, no_weight_decay_list=spared)
        optimizer: torch.optim.Optimizer = TORCH[name](groups, lr=lr)
        if decay and "weight_decay" not in optimizer.defaults:
            raise ValueError("it has no weight decay; set train.weight_decay=0")
        return optimizer


def stepped_state(model: Classifier, config: TrainConfig) -> dict[int, Any]:
    """What the optimizer keeps of each parameter once it took a step, which it does to `model`."""
    optimizer = make_optimizer(model, config)
    model(torch.zeros(1, 3, model.size, model.size)).sum().backward()
    optimizer.step()
    state: dict[int, Any] = optimizer.state_dict()["state"]
    return state


def make_average(model: nn.Module, decay: float) -> ModelEmaV3:
    """A running mean of the weights, which starts at those of the first update.

    The decay rises to `decay`: in a short run the first, random weights would weigh too much.
    """
    return ModelEmaV3(model, decay=decay, use_warmup=True)


def make_mixup(config: DataConfig, classes: int) -> Mixup | None:
    """Mixup and cutmix of timm, if asked for: images (N, ...) float, labels (N,) -> both mixed."""
    if not config.mixup and not config.cutmix:
        return None
    return Mixup(  # type: ignore[no-untyped-call]
        config.mixup, config.cutmix, label_smoothing=0.0, num_classes=classes
    )


def alike(one: Any, other: Any) -> bool:
    """Whether two states have the same form: keys, lengths, types, shapes, whatever the numbers.

    >>> alike({"lr": 1, "betas": (0.9, 0.99)}, {"lr": 0.5, "betas": [0, 1]})
    True
    >>> alike({"lr": 1}, {"lr": "x"})
    False
    """
    for kind in (int | float, str | None):
        if isinstance(one, kind):
            return isinstance(other, kind)
    if isinstance(one, Mapping):
        same = isinstance(other, Mapping) and one.keys() == other.keys()
        return same and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        same = isinstance(other, list | tuple) and len(one) == len(other)
        return same and all(map(alike, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype
    return type(one) is type(other)


class Schedule:
    """The learning rates of a run, as timm or torch plans them."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.state_dict = scheduler.state_dict
        self.by_score = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)

    def step(self, updates: int) -> None:
        """Go on after an update of the optimizer, of which there were so many."""
        if not isinstance(self.scheduler, lr_scheduler.LRScheduler):
            self.scheduler.step_update(updates)
        elif not self.by_score:
            self.scheduler.step()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: it is the state of something else.
        """
        if not alike(self.state_dict(), state):
            raise ValueError("its schedule is another")
        self.scheduler.load_state_dict(state)

    def end_epoch(self, score: float) -> None:
        """Go on after an epoch, if the schedule waits for the score, higher is better, to stall."""
        if self.by_score:
            self.scheduler.step(score)


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, updates_per_epoch: int
) -> Schedule:
    """The schedule; options are in epochs where it is timm's, and in updates where it is torch's.

    Raises:
        InputError: the options are not its own, or do not go together.
    """
    name, options = SHORT.get(config.schedule, config.schedule), config.schedule_options
    with _refused(f"schedule={config.schedule!r} with {brief(options)}"):
        if name in TORCH_SCHEDULES:
            if config.warmup_epochs:
                raise ValueError(f"train.warmup_epochs works with {', '.join(TIMM_SCHEDULES)}")
            updates = config.epochs * updates_per_epoch
            filled: tuple[Any, ...] = (config.lr, updates) if name == "OneCycleLR" else ()
            if name == "ReduceLROnPlateau":
                filled = ("max",)
                # Relative to a negative score, even the same one would be a rise.
                options = {"threshold_mode": "abs", **options}
            return Schedule(getattr(lr_scheduler, name)(optimizer, *filled, **options))
        # What follows the warm-up; timm would cut off its beginning, without the prefix.
        epochs = config.epochs - config.warmup_epochs
        if epochs <= 0:
            raise ValueError(f"a warm-up of {config.warmup_epochs} epochs has to be shorter")
        cycle: Any = epochs / _cycles(options, epochs * updates_per_epoch)
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched="step" if name == "constant" else name,
            num_epochs=cycle,
            warmup_epochs=config.warmup_epochs,
            warmup_prefix=True,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
            **{
                "warmup_lr": config.lr / 100,
                "decay_rate": 1.0 if name in ("constant", "poly") else 0.1,  # or poly's power
                "cycle_decay": 1.0,  # of the rate at each restart
                "decay_epochs": epochs / 3,
                "decay_milestones": [epochs / 2, epochs * 3 / 4],
                **options,
            },
        )
        return Schedule(scheduler)


def _cycles(options: Mapping[str, Any], updates: int) -> float:
    """How many times the first cycle the run is, which all cycles together fill."""
    limit, growth = options.get("cycle_limit", 1), options.get("cycle_mul", 1)
    share, spread = options.get("noise_pct", 0.67), options.get("noise_std", 1)
    if not (isinstance(limit, int) and 1 <= limit <= updates and growth > 0):
        raise ValueError("cycle_limit is a whole number from 1 to the updates, cycle_mul above 0")
    if not 0 < share <= 1 or not 0 <= spread <= 10 * share:  # timm draws until one is in the limit
        raise ValueError("noise_pct is above 0, at most 1, and noise_std at most 10 times that")
    total: float = limit if growth == 1 else (growth**limit - 1) / (growth - 1)
    if not 1 <= total <= updates:
        raise ValueError("its first cycle is shorter than an update, or longer than the run")
    return total


def check_optimize(config: TrainConfig) -> None:
    """Look the names up, and take a step, which some optimizers refuse.

    Raises:
        InputError: there is no such thing, or it does not work in a plain loop.
    """
    optimizers = {*map(str, list_optimizers()), *TORCH, *(f"torch.{name}" for name in TORCH)}
    schedules = (*TIMM_SCHEDULES, *TORCH_SCHEDULES, *SHORT)
    for name, known in ((config.optimizer, optimizers), (config.schedule, schedules)):
        if name not in known:
            where = "optimizer" if known is optimizers else "schedule"
            raise InputError(f"train.{where}={name!r} is not known; {nearest(name, known)}")
    model = Classifier(nn.Linear(2, 2), 1, [0.0] * 3, [1.0] * 3)
    optimizer = make_optimizer(model, config)
    with _refused(f"optimizer={config.optimizer!r}"):
        model.net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    per_epoch = max(1, TRIED // config.epochs)
    schedule = make_schedule(optimizer, config, per_epoch)
    with _refused(f"schedule={config.schedule!r} with {brief(config.schedule_options)}"):
        optimizer.step()  # or torch warns
        for update in range(1, min(TRIED, config.epochs * per_epoch) + 1):
            schedule.step(update)
            schedule.end_epoch(0.0)
            for group in optimizer.param_groups:
                if not 0 <= group["lr"] < math.inf:
                    raise ValueError(f"the rate after {update} updates would be {group['lr']}")


@contextmanager
def _refused(setting: str) -> Iterator[None]:
    """What timm and torch raise, each in its own way, as an InputError about the setting."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"train.{setting} does not work: {why}") from error
