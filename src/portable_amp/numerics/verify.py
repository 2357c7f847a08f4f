"""A model against itself in float64: what `DeviceContext.verify` does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from portable_amp.autocast import maybe_autocast
from portable_amp.copies import LAYOUT_NAMES, Loss, copier
from portable_amp.nested import map_tensors
from portable_amp.numerics.calls import Recorder, answered, copied
from portable_amp.numerics.replay import restored
from portable_amp.numerics.report import Report
from portable_amp.numerics.walk import Place, Walk, dtypes_on_device, widened
from portable_amp.rng import rng_state, set_rng_state

Move = Callable[[Any, torch.memory_format], Any]


def verify(
    model: torch.nn.Module, batch: Any, place: Place, *, loss: Loss, move: Move, plan: str
) -> Report:
    """Replay each module of a copy on the place, and of another on the CPU in float64.

    Model, gradients and random states stay as they are.
    """
    state = rng_state()
    try:
        with torch.inference_mode(False), torch.enable_grad(), contextlib.ExitStack() as regions:
            for kind in {"cpu", place.device.type}:  # of the reference, and of backward passes
                regions.enter_context(maybe_autocast(kind, enabled=False))
            return _verify(model, batch, place, loss=loss, move=move, plan=plan)
    finally:
        set_rng_state(state)


def _verify(
    model: torch.nn.Module, batch: Any, place: Place, *, loss: Loss, move: Move, plan: str
) -> Report:
    reference, wide = copier(model, batch, lambda value, _: value)("contiguous")
    reference = _out_of_place(reference).cpu()
    for one in (*reference.parameters(), *reference.buffers()):
        one.data = widened(one.data)
    wide = map_tensors(lambda one: widened(one.cpu()), copied(wide))
    there, mine = copier(model, batch, move)(LAYOUT_NAMES[place.layout])
    _out_of_place(there)

    def on_device() -> None:
        with place.region():
            loss(there, copied(mine))

    seen = dtypes_on_device(there, on_device)
    recorder = Recorder()
    with answered({"": reference}, recorder), restored(reference):
        total = loss(reference, wide)
        if total.requires_grad:
            total.backward()
    walk = Walk(place, dict(there.named_modules()), seen)
    for call in recorder.calls:
        walk.visit(reference, call)
    weighted = {name for name, one in there.named_modules() if [*one.parameters(recurse=False)]}
    idle = sorted(weighted - seen.keys())
    if idle:
        walk.notes.append(f"never called: {', '.join(idle[:8])}{', ...' * (len(idle) > 8)}")
    notes = tuple(dict.fromkeys(walk.notes))
    return Report(str(place.device), plan, tuple(walk.faults), walk.modules, walk.worst, notes)


def _out_of_place(model: torch.nn.Module) -> torch.nn.Module:
    """ReLU and its like overwrite what they are given: here they do not."""
    for module in model.modules():
        if vars(module).get("inplace") is True:
            vars(module)["inplace"] = False
    return model
