"""The functions of torch that tell of devices, as they answer on a played machine."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from portable_amp.nested import map_tensors

if TYPE_CHECKING:
    from portable_amp.testing.play import Played
    from portable_amp.testing.shadow import Place

Fakes = Iterable[tuple[Any, str, Any]]
"""Owner, name of the attribute, what stands there while the machine is played."""

_Generator = torch.Generator  # the real one, also where one machine plays within another

# Where torch says whether the device is there, for the kinds that are part of torch.
_ASKED_AT = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}


def fakes(played: Played) -> Fakes:
    """Everything that is replaced while this machine is played."""
    for name, owner in _ASKED_AT.items():
        yield owner, "is_available", lambda: False
        yield getattr(torch, name), "device_count", lambda: 0
    for module in _registered():
        yield module, "is_available", lambda: False
    yield torch.version, "hip", "7.0" if played.machine.hardware.arch else None
    yield from played.row.functions(played)
    yield from _accelerator(played)
    yield from _loading(played)
    yield torch, "compile", _compile(played)
    yield torch, "Generator", _generator(played)


def _registered() -> list[Any]:
    """The modules of vendors' devices that this machine really has."""
    names = ("hpu", torch._C._get_privateuse1_backend_name())
    return [getattr(torch, name) for name in names if hasattr(torch, name)]


def host(played: Played) -> Fakes:
    """A machine without an accelerator."""
    yield from ()


def mps(played: Played) -> Fakes:
    """torch.mps and torch.backends.mps on a Mac."""
    macos = played.machine.hardware.macos or ()
    yield torch.backends.mps, "is_available", lambda: True
    yield torch.backends.mps, "is_built", lambda: True
    yield torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos >= (major, minor)
    yield torch.backends.mps, "get_name", lambda: played.machine.hardware.name
    functions = {
        **_functions(played),
        "current_allocated_memory": lambda: played.memory.allocated,
        "driver_allocated_memory": lambda: played.memory.reserved,
        "recommended_max_memory": lambda: played.memory.limit,
    }
    yield from _on(torch.mps, functions)


def cuda_like(played: Played) -> Fakes:
    """torch.cuda, or torch.xpu, with such a device."""
    yield from _on(getattr(torch, played.kind), {**_functions(played), **_facts(played)})


def vendor(played: Played) -> Fakes:
    """torch.<name> as the vendor's package would register it."""
    module = ModuleType(f"torch.{played.kind}")
    module.__dict__.update({**_functions(played), **_facts(played)})
    yield torch, played.kind, module


class _Event:
    """A mark in a queue of the played device."""

    def __init__(self, played: Played) -> None:
        self.played = played

    def record(self, stream: Any = None) -> None:
        self.played.record("record_event")

    def wait(self, stream: Any = None) -> None:
        self.played.record("wait_event")

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.played.record("wait_event")
        self.played.settle()


class _Stream:
    """A queue of the played device, which computes everything at once and in order."""

    def __init__(self, played: Played) -> None:
        self.played = played

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event(self.played)
        event.record(self)
        return event

    def wait_event(self, event: _Event) -> None:
        event.wait(self)

    def wait_stream(self, stream: _Stream) -> None:
        self.wait_event(stream.record_event())

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def is_capturing(self) -> bool:
        return False


def _streams(played: Played) -> dict[str, Callable[..., Any]]:
    """Streams and events of a module like torch.cuda."""
    first = _Stream(played)
    chosen = threading.local()

    @contextlib.contextmanager
    def use(stream: _Stream | None) -> Iterator[None]:
        before = here()
        chosen.stream = stream or before
        played.record("stream")
        try:
            yield
        finally:
            chosen.stream = before

    def here(device: Any = None) -> _Stream:
        stream: _Stream = getattr(chosen, "stream", first)
        return stream

    return {
        "Event": lambda *args, **options: _Event(played),
        "Stream": lambda *args, **options: _Stream(played),
        "stream": use,
        "current_stream": here,
        "default_stream": lambda device=None: first,
        "is_current_stream_capturing": lambda: False,
    }


def _facts(played: Played) -> dict[str, Callable[..., Any]]:
    """What a module like torch.cuda tells of the hardware."""
    hardware = played.machine.hardware
    capability = hardware.compute_capability
    properties = SimpleNamespace(
        name=hardware.name,
        total_memory=hardware.total_memory,
        multi_processor_count=1,
        has_fp64=hardware.float64,
        has_fp16=hardware.float16,
        has_bfloat16_conversions=hardware.bfloat16,
    )
    if hardware.arch:
        properties.gcnArchName = f"{hardware.arch}:sramecc+:xnack-"
        # gfx90a is 9.0, gfx1030 is 10.3
        capability = int(hardware.arch[3:-2]), int(hardware.arch[-2])
    bfloat16 = bool(hardware.bfloat16)
    if capability:
        properties.major, properties.minor = capability
        bfloat16 = properties.major >= 8
    dtypes = {torch.float16: hardware.float16, torch.bfloat16: hardware.bfloat16}
    return {
        "get_device_name": lambda device=None: hardware.name,
        "get_device_properties": lambda device=None: properties,
        # torch counts emulation, unless asked not to.
        "is_bf16_supported": lambda including_emulation=True: including_emulation or bfloat16,
        "get_amp_supported_dtype": lambda: [dtype for dtype, there in dtypes.items() if there],
    }


def _on(module: ModuleType, functions: Mapping[str, Any]) -> Fakes:
    for name, function in functions.items():
        if hasattr(module, name):
            yield module, name, function


def _functions(played: Played) -> dict[str, Callable[..., Any]]:
    """What the modules of accelerators do, each as much of it as it has."""

    def at(device: Any) -> Place:
        return played.place(played.kind if device is None else device)

    def generator(device: Any = None) -> torch.Generator:
        return played.generators[played.places.index(at(device))]

    @contextlib.contextmanager
    def use(device: Any) -> Iterator[None]:
        before = played.current
        played.set_current(device)
        try:
            yield
        finally:
            played.current = before

    def synchronize(device: Any = None) -> None:
        played.record("synchronize")
        played.settle()

    def empty_cache() -> None:
        played.record("empty_cache")
        for place in played.places:
            place.ledger.empty_cache()

    def reset_peak(device: Any = None) -> None:
        at(device).ledger.peak = at(device).ledger.allocated

    def max_reserved(device: Any = None) -> int:
        return max(at(device).ledger.peak, at(device).ledger.reserved)

    def manual_seed(seed: int) -> None:
        generator().manual_seed(seed)

    def manual_seed_all(seed: int) -> None:
        for each in played.generators:
            each.manual_seed(seed)

    def set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
        generator(device).set_state(new_state)

    return {
        **_streams(played),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: len(played.places),
        "current_device": lambda: played.current,
        "set_device": played.set_current,
        "device": use,
        "synchronize": synchronize,
        "empty_cache": empty_cache,
        "memory_allocated": lambda device=None: at(device).ledger.allocated,
        "max_memory_allocated": lambda device=None: at(device).ledger.peak,
        "memory_reserved": lambda device=None: at(device).ledger.reserved,
        "max_memory_reserved": max_reserved,
        "reset_peak_memory_stats": reset_peak,
        "mem_get_info": lambda device=None: (at(device).ledger.free, at(device).ledger.limit),
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed_all,
        "get_rng_state": lambda device=None: generator(device).get_state(),
        "set_rng_state": set_rng_state,
    }


def _accelerator(played: Played) -> Fakes:
    functions: dict[str, Callable[..., Any]] = {
        "is_available": lambda: False,
        "device_count": lambda: 0,
        "current_accelerator": lambda *_, **__: None,
    }
    if played.row.accelerator:
        functions = _functions(played)
        functions |= {
            "current_accelerator": lambda *_, **__: torch.device(played.kind),
            "current_device_index": functions["current_device"],
            "set_device_index": functions["set_device"],
            "get_memory_info": functions["mem_get_info"],
        }
    if hasattr(torch, "accelerator"):  # torch 2.6+; the statistics 2.9+
        yield from _on(torch.accelerator, functions)


def _loading(played: Played) -> Fakes:
    """Data loaders that pin, and checkpoints that are loaded to the device."""
    real_iter, real_load = torch.utils.data.DataLoader.__iter__, torch.load

    def iterate(loader: torch.utils.data.DataLoader[Any]) -> Iterator[Any]:
        if not loader.pin_memory:
            return real_iter(loader)
        if not played.pins:
            # Source: torch.utils.data.dataloader, 2.4 to 2.15: it warns, and does not pin.
            warnings.warn(
                "'pin_memory' argument is set as true but no accelerator that reads pinned memory "
                f"is found on the played {played.machine.key}",
                stacklevel=2,
            )
        loader.pin_memory = False
        try:
            batches = real_iter(loader)
        finally:
            loader.pin_memory = True  # noqa: PAM503
        return (map_tensors(pin, batch) for batch in batches) if played.pins else batches

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        return played.pin(tensor)

    def load(f: Any, map_location: Any = None, **options: Any) -> Any:
        if not played.owns(map_location):
            return real_load(f, map_location, **options)
        loaded = real_load(f, "cpu", **options)
        return map_tensors(lambda tensor: tensor.to(map_location), loaded)

    yield torch.utils.data.DataLoader, "__iter__", iterate
    yield torch, "load", load


def _generator(played: Played) -> type[torch.Generator]:
    """torch.Generator, for the played device too; the CPU draws, as it computes all numbers."""

    class AlsoReal(type(_Generator)):  # type: ignore[misc]
        def __instancecheck__(cls, made: Any) -> bool:
            return isinstance(made, _Generator)

    class Generator(_Generator, metaclass=AlsoReal):
        """A generator that says it is on the played device."""

        place: Any

        def __new__(cls, device: Any = "cpu") -> Any:
            if not played.owns(device):
                return _Generator(device)
            made: Any = _Generator.__new__(cls, "cpu")  # type: ignore[call-arg]
            made.place = played.place(device)
            return made

        @property
        def device(self) -> torch.device:  # type: ignore[override]
            where: torch.device = self.place.device
            return where

    return Generator


def _compile(played: Played) -> Callable[..., Any]:
    """torch.compile that runs the model as it is: no compiler knows a played device."""

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "Cannot find a working triton installation. Either the package is not installed or it "
            "is too old."
        )

    def compile_(model: Any = None, **options: Any) -> Any:
        if model is None:
            return compile_
        played.record("compile")
        return model if played.machine.triton else missing

    return compile_


@contextlib.contextmanager
def replaced(attributes: Fakes) -> Iterator[None]:
    """These attributes, put back at the end in reverse order."""
    gone = object()
    with contextlib.ExitStack() as stack:
        for owner, name, value in attributes:
            # Not getattr: what a class inherits must not become its own.
            before = vars(owner).get(name, gone)
            if before is gone:
                stack.callback(delattr, owner, name)
            else:
                stack.callback(setattr, owner, name, before)
            setattr(owner, name, value)
        yield
