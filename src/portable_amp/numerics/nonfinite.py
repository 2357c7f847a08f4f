"""The first infinity or NaN that reaches the loss or a gradient: `DeviceContext.find_nonfinite`."""

from __future__ import annotations

import contextlib
import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from portable_amp.copies import Loss, copier, undisturbed
from portable_amp.nested import map_tensors, tensors_in
from portable_amp.numerics.origins import Origin, Tracer
from portable_amp.numerics.watch import LOSS, Watch
from portable_amp.rng import rng_state, seed_everything, set_rng_state

Region = Callable[[], AbstractContextManager[Any]]
BATCH = "the batch"


@dataclass(frozen=True)
class NonfiniteReport:
    """Which operation made the first value that is not finite, and of which module it is."""

    origin: Origin | None
    """None where loss and gradients are finite."""
    type: str
    """The module's class; "" where no module made it."""
    reaches: str
    """"the loss", "a gradient" or ""."""
    passes: int
    """Forward and backward passes that were looked at."""
    plan: str
    scale: float
    """The loss was multiplied by it."""

    @property
    def ok(self) -> bool:
        """Loss and gradients are finite."""
        return self.origin is None

    @property
    def module(self) -> str:
        """Its name in the model; "" is the model itself, "the loss" what no module runs."""
        return self.origin.module if self.origin else ""

    @property
    def operation(self) -> str:
        """What makes the value, as torch calls it: "addmm"; or "parameter weight", which has it."""
        return self.origin.operation if self.origin else ""

    def __str__(self) -> str:
        one = self.origin
        if one is None:
            passes = "1 pass" if self.passes == 1 else f"{self.passes} passes"
            return f"Finite in {passes} in {self.plan}, at loss scale {self.scale:g}."
        where = one.module
        if self.type:
            where = f"{one.module or 'the model itself'} ({self.type})"
        if one.kind == "given":
            text = f"{one.operation} holds {one.value} before the pass"
        else:
            text = f"in the forward pass, {one.operation}"
            if one.node:
                text = f"in the backward pass, {one.operation} of {one.node}"
            if one.kind == "constant":
                text += f" puts {one.value} there"
            else:
                text += f" makes {one.value} of {one.of}, in {str(one.dtype)[6:]}"
        text += f", which becomes nan by {one.becomes}" if one.becomes else ""
        return f"{where}: {text}. It reaches {self.reaches}.{_cure(one, self.scale)}"


def _cure(one: Origin, scale: float) -> str:
    if one.precise is None:
        return ""
    if not one.precise:
        return " In fp32 it is not finite either."
    if one.node and scale > 1:
        return " In fp32 it is finite: a smaller loss scale may do, which a scaler finds by itself."
    return " In fp32 it is finite: keep this module in fp32, or compute in bf16."


def find_nonfinite(
    model: torch.nn.Module,
    batch: Any,
    device: torch.device,
    region: Region,
    *,
    loss: Loss,
    scale: float,
    passes: int,
    move: Callable[[Any, torch.memory_format], Any],
    plan: str,
) -> NonfiniteReport:
    """Look at passes with the random state as it is, then others, while they draw at random."""
    if passes < 1 or not 0 < scale < math.inf:
        raise ValueError(f"passes={passes}, scale={scale}: 1 pass or more, a scale above 0")

    def run(tracer: Tracer) -> tuple[Origin | None, str]:
        if _stays(model, device):
            mine = map_tensors(_like, move(batch, torch.preserve_format))
            at = rng_state()
            with kept(model):
                total = _forward(tracer, model, mine, region, loss)
                if not _reentrant(total):
                    return _backward(tracer, model, total, scale, torch.autograd.grad)
            tracer = Tracer()
            set_rng_state(at)
        there, mine = copier(model, batch, move)("contiguous")
        total = _forward(tracer, there, mine, region, loss)
        return _backward(tracer, there, total, scale, _accumulated)

    found: Origin | None = None
    done, reaches = 0, ""
    with undisturbed(device.type) as state:
        for done in range(1, passes + 1):
            if done > 1:
                seed_everything(done)
            found, reaches = run(Tracer())
            if found or not _drawn(state):
                break
    names = dict(model.named_modules())
    type_name = type(names[found.module]).__qualname__ if found and found.module in names else ""
    return NonfiniteReport(found, type_name, reaches, done, plan, scale)


def _drawn(state: Any) -> bool:
    """Some generator is not in this state any more."""
    plain = map_tensors(torch.Tensor.tolist, (state, rng_state()))
    return bool(plain[0] != plain[1])


def _like(one: torch.Tensor) -> torch.Tensor:
    """A copy without a graph, for the model may write into it."""
    return one.detach().clone().requires_grad_(one.requires_grad)


def _stays(model: torch.nn.Module, device: torch.device) -> bool:
    """It can run as it is, and be put back as it was."""
    tensors = [*model.parameters(), *model.buffers()]
    return (
        all(one.device.type == device.type for one in tensors)
        and not any(map(torch.nn.parameter.is_lazy, tensors))
        and not any(isinstance(one, torch.jit.ScriptModule) for one in model.modules())
    )


def _forward(
    tracer: Tracer, model: torch.nn.Module, batch: Any, region: Region, loss: Loss
) -> torch.Tensor:
    tracer.watch = Watch(model, tracer.see)
    for module_name, module in model.named_modules():
        for name, one in module.named_parameters(recurse=False):
            tracer.given(f"parameter {name}", module_name, one)
        for name, one in module.named_buffers(recurse=False):
            tracer.given(f"buffer {name}", module_name, one)
    for at, one in enumerate(tensors_in(batch)):
        tracer.given(f"tensor {at}", BATCH, one)
    with tracer.watch.watching(), region():
        total = loss(model, batch)
    if not isinstance(total, torch.Tensor):
        raise TypeError(f"loss= returned a {type(total).__name__}: a scalar tensor works here")
    return total


def _backward(
    tracer: Tracer,
    model: torch.nn.Module,
    total: torch.Tensor,
    scale: float,
    gradients: Callable[..., Iterable[torch.Tensor | None]],
) -> tuple[Origin | None, str]:
    """Where the loss, or else a gradient, gets what is not finite; and which of them."""
    found = tracer.of(total)
    wanted = [one for one in model.parameters() if one.requires_grad]
    if found or not wanted or not total.requires_grad:
        return found, LOSS if found else ""
    factor = torch.full((), scale, device=total.device)
    with tracer.watch.watching():
        made = gradients(total * factor, wanted, allow_unused=True)
    origins = [*filter(None, map(tracer.of, made))]
    first = min(origins, key=lambda one: one.rank, default=None)
    return first, "a gradient" if first else ""


def _accumulated(total: torch.Tensor, wanted: list[torch.Tensor], **_: Any) -> Any:
    total.backward()
    return [one.grad for one in wanted]


def _reentrant(total: torch.Tensor) -> bool:
    """Its graph has a checkpoint with `use_reentrant=True`: only `backward()` goes through that."""
    todo: list[Any] = [total.grad_fn]
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        todo += [before for before, _ in node.next_functions]
    return False


@contextlib.contextmanager
def kept(model: torch.nn.Module) -> Iterator[None]:
    """Attributes and buffers of its modules are afterwards what they were.

    In the region each buffer is a copy, so that not even its version changes.
    """
    modules = [*model.modules()]
    before = [(vars(one), dict(vars(one))) for one in modules]
    containers = [
        (held, copy.copy(held))
        for _, attributes in before
        for held in attributes.values()
        if type(held) in (dict, OrderedDict, list, set)
    ]
    copies: dict[int, torch.Tensor] = {}
    try:
        for one in modules:
            for name, buffer in one.named_buffers(recurse=False):
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer.clone()
                one._buffers[name] = copies[id(buffer)]
        yield
    finally:
        for attributes, old in before:
            attributes.clear()
            attributes.update(old)
        for held, content in containers:
            held.clear()
            held.extend(content) if isinstance(held, list) else held.update(content)
