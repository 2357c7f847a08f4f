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
    """The module of a vendor's device that this machine really has."""
    name = str(torch._C._get_privateuse1_backend_name())
    return [getattr(torch, name)] if hasattr(torch, name) else []


def host(played: Played) -> Fakes:
    """A machine without an accelerator."""
    yield from ()


def mps(played: Played) -> Fakes:
    """torch.mps and torch.backends.mps on a Mac."""
    macos = played.machine.hardware.macos or (0, 0)
    place = played.places[0]
    yield torch.backends.mps, "is_available", lambda: True
    yield torch.backends.mps, "is_built", lambda: True
    yield torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos >= (major, minor)
    yield torch.backends.mps, "get_name", lambda: played.machine.hardware.name
    functions = {
        **_shared(played),
        "current_allocated_memory": lambda: place.ledger.allocated,
        "driver_allocated_memory": lambda: place.ledger.reserved,
        "recommended_max_memory": lambda: place.ledger.limit,
    }
    yield from _on(torch.mps, functions)


def cuda_like(played: Played) -> Fakes:
    """torch.cuda, or torch.xpu, with such a device."""
    yield from _on(getattr(torch, played.kind), _cuda_functions(played))


def vendor(played: Played) -> Fakes:
    """torch.<name> as the vendor's package would register it."""
    module = ModuleType(f"torch.{played.kind}")
    module.__dict__.update(_cuda_functions(played))
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
    }


def _cuda_functions(played: Played) -> dict[str, Callable[..., Any]]:
    hardware = played.machine.hardware
    kind = hardware.device_type

    def at(device: Any = None) -> Any:
        return played.place(torch.device(kind) if device is None else device).ledger

    def reset_peak(device: Any = None) -> None:
        at(device).peak = at(device).allocated

    @contextlib.contextmanager
    def use(device: Any) -> Iterator[None]:
        before = played.current
        played.set_current(device)
        try:
            yield
        finally:
            played.current = before

    properties = SimpleNamespace(
        name=hardware.name,
        total_memory=hardware.total_memory,
        multi_processor_count=1,
        major=(hardware.compute_capability or (9, 0))[0],
        minor=(hardware.compute_capability or (9, 0))[1],
        gcnArchName=f"{hardware.arch}:sramecc+:xnack-" if hardware.arch else "",
        has_fp64=hardware.float64,
        has_fp16=hardware.float16,
        has_bfloat16_conversions=hardware.bfloat16,
    )
    dtypes = [
        dtype
        for dtype, there in (
            (torch.float16, hardware.float16),
            (torch.bfloat16, hardware.bfloat16),
        )
        if there
    ]
    return {
        **_shared(played),
        **_streams(played),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "current_device": lambda: played.current,
        "set_device": played.set_current,
        "device": use,
        "get_device_name": lambda device=None: hardware.name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        # torch counts emulation, unless asked not to; on AMD's cards it always says yes.
        "is_bf16_supported": lambda including_emulation=True: (
            including_emulation or bool(hardware.arch) or properties.major >= 8
        ),
        "memory_allocated": lambda device=None: at(device).allocated,
        "max_memory_allocated": lambda device=None: at(device).peak,
        "memory_reserved": lambda device=None: at(device).reserved,
        "max_memory_reserved": lambda device=None: at(device).peak,
        "reset_peak_memory_stats": reset_peak,
        "mem_get_info": lambda device=None: (at(device).free, at(device).limit),
        "get_amp_supported_dtype": lambda: dtypes,
    }


def _on(module: ModuleType, functions: Mapping[str, Any]) -> Fakes:
    for name, function in functions.items():
        if hasattr(module, name):
            yield module, name, function


def _shared(played: Played) -> dict[str, Callable[..., Any]]:
    """What every backend's module has."""

    def index(device: Any) -> int:
        if isinstance(device, int):
            return device
        return played.place(torch.device(device)).device.index or 0 if device else played.current

    def synchronize(device: Any = None) -> None:
        played.record("synchronize")
        played.settle()

    def empty_cache() -> None:
        played.record("empty_cache")
        for place in played.places:
            place.ledger.empty_cache()

    def manual_seed(seed: int) -> None:
        for generator in played.generators:
            generator.manual_seed(seed)

    def get_rng_state(device: Any = None) -> torch.Tensor:
        return played.generators[index(device)].get_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
        played.generators[index(device)].set_state(new_state)

    return {
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: len(played.places),
        "synchronize": synchronize,
        "empty_cache": empty_cache,
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed,
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
    }


def _accelerator(played: Played) -> Fakes:
    module = getattr(torch, "accelerator", None)  # torch 2.6+
    here = played.row.accelerator
    if module is None:
        return
    yield module, "is_available", lambda: here
    yield module, "device_count", lambda: len(played.places) if here else 0
    yield (
        module,
        "current_accelerator",
        lambda check_available=False: torch.device(played.kind) if here else None,
    )
    if not here:
        return
    yield module, "current_device_index", lambda: played.current
    yield module, "set_device_index", played.set_current
    yield module, "synchronize", _shared(played)["synchronize"]
    # Optimizers ask whether a graph is being captured.
    yield module, "current_stream", _streams(played)["current_stream"]
    if hasattr(module, "empty_cache"):  # torch 2.9+, with the statistics
        yield module, "empty_cache", _shared(played)["empty_cache"]
        ledger = played.places[0].ledger
        yield module, "memory_allocated", lambda device=None: ledger.allocated
        yield module, "memory_reserved", lambda device=None: ledger.reserved
        yield module, "max_memory_allocated", lambda device=None: ledger.peak


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
        if not isinstance(map_location, (str, torch.device)) or not played.owns(map_location):
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
            return lambda function: compile_(function, **options)
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
