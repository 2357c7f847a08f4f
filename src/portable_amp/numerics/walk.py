"""Walk through a model: each module is replayed alone, on the CPU in float64 and on the device."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from portable_amp.autocast import maybe_autocast
from portable_amp.memory import is_oom_error
from portable_amp.nested import map_tensors, tensors_in
from portable_amp.numerics.calls import Call, Recorder, answered, floats, is_float, named_calls
from portable_amp.numerics.islands import is_inside
from portable_amp.numerics.judge import BOUNDS, Distance, distances, worst
from portable_amp.numerics.progress import Progress
from portable_amp.numerics.replay import Answer, OtherPathError, Place, Ran, Task, restored
from portable_amp.numerics.report import LIMITS, Fault
from portable_amp.numerics.verdict import fault, judged

Dtypes = tuple[list[torch.dtype], list[torch.dtype]]
"""Of the floats that a module is given, and of those that it returns."""


@dataclass
class Walk:
    """One pass through a model, call by call, and what it found."""

    place: Place
    there: dict[str, torch.nn.Module]
    """The modules on the device, by their names."""
    seen: dict[str, Iterator[Dtypes]]
    """Of the calls of each module on the device, in their order."""
    progress: Progress
    backward: bool = True
    """Gradients are compared, too."""
    fp32_modules: tuple[str, ...] = ()
    """Those that are kept in float32."""
    sampled: bool = False
    """Of modules that are alike, and are given alike, one is compared."""
    until: float = math.inf
    """When no further call is compared, by `time.perf_counter`."""
    faults: list[Fault] = field(default_factory=list)
    limits: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    modules: int = 0
    left_out: int = 0
    """Calls for which there was no time."""
    worst: float = 0.0
    noise: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    done: set[Any] = field(default_factory=set)
    """What was compared, where modules are sampled."""
    trained: set[str] = field(default_factory=set)
    """Parameters that have a gradient, by their names in the model."""

    def visit(self, module: torch.nn.Module, call: Call) -> Answer:
        """Compare what is inside, then the module itself with all inside answered."""
        given, returned = self._seen(call.name)
        call.args, call.kwargs = rounded((call.args, call.kwargs), given)
        call.output = rounded(call.output, returned)
        task = Task(module, call, [], [*self._gradients(call)])
        inner = named_calls(module, call.name)
        late = time.perf_counter() > self.until
        if late or not self._is_new(module, call):
            self.left_out += late
            with answered(inner, self._passing):
                return self._answer(call, task.on_cpu())
        recorder = Recorder()
        if inner:
            with answered(inner, recorder):
                task.on_cpu()
        answers = [(one.written, self.visit(inner[one.name], one)) for one in recorder.calls]
        # What writes into its input is called in earnest.
        task.answers = [answer for written, answer in answers if not written]
        try:
            exact = task.on_cpu()
        except OtherPathError:
            self._note(call, "is not compared: rounding changes which modules it calls")
            return self._answer(call, None)
        self.modules += 1
        of = "gradient of "
        names = (one.removeprefix(of) for one in exact.found if one.startswith(of))
        self.trained |= {f"{call.name}.{name}" if call.name else name for name in names}
        if why := self._compared(task, exact):
            self._note(call, why)
        self.progress.step(call.name)
        return self._answer(call, exact)

    def _seen(self, name: str) -> Dtypes:
        return next(self.seen.get(name, iter(())), ([], []))

    def _passing(self, name: str, module: torch.nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        self._seen(name)
        self.progress.step(name)
        return module._call_impl(*args, **kwargs)

    def _is_new(self, module: torch.nn.Module, call: Call) -> bool:
        shapes = [(one.shape, one.dtype) for one in tensors_in((call.args, call.kwargs))]
        key = repr(module), str(shapes), module.training
        is_new = not self.sampled or key not in self.done
        self.done.add(key)
        return is_new

    def _answer(self, call: Call, exact: Ran | None) -> Answer:
        """What it answers from now on; what it was given is needed no more."""
        inputs = floats((call.args, call.kwargs))
        gradients: list[torch.Tensor | None] = [None] * len(inputs)
        if exact:
            pairs = zip(exact.inputs, inputs, strict=True)
            gradients = [None if back is None else back.to(one.dtype) for back, one in pairs]
        shapes = [one.shape for one in tensors_in((call.args, call.kwargs))]
        return Answer(call.name, call.output, shapes, gradients)

    def _note(self, call: Call, what: str) -> None:
        self.notes.append(f"{call.name or 'the model'} {what}")

    def _compared(self, task: Task, exact: Ran) -> str:
        """Why that was possible in another mode alone, or not at all; "" where it was."""
        there, place = self.there[task.call.name], self.place
        if is_inside(task.call.name, self.fp32_modules):  # its inputs are in float32, too
            off = functools.partial(maybe_autocast, place.device.type, enabled=False)
            place = replace(place, region=off, dtype=torch.float32)
        bound = BOUNDS[place.dtype]
        far_off, most = list[Ran](), 0.0
        try:
            for _ in range(place.repeats):
                ran = task.on(place, there)
                far = [worst(one, bound).beyond for one in distances(exact, ran)]
                far_off += [ran] * (max(far, default=0.0) > 1)
                most = max([most, *(one for one in far if one <= 1)])
        except OtherPathError as error:
            if why := "" if task.random else self._varies(task, exact):
                return why
            self.faults.append(fault(task, "path", Distance(str(error), math.inf), bound))
            return ""
        except Exception as error:
            if is_oom_error(error):
                raise
            what = Distance(f"{type(error).__name__}: {error}", math.inf)
            self.faults.append(fault(task, "fails", what, bound))
            return ""
        if why := "" if task.random or not far_off else self._varies(task, exact):
            return why
        self.worst = max(self.worst, most)
        if far_off:
            found = [*judged(task, place.dtype, exact, far_off)]
            self.faults += [one for one in found if one.kind not in LIMITS]
            self.limits += [one for one in found if one.kind in LIMITS]
        return ""

    def _varies(self, task: Task, exact: Ran) -> str:
        """Whether it draws at random, be it which others it calls; if so, it is compared without.

        Or whether it keeps something from call to call.
        """
        if _same(task, exact, seed=1):
            return ""
        if not _same(task, exact, seed=0):
            return "is not compared: it keeps something from call to call"
        task.random = True
        try:
            self._compared(task, task.on_cpu())
        except OtherPathError:
            return "draws at random: not compared, for it calls other modules in eval mode"
        return "draws at random: compared in eval mode"

    def _gradients(self, call: Call) -> Iterator[torch.Tensor]:
        """Those that reached the output, with a root mean square of 1; where none did, noise.

        Rounded to the dtypes that they have on the device.
        """
        for at, one in enumerate(floats(call.output) if self.backward else ()):
            found = call.gradients[at]
            norm = 0.0 if found is None else float(found.norm())
            if found is None or not 0 < norm < math.inf:
                found = torch.randn(one.shape, generator=self.noise, dtype=one.dtype)
            else:
                found = found * (math.sqrt(found.numel()) / norm)
            yield found.to(one.dtype)


def _same(task: Task, exact: Ran, seed: int) -> bool:
    """Whether the reference comes out as before."""
    try:
        again = task.on_cpu(seed=seed).found
    except OtherPathError:
        return False
    return again.keys() == exact.found.keys() and all(
        torch.equal(one, again[what]) for what, one in exact.found.items()
    )


def rounded(value: Any, dtypes: list[torch.dtype]) -> Any:
    """The same with its floats in these dtypes, and in fp32 where there are none left."""
    rest = iter(dtypes)

    def put(one: torch.Tensor) -> torch.Tensor:
        if not is_float(one):
            return one
        dtype = next(rest, torch.float32)
        return one.to(torch.complex64 if one.is_complex() else dtype)

    return map_tensors(put, value)


def dtypes_on_device(model: torch.nn.Module, call: Callable[[], Any]) -> dict[str, list[Dtypes]]:
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
    return found
