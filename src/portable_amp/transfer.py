"""Moving batches and models to a device, and what a DataLoader should do for it."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from portable_amp.backends import Backend
from portable_amp.capabilities import Capabilities
from portable_amp.errors import PrecisionFallbackWarning
from portable_amp.nested import map_tensors, tensors_in
from portable_amp.notices import tell_once


def to_device(
    value: Any, device: torch.device, backend: Backend, capabilities: Capabilities
) -> Any:
    """`value` on `device`: a module, moved in place as in torch, or tensors nested in containers.

    Copies are asynchronous only from page-locked memory to a device that keeps them in order. On a
    device without float64, float64 tensors become float32, and that is said once.
    """
    lacks_float64 = capabilities.float64 is False

    def narrow(tensor: torch.Tensor) -> torch.Tensor:
        if not lacks_float64 or tensor.dtype is not torch.float64:
            return tensor
        tell_once(
            ("float64", device.type),
            f"{device.type} has no float64: such tensors are moved there as float32.",
            PrecisionFallbackWarning,
        )
        return tensor.to(torch.float32)

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if lacks_float64:
            tensor = narrow(tensor)  # before asking: the narrowed copy is not in pinned memory
        return tensor.to(device, non_blocking=backend.pins_memory and tensor.is_pinned())

    if isinstance(value, torch.nn.Module):
        for held in (*value.parameters(), *value.buffers()):
            held.data = narrow(held.data)
        future: Any = torch.__future__
        before = future.get_swap_module_params_on_conversion()
        future.set_swap_module_params_on_conversion(before or backend.replaces_parameters)
        try:
            return value.to(device)
        finally:
            future.set_swap_module_params_on_conversion(before)
    return map_tensors(move, value)


def prefetch(
    batches: Iterable[Any], move: Callable[[Any], Any], device: torch.device, backend: Backend
) -> Iterator[Any]:
    """What `move` makes of each batch, made while the device computes with the one before.

    Where copies may be asynchronous they run on a stream of their own.
    """
    if backend.synchronize is None:
        # The CPU: it computes on the very cores that would load. 5 % slower, measured.
        yield from map(move, batches)
        return
    source, end = iter(batches), object()
    streams: Any = torch.get_device_module(device) if backend.pins_memory else None
    side = streams.Stream(device=device) if streams else None

    def load() -> tuple[Any, Any]:
        if side is None:
            return next(source, end), None
        with streams.stream(side):  # pinning, too, is for this device, not for a thread's first
            batch = next(source, end)
            return (batch if batch is end else move(batch)), side.record_event()

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(load)
        while (loaded := coming.result())[0] is not end:
            coming = pool.submit(load)
            batch, copied = loaded
            if side is None:
                batch = move(batch)
            else:
                here = streams.current_stream(device)
                here.wait_event(copied)
                for tensor in tensors_in(batch):
                    if tensor.device.type == device.type:
                        # Or its memory could be given to the batch after next while it is read.
                        tensor.record_stream(here)
            yield batch


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
