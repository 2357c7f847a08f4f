"""The same calls with scaling on and off: both pass, and both train the same weights."""

from __future__ import annotations

import pickle
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from portable_amp import ScalerShim

Pair = namedtuple("Pair", "first second")

WEIGHTS: dict[str, Callable[[], torch.Tensor]] = {
    "real": lambda: torch.tensor([1.0, -2.0]),
    "complex": lambda: torch.tensor([1 + 2j, -0.5j]),
    "table": lambda: torch.ones(4, 2),  # whose gradient is sparse
    "frozen": lambda: torch.ones(2),
    "unused": lambda: torch.ones(2),
}
GROUP = st.lists(st.sampled_from(list(WEIGHTS)), min_size=1, max_size=3)
OPTIMIZERS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.5, momentum=0.5),
    "sgd, foreach": lambda weights: torch.optim.SGD(weights, lr=0.25, foreach=True),
}
CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "one": sum,
    "list": list,
    "tuple": tuple,
    "iterator": iter,
    "dict": lambda losses: dict(enumerate(losses)),
    "named tuple": lambda losses: Pair(losses[0], losses[1:]),
    "none": lambda losses: None,
}
LOOKS: list[Callable[[ScalerShim], Any]] = [
    ScalerShim.is_enabled,
    ScalerShim.get_scale,
    ScalerShim.get_growth_factor,
    ScalerShim.get_backoff_factor,
    ScalerShim.get_growth_interval,
    ScalerShim.state_dict,
    lambda scaler: scaler.set_growth_interval(3),
    lambda scaler: scaler.set_growth_factor(4.0),
    lambda scaler: scaler.last_step and scaler.last_step.stepped,
]
ITERATIONS = st.lists(
    st.fixed_dictionaries(
        {
            "losses": st.sampled_from(list(CONTAINERS)),
            "unscale": st.booleans(),
            "by backward_step": st.booleans(),
            "update": st.sampled_from(["plain", "twice", "set", "saved"]),
            "look": st.sampled_from(LOOKS),
        }
    ),
    min_size=1,
    max_size=5,
)


def leaves(scaled: Any) -> list[torch.Tensor]:
    if isinstance(scaled, torch.Tensor):
        return [scaled]
    values = scaled.values() if isinstance(scaled, dict) else scaled or ()
    return [leaf for value in values for leaf in leaves(value)]


def trained(
    on: bool, groups: list[list[str]], kind: str, iterations: list[dict[str, Any]]
) -> list[Any]:
    weights = [[WEIGHTS[name]().requires_grad_(name != "frozen") for name in g] for g in groups]
    optimizers = [OPTIMIZERS[kind](group) for group in weights]
    scaler = ScalerShim("cpu", enabled=on)

    def losses(which: int) -> list[torch.Tensor]:
        found = [torch.ones((), requires_grad=True) * 1.0]
        for name, weight in zip(groups[which], weights[which], strict=True):
            if name == "table":
                rows = torch.tensor([1, 3, 1])
                found.append(torch.nn.functional.embedding(rows, weight, sparse=True).sum())
            elif name in ("real", "complex"):
                found.append((weight * 2).abs().sum())
        return found

    scaler.update()
    for iteration in iterations:
        for which, optimizer in enumerate(optimizers):
            if iteration["by backward_step"]:
                assert scaler.backward_step(torch.stack(losses(which)).sum(), optimizer).stepped
                continue
            for loss in leaves(scaler.scale(CONTAINERS[iteration["losses"]](losses(which)))):
                loss.backward()  # type: ignore[no-untyped-call]
            if iteration["unscale"]:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            optimizer.zero_grad()
        iteration["look"](scaler)
        scaler.update(*([512] if iteration["update"] == "set" else []))
        if iteration["update"] == "twice":
            scaler.update()
        if iteration["update"] == "saved":
            scaler = pickle.loads(pickle.dumps(scaler))
            scaler.load_state_dict(ScalerShim("cpu", enabled=True).state_dict())
    return [weight.tolist() for group in weights for weight in group]


@given(
    st.lists(
        st.lists(st.sampled_from(list(WEIGHTS)), min_size=1, max_size=3), min_size=1, max_size=2
    ),
    st.sampled_from(list(OPTIMIZERS)),
    ITERATIONS,
)
def test_the_same_calls_pass_and_train_the_same(
    groups: list[list[str]], kind: str, iterations: list[dict[str, Any]]
) -> None:
    assert trained(True, groups, kind, iterations) == trained(False, groups, kind, iterations)
