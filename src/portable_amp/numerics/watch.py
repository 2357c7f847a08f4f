"""What each operation of a pass computes, forward and backward, and which module it belongs to."""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from portable_amp.nested import tensors_in
from portable_amp.numerics.calls import answered, is_float

LOSS = "the loss"
"""Where operations belong that no module runs."""
EMPTY = {
    "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided",
    "resize_",
}  # fmt: skip
"""Operations that return whatever was there."""

See = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""Given an operation and its arguments, it runs the operation and returns its result."""


class Watch(TorchDispatchMode):
    """In this region `see` runs each operation; `here()` tells it which module that belongs to.

    An operation belongs to the innermost module that runs; in the backward pass to the one whose
    forward pass made the node of the graph. What is watched is below autograd: autocast's casts and
    the operations inside of a layer are seen, too.
    """

    def __init__(self, model: torch.nn.Module, see: See) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.see = model, see
        self.stack: list[str] = []
        self.thread = threading.get_ident()
        # From which node of the graph on which module runs; nodes are numbered as they are made.
        self.begins: list[int] = [-1]
        self.names: list[str] = [LOSS]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.see(function, args, kwargs or {})

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """The region; calls of the model's modules in it are followed."""
        with answered(dict(self.model.named_modules()), self._call), self:
            yield

    def here(self) -> tuple[str, str]:
        """The module, and the node of the graph whose backward pass this is, or ""."""
        node = current_node()
        if node is None or self.stack:  # a pass that is run again, or a gradient that is an input
            return (self.stack or [LOSS])[-1], ""
        return self.names[bisect.bisect_right(self.begins, node._sequence_nr()) - 1], node.name()

    def _call(self, name: str, module: torch.nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        self.stack.append(name)
        self._mark()
        try:
            return module._call_impl(*args, **kwargs)
        finally:
            self.stack.pop()
            self._mark()

    def _mark(self) -> None:
        if threading.get_ident() == self.thread:  # each thread counts for itself
            self.begins.append(next_number())
            self.names.append((self.stack or [LOSS])[-1])


def current_node() -> Any:
    """The node whose backward pass runs. Private to torch, tried on 2.4 and 2.15."""
    return torch._C._current_autograd_node()


def next_number() -> int:
    """What the next node will have. Private to torch, tried on 2.4 and 2.15."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


def numbers(value: Any) -> list[torch.Tensor]:
    """The float tensors in it that are not empty, as dense real ones."""
    return [one for one in map(_dense, tensors_in(value)) if one is not None]


def _dense(one: torch.Tensor) -> torch.Tensor | None:
    if not is_float(one) or torch.nn.parameter.is_lazy(one) or one.device.type == "meta":
        return None
    if one.layout is torch.sparse_coo:
        one = one._values()
    elif one.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        one = one.values()
    elif one.layout is not torch.strided:
        return None
    if one.is_complex():
        one = torch.view_as_real(one.resolve_conj())
    # Of the zeros that autograd has for a missing gradient, none is anywhere.
    return one if one.numel() and not one._is_zerotensor() else None


def extremes(one: torch.Tensor) -> tuple[float, float]:
    """The least and the largest number in it; NaN where there is one. It waits for the device."""
    one = one.detach()
    if one.element_size() == 1:  # float8 is kept, and not compared
        one = one.float()
    low, high = torch.aminmax(one.resolve_neg())
    return float(low), float(high)


def memory_of(one: torch.Tensor) -> int:
    """Where its numbers are: the same for views, and for what autograd saved."""
    return one.untyped_storage().data_ptr()
