"""Moving batches and models to a device, and what a DataLoader should do for it."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from portable_amp.backends import Backend
from portable_amp.capabilities import Capabilities
from portable_amp.errors import PrecisionFallbackWarning
from portable_amp.nested import held_by, map_tensors
from portable_amp.notices import tell_once

# What takes the place of a dtype that a device lacks.
_NARROWER = {
    torch.float64: torch.float32,
    torch.complex128: torch.complex64,
    torch.bfloat16: torch.float32,
}


def to_device(
    value: Any,
    device: torch.device,
    backend: Backend,
    capabilities: Capabilities,
    layout: torch.memory_format | None = None,
) -> Any:
    """`value` on `device`: a module, moved in place as in torch, or tensors nested in containers.

    Copies are asynchronous only from page-locked memory to a device that keeps them in order. A
    dtype that the device lacks becomes another, and that is said once. What has a method `to` of
    its own is moved by it, its tensors as all others. What holds tensors and cannot be moved stays,
    and that is said once, too. With a layout, what has dimensions (N, C, H, W) gets it.
    """
    missing, pins = capabilities.missing_dtypes, backend.pins_memory

    def narrow(tensor: torch.Tensor) -> torch.Tensor:
        had = tensor.dtype
        if had not in missing:
            return tensor
        gets = _NARROWER[had]
        tell_once(
            (had, device.type),
            f"{device.type} has no {_name(had)} here: such tensors are moved there as "
            f"{_name(gets)}.",
            PrecisionFallbackWarning,
        )
        return tensor.to(gets)

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if missing:
            tensor = narrow(tensor)  # before asking: the narrowed copy is not in pinned memory
        tensor = tensor.to(device, non_blocking=pins and tensor.is_pinned())
        return tensor.contiguous(memory_format=layout) if layout and tensor.dim() == 4 else tensor

    def move_whole(thing: Any) -> Any:
        future: Any = torch.__future__
        before = future.get_swap_module_params_on_conversion()
        future.set_swap_module_params_on_conversion(before or backend.replaces_parameters)
        moving = _MovedBy(move)
        try:
            with moving:
                moved = thing.to(device)
        except Exception as error:
            if moving.moved or isinstance(thing, torch.nn.Module):
                raise
            # Another kind of `to`, such as that of a quantity with a unit.
            kind = type(thing)
            tell_once(
                ("stays", kind),
                f"a batch has a {kind.__module__}.{kind.__qualname__}, which ctx.to leaves as it "
                f"is: its method to() says {error}",
            )
            return thing
        finally:
            future.set_swap_module_params_on_conversion(before)
        return thing if moved is None else moved

    return map_tensors(move, value, move_whole, _tell_of_what_stays)


class _MovedBy(TorchFunctionMode):
    """Tensor.to is `move`: the `to` of another library may copy asynchronously where that harms.

    PyTorch Geometric's takes `non_blocking` from its caller, TensorDict's decides it by itself; and
    none of them knows what dtypes the device lacks.
    """

    def __init__(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.move, self.moved = move, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func != torch.Tensor.to:
            return func(*args, **(kwargs or {}))
        self.moved = True
        return self.move(args[0])


def _tell_of_what_stays(thing: Any) -> None:
    """Say of something that is neither moved nor looked into that it should be, if so."""
    kind = type(thing)
    numbers = hasattr(thing, "__array_interface__") and thing.ndim and thing.dtype.kind in "biufc"
    if numbers:
        cure = "make it a tensor, with torch.as_tensor"
    elif next(held_by(thing), None) is not None:
        cure = "give it a method to(device), make it a data class, or take its tensors out"
    else:
        return
    name = f"{kind.__module__}.{kind.__qualname__}"
    tell_once(("stays", kind), f"a batch has a {name}, which ctx.to leaves where it is: {cure}.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def prefetch(
    batches: Iterable[Any], move: Callable[[Any], Any], device: torch.device, backend: Backend
) -> Iterator[Any]:
    """What `move` makes of each batch, copied while the device computes with the one before.

    Where copies may be asynchronous they run on a stream of their own. All is asked for in the
    thread of the loop: random states are the process's, modes and autocast the thread's. Only what
    the processes of a loader have ready is asked for one batch ahead.
    """
    if not backend.pins_memory:
        yield from map(move, batches)
        return
    ahead, source, end = getattr(batches, "num_workers", 0) > 0, iter(batches), object()
    streams: Any = torch.get_device_module(device)
    side = streams.Stream(device=device)

    def load() -> tuple[Any, Any] | None:
        batch = next(source, end)
        if batch is end:
            return None
        with streams.stream(side):
            return move(batch), side.record_event()

    here: Any = None

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == device.type:
            # Or its memory could be given to the batch after next while it is read.
            tensor.record_stream(here)
        return tensor

    coming = load()
    while coming:
        (batch, copied), coming, failed = coming, None, None
        if ahead:
            try:
                coming = load()
            except Exception as error:  # it is the next batch's, and comes in its place
                failed = error
        here = streams.current_stream(device)
        here.wait_event(copied)
        map_tensors(keep, batch, lambda thing: [*map(keep, held_by(thing))])
        yield batch
        if failed:
            raise failed
        if not ahead:
            coming = load()


def fetch(tensor: torch.Tensor, backend: Backend) -> Callable[[], torch.Tensor]:
    """What returns `tensor` on the CPU as it is now, and waits for nothing asked for later."""
    if not backend.pins_memory or tensor.device.type != backend.device_type:
        kept = tensor.detach().clone()
        return kept.cpu
    streams: Any = torch.get_device_module(tensor.device)
    host = torch.empty(tensor.shape, dtype=tensor.dtype).pin_memory()  # noqa: PAM503
    host.copy_(tensor.detach(), non_blocking=True)
    copied = streams.current_stream(tensor.device).record_event()

    def wait() -> torch.Tensor:
        copied.synchronize()
        return host

    return wait


def loader_options(backend: Backend, num_workers: int, seed: int | None) -> dict[str, Any]:
    """Arguments for a DataLoader that feeds this kind of device; see `DeviceContext`."""
    options: dict[str, Any] = {
        "num_workers": num_workers,
        # Pinning for a device that does not read page-locked memory only warns and wastes time.
        "pin_memory": backend.pins_memory,
        "worker_init_fn": seed_worker,
        "persistent_workers": num_workers > 0,
    }
    if seed is not None:
        options["generator"] = torch.Generator().manual_seed(seed)
    return options


def seed_worker(worker_id: int) -> None:
    """Give a DataLoader worker random states of its own, those of its data set included.

    A data set with a method `set_random_seed(seed: int)` gets its worker's seed through it, also
    inside Subset and its like. Libraries with generators of their own need that: every worker gets
    a copy of the same one, and would draw the same augmentations.
    """
    seed = torch.initial_seed() % 2**32  # torch gives each worker, in each epoch, another one
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy:
        numpy.random.seed(seed)
    info = torch.utils.data.get_worker_info()
    dataset: Any = info.dataset if info else None
    while dataset is not None:
        if hasattr(dataset, "set_random_seed"):
            dataset.set_random_seed(seed)
        dataset = getattr(dataset, "dataset", None)
