"""Caches, memory statistics, and running out of memory."""

from __future__ import annotations

import collections
import itertools
import traceback
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from portable_amp.backends import (
    OUT_OF_MEMORY,
    MemoryStats,
    backend_for,
    present,
    resolve_device,
    torch_function,
)
from portable_amp.callables import opened
from portable_amp.errors import PortableAmpError
from portable_amp.nested import is_container, length_of, slice_of, tensors_in

T = TypeVar("T")


def memory_stats(device: str | torch.device | None = None) -> MemoryStats:
    """Bytes allocated, reserved and in all on a device; None where torch cannot tell.

    >>> memory_stats("cpu")
    MemoryStats(allocated=None, reserved=None, total=None)

    Raises:
        DeviceError: there is no such device here.
    """
    return _stats(resolve_device(device))


def clear_cache(
    device: str | torch.device | None = None, *, min_pressure: float | None = None
) -> int | None:
    """Give cached memory of a device back to the system; never raises, whatever torch or machine.

    torch empties its caches by itself before it runs out of memory, and a call in every step slows
    training down: between training and evaluation is the place, or with `min_pressure`.

    Args:
        device: None: the best device of this machine.
        min_pressure: only when torch has reserved at least this part, 0 to 1, of the device's
            memory; where that cannot be told, not at all.

    Returns:
        Bytes given back; None where there is nothing to clear or to tell.

    >>> clear_cache("cpu") is None
    True
    """
    try:
        where = resolve_device(device)
        empty = torch_function(backend_for(where.type).empty_cache)
        if empty is None:
            return None
        before = _stats(where)
        if min_pressure is not None:
            pressure = _pressure(before)
            if pressure is None or pressure < min_pressure:
                return None
        empty()
        after = _stats(where)
    # A cache is never worth a training run: whatever an old torch or a plugin throws stays here.
    except Exception:
        return None
    if before.reserved is None or after.reserved is None:
        return None
    return max(before.reserved - after.reserved, 0)


def is_oom_error(error: BaseException) -> bool:
    """Whether `error` means out of memory, on any device and any torch.

    >>> is_oom_error(RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"))
    True
    >>> is_oom_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # An accelerator without a row of its own says its own name: "NPU out of memory".
    text = str(error)
    return isinstance(error, RuntimeError) and (
        " out of memory" in text or any(known in text for known in OUT_OF_MEMORY)
    )


# What fitted, by step and what it closes over: samples, by the elements of one sample. The more a
# sample has the fewer fit, so that what fitted for smaller ones bounds what may fit for larger.
_fitted: collections.OrderedDict[Any, dict[int, int]] = collections.OrderedDict()
_MOST_STEPS = 256
_numbers: dict[int, tuple[weakref.ref[Any], int]] = {}
"""By the id of an object that is alive."""
_count = itertools.count()


def split_on_oom(
    step: Callable[[Any, float], T],
    batch: Any,
    *,
    parameters: torch.nn.Module | Iterable[torch.Tensor] = (),
    size: int | None = None,
) -> list[T]:
    """Run `step` on the batch; when memory runs out, on halves of it, whose gradients add up.

    `step(part, weight)` computes one part. Where it trains, it multiplies its mean loss with
    `weight`, the part's share of the batch, before backward; the sum of the gradients is then the
    whole batch's. BatchNorm sees the parts, not the batch. The size that fitted is remembered for
    this step of this model, and the next batch of samples as large, or larger, starts with it.

    Args:
        step: the forward pass, and in training the backward pass; it must not touch the optimizer.
        batch: a tensor, or tensors nested in containers, each (N, ...).
        parameters: the model, or what gets gradients in `step`, so that a backward pass that broke
            off half-way can be undone; needed for training only. Buffers, such as BatchNorm's
            statistics, are put back of this model, and of those that the step or its object holds.
        size: samples in a part to begin with, such as `ctx.plan.chunk`; None: the whole batch.

    Returns:
        What `step` returned for each part, in order.

    Raises:
        PortableAmpError: memory ran out in a backward pass and no parameters were given.
        ValueError: `size` is less than 1; or the batch has to be cut, and cannot be.
        Exception: the device's own error, when even a part of one sample does not fit, or when
            several processes train together, where each must make the same number of passes.

    >>> seen = []
    >>> def step(part, weight):
    ...     if len(part) > 2:
    ...         raise MemoryError
    ...     seen.append((part.tolist(), weight))
    >>> _ = split_on_oom(step, torch.arange(4))
    >>> seen
    [([0, 1], 0.5), ([2, 3], 0.5)]
    """
    if size is not None and size < 1:
        raise ValueError(f"size={size!r}: a part has at least one sample")
    total = length_of(batch)
    tensors = list(tensors_in(batch))
    elements = sum(one.numel() // total for one in tensors if one.dim())
    # A lambda made anew for each batch is the same step; one over another model is another.
    functions, owners, held = opened(step)
    parts = [*owners, *(one for one in held if not _of_data(one))]
    codes = (function.__code__ for function in functions)
    key = (torch.is_grad_enabled(), *codes, *map(_number, parts))
    fitted = _fitted.setdefault(key, {})
    _fitted.move_to_end(key)
    if len(_fitted) > _MOST_STEPS:
        _fitted.popitem(last=False)
    known = [samples for sample, samples in fitted.items() if sample <= elements]
    size = first = min([*known, size or total, total])
    models = _models_in([*owners, *held])
    if isinstance(parameters, torch.nn.Module):
        models.append(parameters)
        parameters = parameters.parameters()
    trained = {one: None for model in models for one in model.modules() if one.training}
    put_back = keep_buffers(trained)
    leaves = [leaf for leaf in parameters if leaf.requires_grad]
    before = [leaf.grad for leaf in leaves]
    while True:
        _set_grads(leaves, [None] * len(leaves))
        try:
            done = [
                step(slice_of(batch, at, at + size), min(size, total - at) / total)
                for at in range(0, total, size)
            ]
            break
        except BaseException as error:
            _set_grads(leaves, before)
            put_back()
            if not is_oom_error(error) or size == 1 or _several_processes():
                raise
            if not leaves and _in_backward(error):
                raise PortableAmpError(
                    "memory ran out in a backward pass, and gradients may be half-added: give "
                    "split_on_oom the model as parameters=... so that it can undo them"
                ) from error
        # Outside `except`: the error's traceback keeps every tensor of the failed step alive
        # (pytorch#27600).
        size = (size + 1) // 2
        for row in present():  # the step may have moved the batch anywhere
            clear_cache(row.device_type)
    if size < first:
        fitted[elements] = size
    _set_grads(leaves, [_sum(old, leaf.grad) for old, leaf in zip(before, leaves)])  # noqa: B905
    return done


def keep_buffers(modules: Iterable[torch.nn.Module]) -> Callable[[], None]:
    """Copy the buffers of these modules themselves; what it returns puts them back."""
    buffers = [
        (one, name, buffer, buffer.clone())
        for one in modules
        for name, buffer in one.named_buffers(recurse=False)
        if not torch.nn.parameter.is_lazy(buffer)
    ]

    def put_back() -> None:
        for one, name, buffer, kept in buffers:
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                buffer.copy_(kept)
            setattr(one, name, buffer)  # a pass may have put another there

    return put_back


def _models_in(things: list[Any]) -> list[torch.nn.Module]:
    """The models among them, and those that they have as attributes."""
    inner = [held for thing in things for held in getattr(thing, "__dict__", {}).values()]
    return [one for one in (*things, *inner) if isinstance(one, torch.nn.Module)]


def _of_data(thing: Any) -> bool:
    """Whether it is made anew for each batch, and no part of the step."""
    if isinstance(thing, torch.Tensor) or not hasattr(thing, "__dict__"):
        return True
    return is_container(thing) and not any(
        isinstance(held, torch.nn.Module) for held in vars(thing).values()
    )


def _number(thing: Any) -> int:
    """A number of its own for an object: not its id, which the next one at its place has, too."""
    at = id(thing)
    if at not in _numbers:
        try:
            alive = weakref.ref(thing, lambda _: _numbers.pop(at, None))
        except TypeError:  # it takes no weak references
            return -at
        _numbers[at] = alive, next(_count)
    return _numbers[at][1]


def _set_grads(leaves: list[torch.Tensor], grads: list[torch.Tensor | None]) -> None:
    for leaf, grad in zip(leaves, grads):  # noqa: B905
        leaf.grad = grad


def _sum(old: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old.add_(new)


def _in_backward(error: BaseException) -> bool:
    return any(
        frame.name == "backward" and "autograd" in frame.filename
        for frame in traceback.extract_tb(error.__traceback__)
    )


def _several_processes() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def _pressure(stats: MemoryStats) -> float | None:
    if stats.reserved is None or not stats.total:
        return None
    return stats.reserved / stats.total


def _stats(device: torch.device) -> MemoryStats:
    try:
        return backend_for(device.type).memory(device)
    # Reading statistics must not end a training run either: 2.9 to 2.12 assert on MPS
    # (pytorch#186430), and a plugin may lack them.
    except Exception:
        return MemoryStats()
