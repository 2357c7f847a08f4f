"""How a tensor may lie in memory, and a module that is given it so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from portable_amp.nested import tensors_in
from portable_amp.numerics.calls import is_float
from portable_amp.numerics.operation import Shape

FAR = 2**31
"""Elements: the second sample of a tensor that lies far apart begins beyond them."""
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

View = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """One way to lie in memory."""

    name: str
    fits: Callable[[Shape], bool]
    base: Callable[[Shape], Shape] = lambda shape: shape
    """The shape of what is drawn; that of the input is made of it."""
    view: Callable[[torch.Tensor, Shape], torch.Tensor] = lambda base, shape: base
    gradient: View = lambda one: one
    """How the gradient lies that reaches the output, which may be of any shape."""
    weights: Callable[[torch.nn.Module], torch.nn.Module] = lambda module: module


class _Far(torch.autograd.Function):
    """A copy whose samples lie so far apart that offsets need more than 32 bits."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        rest = x[0].numel()
        apart = FAR // (len(x) - 1) + 1
        base = torch.empty(apart * (len(x) - 1) + rest, dtype=x.dtype, device=x.device)
        far = base.as_strided(x.shape, (apart, *x[0].contiguous().stride()))
        far.copy_(x)
        return far

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0]


def _channels_last(one: torch.Tensor) -> torch.Tensor:
    kind = _CHANNELS_LAST.get(one.dim())
    return one.contiguous(memory_format=kind) if kind else one


def _weights_last(module: torch.nn.Module) -> torch.nn.Module:
    for one in module.parameters():
        one.data = _channels_last(one.data)
    return module


def _every_other(one: torch.Tensor) -> torch.Tensor:
    return torch.stack([one, one], -1)[..., 1]


def _swapped(shape: Shape) -> Shape:
    return (*shape[:-2], shape[-1], shape[-2])


LAYOUTS = {
    one.name: one
    for one in (
        Layout("contiguous", lambda shape: True),
        Layout(
            "channels_last",
            lambda shape: len(shape) in _CHANNELS_LAST,
            view=lambda base, shape: _channels_last(base),
            gradient=_channels_last,
            weights=_weights_last,
        ),
        Layout(
            "strided view",
            lambda shape: True,
            base=lambda shape: (*shape[:-1], 2 * shape[-1] + 1),
            view=lambda base, shape: base[..., 1::2],
            gradient=_every_other,
        ),
        Layout(
            "transposed",
            lambda shape: len(shape) > 1,
            base=_swapped,
            view=lambda base, shape: base.mT,
            gradient=lambda one: one.mT.contiguous().mT if one.dim() > 1 else one,
        ),
        Layout(
            "expanded",
            lambda shape: shape[0] > 1,
            base=lambda shape: (1, *shape[1:]),
            view=lambda base, shape: base.expand(shape),
            gradient=lambda one: one[:1].expand_as(one) if one.dim() else one,
        ),
        Layout(
            "far apart",
            lambda shape: shape[0] > 1,
            view=lambda base, shape: _Far.apply(base),
        ),
    )
}


class Laid(torch.nn.Module):
    """The module given its float inputs in that layout, and its output the gradient."""

    def __init__(self, module: torch.nn.Module, layout: Layout, shape: Shape) -> None:
        super().__init__()
        self.module, self.layout, self.shape = module, layout, shape
        self.plain = True
        """It is the reference: the same numbers, contiguous."""
        self.returned: list[torch.dtype] = []

    def forward(self, *given: Any) -> Any:
        """Call it."""
        output = self.module(*(self._laid(one) if is_float(one) else one for one in given))
        self.returned = [one.dtype for one in tensors_in(output)]
        for one in tensors_in(output):
            if one.requires_grad:
                one.register_hook(self._gradient)
        return output

    def _laid(self, one: torch.Tensor) -> torch.Tensor:
        if not self.plain:
            return self.layout.view(one, self.shape)
        if self.layout.name == "far apart":
            return one
        return self.layout.view(one, self.shape).contiguous()

    def _gradient(self, one: torch.Tensor) -> torch.Tensor:
        laid = self.layout.gradient(one)
        return laid.contiguous() if self.plain else laid
