"""play: this process behaves as on another machine, for the length of a `with` block."""

from __future__ import annotations

import contextlib
import difflib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from portable_amp import backends, capabilities, notices
from portable_amp.autocast import Autocast
from portable_amp.backends import Backend
from portable_amp.errors import MachineError
from portable_amp.testing import machines
from portable_amp.testing.functions import fakes, replaced
from portable_amp.testing.kinds import kind_of
from portable_amp.testing.ledger import Ledger
from portable_amp.testing.machines import Machine
from portable_amp.testing.shadow import Place, Shadow, guarded
from portable_amp.testing.tensors import Functions, Operations, composites


@dataclass(frozen=True)
class Call:
    """Something that was asked of the played device."""

    name: str
    """"copy", "pin_memory", "autocast", "scale", "synchronize", "empty_cache", "compile", "stream",
    "record_event", "wait_event" or "record_stream"."""
    non_blocking: bool = False
    """The copy was allowed to be asynchronous."""
    pinned: bool = False
    """The copy was from page-locked memory."""
    dtype: torch.dtype | None = None
    """What autocast lowered to."""


@dataclass(frozen=True)
class Quirks:
    """What a live device does badly; by default what the machine is known for."""

    memory: int | None = None
    """Bytes it has; None: what the machine has."""
    float64: bool | None = None
    """It has float64 tensors; None: as the machine has."""
    late_copies: bool | None = None
    """An asynchronous copy reads its source only when the device needs it."""
    slow: tuple[torch.dtype, ...] | None = None
    """Dtypes whose matrix products take a millisecond more; the emulated ones."""
    wrong: tuple[torch.dtype, ...] | None = None
    """Dtypes whose matrix products are NaN; those that do not work there."""


class Played:
    """A machine that is being played, and what was asked of its device."""

    def __init__(self, machine: Machine, *, live: bool, count: int, quirks: Quirks) -> None:
        self.machine = machine
        self.live = live
        self.calls: list[Call] = []
        self.active = True
        self.kind = machine.hardware.device_type
        self.current = 0
        self.generators = [torch.Generator() for _ in range(count)]
        self._here = threading.local()
        self.row = kind_of(self.kind, amd=bool(machine.hardware.arch))
        self.places = [
            self._place(torch.device(self.kind, index), quirks) for index in range(count)
        ]
        self.pins = self.row.pins

    def asked(self, name: str, **details: Any) -> list[Call]:
        """The calls of that name with these details, in order."""
        return [
            call
            for call in self.calls
            if call.name == name and all(getattr(call, k) == v for k, v in details.items())
        ]

    @property
    def memory(self) -> Ledger:
        """The books of the first device's memory; `limit` may be set."""
        return self.places[0].ledger

    # --- what the fakes ask ------------------------------------------------------------------

    def record(self, name: str, **details: Any) -> None:
        """Note a call, unless the block is over."""
        if self.active:
            self.calls.append(Call(name, **details))

    @property
    def backward_on(self) -> Place | None:
        """Where this thread runs a backward pass."""
        return getattr(self._here, "backward_on", None)

    @contextlib.contextmanager
    def backward(self, place: Place | None) -> Iterator[None]:
        """What is allocated in the block counts for `place`."""
        before, self._here.backward_on = self.backward_on, place or self.backward_on
        try:
            yield
        finally:
            self._here.backward_on = before

    def settle(self) -> None:
        """Let all copies under way arrive."""
        for place in self.places:
            place.settle()

    def owns(self, device: Any) -> bool:
        """Whether this names an accelerator, which this machine has or has not."""
        if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
            return False
        kind = self.kind if isinstance(device, int) else torch.device(device).type
        return kind not in _NO_ACCELERATORS

    def place(self, device: Any) -> Place:
        """The played device of that name, or the error of a machine that has none."""
        named = torch.device(self.kind, device) if isinstance(device, int) else torch.device(device)
        if named.type != self.kind:
            raise kind_of(named.type).not_here
        index = self.current if named.index is None else named.index
        if index >= len(self.places):
            raise RuntimeError(
                f"{self.kind.upper()} error: invalid device ordinal: {named} of {len(self.places)}"
            )
        return self.places[index]

    def set_current(self, device: Any) -> None:
        """Make this device the current one."""
        self.current = self.places.index(self.place(device))

    def arrive(self, made: Any, device: Any) -> Any:
        """Tensors that were made for `device`, there."""
        place = self.place(device)
        if not isinstance(made, torch.Tensor):
            return made
        place.check(made.dtype)
        return Shadow(made, place) if self.live else made

    def move(
        self,
        tensor: torch.Tensor,
        device: torch.device | None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
        *,
        copy: bool = False,
        memory_format: torch.memory_format | None = None,
    ) -> torch.Tensor:
        """Tensor.to, for every pair of devices."""
        options: Any = {"dtype": dtype or tensor.dtype, "copy": copy}
        if memory_format is not None:
            options["memory_format"] = memory_format
        place = self.place(device) if device is not None and self.owns(device) else None
        there = isinstance(tensor, Shadow) and tensor.place is place
        if device is None or there or (place is None and not isinstance(tensor, Shadow)):
            if device is not None and not there:
                options["device"] = device
            return tensor.to(**options)
        pinned = self.is_pinned(tensor)
        raw = tensor.raw if isinstance(tensor, Shadow) else tensor
        if place is None:
            self.record("copy", non_blocking=non_blocking)
            return raw.to(**{**options, "device": device, "copy": True})
        self.record("copy", non_blocking=non_blocking, pinned=pinned)
        place.check(options["dtype"])
        moved = raw.to(**{**options, "copy": True})
        if not self.live:
            return moved
        shadow = Shadow(moved, place)
        if non_blocking and not raw.requires_grad and moved.dtype is raw.dtype:
            place.postpone(shadow, raw, kept=pinned)
        return shadow

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in memory that counts as page-locked."""
        self.record("pin_memory")
        if not self.row.accelerator:
            raise RuntimeError("Cannot access accelerator device when none is available.")
        copied = tensor.clone()
        copied.untyped_storage()._played_as_pinned = True  # type: ignore[attr-defined]
        return copied

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether `pin` made it, or what it is a view of."""
        return getattr(tensor.untyped_storage(), "_played_as_pinned", False)

    def _place(self, device: torch.device, quirks: Quirks) -> Place:
        row = self.machine
        late = self.row.late_copies if quirks.late_copies is None else quirks.late_copies
        return Place(
            device,
            Ledger(
                self.machine.hardware.total_memory if quirks.memory is None else quirks.memory,
                self.row.out_of_memory,
            ),
            missing=row.capabilities.missing_dtypes,
            no_dtype=self.row.no_dtype,
            slow=frozenset(row.slow if quirks.slow is None else quirks.slow),
            wrong=frozenset(row.wrong if quirks.wrong is None else quirks.wrong),
            late_copies=late,
        )


_NO_ACCELERATORS = ("cpu", "meta")
_playing: list[tuple[int, Played]] = []


def is_playing() -> bool:
    """Whether this process plays a machine now."""
    return bool(_playing)


@contextlib.contextmanager
def play(
    machine: str | Machine,
    *,
    live: bool = False,
    count: int = 1,
    torch_version: str | None = None,
    **quirks: Any,
) -> Iterator[Played]:
    """Within the block this process behaves as on that machine, as far as its devices go.

    torch reports the machine's devices and no others; `DeviceContext()` and the drop-ins decide as
    they would there; tensors that are moved there stay on the CPU. With `live` they become shadows:
    tensors that say they are on the device, on which the backend's own autocast rules work, and
    whose numbers the CPU computes.

    The whole process plays, threads included; threads started in the block can use the device.
    torch.compile runs the model as it is.

    Args:
        machine: a name of the catalogue, or a Machine.
        live: play the tensors too; for cuda, xpu and mps, on Linux and macOS.
        count: how many such devices there are.
        torch_version: the torch that runs there, "2.6"; None: the row's.
        quirks: fields of `Quirks`, for live devices.

    Yields:
        What is played; `calls` lists what was asked of the device.

    Raises:
        MachineError: there is no such machine, version or option; the nearest names are told.
        DeviceError: a live device of this type cannot be played here.

    >>> from portable_amp import DeviceContext
    >>> with play("m1-macos13") as played:
    ...     ctx = DeviceContext()
    ...     batch = ctx.to(torch.ones(2, 2))
    >>> ctx.device, played.asked("copy", non_blocking=True)
    (device(type='mps', index=0), [])
    """
    # What torch finds out about this machine when it loads its compiler must be the truth.
    import torch._dynamo

    row = machines.machine(machine, torch_version) if isinstance(machine, str) else machine
    row = _with_this_torch(row)
    options = _quirks(quirks, live=live)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise MachineError(f"play(count={count!r}): a machine has 1 device or more")
    if options.float64 is not None:  # a fact, which decisions follow, too
        row = replace(row, hardware=replace(row.hardware, float64=options.float64))
    with _one_thread_plays(), contextlib.ExitStack() as stack:
        played = Played(row, live=live, count=count, quirks=options)
        stack.enter_context(_facts(row))
        stack.enter_context(replaced(fakes(played)))
        stack.enter_context(replaced(_recorders(played)))
        if live and played.row.accelerator:
            stack.enter_context(guarded(played.kind))
            stack.enter_context(replaced(composites(played)))
            stack.enter_context(_modules_swap())
            # cuDNN's kernels would be chosen by the device's name, and there is no device.
            # Not by its `flags`: those read the old name of TF32, which may raise (pytorch#189955).
            cudnn = torch.backends.cudnn
            stack.callback(setattr, cudnn, "enabled", cudnn.enabled)
            cudnn.enabled = False
        stack.enter_context(_modes(played))
        stack.callback(setattr, played, "active", False)
        _playing.append((threading.get_ident(), played))
        stack.callback(_playing.pop)
        yield played


def _with_this_torch(row: Machine) -> Machine:
    """The machine, as far as the torch that runs can play it.

    A device that a vendor's plugin brings is called what torch calls it before the plugin names it:
    the name would be for good, and make torch.accelerator look for the plugin ever after.
    """
    name = row.hardware.device_type
    try:
        torch.device(name)
    except RuntimeError:
        name = torch._C._get_privateuse1_backend_name()
    autocast = row.hardware.autocast and torch.amp.is_autocast_available(name)
    return replace(row, hardware=replace(row.hardware, device_type=name, autocast=autocast))


def _quirks(given: dict[str, Any], *, live: bool) -> Quirks:
    names = [field.name for field in fields(Quirks)]
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names)
            hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(names)}"
            raise MachineError(f"play() has no option {name!r}; {hint}")
        if not live and name != "float64":
            raise MachineError(f"play({name}=...) is about the tensors: it needs live=True")
    return Quirks(**given)


@contextlib.contextmanager
def _one_thread_plays() -> Iterator[None]:
    for thread, played in reversed(_playing):
        if thread != threading.get_ident():
            raise MachineError(
                f"another thread plays {played.machine.key}, and a process can only be one machine "
                "at a time"
            )
    yield


@contextlib.contextmanager
def _facts(row: Machine) -> Iterator[None]:
    """Nothing is known, decided or told yet; and nothing of the block afterwards."""
    told = set(notices._told)
    hardware, kind = row.hardware, row.hardware.device_type

    def forget() -> None:
        capabilities.forget()
        notices.forget()

    def seen(real: Backend) -> Backend:
        return replace(real, read=lambda device: hardware) if real.device_type == kind else real

    rows: tuple[Backend, ...] = backends.BACKENDS
    if kind not in {real.device_type for real in rows}:
        rows = (backends.backend_for(kind), *rows)
    forget()
    try:
        # A vendor's device that is really here is none of the machine's.
        vendors = (backends, "_vendor_types", tuple)
        with replaced([(backends, "BACKENDS", tuple(map(seen, rows))), vendors]):
            yield
    finally:
        forget()
        notices._told.update(told)


def _recorders(played: Played) -> Iterator[tuple[Any, str, Any]]:
    enter, scale = torch.autocast.__enter__, torch.amp.GradScaler.scale
    enter_ours = Autocast.__enter__

    def entered(region: Any) -> Any:
        if region._enabled and region.device == played.kind:
            played.record("autocast", dtype=region.fast_dtype)
        return enter(region)  # type: ignore[no-untyped-call]

    def entered_ours(region: Any) -> Any:
        asks_torch = torch.compiler.is_compiling() or torch._C._is_torch_function_mode_enabled()
        if region._enabled and region.device == played.kind and not asks_torch:
            played.record("autocast", dtype=region.fast_dtype)
        return enter_ours(region)

    def scaled(scaler: Any, outputs: Any) -> Any:
        if scaler.is_enabled():
            played.record("scale")
        return scale(scaler, outputs)

    yield torch.autocast, "__enter__", entered
    yield Autocast, "__enter__", entered_ours
    yield torch.amp.GradScaler, "scale", scaled


@contextlib.contextmanager
def _modules_swap() -> Iterator[None]:
    """Module.to keeps its parameters' identity, also where their class changes."""
    future: Any = torch.__future__
    before = future.get_swap_module_params_on_conversion()
    future.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        future.set_swap_module_params_on_conversion(before)


@contextlib.contextmanager
def _modes(played: Played) -> Iterator[None]:
    """Torch's hooks, in this thread and in those it starts: torch keeps them per thread."""
    start = threading.Thread.start

    def start_playing(thread: threading.Thread) -> None:
        run = thread.run

        def run_playing() -> None:
            with Functions(played), Operations(played):
                run()

        thread.run = run_playing  # type: ignore[method-assign]
        start(thread)

    started_threads_play = replaced([(threading.Thread, "start", start_playing)])
    with started_threads_play, Functions(played), Operations(played):
        yield


__all__ = ["Call", "Played", "Quirks", "play"]
