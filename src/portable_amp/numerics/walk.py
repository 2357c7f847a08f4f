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

    def put(self, one: torch.Tensor) -> torch.Tensor:
        """A tensor as it is, there."""
        one = one.to(self.device)
        return one.contiguous(memory_format=self.layout) if one.dim() == 4 else one


@dataclass
class _Task:
    """One call of one module, and all that both replays of it need."""

    module: torch.nn.Module
    call: Call
    answers: list[Answer]
    gradients: list[torch.Tensor]
    random: bool = False

    def on_cpu(self, around: Region = contextlib.nullcontext, seed: int = 0) -> Ran:
        """The reference."""
        return self._run(self.module, widened, contextlib.nullcontext, around, seed)

    def on(self, place: Place, there: torch.nn.Module) -> Ran:
        """On the device."""
        return self._run(there, place.put, place.region)

    def _run(
        self,
        module: torch.nn.Module,
        put: Callable[[torch.Tensor], torch.Tensor],
        region: Region,
        around: Region = contextlib.nullcontext,
        seed: int = 0,
    ) -> Ran:
        torch.default_generator.manual_seed(seed)
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
        call.args, call.kwargs = rounded((call.args, call.kwargs), given)
        call.output = rounded(call.output, returned)
        task = _Task(module, call, [], [*self._gradients(call)])
        inner = named_calls(module, call.name)
        recorder = Recorder()
        if inner:
            with answered(inner, recorder):
                task.on_cpu()
        answers = [self.visit(inner[one.name], one) for one in recorder.calls]
        # What writes into its input is called in earnest.
        task.answers = [answer for answer in answers if not answer.call.written]
        given_floats = floats((call.args, call.kwargs))
        try:
            exact = task.on_cpu()
        except OtherPathError:
            name = call.name or "the model"
            self.notes.append(f"{name} is not compared: rounding changes which modules it calls")
            return Answer(call, [None] * len(given_floats))
        self.modules += 1
        if not self._compared(task, exact):
            task.random = True
            how = "compared in eval mode"
            try:
                self._compared(task, task.on_cpu())
            except OtherPathError:
                how = "not compared, for it calls other modules in eval mode"
            self.notes.append(f"{call.name or 'the model'} draws at random: {how}")
        pairs = zip(exact.inputs, given_floats, strict=True)
        gradients = [None if back is None else back.to(one.dtype) for back, one in pairs]
        return Answer(call, gradients)

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
            if not task.random and self._draws(task, exact):
                return False
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
        """Whether the module draws at random, be it which others it calls."""
        try:
            again = task.on_cpu(seed=1).found
        except OtherPathError:
            again = {}
        return again.keys() != exact.found.keys() or not all(
            torch.equal(one, again[what]) for what, one in exact.found.items()
        )

    def _judge(self, task: _Task, exact: Ran, off: list[Distance], bound: float) -> None:
        """Tell what is wrong from what this dtype does to this module on every device."""
        dtype = self.place.dtype
        noisy = task.on_cpu(lambda: Rounding(dtype))
        made = {one.what: one for one in distances(exact, noisy)}
        told: set[str] = set()  # once, however often it is repeated
        for one in off:
            noise = made[one.what]
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

    def _gradients(self, call: Call) -> Iterator[torch.Tensor]:
        """Those that reached the output, with a root mean square of 1; where none did, noise.

        Rounded to the dtypes that they have on the device.
        """
        for at, one in enumerate(floats(call.output)):
            found = call.gradients[at]
            norm = 0.0 if found is None else float(found.norm())
            if found is None or not 0 < norm < math.inf:
                found = torch.randn(one.shape, generator=self.noise, dtype=one.dtype)
            else:
                found = found * (math.sqrt(found.numel()) / norm)
            yield found.to(one.dtype)


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    mode, module.training = module.training, False
    try:
        yield
    finally:
        module.training = mode


def widened(one: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, or complex128."""
    return one.to(torch.promote_types(one.dtype, torch.float64)) if is_float(one) else one


def rounded(value: Any, dtypes: list[torch.dtype]) -> Any:
    """The same with its floats in these dtypes, and in fp32 where there are none left."""
    rest = iter(dtypes)

    def put(one: torch.Tensor) -> torch.Tensor:
        if not is_float(one):
            return one
        dtype = next(rest, torch.float32)
        return one.to(torch.complex64 if one.is_complex() else dtype)

    return map_tensors(put, value)


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

    with contextlib.ExitStack() as hooks, torch.no_grad(), restored(model):
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_hook(noting(name), with_kwargs=True))
        call()
    return {name: iter(calls) for name, calls in found.items()}
