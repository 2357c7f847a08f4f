"""Walk through a model: each module is replayed alone, on the CPU in float64 and on the device."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from portable_amp.autocast import maybe_autocast
from portable_amp.copies import one_line
from portable_amp.memory import is_oom_error
from portable_amp.nested import map_tensors, tensors_in
from portable_amp.numerics.calls import Call, Recorder, answered, floats, is_float, named_calls
from portable_amp.numerics.judge import BOUNDS, Distance, distances, is_backward, worst
from portable_amp.numerics.progress import Progress
from portable_amp.numerics.replay import Answer, OtherPathError, Place, Ran, Task, restored
from portable_amp.numerics.report import LIMITS, Fault
from portable_amp.numerics.verdict import fault, judged

LARGEST = 2.0**12
"""Of a gradient in fp16, which holds 65,504: how large it is is up to the loss scale."""


class Dtypes(NamedTuple):
    """Of one call on the device."""

    given: list[torch.dtype]
    """Of the floats among its arguments."""
    returned: list[torch.dtype]
    region: torch.dtype | None = None
    """Of autocast, where the call is; float32 where that is off."""


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
        dtypes = self._seen(call.name)
        call.args, call.kwargs = rounded((call.args, call.kwargs), dtypes.given)
        call.output = rounded(call.output, dtypes.returned)
        task = Task(module, call, [], [*self._gradients(call)])
        inner = named_calls(module, call.name)
        late = time.perf_counter() > self.until
        if late or not self._is_new(module, call):
            self.left_out += late
            with answered(inner, self._passing):
                return self._answer(call, task.on_cpu())
        recorder = Recorder()
        if inner:
            with contextlib.suppress(Exception):  # it comes again below
                task.on_cpu(recorder=recorder)
        answers = [(one.written, self.visit(inner[one.name], one)) for one in recorder.calls]
        # What writes into its input is called in earnest.
        task.answers = [answer for written, answer in answers if not written]
        try:
            exact = task.on_cpu()
        except OtherPathError:
            self._note(call, "is not compared: rounding, or chance, changes which modules it calls")
            return self._answer(call, None)
        except Exception as error:
            if is_oom_error(error):
                raise
            self._note(call, f"is not compared: called again, alone, it raises {one_line(error)}")
            return self._answer(call, None)
        self.modules += 1
        place = self._there(task, dtypes)
        if place.dtype is torch.float16 and _lowered(task, exact):
            exact = task.on_cpu()
        of = "gradient of "
        names = (one.removeprefix(of) for one in exact.found if one.startswith(of))
        self.trained |= {f"{call.name}.{name}" if call.name else name for name in names}
        if why := self._compared(task, exact, place):
            self._note(call, why)
        self.progress.step(call.name)
        return self._answer(call, exact)

    def _seen(self, name: str) -> Dtypes:
        return next(self.seen.get(name, iter(())), Dtypes([], []))

    def _there(self, task: Task, dtypes: Dtypes) -> Place:
        """The place, with autocast as the call had it, and the bound of what has fewest bits."""
        place, region = self.place, dtypes.region or self.place.dtype
        if dtypes.region and region is not place.dtype:
            on = region is not torch.float32
            put = functools.partial(maybe_autocast, place.device.type, region, enabled=on)
            place = replace(place, region=put)
        own = [one.dtype for one in self.there[task.call.name].parameters()]
        held = {region, *dtypes.given, *dtypes.returned, *own} & BOUNDS.keys()
        return replace(place, dtype=max(held, key=BOUNDS.__getitem__))

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

    def _compared(self, task: Task, exact: Ran, place: Place) -> str:
        """Why that was possible in another mode alone, or not at all; "" where it was."""
        there, bound = self.there[task.call.name], BOUNDS[place.dtype]
        far_off, most = list[Ran](), 0.0
        try:
            for _ in range(place.repeats):
                ran = task.on(place, there)
                far = [worst(one, bound).beyond for one in distances(exact, ran)]
                far_off += [ran] * (max(far, default=0.0) > 1)
                most = max([most, *(one for one in far if one <= 1)])
        except OtherPathError as error:
            if why := "" if task.random else self._varies(task, exact, place):
                return why
            self.faults.append(fault(task, "path", Distance(str(error), math.inf), bound))
            return ""
        except Exception as error:
            if is_oom_error(error):
                raise
            what = Distance(f"{type(error).__name__}: {error}", math.inf)
            self.faults.append(fault(task, "fails", what, bound))
            return ""
        if why := "" if task.random or not far_off else self._varies(task, exact, place):
            return why
        self.worst = max(self.worst, most)
        if far_off:
            found = [*judged(task, place.dtype, exact, far_off)]
            self.faults += [one for one in found if one.kind not in LIMITS]
            self.limits += [one for one in found if one.kind in LIMITS]
        return ""

    def _varies(self, task: Task, exact: Ran, place: Place) -> str:
        """Whether it draws at random, be it which others it calls; if so, it is compared without.

        Or whether it keeps something from call to call.
        """
        if _same(task, exact, seed=1):
            return ""
        self.modules -= 1
        if not _same(task, exact, seed=0):
            return "is not compared: it keeps something from call to call, or draws outside torch"
        task.random = True
        try:
            exact = task.on_cpu()
        except OtherPathError:
            return "draws at random: not compared, for it calls other modules in eval mode"
        if not _same(task, exact, seed=1):
            return "draws at random in eval mode, too: not compared"
        self.modules += 1
        self._compared(task, exact, place)
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


def _lowered(task: Task, exact: Ran) -> bool:
    """Lower the gradient that it is given, as a scaler would, where fp16 might not hold a sum."""
    found = [
        one.abs().max() for what, one in exact.found.items() if is_backward(what) and one.numel()
    ]
    largest = max(map(float, found), default=0.0)
    if not LARGEST < largest < math.inf:
        return False
    task.gradients = [one * (LARGEST / largest) for one in task.gradients]
    return True


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
        if one.is_complex():
            return one.to(torch.complex64)
        made = one.to(dtype)
        if bool(made.isinf().any()):  # the least number of float64, for a mask, is to stay finite
            most = torch.finfo(dtype).max
            made = torch.where(one.isinf(), one, one.clamp(-most, most)).to(dtype)
        return made

    return map_tensors(put, value)


def dtypes_on_device(
    model: torch.nn.Module, kind: str, call: Callable[[], Any]
) -> dict[str, list[Dtypes]]:
    """What each call of each module is given and returns in `call()`, on this kind of device."""
    found: dict[str, list[Dtypes]] = {}

    def noting(name: str) -> Any:
        def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            given, returned = floats((args, kwargs)), floats(output)
            row = [one.dtype for one in given], [one.dtype for one in returned]
            found.setdefault(name, []).append(Dtypes(*row, _autocast(kind)))

        return note

    with contextlib.ExitStack() as hooks, restored(model):
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_hook(noting(name), with_kwargs=True))
        call()
    return found


def _autocast(kind: str) -> torch.dtype | None:
    try:
        on = torch.is_autocast_enabled(kind)
    except RuntimeError:  # it has none
        return None
    return torch.get_autocast_dtype(kind) if on else torch.float32
