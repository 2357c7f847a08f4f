"""Walk through a model: each module is replayed alone, on the CPU in float64 and on the device."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from portable_amp.memory import is_oom_error
from portable_amp.nested import map_tensors
from portable_amp.numerics.calls import Call, Recorder, answered, floats, is_float, named_calls
from portable_amp.numerics.judge import BOUNDS, Distance, distances, worst
from portable_amp.numerics.replay import Answer, OtherPathError, Ran, restored, run
from portable_amp.numerics.report import Fault
from portable_amp.numerics.rounding import Rounding

Region = Callable[[], AbstractContextManager[Any]]
Dtypes = tuple[list[torch.dtype], list[torch.dtype]]
"""Of the floats that a module is given, and of those that it returns."""


@dataclass
class Place:
    """Where the model is tried."""

    device: torch.device
    region: Region
    """What the forward pass runs in."""
    dtype: torch.dtype
    """What that computes in."""
    layout: torch.memory_format
    """Of images."""
    repeats: int


@dataclass
class _Task:
    """One call of one module, and all that both replays of it need."""

    module: torch.nn.Module
    call: Call
    answers: list[Answer]
    gradients: list[torch.Tensor]
    given: list[torch.dtype]
    random: bool = False

    def on_cpu(self, around: Region = contextlib.nullcontext, seed: int = 0) -> Ran:
        """The reference."""
        torch.default_generator.manual_seed(seed)
        put = placing(self.given, torch.device("cpu"), wide=True)
        return self._run(self.module, put, exactly, around)

    def on(self, place: Place, there: torch.nn.Module) -> Ran:
        """On the device."""
        put = placing(self.given, place.device, layout=place.layout)
        return self._run(there, put, place.region)

    def _run(
        self,
        module: torch.nn.Module,
        put: Callable[[Any], Any],
        region: Region,
        around: Region = contextlib.nullcontext,
    ) -> Ran:
        with _evaluating(module) if self.random else contextlib.nullcontext():
            return run(module, self.call, self.answers, self.gradients, put, region, around=around)


@dataclass
class Walk:
    """One pass through a model, call by call, and what it found."""

    place: Place
    there: dict[str, torch.nn.Module]
    """The modules on the device, by their names."""
    seen: dict[str, Iterator[Dtypes]]
    """Of the calls of each module on the device, in their order."""
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    modules: int = 0
    worst: float = 0.0
    noise: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def visit(self, module: torch.nn.Module, call: Call) -> Answer:
        """Compare what is inside, then the module itself with all inside answered."""
        given, returned = next(self.seen.get(call.name, iter(())), ([], []))
        task = _Task(module, call, [], [*self._gradients(call, returned)], given)
        inner = named_calls(module, call.name)
        recorder = Recorder()
        if inner:
            with answered(inner, recorder):
                task.on_cpu()
        answers = [self.visit(inner[one.name], one) for one in recorder.calls]
        # What writes into its input is called in earnest.
        task.answers = [answer for answer in answers if not answer.call.written]
        exact = task.on_cpu()
        self.modules += 1
        if not self._compared(task, exact):
            task.random = True
            self._compared(task, task.on_cpu())
        return Answer(call, rounded(call.output, returned), rounded(exact.inputs, given))

    def _compared(self, task: _Task, exact: Ran) -> bool:
        """Whether that was possible; not where the module draws at random."""
        bound = BOUNDS[self.place.dtype]
        try:
            found = [
                one
                for _ in range(self.place.repeats)
                for one in distances(exact, task.on(self.place, self.there[task.call.name]))
            ]
        except OtherPathError as error:
            self._fault(task, "path", Distance(str(error), math.inf), bound)
            return True
        except Exception as error:
            if is_oom_error(error):
                raise
            self._fault(
                task, "fails", Distance(f"{type(error).__name__}: {error}", math.inf), bound
            )
            return True
        measured = [(one, worst(one, bound).beyond) for one in found]
        off = [one for one, far in measured if far > 1]
        if off and not task.random and self._draws(task, exact):
            return False
        self.worst = max([self.worst, *(far for _, far in measured if far <= 1)])
        if off:
            self._judge(task, exact, off, bound)
        return True

    def _draws(self, task: _Task, exact: Ran) -> bool:
        """Whether the module draws at random."""
        again = task.on_cpu(seed=1)
        if all(torch.equal(one, again.found[what]) for what, one in exact.found.items()):
            return False
        self.notes.append(f"{task.call.name or 'the model'} draws at random: compared in eval mode")
        return True

    def _judge(self, task: _Task, exact: Ran, off: list[Distance], bound: float) -> None:
        """Tell what is wrong from what this dtype does to this module on every device."""
        dtype = self.place.dtype
        noisy = task.on_cpu(lambda: Rounding(dtype))
        made = {one.what: one for one in distances(exact, noisy)}
        told: set[str] = set()  # once, however often it is repeated
        for one in off:
            noise = made.get(one.what, one)
            finite = not math.isinf(one.error)
            if one.what in told or (finite and worst(one, bound, noise).beyond <= 1):
                continue
            told.add(one.what)
            overflows = not finite and math.isinf(noise.error)
            self._fault(task, "overflow" if overflows else "wrong", one, bound, noise)

    def _fault(
        self, task: _Task, kind: str, one: Distance, bound: float, noise: Distance | None = None
    ) -> None:
        most = worst(one, bound, noise if noise and math.isfinite(noise.error) else None)
        name, type_name = task.call.name, type(task.module).__qualname__
        row = Fault(name, type_name, kind, one.what, most.how, most.found, most.allowed)
        self.faults.append(row)

    def _gradients(self, call: Call, dtypes: list[torch.dtype]) -> Iterator[torch.Tensor]:
        """Those that reached the output, with a root mean square of 1; where none did, noise.

        Rounded to the dtypes that they have on the device.
        """
        rest = iter(dtypes)
        for at, one in enumerate(floats(call.output)):
            found = call.gradients[at]
            norm = 0.0 if found is None else float(found.norm())
            if found is None or not 0 < norm < math.inf:
                found = torch.randn(one.shape, generator=self.noise, dtype=torch.float64)
            else:
                found = found * (math.sqrt(found.numel()) / norm)
            yield found.to(next(rest, torch.float32))


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    mode, module.training = module.training, False
    try:
        yield
    finally:
        module.training = mode


def exactly() -> AbstractContextManager[Any]:
    """The reference is computed without autocast, whatever surrounds the call."""
    return torch.autocast("cpu", enabled=False)


def placing(
    dtypes: list[torch.dtype],
    device: torch.device,
    *,
    wide: bool = False,
    layout: torch.memory_format | None = None,
) -> Callable[[Any], Any]:
    """What puts tensors on a device, in dtypes for the first floats and fp32 for the rest.

    wide: rounded to that dtype, and then in float64.
    """
    rest = iter(dtypes)

    def put(one: torch.Tensor) -> torch.Tensor:
        if not is_float(one):
            return one.to(device)
        dtype = next(rest, torch.float32)
        one = one.to(torch.complex64 if one.is_complex() else dtype)
        if wide:
            return one.to(torch.complex128 if one.is_complex() else torch.float64)
        one = one.to(device)
        if layout is not None and one.dim() == 4:
            one = one.contiguous(memory_format=layout)
        return one

    return lambda value: map_tensors(put, value)


def rounded(value: Any, dtypes: list[torch.dtype]) -> Any:
    """In the dtypes that it has on the device."""
    return placing(dtypes, torch.device("cpu"))(value)


def dtypes_on_device(
    model: torch.nn.Module, call: Callable[[], Any]
) -> dict[str, Iterator[Dtypes]]:
    """What each call of each module is given and returns in `call()`."""
    found: dict[str, list[Dtypes]] = {}

    def noting(name: str) -> Any:
        def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            given, returned = floats((args, kwargs)), floats(output)
            row = [one.dtype for one in given], [one.dtype for one in returned]
            found.setdefault(name, []).append(row)

        return note

    handles = [
        module.register_forward_hook(noting(name), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad(), restored(model):
            call()
    finally:
        for handle in handles:
            handle.remove()
    return {name: iter(calls) for name, calls in found.items()}
