"""Faults of a device, put into models on purpose: right in float64, where the reference is."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import zoo
from portable_amp.numerics.calls import floats

Fault = Callable[..., Any]
"""Called with what computes the right output, the module, and its inputs; returns another one."""


def plant_in(module: nn.Module, fault: Fault) -> None:
    """Make one of its kind of it, that computes something else."""
    kind: Any = type(module)

    class Planted(kind):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            given = [*floats((args, kwargs)), *self.parameters()]
            right = functools.partial(super().forward, *args, **kwargs)
            if given and given[0].dtype is torch.float64:
                return right()
            return fault(right, self, *args, **kwargs)

    Planted.__qualname__ = "Planted"
    module.__class__ = Planted


def after(change: Callable[..., torch.Tensor]) -> Fault:
    """The right output, changed; where there are several, the first."""

    def wrong(right: Callable[[], Any], module: Any, *_: Any, **__: Any) -> Any:
        made = right()
        if isinstance(made, tuple):
            return change(made[0], module), *made[1:]
        return change(made, module)

    return wrong


class Backward(torch.autograd.Function):
    """Right forward; backward another gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, change: Callable[..., Any]) -> torch.Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return ctx.change(gradients[0]), None


def backward(x: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The same, but for the gradient that it lets through."""
    return Backward.apply(x, change)  # type: ignore[no-any-return, no-untyped-call]


class Products(torch.autograd.Function):
    """Of a linear layer, of shorter numbers, as tensor cores take them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, short: Callable[..., Any]) -> Any:
        ctx.short = short
        ctx.save_for_backward(x, w)
        return short(x) @ short(w).T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (g,), (x, w), short = gradients, ctx.saved_tensors, ctx.short
        flat = short(g).flatten(0, -2).T @ short(x).flatten(0, -2)
        return short(g) @ short(w), flat, None


def cut(x: torch.Tensor, dropped: int, half: int = 0) -> torch.Tensor:
    """Without so many of the 23 bits of mantissa."""
    return ((x.contiguous().view(torch.int32) + half) & -(1 << dropped)).view(torch.float32)


def shortened(dropped: int) -> Fault:
    """A linear layer whose products are taken so."""

    def wrong(_: Any, layer: Any, x: torch.Tensor) -> Any:
        made = Products.apply(x, layer.weight, lambda it: cut(it, dropped))  # type: ignore[no-untyped-call]
        return made + layer.bias

    return wrong


def layer(call: Callable[[Any, torch.Tensor], torch.Tensor]) -> Fault:
    """Another computation with the layer's weights."""
    return lambda _, it, x: call(it, x)


def second_only(factor: float) -> Fault:
    """Right the first time that it is replayed."""
    calls: list[int] = []

    def change(y: torch.Tensor, _: Any) -> torch.Tensor:
        calls.append(1)
        return y * (factor if len(calls) > 2 else 1)  # the first is to see the dtypes

    return after(change)


def lost(y: torch.Tensor, value: float) -> torch.Tensor:
    """One element is that."""
    return y.masked_fill((torch.arange(y.numel(), device=y.device) == 5).view(y.shape), value)


def _stale(y: torch.Tensor, norm: Any) -> torch.Tensor:
    """Statistics that are not written."""
    norm.running_var = torch.ones_like(norm.running_var)
    return y


stale = after(_stale)


def elsewhere(kind: Any, **names: Any) -> Fault:
    """What a class computes with other functions in place of some that its code names."""
    wrong = types.FunctionType(kind.forward.__code__, {**vars(zoo), **names})
    return lambda _, module, *args, **kwargs: wrong(module, *args, **kwargs)


class Other:
    """A module of functions with some replaced."""

    def __init__(self, real: Any, **names: Any) -> None:
        self.real, self.names = real, names

    def __getattr__(self, name: str) -> Any:
        return self.names.get(name) or getattr(self.real, name)


def attention(by: Callable[..., torch.Tensor]) -> Fault:
    """Another attention inside of a block's own forward pass."""
    call = functools.partial(by, F.scaled_dot_product_attention)
    return elsewhere(zoo.Attention, F=Other(F, scaled_dot_product_attention=call))


def norm_with(**settings: Any) -> Fault:
    """A norm with other settings."""

    def wrong(_: Any, norm: Any, x: torch.Tensor) -> Any:
        other = copy.copy(norm)
        vars(other).update(settings)
        return type(norm).__mro__[1].forward(other, x)  # type: ignore[attr-defined]

    return wrong


GPT, UNET, BOTH, LSTM, GAN = (
    "language model", "diffusion", "encoder and decoder", "LSTM and GRU", "discriminator",
)  # fmt: skip
# What is wrong: the model, the module, and the fault.
PLANTED: dict[str, tuple[str, str, Fault]] = {
    "a scale": (GPT, "blocks.1.gate", after(lambda y, _: y * 1.001)),
    "no mask": (GPT, "blocks.2.attention", attention(
        lambda sdpa, q, k, v, is_causal: sdpa(q, k, v))),
    "swapped operands": (GPT, "blocks.1.attention", attention(
        lambda sdpa, q, k, v, is_causal: sdpa(k, q, v, is_causal=is_causal))),
    "another temperature": (GPT, "blocks.0.attention", attention(
        lambda sdpa, q, k, v, is_causal: sdpa(1.01 * q, k, v, is_causal=is_causal))),
    "turned the other way": (GPT, "blocks.0.attention", elsewhere(
        zoo.Attention, rotated=lambda x: zoo.rotated(x.flip(-1)).flip(-1))),
    "the wrong gate": (GPT, "blocks.2", elsewhere(zoo.Block, F=Other(F, silu=F.gelu))),
    "one element of a table": (GPT, "words", after(lambda y, _: lost(y, 0.0))),
    "a gradient of a table": (GPT, "words", after(lambda y, _: backward(y, lambda g: 1.05 * g))),
    "a gradient with a term too much": (GPT, "norm", after(
        lambda y, _: backward(y, lambda g: g + 0.02 * g.mean(-1, keepdim=True)))),
    "tied weights without gradient": (GPT, "", elsewhere(
        zoo.Language, F=Other(F, linear=lambda x, w: F.linear(x, w.detach())))),
    "a bias twice": (GPT, "blocks.0.down", after(lambda y, layer: y + layer.bias)),
    "weights of the step before": (GPT, "blocks.1.up", layer(
        lambda it, x: F.linear(x, 0.999 * it.weight, it.bias))),
    "products in TF32": (GPT, "blocks.2.gate", shortened(13)),
    "products in bf16": (GPT, "blocks.0.up", shortened(16)),
    "bf16 inside": (GPT, "blocks.1.norm2", after(lambda y, _: y.bfloat16().float())),
    "no epsilon": (UNET, "down.norm1", norm_with(eps=0.0)),
    "other groups": (UNET, "down.norm1", norm_with(num_groups=2)),
    "edges": (UNET, "middle.conv1", layer(lambda it, x: F.conv2d(
        F.pad(x, (1, 1, 1, 1), mode="replicate"), it.weight, it.bias))),
    "no gradient of a bias": (UNET, "up.conv2", layer(lambda it, x: F.conv2d(
        x, it.weight, it.bias.detach(), padding=1))),
    "another axis": (UNET, "attention", after(lambda y, _: y.mT.reshape(y.shape))),
    "another interpolation": (UNET, "", elsewhere(zoo.Diffusion, F=Other(
        F, interpolate=lambda x, scale_factor: F.interpolate(
            x, scale_factor=scale_factor, mode="bilinear")))),
    "the largest for the mean": (UNET, "", elsewhere(
        zoo.Diffusion, F=Other(F, avg_pool2d=F.max_pool2d))),
    "an activation with less": (UNET, "middle", elsewhere(
        zoo.Residual, F=Other(F, silu=lambda x: F.silu(x) * 0.999))),
    "NaN in one element": (UNET, "last", after(lambda y, _: lost(y, float("nan")))),
    "the second run": (UNET, "first", second_only(1.01)),
    "2 % of a gradient": (UNET, "up.norm2", after(lambda y, _: backward(y, lambda g: 1.02 * g))),
    "the gradient of the last channel": (UNET, "up.skip", after(lambda y, _: backward(
        y, lambda g: torch.cat([g[:, :-1], 0 * g[:, -1:]], 1)))),
    "no epsilon in a layer": (BOTH, "encoder.layers.0.norm1", norm_with(eps=0.0)),
    "an offset": (BOTH, "encoder.layers.1.linear1", after(lambda y, _: y + 1e-3)),
    "shifted keys": (BOTH, "decoder.layers.0.multihead_attn", lambda _, it, q, k, v, **more: (
        nn.MultiheadAttention.forward(it, q, k, v.roll(1, 1), **more))),
    "the gradient of an input": (BOTH, "decoder.layers.1.linear2", layer(lambda it, x: F.linear(
        backward(x, lambda g: 1.001 * g), it.weight, it.bias))),
    "a sign": (BOTH, "decoder.norm", after(lambda y, _: -y)),
    "a direction": (LSTM, "lstm", after(
        lambda y, _: torch.cat([y[..., :24], y[..., 24:].flip(1)], -1))),
    "steps that are shifted": (LSTM, "gru", after(lambda y, _: y.roll(1, 1))),
    "an index": (LSTM, "words", layer(lambda it, x: F.embedding(
        (x + 1) % 50, it.weight, it.padding_idx))),
    "gradients of padding": (LSTM, "words", layer(lambda it, x: F.embedding(x, it.weight))),
    "a slope": (GAN, "1", layer(lambda it, x: F.leaky_relu(x, 0.21))),
    "an old singular value": (GAN, "2", after(lambda y, _: 1.003 * y)),
    "rolled rows": (GAN, "4", after(lambda y, _: y.roll(1, 0))),
    "statistics that are not written": ("mobilenetv3_small_050", "bn1", stale),
    "another GELU": (
        "convnext_atto", "stages.0.blocks.0.mlp.act",
        layer(lambda it, x: F.gelu(x, approximate="tanh")),
    ),
    "a clipped activation": (
        "mobilenetv3_small_050", "conv_head",
        after(lambda y, _: y.clamp(max=0.5 * float(y.detach().max()))),
    ),
}  # fmt: skip


def plant(what: str) -> tuple[nn.Module, Any, str]:
    """A model with that fault, in training, a batch, and the name of the module that has it."""
    name, place, fault = PLANTED[what]
    torch.manual_seed(0)
    model, batch = zoo.ZOO[name]()
    plant_in(model.get_submodule(place), fault)
    return model.train(), batch, place
