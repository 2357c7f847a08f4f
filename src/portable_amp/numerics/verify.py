"""A model against itself in float64: what `DeviceContext.verify` does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from portable_amp.copies import LAYOUT_NAMES, Loss, copier, one_line, undisturbed
from portable_amp.memory import is_oom_error
from portable_amp.nested import length_of, map_tensors, slice_of
from portable_amp.numerics.calls import Recorder, answered, copied
from portable_amp.numerics.islands import keep_in_fp32
from portable_amp.numerics.progress import Progress
from portable_amp.numerics.replay import Place, restored, widened
from portable_amp.numerics.report import Report
from portable_amp.numerics.rounding import Wide
from portable_amp.numerics.walk import Walk, dtypes_on_device

Move = Callable[[Any, torch.memory_format], Any]


def verify(
    model: torch.nn.Module,
    batch: Any,
    place: Place,
    *,
    loss: Loss,
    move: Move,
    plan: str,
    backward: bool = True,
    fp32_modules: tuple[str, ...] = (),
    sizes: Sequence[int] = (),
    budget_s: float = math.inf,
    sampled: bool = False,
) -> Report:
    """Replay each module of a copy on the place, and of another on the CPU in float64.

    Model, gradients and random states stay as they are.
    """
    if not isinstance(place.repeats, int) or place.repeats < 1:
        raise ValueError(f"repeats={place.repeats!r}: a whole number from 1 on works here")
    if not isinstance(sizes, Sequence) or any(one < 1 for one in sizes):
        raise ValueError(f"sizes={sizes!r}: numbers of samples from 1 on work here, as in (1, 64)")
    if any(isinstance(one, torch.jit.ScriptModule) for one in model.modules()):
        raise RuntimeError(
            "the model has parts that torch.jit compiled, whose modules cannot be called alone: "
            "verify the model that they were made of"
        )
    until = time.perf_counter() + budget_s
    batches = [batch, *(resized(batch, size) for size in sizes)]
    with undisturbed(place.device.type, gradients=backward):
        walks = [
            _walk(
                model, one, place, loss, move,
                backward=backward, fp32_modules=fp32_modules, until=until, sampled=sampled,
            )
            for one in batches
        ]  # fmt: skip
    notes = [note for walk in walks for note in walk.notes]
    if left_out := sum(walk.left_out for walk in walks):
        notes.append(f"{left_out} calls of modules were not reached in {budget_s:g} s")
    faults = {(one.module, one.kind, one.what): one for walk in walks for one in walk.faults}
    limits = {(one.module, one.kind, one.what): one for walk in walks for one in walk.limits}
    return Report(
        str(place.device),
        plan,
        tuple(faults.values()),
        sum(walk.modules for walk in walks),
        max(walk.worst for walk in walks),
        tuple(dict.fromkeys(notes)),
        tuple(limits.values()),
    )


def _walk(
    model: torch.nn.Module,
    batch: Any,
    place: Place,
    loss: Loss,
    move: Move,
    *,
    fp32_modules: tuple[str, ...],
    **options: Any,
) -> Walk:
    reference, wide = copier(model, batch, lambda value, _: value)("contiguous")
    reference = _prepared(reference).cpu()
    for one in (*reference.parameters(), *reference.buffers()):
        one.data = _plain(one.data)
    wide = map_tensors(lambda one: _plain(one.cpu()), copied(wide))
    there, mine = copier(model, batch, move)(LAYOUT_NAMES[place.layout])
    there = _prepared(there)
    keep_in_fp32(there, fp32_modules, place.device.type)

    def on_device() -> None:
        with place.region():
            loss(there, copied(mine))

    seen = dtypes_on_device(there, place.device.type, on_device)
    recorder = Recorder()
    modules = dict(reference.named_modules())
    with Wide(), restored(reference):
        try:
            with answered(modules, recorder):
                total = loss(reference, wide)
        except Exception as error:
            if is_oom_error(error):
                raise
            raise RuntimeError(
                "the model cannot be computed in float64 on the CPU, with which all is compared: "
                + one_line(error)
            ) from error
        if not isinstance(total, torch.Tensor) or total.numel() != 1:
            made = type(total).__name__
            made = f"{made} of {total.numel()} numbers" if isinstance(total, torch.Tensor) else made
            raise TypeError(f"loss= returned a {made}: a scalar tensor works here")
        if total.requires_grad:
            total.backward()
            reference.zero_grad()
    del total, wide
    if not recorder.calls:
        raise RuntimeError("there is nothing to compare: loss= calls no module of the model")
    with Progress("verify", sum(map(len, seen.values()))) as progress:
        rows = {name: iter(calls) for name, calls in seen.items()}
        there_by_name = dict(there.named_modules())
        walk = Walk(place, there_by_name, rows, progress, **options)
        for call in recorder.calls:
            walk.visit(modules[call.name], call)
    idle = sorted(
        name
        for name, one in there.named_modules()
        if name not in seen
        # Some, such as attention, take the weights of another without calling it.
        if any(f"{name}.{of}" not in walk.trained for of, _ in one.named_parameters(recurse=False))
    )
    if idle:
        walk.notes.append(f"never called: {', '.join(idle[:8])}{', ...' * (len(idle) > 8)}")
    return walk


def resized(batch: Any, size: int) -> Any:
    """So many samples of a batch; where it has fewer, they are repeated."""
    total = length_of(batch)
    if size <= total:
        return slice_of(batch, 0, size)
    at = torch.arange(size) % total
    return map_tensors(lambda one: one[at.to(one.device)] if one.dim() else one, batch)


def _plain(one: torch.Tensor) -> torch.Tensor:
    """Wide, and contiguous: a layout may have kernels of its own."""
    one = widened(one)
    return one.contiguous() if one.layout is torch.strided else one


def _prepared(model: torch.nn.Module) -> torch.nn.Module:
    """Its copy to be replayed, without what torch.compile put around modules.

    ReLU and its like overwrite what they are given: here they do not.
    """
    for module in model.modules():
        if vars(module).get("inplace") is True:
            vars(module)["inplace"] = False
        for name, inner in module._modules.items():
            module._modules[name] = getattr(inner, "_orig_mod", inner)
    return model
