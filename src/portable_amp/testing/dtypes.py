"""Which dtype each layer computes in under a backend's autocast, without the backend."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from portable_amp.backends import parse_device
from portable_amp.errors import DeviceError, MachineError
from portable_amp.nested import map_tensors, tensors_in
from portable_amp.testing.functions import replaced
from portable_amp.testing.kinds import kind_of
from portable_amp.testing.play import is_playing, play
from portable_amp.testing.shadow import guarded

# A machine that has such a device and computes in both 16-bit dtypes.
_WITH = {"cpu": "cpu", "cuda": "h100", "xpu": "max1550", "mps": "m2-macos15"}


@dataclass(frozen=True)
class LayerDtype:
    """What one layer, a module without children, takes and gives."""

    name: str
    """As in `model.named_modules()`."""
    kind: str
    """The class, such as "LayerNorm"."""
    takes: tuple[torch.dtype, ...]
    """The dtypes of its floating inputs."""
    gives: tuple[torch.dtype, ...]
    """The dtypes of its floating outputs."""


def dtype_flow(
    model: torch.nn.Module, batch: Any, device_type: str, dtype: torch.dtype | None = None
) -> list[LayerDtype]:
    """The dtypes that flow through the layers of `model` under autocast, in the order of calls.

    The forward pass runs on tensors that have shapes and dtypes but no numbers, so any model fits,
    and nothing of it is changed. The rules are torch's own for the backend.

    Args:
        model: on any device, in any mode.
        batch: what the model is called with; a tuple is its arguments, a dict its keywords.
        device_type: "cuda", "xpu", "mps" or "cpu".
        dtype: what autocast lowers to; None: torch's default there; torch.float32: no autocast.

    Raises:
        DeviceError: torch knows no such device, or this system cannot play it.
        MachineError: a machine is being played; torch would look for its device.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    >>> for device_type in ("cpu", "cuda"):
    ...     flow = dtype_flow(model, torch.ones(2, 4), device_type, torch.bfloat16)
    ...     print(device_type, [layer.gives[0] for layer in flow])
    cpu [torch.bfloat16, torch.bfloat16]
    cuda [torch.bfloat16, torch.float32]
    """
    device = parse_device(device_type)
    if is_playing():
        raise MachineError("dtype_flow() asks torch itself: call it outside of play()")
    if device.type not in _WITH:
        known = ", ".join(sorted(_WITH))
        raise DeviceError(f"dtype_flow() knows the rules of {known}, not of {device.type}")
    # Autocast itself looks for the device, and never again once it is made.
    with play(_WITH[device.type]):
        region = torch.autocast(device.type, None if dtype is torch.float32 else dtype)
    seen: list[LayerDtype] = []
    with contextlib.ExitStack() as stack:
        if kind_of(device.type).accelerator:
            stack.enter_context(guarded(device.type))
            stack.enter_context(replaced([(F, "scaled_dot_product_attention", _attention)]))
        fake = stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.no_grad())

        def outline(tensor: torch.Tensor) -> torch.Tensor:
            with fake:
                return torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
                )

        for name, layer in model.named_modules():
            if next(layer.children(), None) is None:
                hook = _note(seen, name)
                stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        state = {k: outline(v) for k, v in (*model.named_parameters(), *model.named_buffers())}
        inputs = map_tensors(outline, batch)
        if dtype is not torch.float32:
            stack.enter_context(region)
        args, kwargs = _arguments(inputs)
        torch.func.functional_call(model, state, args, kwargs)
    return seen


def _attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What torch has chooses between kernels that only a real device has."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, args, kwargs = map_tensors(
            lambda t: t.to(dtype) if t.is_floating_point() else t, (query, args, kwargs)
        )
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_attention_math(query, *args, **kwargs)[0]
    return out


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, dict):
        return (), batch
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def _note(seen: list[LayerDtype], name: str) -> Any:
    def hook(layer: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        taken = _floating((args, list(kwargs.values())))
        seen.append(LayerDtype(name, type(layer).__name__, taken, _floating(output)))

    return hook


def _floating(value: Any) -> tuple[torch.dtype, ...]:
    return tuple(tensor.dtype for tensor in tensors_in(value) if tensor.is_floating_point())
