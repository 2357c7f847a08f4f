"""One case: on the CPU in float64, and on the device, forward and backward."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import warnings
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from portable_amp.copies import one_line
from portable_amp.memory import is_oom_error
from portable_amp.numerics.calls import Call, floats, is_float
from portable_amp.numerics.cases import BY_NAME, Case, Row, row_of
from portable_amp.numerics.judge import BOUNDS, Distance, Measure, distances, is_backward, worst
from portable_amp.numerics.layouts import LAYOUTS, Laid
from portable_amp.numerics.replay import Place, Ran, Task, restored, widened
from portable_amp.numerics.rounding import Rounding

REPEATS = 2
"""On the device: some are wrong the second time alone."""
_ROUNDINGS = 2 * torch.finfo(torch.float32).eps
"""Allowed for a sum of n terms, times sqrt(n). On a CPU a quarter of it came up, for the bias of a
transposed 3-D convolution: 43,000 terms, 8e-6."""
_MEASURES = ("error", "tilt", "peak")
_DRAWS = 4
_NOT_IMPLEMENTED = (
    "not implemented",
    "not supported",
    "unsupported",
    "could not create a primitive",
)


def compare(case: Case, device: torch.device, seed: int = 0) -> Row:
    """Run it on the CPU in float64, and on the device, forward and backward, as often as told."""
    row = functools.partial(row_of, case, device, seed)
    with _undisturbed():
        try:
            trial = _Trial(case, device, seed)
        except Exception as error:
            return row(status="memory" if is_oom_error(error) else "raises", says=one_line(error))
        try:
            ran = trial.on_device()
        except Exception as error:
            return row(status=_status(error), says=one_line(error))
        found = trial.judged(ran)
    if not found:
        return row(status="right")
    first, *others = sorted(found, key=lambda one: -one[1].beyond)
    what, most, repeat = first
    return row(
        status="wrong", what=what, also=[*dict.fromkeys(one[0] for one in others)],
        direction="backward" if is_backward(what) else "forward", how=most.how,
        error=_finite(most.found), allowed=_finite(most.allowed), repeat=repeat,
    )  # fmt: skip


def _status(error: Exception) -> str:
    if is_oom_error(error):
        return "memory"
    text = str(error).lower()
    missing = isinstance(error, NotImplementedError) or any(one in text for one in _NOT_IMPLEMENTED)
    return "missing" if missing else "fails"


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """By what is around; and the random state stays as it was, and warnings are not told."""
    state = torch.get_rng_state()
    try:
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_rng_state(state)


class _Trial:
    """The module, its inputs and the gradients of its outputs, for both."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        operation = BY_NAME[case.operation]
        shape = operation.shapes()[case.size]
        layout = LAYOUTS[case.layout]
        self.case = case
        number = zlib.crc32(f"{case.operation} {case.size} {seed}".encode())
        torch.default_generator.manual_seed(number)
        random = torch.Generator().manual_seed(number)
        self.module = Laid(operation.make(shape), layout, shape)
        for one in (*self.module.parameters(), *self.module.buffers()):
            if one.dim() == 1 and is_float(one):  # else ones and zeros, which hide much
                one.data = 0.5 + torch.rand(one.shape, generator=random)
        args = []
        for draw in operation.draws:
            drawn = draw(shape, random)
            args.append(draw(layout.base(shape), random) if is_float(drawn) else drawn)
        # What 16 bits make of the weights and inputs is none of the operation's doing.
        for one in self.module.parameters():
            one.data = self._rounded(one.data)
        self.call = Call("", tuple(map(self._rounded, args)), {}, None, [], False)
        self.reference = copy.deepcopy(self.module).double()
        with torch.no_grad(), restored(self.reference):
            output = self.reference(*map(widened, self.call.args))
        self.dtypes = self.reference.returned
        self.gradients = [
            self._rounded(torch.randn(one.shape, generator=random)) for one in floats(output)
        ]
        self.exact = self._task(self.reference, self.call).on_cpu()
        self.place = Place(device, self._region, case.dtype, torch.contiguous_format, REPEATS)

    def _task(self, module: torch.nn.Module, call: Call) -> Task:
        return Task(module, call, [], self.gradients)

    def _rounded(self, one: torch.Tensor) -> torch.Tensor:
        if not is_float(one):
            return one
        one = one.to(self.case.dtype)
        return one.float() if self.case.autocast else one

    def _region(self) -> AbstractContextManager[Any]:
        if not self.case.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.place.device.type, dtype=self.case.dtype)

    def on_device(self) -> list[tuple[Ran, list[torch.dtype]]]:
        """What each run computed, and the dtypes it returned."""
        there: Any = copy.deepcopy(self.module)
        if not self.case.autocast:
            there = there.to(self.case.dtype)
        there = there.layout.weights(there.to(self.place.device))
        there.plain = False
        task = self._task(there, self.call)
        return [(task.on(self.place, there), there.returned) for _ in range(REPEATS)]

    def judged(self, ran: list[tuple[Ran, list[torch.dtype]]]) -> list[tuple[str, Measure, int]]:
        """What is off: which result, by what measure, in which run first."""
        bound = self._bound()
        off: dict[str, tuple[Distance, int]] = {}
        for repeat, (got, dtypes) in enumerate(ran, 1):
            for one in (*distances(self.exact, got), *self._other_dtypes(dtypes)):
                if one.what not in off and worst(one, bound).beyond > 1:
                    off[one.what] = one, repeat
        made = self._noise() if off else {}
        found = []
        for what, (one, repeat) in off.items():
            most = worst(one, bound, made.get(what))
            if most.beyond > 1:
                found.append((what, most, repeat))
        return found

    def _noise(self) -> dict[str, Distance]:
        """What rounding makes of each: of weights, inputs, and the result of each operation.

        What a kernel rounds inside is as if its weights and inputs were off. The largest of
        several draws, for one may be small by chance.
        """
        made: dict[str, Distance] = {}
        for seed in range(_DRAWS):
            rounding = Rounding(self.case.dtype)
            rounding.random.manual_seed(seed)
            reference = copy.deepcopy(self.reference)
            with rounding, torch.no_grad():
                for weight in (*reference.parameters(), *reference.buffers()):
                    weight.data = weight.data * 1
                args = tuple(widened(one) * 1 if is_float(one) else one for one in self.call.args)
            task = self._task(reference, replace(self.call, args=args))
            for one in distances(self.exact, task.on_cpu(lambda: rounding)):  # noqa: B023
                before = made.get(one.what, one)
                most = {name: max(getattr(before, name), getattr(one, name)) for name in _MEASURES}
                made[one.what] = Distance(one.what, count=one.count, **most)
        return made

    def _bound(self) -> float:
        """A sum is rounded once for each term, by chance up or down; `Rounding` rounds it once.

        How many terms there are, the smallest result tells: a bias, a statistic, a loss.
        """
        sizes = [one.numel() for one in (*self.call.args, *self.gradients)]
        smallest = min(one.numel() or 1 for one in self.exact.found.values())
        return max(BOUNDS[self.case.dtype], _ROUNDINGS * math.sqrt(max(sizes) / smallest))

    def _other_dtypes(self, returned: list[torch.dtype]) -> Iterator[Distance]:
        """Than it should return: in autocast each device has lists of its own."""
        for at, (exact, got) in enumerate(zip(self.dtypes, returned)):  # noqa: B905
            expected = {exact}
            if exact is torch.float64:
                expected = {self.case.dtype, *[torch.float32] * self.case.autocast}
            if got not in expected:
                yield Distance(f"dtype {got} of output {at}", math.inf)
