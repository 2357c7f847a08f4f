"""Tensors that are asked for on a played device: kept on the CPU, or made shadows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from portable_amp.numerics import watch
from portable_amp.testing.shadow import Shadow, bare, on_raw, one_device, shadows_in

if TYPE_CHECKING:
    from portable_amp.testing.play import Played

_HOST = torch.device("cpu")


class Functions(TorchFunctionMode):
    """Answers torch's functions that name a device, on behalf of the played machine."""

    def __init__(self, played: Played) -> None:
        super().__init__()
        self.played = played
        self.answers: dict[Any, Callable[..., Any]] = {
            torch.Tensor.to: self._to,
            torch.Tensor.cuda: self._to_kind("cuda"),
            torch.Tensor.xpu: self._to_kind("xpu"),
            torch.Tensor.cpu: self._cpu,
            torch.Tensor.pin_memory: lambda tensor, *_, **__: played.pin(tensor),
            torch.Tensor.is_pinned: lambda tensor, *_, **__: played.is_pinned(tensor),
            torch.Tensor.new_tensor: self._new_tensor,
            torch.autograd.grad: _gradients,
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.played.active:  # a thread that outlived the block
            return func(*args, **kwargs)
        device = kwargs.get("device")
        if type(device) is int and self.played.owns(device):  # an index, on the accelerator
            device = torch.device(self.played.kind, device)
            kwargs = {**kwargs, "device": device}
        answer = self.answers.get(func)
        if answer:
            return answer(*args, **kwargs)
        if kwargs.get("requires_grad") and shadows_in(args):  # torch tells the outline, not `raw`
            return func(*args, **{**kwargs, "requires_grad": False}).requires_grad_()
        if device is None or not self.played.owns(device) or shadows_in(args):
            return func(*args, **kwargs)
        return self.played.arrive(func(*args, **{**kwargs, "device": _HOST}), device)

    def _to(self, tensor: torch.Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Any:
        def named(value: Any) -> Any:
            return torch.device(self.played.kind, value) if type(value) is int else value

        if [type(value) for value in args[-2:]] == [bool, bool]:  # non_blocking and copy
            *args, copy = args  # type: ignore[assignment]
        args, kwargs = tuple(map(named, args)), {k: named(v) for k, v in kwargs.items()}
        with torch._C.DisableTorchFunction():
            device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        return self.played.move(
            tensor, device, dtype, non_blocking, copy=copy, memory_format=memory_format
        )

    def _cpu(
        self, tensor: torch.Tensor, memory_format: torch.memory_format | None = None
    ) -> torch.Tensor:
        return self.played.move(tensor, _HOST, memory_format=memory_format)

    def _to_kind(self, name: str) -> Callable[..., Any]:
        def to_kind(
            tensor: torch.Tensor,
            device: Any = None,
            non_blocking: bool = False,
            memory_format: torch.memory_format | None = None,
        ) -> torch.Tensor:
            where = torch.device(name, device) if isinstance(device, int) else device or name
            return self.played.move(
                tensor, torch.device(where), None, non_blocking, memory_format=memory_format
            )

        return to_kind

    def _new_tensor(
        self,
        like: torch.Tensor,
        data: Any,
        *,
        dtype: torch.dtype | None = None,
        device: Any = None,
        requires_grad: bool = False,
    ) -> torch.Tensor:
        where = like.device if device is None else device
        there = self.played.owns(where)
        made = torch.tensor(
            data,
            dtype=dtype or like.dtype,
            device=_HOST if there else where,
            requires_grad=requires_grad,
        )
        return self.played.arrive(made, where) if there else made


class Operations(TorchDispatchMode):
    """What `Functions` cannot see: devices named inside torch's own functions, and backward."""

    def __init__(self, played: Played) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.played = played

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is None or not self.played.active or not self.played.owns(device):
            out = func(*args, **kwargs)
            place = self.played.backward_on
            if place is not None:
                tree_map(lambda o: place.admit(o) if isinstance(o, torch.Tensor) else None, out)
            return out
        given = next((item for item in args if isinstance(item, torch.Tensor)), None)
        # The graph of a shadow is that of the CPU's tensors, and goes on.
        plain = given is not None and not isinstance(given, Shadow) and given.requires_grad
        if plain and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{func} moves a tensor that requires a gradient to {device} inside torch, which "
                "is not played; call .to() from Python before"
            )
        return self.played.arrive(func(*args, **{**kwargs, "device": _HOST}), device)


def _gradients(outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> Any:
    """torch.autograd.grad, with each gradient where its tensor is."""
    wanted = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
    found = torch.autograd.grad(
        bare(outputs), bare(wanted), grad_outputs=bare(grad_outputs), **options
    )
    return tuple(
        Shadow(grad, tensor.place) if isinstance(tensor, Shadow) and grad is not None else grad
        for grad, tensor in zip(found, wanted)  # noqa: B905 - Python 3.9 has no strict
    )


def composites(played: Played) -> list[tuple[Any, str, Any]]:
    """Functions that choose a kernel by the device's name, or keep autograd state of their own."""
    function = torch.autograd.Function
    memory_of = watch.memory_of
    real_backward, real_apply = torch.autograd.backward, vars(function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        real = real_apply.__get__(None, cls)
        shadows = shadows_in((args, kwargs))
        if shadows and cls is torch.utils.checkpoint.CheckpointFunction:
            raise NotImplementedError(
                "checkpoint(use_reentrant=True) has no gradient on a live machine, and is not "
                "played; use_reentrant=False is"
            )
        # Checkpointing keeps its arguments in one, to call the model with them again.
        if not shadows or cls.__module__ == "torch.utils.checkpoint":
            return real(*args, **kwargs)
        return on_raw(real, shadows[0].place, *args, **kwargs)

    def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        shadows = shadows_in(tensors)
        with played.backward(shadows[0].place if shadows else None):
            real_backward(*bare((tensors, grad_tensors, *args)), **bare(kwargs))

    return [
        *(
            (owner, name, _on_cpu(getattr(owner, name)))
            for owner, name in (
                (torch.nn.functional, "scaled_dot_product_attention"),
                *((torch._VF, name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
            )
        ),
        (function, "apply", classmethod(apply)),
        (torch.autograd, "backward", backward),
        (watch, "memory_of", lambda one: memory_of(bare(one))),
    ]


def _is_float(item: Any) -> bool:
    """A tensor of numbers; the sizes of a batch are integers, and the CPU's in any case."""
    return isinstance(item, torch.Tensor) and item.is_floating_point()


def _on_cpu(real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, one that autocast casts to 16 bits, computed by the CPU where it is given shadows."""

    def compute(*args: Any, **kwargs: Any) -> Any:
        shadows = shadows_in((args, kwargs))
        if not shadows:
            return real(*args, **kwargs)
        place = shadows.pop().place
        one_device(place, [one for one in tree_leaves((args, kwargs)) if _is_float(one)])
        if torch.is_autocast_enabled(place.device.type):
            dtype = torch.get_autocast_dtype(place.device.type)
            args, kwargs = tree_map(
                lambda item: item.to(dtype) if _is_float(item) else item,
                (args, kwargs),
            )
        return on_raw(real, place, *args, **kwargs)

    return compute
