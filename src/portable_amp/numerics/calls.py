"""One call of one module: what it was given, what it returned, and which modules it called."""

from __future__ import annotations

import contextlib
import io
import pickle
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from portable_amp.nested import map_tensors, tensors_in

SIXTEEN = (torch.float16, torch.bfloat16)


@dataclass
class Call:
    """Copies, without a graph, of all that went in and came out."""

    name: str
    """The module's, in the model; "" is the model itself."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    gradients: list[torch.Tensor | None]
    """That reached each float tensor of the output; None where none did."""
    written: bool
    """It wrote into a tensor that it was given."""


def is_float(one: torch.Tensor) -> bool:
    """It can have a gradient, by its dtype."""
    return one.is_floating_point() or one.is_complex()


def single(one: torch.Tensor) -> torch.Tensor:
    """A tensor of 16 bits in float32; any other as it is."""
    return one.float() if one.dtype in SIXTEEN else one


def floats(value: Any) -> list[torch.Tensor]:
    """The tensors in it that can have gradients."""
    return [*filter(is_float, tensors_in(value))]


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, held: list[Any]) -> None:
        super().__init__(file)
        self.held = held

    def persistent_id(self, one: Any) -> int | None:
        if not isinstance(one, (torch.Tensor, torch.nn.Module, type, types.FunctionType)):
            return None
        self.held.append(one)
        return len(self.held) - 1


def mapped(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """The same with each tensor changed, also of objects that are no containers.

    Such as a cache of keys and values, which a module writes into: each replay has one of its own.
    What cannot be pickled is not copied.
    """
    objects: list[Any] = []
    made = map_tensors(change, value, other=objects.append)
    if not objects:
        return made
    file, held = io.BytesIO(), list[Any]()
    try:
        _Pickler(file, held).dump(value)
        reader: Any = pickle.Unpickler(io.BytesIO(file.getvalue()))
        reader.persistent_load = lambda at: (
            change(held[at]) if isinstance(held[at], torch.Tensor) else held[at]
        )
        return reader.load()
    except Exception:  # a class may raise anything
        return made


def copied(value: Any) -> Any:
    """The same with copies of its tensors, without a graph."""
    return mapped(lambda one: one.detach().clone(), value)


def _is_strange(one: torch.Tensor) -> bool:
    """Of several lengths, or one that torch.func maps over: neither is copied for a replay.

    A private name of torch, 2.4 to 2.15.
    """
    return one.is_nested or torch._C._functorch.is_functorch_wrapped_tensor(one)


def named_calls(module: torch.nn.Module, prefix: str) -> dict[str, torch.nn.Module]:
    """All modules inside of it, by their names in the model."""
    return {
        f"{prefix}.{name}" if prefix else name: inner
        for name, inner in module.named_modules()
        if name
    }


@contextlib.contextmanager
def answered(
    inner: dict[str, torch.nn.Module],
    answer: Callable[..., Any],
) -> Iterator[None]:
    """Whoever calls one of these modules gets `answer(name, module, ...)` in its place.

    It stands where `Module.compile` puts the compiled call: in front of the module's own hooks.
    """
    before = {name: one._compiled_call_impl for name, one in inner.items()}
    for name, one in inner.items():
        one._compiled_call_impl = partial(answer, name, one)
    try:
        yield
    finally:
        for name, one in inner.items():
            one._compiled_call_impl = before[name]


class Recorder:
    """Notes the outermost calls among the modules that it is asked about.

    What cannot be replayed alone is not noted: it is a part of what calls it.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.inside = False

    def __call__(self, name: str, module: torch.nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """Call it, and keep what went in and out."""
        if self.inside:
            return module._call_impl(*args, **kwargs)
        given = [*tensors_in((args, kwargs))]
        self.inside = True
        try:
            if any(map(_is_strange, given)):
                return module._call_impl(*args, **kwargs)
            args_before, kwargs_before = copied((args, kwargs))
            versions = [one._version for one in given]
            output = module._call_impl(*args, **kwargs)
        finally:
            self.inside = False
        if any(map(_is_strange, tensors_in(output))):
            return output
        found = floats(output)
        gradients: list[torch.Tensor | None] = [None] * len(found)
        for at, one in enumerate(found):
            if one.requires_grad:
                one.register_hook(_keeping(gradients, at))
        written = versions != [one._version for one in given]
        self.calls.append(
            Call(name, args_before, kwargs_before, copied(output), gradients, written)
        )
        return output


def _keeping(gradients: list[torch.Tensor | None], at: int) -> Callable[[torch.Tensor], None]:
    def keep(gradient: torch.Tensor) -> None:
        gradients[at] = gradient.detach().clone()

    return keep
