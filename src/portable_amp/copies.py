"""Copies of a model and a batch on a device: what is measured there leaves the caller's alone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from portable_amp.autocast import maybe_autocast
from portable_amp.errors import shown
from portable_amp.memory import is_oom_error
from portable_amp.nested import map_tensors, tensors_in
from portable_amp.rng import rng_state, set_rng_state

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LAYOUT_NAMES = {layout: name for name, layout in LAYOUTS.items()}

Loss = Callable[[torch.nn.Module, Any], torch.Tensor]


@contextlib.contextmanager
def undisturbed(device_type: str, *, gradients: bool = True) -> Iterator[dict[str, Any]]:
    """Whatever surrounds the call: no autocast, and gradients or none; random states stay.

    Yields that of before.
    """
    state = rng_state()
    try:
        with contextlib.ExitStack() as regions:
            regions.enter_context(torch.inference_mode(False))
            regions.enter_context(torch.set_grad_enabled(gradients))
            for kind in {"cpu", device_type}:  # of references, and of backward passes
                regions.enter_context(maybe_autocast(kind, enabled=False))
            yield state
    finally:
        set_rng_state(state)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """What DistributedDataParallel, DataParallel and torch.compile were given, in any order.

    Raises:
        TypeError: it is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model={shown(model)} is a {type(model).__name__}: a module works here")
    parallel = torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif inner := model._modules.get("_orig_mod"):
            model = inner
        else:
            return model


def copier(
    model: torch.nn.Module, batch: Any, move: Callable[[Any, torch.memory_format], Any]
) -> Callable[[str], tuple[torch.nn.Module, Any]]:
    """What makes a copy of the model and the batch on the device, in a layout.

    Raises:
        UncopiedError: there is something in the model that Python cannot copy.
        RuntimeError: it has lazy weights.
    """
    if any(map(torch.nn.parameter.is_lazy, (*model.parameters(), *model.buffers()))):
        raise RuntimeError(
            "the model cannot be measured: it has lazy weights; give it one batch first"
        )

    def copied(layout: str) -> tuple[torch.nn.Module, Any]:
        there = move(_copy(model), LAYOUTS[layout])
        there.zero_grad()
        # Of a copy, too: some that move themselves do so in place.
        mine = map_tensors(lambda tensor: tensor, batch, copy.deepcopy)
        return there, move(mine, LAYOUTS[layout])

    return copied


class UncopiedError(RuntimeError):
    """The model cannot be copied."""


def _copy(model: torch.nn.Module) -> torch.nn.Module:
    held = [
        (f"{name}.{key}" if name else key, value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key != "_modules"
    ]
    # Results of an earlier pass, such as the weight of torch.nn.utils.weight_norm: torch copies no
    # tensor that has a graph, and the next pass makes them anew.
    made = [one for _, one in held if isinstance(one, torch.Tensor) and not one.is_leaf]
    results = {id(one): one.detach().clone() for one in made}
    try:
        return copy.deepcopy(model, dict(results))
    except Exception as error:
        if is_oom_error(error):
            raise
        why = f"the model cannot be copied, and copies are measured: {one_line(error)}"
        for name, value in held:
            try:
                copy.deepcopy(value, dict(results))
            except Exception as first:
                kind = type(value).__qualname__
                why = f"the model cannot be copied, and copies are measured: {name!r} of it, "
                why += f"of type {kind}, raises {one_line(first)}"
                break
        raise UncopiedError(
            f"{why}. Measure the model before it is given that, or write its class a __deepcopy__"
        ) from error


def one_line(error: Exception) -> str:
    """What it is, and the first line of what it says."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:160]


def mean_square(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """A loss for any model: of what it makes of the batch's inputs, the mean square."""
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    made = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    floats = [one.float() for one in tensors_in(made) if one.is_floating_point()]
    if not floats:
        raise RuntimeError(
            f"the model returns a {type(made).__qualname__} without a float tensor: give loss=, "
            "which is called with the model and the batch"
        )
    return torch.stack([one.square().mean() for one in floats]).sum()
