"""What the example minimises and how, against torch, timm and scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.nn import functional as F

from cv_classification.config import InputError, TrainConfig
from cv_classification.model import Classifier
from cv_classification.optimize import (
    TIMM_SCHEDULES,
    TORCH_SCHEDULES,
    Schedule,
    check_optimize,
    make_loss,
    make_optimizer,
    make_schedule,
)
from portable_amp import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = [0] * 6 + [1] * 3 + [2]
CLASSES = 3


def some_logits(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return 3 * torch.randn(10, CLASSES, generator=torch.Generator().manual_seed(4), dtype=dtype)


def some_shares(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(10, CLASSES, generator=torch.Generator().manual_seed(5), dtype=dtype).softmax(
        -1
    )


def loss_of(**settings: Any) -> nn.Module:
    return make_loss(TrainConfig(**settings), LABELS, CLASSES)


def one_hot(labels: Sequence[int]) -> torch.Tensor:
    return F.one_hot(torch.tensor(labels), CLASSES).float()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_that_of_torch(smoothing: float, weighted: bool) -> None:
    loss = loss_of(label_smoothing=smoothing, class_weights="balanced" if weighted else "none")
    weights = compute_class_weight("balanced", classes=np.arange(CLASSES), y=LABELS)
    oracle = nn.CrossEntropyLoss(
        torch.tensor(weights).float() if weighted else None, label_smoothing=smoothing
    )
    logits, target = some_logits()[4:], torch.tensor(LABELS[4:])
    torch.testing.assert_close(loss(logits, target), oracle(logits, target))
    if not weighted:  # torch's mean of shares does not divide by the weights
        shares = some_shares()
        torch.testing.assert_close(loss(some_logits(), shares), oracle(some_logits(), shares))


@pytest.mark.parametrize("class_weights", ["none", "balanced"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
def test_a_class_is_all_of_its_share(loss: str, smoothing: float, class_weights: str) -> None:
    chosen = loss_of(loss=loss, label_smoothing=smoothing, class_weights=class_weights)
    logits, labels = some_logits()[4:], LABELS[4:]  # of other proportions than all the labels
    hard = chosen(logits, torch.tensor(labels))
    torch.testing.assert_close(chosen(logits, one_hot(labels)), hard)
    assert hard.shape == ()


@pytest.mark.parametrize("class_weights", ["none", "balanced"])
def test_focal_without_focus_is_cross_entropy(class_weights: str) -> None:
    focal = loss_of(loss="focal", focal_gamma=0, class_weights=class_weights)
    plain = loss_of(class_weights=class_weights)
    for targets in (torch.tensor(LABELS), some_shares()):
        torch.testing.assert_close(focal(some_logits(), targets), plain(some_logits(), targets))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_is_what_its_paper_says(gamma: float) -> None:
    right = some_logits().softmax(-1)[torch.arange(10), torch.tensor(LABELS)]
    by_hand = torch.stack([-((1 - p) ** gamma) * p.log() for p in right]).mean()
    focal = loss_of(loss="focal", focal_gamma=gamma)
    torch.testing.assert_close(focal(some_logits(), torch.tensor(LABELS)), by_hand)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("weighted", ["none", "balanced"])
def test_gradients_are_right(gamma: float, weighted: str) -> None:
    focal = loss_of(
        loss="focal", focal_gamma=gamma, class_weights=weighted, label_smoothing=0.1
    ).double()
    logits = some_logits(torch.float64).requires_grad_()
    for targets in (torch.tensor(LABELS), some_shares(torch.float64)):
        assert torch.autograd.gradcheck(lambda x, y=targets: focal(x, y), (logits,))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_certainty_leaves_gradients_finite(gamma: float) -> None:
    logits = torch.tensor([[500.0, -500.0, 0.0], [-500.0, 500.0, 0.0]], requires_grad=True)
    loss_of(loss="focal", focal_gamma=gamma)(logits, torch.tensor([0, 0])).backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    assert logits.grad[1].abs().sum() > 0


@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
def test_half_precision_is_summed_in_float32(loss: str) -> None:
    logits, targets = some_logits().bfloat16(), torch.tensor(LABELS)
    chosen = loss_of(loss=loss)
    assert chosen(logits, targets).dtype == torch.float32
    assert torch.equal(chosen(logits, targets), chosen(logits.float(), targets))


def test_a_class_without_images_weighs_nothing() -> None:
    loss = make_loss(TrainConfig(class_weights="balanced"), [0, 0, 0, 1], 3)
    assert loss.weights.tolist() == pytest.approx([4 / 9, 4 / 3, 0.0])
    targets = torch.tensor([0, 1])
    assert bool(loss(torch.randn(2, 3), targets).isfinite())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.token = nn.Parameter(torch.ones(1, 4))
        self.head = nn.Linear(4, CLASSES)

    def no_weight_decay(self) -> set[str]:
        return {"token"}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.norm(self.conv(images)).mean((2, 3)) * self.token
        logits: torch.Tensor = self.head(features)
        return logits


def small() -> Classifier:
    torch.manual_seed(0)
    return Classifier(Small(), 5, [0.5] * 3, [0.2] * 3)


def take_step(model: Classifier, optimizer: torch.optim.Optimizer, seed: int) -> None:
    images = 255 * torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    F.cross_entropy(model.train()(images), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()


# One of each kind of state; all 80 that work without more packages were tried once.
TIMM = ["adafactor", "adamw", "adopt", "cadamw", "lamb", "lion", "muon", "nadamw", "sgd", "sgdw"]
TORCH = ["AdamW", "torch.Adam", "Adafactor", "Adagrad", "ASGD", "NAdam", "RMSprop", "SGD"]


@pytest.mark.parametrize("name", [*TIMM, *TORCH])
def test_an_optimizer_goes_on_from_its_checkpoint(name: str, tmp_path: Path) -> None:
    config = TrainConfig(optimizer=name, lr=1e-2)
    check_optimize(config)
    model = small()
    before = model.net.head.weight.detach().clone()
    optimizer = make_optimizer(model, config)
    for seed in range(2):
        take_step(model, optimizer, seed)
    assert not torch.equal(model.net.head.weight, before)
    save_checkpoint(
        tmp_path / "last.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    )
    take_step(model, optimizer, 2)

    state = load_checkpoint(tmp_path / "last.pt")
    again = small()
    again.load_state_dict(state["model"])
    other = make_optimizer(again, config)
    other.load_state_dict(state["optimizer"])
    take_step(again, other, 2)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["adamw", "AdamW"])
def test_what_decays_and_what_is_trained(name: str) -> None:
    model = small()
    model.net.conv.weight.requires_grad_(False)
    names = {id(parameter): name for name, parameter in model.net.named_parameters()}
    groups = make_optimizer(model, TrainConfig(optimizer=name, weight_decay=0.1)).param_groups
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {
        "token": 0.0, "conv.bias": 0.0, "norm.weight": 0.0, "norm.bias": 0.0,
        "head.weight": 0.1, "head.bias": 0.0,
    }  # fmt: skip


def test_a_capital_letter_is_torch() -> None:
    optimizer = make_optimizer(small(), TrainConfig(optimizer="SGD"))
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["momentum"] == 0.0
    assert make_optimizer(small(), TrainConfig(optimizer="sgd")).param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": "adamv"}, r"^train\.optimizer='adamv' is not known; did you mean 'adam"),
        ({"optimizer": "torch.adamw"}, "is not known; did you mean 'torch.Adam"),
        ({"optimizer": "AdamV"}, "is not known; did you mean 'Adam"),
        ({"optimizer": "LBFGS"}, r"^train\.optimizer='LBFGS' does not work: "),
        (
            {"optimizer": "SparseAdam", "weight_decay": 0},
            "does not support dense gradients",
        ),
        ({"optimizer": "Muon"}, "Muon only supports 2D parameters"),
        ({"optimizer": "adahessian"}, r"^train\.optimizer='adahessian' does not work: "),
        ({"optimizer": "Rprop"}, r"no weight decay; set train\.weight_decay=0"),
        ({"schedule": "cosin"}, r"^train\.schedule='cosin' is not known; did you mean 'cosine'"),
        ({"schedule": "LambdaLR"}, "is not known; did you mean"),
        ({"schedule_options": {"cycle": 2}}, "unexpected keyword argument 'cycle'"),
        ({"schedule_options": {"num_epochs": 2}}, "multiple values for keyword argument"),
        ({"schedule_options": {"cycle_limit": "two"}}, r"^train\.schedule='cosine' with "),
        ({"schedule": "onecycle", "schedule_options": {"total_steps": 3}}, "multiple values"),
        ({"schedule": "plateau", "schedule_options": {"mode": "min"}}, "multiple values"),
        ({"schedule": "StepLR"}, "step_size"),
        ({"schedule": "onecycle", "warmup_epochs": 1}, "warmup_epochs works with constant"),
        ({"schedule": "onecycle", "optimizer": "Adafactor"}, "cycle_momentum"),
        ({"warmup_epochs": 20}, "a warm-up of 20 epochs has to be shorter"),
        ({"schedule_options": {"cycle_limit": 10**9}}, "cycle_limit is a whole number from 1"),
        ({"schedule_options": {"cycle_limit": 0}}, "cycle_limit is a whole number from 1"),
        ({"schedule_options": {"cycle_limit": 500, "cycle_mul": 1e9}}, "does not work"),
        ({"schedule_options": {"cycle_mul": 0}}, "cycle_mul above 0"),
        ({"schedule_options": {"cycle_mul": "x"}}, "does not work"),
        ({"schedule_options": {"noise": 0.1, "noise_std": 1e9}}, "noise_std at most"),
        ({"schedule_options": {"noise": 0.1, "noise_pct": 0}}, "noise_pct is above 0"),
        ({"schedule_options": {"min_lr": -1}}, "does not work"),
        ({"schedule_options": {"min_lr": "1e-6"}}, "does not work"),
        ({"schedule_options": {"k_decay": float("nan")}}, "does not work"),
        ({"schedule": "step", "schedule_options": {"decay_epochs": 0}}, "does not work"),
        ({"schedule": "step", "schedule_options": {"decay_rate": -1}}, "does not work"),
        ({"schedule": "multistep", "schedule_options": {"decay_milestones": ["a"]}}, "not work"),
        ({"schedule": "StepLR", "schedule_options": {"step_size": 0}}, "does not work"),
        ({"schedule": "StepLR", "schedule_options": {"step_size": 1, "gamma": 1e9}}, "would be"),
        ({"schedule": "CosineAnnealingLR", "schedule_options": {"T_max": 0}}, "does not work"),
        ({"schedule": "ExponentialLR", "schedule_options": {"gamma": "a"}}, "does not work"),
        ({"schedule": "plateau", "schedule_options": {"patience": "a"}}, "does not work"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        check_optimize(TrainConfig(**settings))
    assert "\n" not in str(refused.value)


EPOCHS, PER_EPOCH = 6, 5


class Rates:
    """A run that is all optimizer and schedule: SGD on one parameter, plateau scores included."""

    def __init__(self, scores: Callable[[int], float] = lambda epoch: 0.5, **settings: Any) -> None:
        self.config = TrainConfig(epochs=EPOCHS, lr=0.1, optimizer="sgd", **settings)
        check_optimize(self.config)
        self.model, self.scores, self.updates = small(), scores, 0
        self.optimizer = make_optimizer(self.model, self.config)
        self.schedule: Schedule = make_schedule(self.optimizer, self.config, PER_EPOCH)

    def rate(self) -> float:
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def run(self, until: int = EPOCHS * PER_EPOCH) -> list[float]:
        """The rate of each update, and the one after the last."""
        seen = [self.rate()]
        while self.updates < until:
            self.optimizer.step()
            self.updates += 1
            self.schedule.step(self.updates)
            if self.updates % PER_EPOCH == 0:
                self.schedule.end_epoch(self.scores(self.updates // PER_EPOCH))
            seen.append(self.rate())
        return seen


OPTIONS: dict[str, dict[str, Any]] = {
    "ConstantLR": {"total_iters": 7},
    "CosineAnnealingLR": {"T_max": 30},
    "CosineAnnealingWarmRestarts": {"T_0": 4, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4},
    "ExponentialLR": {"gamma": 0.9},
    "LinearLR": {"total_iters": 9},
    "MultiStepLR": {"milestones": [4, 17]},
    "PolynomialLR": {"total_iters": 30},
    "ReduceLROnPlateau": {"patience": 1},
    "StepLR": {"step_size": 4},
}
WITH_OPTIONS = [
    *((name, OPTIONS.get(name, {})) for name in (*TIMM_SCHEDULES, *TORCH_SCHEDULES)),
    ("cosine", {"cycle_limit": 2, "cycle_mul": 2, "cycle_decay": 0.5}),
    ("cosine", {"noise": 0.2}),
    ("onecycle", {}),
    ("plateau", {"patience": 0}),
]


@pytest.mark.parametrize("cut", [1, 13, 15])
@pytest.mark.parametrize(("name", "options"), WITH_OPTIONS)
def test_a_schedule_goes_on_from_its_state(
    name: str, options: dict[str, Any], cut: int, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"schedule": name, "schedule_options": options}
    if name in TIMM_SCHEDULES:
        settings["warmup_epochs"] = 1
    whole = Rates(**settings).run()
    first = Rates(**settings)
    head = first.run(cut)
    save_checkpoint(
        tmp_path / "last.pt",
        {"optimizer": first.optimizer.state_dict(), "schedule": first.schedule.state_dict()},
    )
    second, state = Rates(**settings), load_checkpoint(tmp_path / "last.pt")
    second.updates = cut
    second.optimizer.load_state_dict(state["optimizer"])
    second.schedule.load_state_dict(state["schedule"])
    assert head + second.run()[1:] == whole
    assert len(set(whole)) > 1, "a schedule that does nothing would resume, too"


def formula(name: str, t: float, length: float, limit: int = 1, shrink: float = 1.0) -> float:
    """The rate of 0.1 after t of the updates that follow the warm-up, of which there are length."""
    cycle, at = divmod(t, length / limit)
    top, share = 0.1 * shrink**cycle, at / (length / limit)
    if name in ("cosine", "tanh", "poly") and cycle >= limit:
        return 0.0
    return {
        "constant": 0.1,
        "cosine": top * (1 + math.cos(math.pi * share)) / 2,
        "poly": top * (1 - share),
        "tanh": top * (1 - math.tanh(-7 * (1 - share) + 3 * share)) / 2,
        "step": 0.1 * 0.1 ** (t // (length / 3)),
        # timm's come one update before their epoch does
        "multistep": 0.1 * 0.1 ** ((t + 1 >= length / 2) + (t + 1 >= length * 3 / 4)),
    }[name]


@pytest.mark.parametrize("cut", [None, 4, 13])
@pytest.mark.parametrize("warmup", [0, 2, 3, 5])
@pytest.mark.parametrize("name", TIMM_SCHEDULES)
def test_the_rate_of_each_update_is_that_of_the_formula(
    name: str, warmup: int, cut: int | None
) -> None:
    run, every, first = Rates(schedule=name, warmup_epochs=warmup), EPOCHS * PER_EPOCH, []
    if cut:
        first, state = run.run(cut)[:-1], (run.optimizer.state_dict(), run.schedule.state_dict())
        run = Rates(schedule=name, warmup_epochs=warmup)
        run.updates = cut
        run.optimizer.load_state_dict(state[0])
        run.schedule.load_state_dict(state[1])
    before = warmup * PER_EPOCH
    expected = [
        0.001 + 0.099 * t / before if t < before else formula(name, t - before, every - before)
        for t in range(every)
    ]
    # tanh, which never is 1, starts at the rate itself
    assert first + run.run()[:-1] == pytest.approx(expected, abs=1e-7)
    assert max(expected) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["cosine", "tanh", "poly"])
@pytest.mark.parametrize("shrink", [None, 0.5])
def test_restarts_are_those_of_the_formula(name: str, shrink: float | None) -> None:
    options = {"cycle_limit": 3} | ({"cycle_decay": shrink} if shrink else {})
    expected = [formula(name, t, 30, 3, shrink or 1.0) for t in range(31)]
    assert Rates(schedule=name, schedule_options=options).run() == pytest.approx(expected)


def test_restarts_come_back_to_the_whole_rate() -> None:
    rates = Rates(schedule_options={"cycle_limit": 3}).run()
    assert [rates[start] for start in (0, 10, 20)] == pytest.approx([0.1, 0.1, 0.1])


def torch_formula(name: str, t: int) -> float:
    high, low = 0.1, 0.1 / 25
    turn = 0.3 * 30 - 1
    if t <= turn:
        one = high + (low - high) * (1 + math.cos(math.pi * t / turn)) / 2
    else:
        end = low / 1e4
        one = end + (high - end) * (1 + math.cos(math.pi * (t - turn) / (29 - turn))) / 2
    at, length = (t, 4) if t < 4 else (t - 4, 8) if t < 12 else (t - 12, 16)
    length, at = (32, t - 28) if t >= 28 else (length, at)
    return {
        "ConstantLR": 0.1 / 3 if t < 7 else 0.1,
        "CosineAnnealingLR": 0.1 * (1 + math.cos(math.pi * t / 30)) / 2,
        "CosineAnnealingWarmRestarts": 0.1 * (1 + math.cos(math.pi * at / length)) / 2,
        "CyclicLR": 0.01 + 0.09 * (1 - abs(t % 8 - 4) / 4),
        "ExponentialLR": 0.1 * 0.9**t,
        "LinearLR": 0.1 * (1 / 3 + 2 / 3 * min(t, 9) / 9),
        "MultiStepLR": 0.1 * 0.1 ** ((t >= 4) + (t >= 17)),
        "PolynomialLR": 0.1 * (1 - t / 30),
        "StepLR": 0.1 * 0.1 ** (t // 4),
        "OneCycleLR": one,
    }[name]


@pytest.mark.parametrize("name", sorted({*TORCH_SCHEDULES} - {"ReduceLROnPlateau"}))
def test_torch_schedules_are_their_formulas(name: str) -> None:
    rates = Rates(schedule=name, schedule_options=OPTIONS.get(name, {})).run()[:-1]
    expected = [torch_formula(name, t) for t in range(30)]
    assert rates == pytest.approx(expected, abs=1e-9)


def test_restarts_restart_within_the_run() -> None:
    options = {"cycle_limit": 3, "cycle_decay": 0.5}
    rates = Rates(schedule_options=options).run()
    assert [rates[start] for start in (0, 10, 20)] == pytest.approx([0.1, 0.05, 0.025])
    for start in (0, 10, 20):
        assert rates[start : start + 10] == sorted(set(rates[start : start + 10]), reverse=True)
    longer = Rates(schedule_options={"cycle_limit": 2, "cycle_mul": 2, "cycle_decay": 1.0}).run()
    assert [index for index, rate in enumerate(longer) if rate == 0.1] == [0, 10]
    assert rates[-1] == longer[-1] == 0.0


def test_one_cycle_rises_and_falls() -> None:
    rates = Rates(schedule="onecycle").run()
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.1)
    assert top == 8  # 0.3 of the run
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:-1] == sorted(rates[top:-1], reverse=True)
    assert rates[-2] < 1e-6


def test_torch_schedules_count_updates() -> None:
    rates = Rates(schedule="StepLR", schedule_options={"step_size": 4, "gamma": 0.5}).run(9)
    assert rates == [0.1] * 4 + [0.05] * 4 + [0.025] * 2


@pytest.mark.parametrize("sign", [1, -1])
def test_a_plateau_lowers_the_rate(sign: int) -> None:
    options = {"patience": 1, "factor": 0.1}

    def rates(scores: Callable[[int], float]) -> list[float]:
        return Rates(scores, schedule="plateau", schedule_options=options).run()[::PER_EPOCH]

    assert rates(lambda epoch: epoch - 100 * (sign < 0)) == [0.1] * 7
    assert rates(lambda epoch: 0.7 * sign) == pytest.approx([0.1] * 3 + [0.01] * 2 + [0.001] * 2)


@pytest.mark.parametrize(
    ("name", "options", "rates"),
    [
        ("constant", {}, [0.1] * 7),
        ("step", {}, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001]),
        ("step", {"decay_epochs": 3, "decay_rate": 0.5}, [0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025]),
        ("multistep", {"decay_milestones": [1, 4]}, [0.1, 0.01, 0.01, 0.01, 0.001, 0.001, 0.001]),
        ("poly", {}, [0.1 * (6 - epoch) / 6 for epoch in range(7)]),
    ],
)
def test_schedules_of_timm_count_epochs(
    name: str, options: dict[str, Any], rates: list[float]
) -> None:
    seen = Rates(schedule=name, schedule_options=options).run()[::PER_EPOCH]
    assert seen == pytest.approx(rates)
