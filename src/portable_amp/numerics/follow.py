"""Tells a trace what torch is doing, while the trace is on; nothing is put into a model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

_current: Any = None
"""The trace that is on."""


@contextlib.contextmanager
def followed_by(trace: Any) -> Iterator[None]:
    """Calls of modules, backward passes, scalers and optimizers are told to a `Trace`.

    Raises:
        RuntimeError: another one is told already.
    """
    global _current
    if _current is not None:
        raise RuntimeError("a trace is being recorded already: one at a time works")
    _current = trace
    wrapped = (
        (torch.nn.Module, "__call__", _calling),
        (torch.autograd, "backward", _going_back),
        (torch.amp.GradScaler, "scale", _scaling),
        (torch.amp.GradScaler, "step", _stepping),
    )
    before = [getattr(owner, name) for owner, name, _ in wrapped]
    hooks = [
        register_optimizer_step_pre_hook(trace.before_step),
        register_optimizer_step_post_hook(trace.after_step),
    ]
    for (owner, name, wrap), original in zip(wrapped, before, strict=True):
        setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        _current = None
        for (owner, name, _), original in zip(wrapped, before, strict=True):
            setattr(owner, name, original)
        for hook in hooks:
            hook.remove()


def in_backward() -> bool:
    """A backward pass runs in this thread, such as where a checkpoint computes forward once more.

    Private to torch, whose own checkpoints ask it, the same from 2.4 to 2.15.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def _calling(original: Callable[..., Any]) -> Callable[..., Any]:
    def __call__(module: torch.nn.Module, /, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        if is_dynamo_compiling() or _current is None:  # what is compiled is one call
            return original(module, *args, **kwargs)
        return _current.called(original, module, args, kwargs)

    return __call__


def _going_back(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def backward(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling() or _current is None or in_backward():
            return original(*args, **kwargs)
        with _current.going_back(args[0] if args else kwargs.get("tensors")):
            return original(*args, **kwargs)

    return backward


def _scaling(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def scale(scaler: torch.amp.GradScaler, *args: Any, **kwargs: Any) -> Any:
        made = original(scaler, *args, **kwargs)
        if _current and scaler.is_enabled():
            _current.scaled(scaler)
        return made

    return scale


def _stepping(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def step(scaler: torch.amp.GradScaler, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(scaler, optimizer, *args, **kwargs)
        if _current:
            _current.scaler_stepped(optimizer)
        return made

    return step
