"""Which plan is fastest for one model and batch: measured here, and checked against fp32."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from portable_amp.autocast import maybe_autocast
from portable_amp.backends import backend_for
from portable_amp.capabilities import Capabilities, Support
from portable_amp.nested import length_of, map_tensors, slice_of, tensors_in
from portable_amp.precision import PrecisionPlan
from portable_amp.rng import rng_state, set_rng_state

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TUNED = "tuned"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# What may differ from fp32, relatively: the loss, the gradient, and the gradient of each parameter
# with at least a hundredth of the whole. Rounding to 8 bits of mantissa is 0.4 % per operation.
TOLERANCE = {
    torch.float32: (1e-3, 0.01, 0.05),
    torch.bfloat16: (0.05, 0.2, 0.45),
    torch.float16: (0.05, 0.2, 0.45),
}
# A later candidate has to be faster by this much: what is equally fast stays simple.
GAIN = 0.97
LOSER = 1.25  # this much slower than the best after two rounds, it is not measured on;
LOST_AT_ONCE = 2.0  # this much, not even for those
ROUNDS = 11
CHUNK_ROUNDS = 4
# When no further round begins, in steps of the slowest candidate; a round may take four.
MOST_STEPS = 24
MOST_STEPS_BEFORE_CHUNKS = 13
AT_LEAST_S = 0.2  # is spent however quick the steps are: the quickest need the most rounds

Loss = Callable[[torch.nn.Module, Any], torch.Tensor]


@dataclass
class Candidate:
    """One way to compute, and what became of it."""

    dtype: torch.dtype
    layout: str
    out: str = ""
    """Why it is none, "" while it is one."""
    seconds: list[float] = field(default_factory=list)
    compiled: bool = False

    @property
    def name(self) -> str:
        """As `explain` has it."""
        return f"{NAMES[self.dtype]} {self.layout}" + (" compiled" if self.compiled else "")

    def told(self) -> str:
        """A line for `explain`."""
        if self.out:
            return f"{self.name}: out, {self.out}"
        return f"{self.name}: {statistics.median(self.seconds) * 1e3:.3g} ms"


def tune(
    model: torch.nn.Module,
    batch: Any,
    device: torch.device,
    capabilities: Capabilities,
    *,
    loss: Loss,
    budget_s: float,
    wait: Callable[[], None],
    move: Callable[[Any], Any],
    dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> PrecisionPlan:
    """The fastest plan that computes what fp32 does, measured on copies of the model, interleaved.

    With a dtype only plans that compute in it.

    Raises:
        RuntimeError: the model fails in fp32, or computes something else in that dtype.
    """
    prepared = copier(model, batch, move)
    shared = functools.cache(prepared)
    found = [
        one
        for one in candidates(model, capabilities)
        if dtype in (None, one.dtype) or one.name == "fp32 contiguous"  # the reference
    ]
    before = rng_state()
    clock = _Clock(found, budget_s)
    try:
        runs, reference = [], None
        for one in found:
            run = _Run(one, shared, device, loss, wait, training=model.training)
            result = run.check(reference)
            reference = reference or result
            if one is found[0] and one.out:
                raise RuntimeError(f"the model cannot be measured: {one.out}")
            if dtype not in (None, one.dtype):
                one.out = f"{NAMES[dtype]} was asked for"
            runs += [] if one.out else [run]
        if not runs:
            raise RuntimeError("; ".join(one.told() for one in found))
        _race(runs, clock)
        best = fastest(found)
        if compiled:
            found.append(Candidate(best.dtype, best.layout, compiled=True))
            run = _Run(found[-1], prepared, device, loss, wait, training=model.training)
            run.check(reference)
            # The two alone, measured anew: what others took before is not to be compared with that.
            runs = [*(one for one in runs if one.candidate is best), run]
            runs = [one for one in runs if not one.candidate.out]
            clock = _Clock(found, budget_s)
            _race(runs, clock)
            best = fastest([one.candidate for one in runs])
        (run,) = (one for one in runs if one.candidate is best)
        per_sample = {} if model.training else run.chunks(clock)
    finally:
        set_rng_state(before)
    return decide(found, per_sample, f"tuned {NAMES[dtype]}" if dtype else TUNED, best=best)


def fastest(found: list[Candidate]) -> Candidate:
    """The fastest; simple ones, which come first, win where it makes no odds."""
    alive = [one for one in found if not one.out]
    best = alive[0]
    for one in alive[1:]:
        if statistics.median(one.seconds) < GAIN * statistics.median(best.seconds):
            best = one
    return best


def decide(
    found: list[Candidate],
    per_sample: Mapping[int, float] | None = None,
    request: str = TUNED,
    *,
    best: Candidate | None = None,
) -> PrecisionPlan:
    """The plan of what was measured; per_sample: seconds, by the samples in one pass."""
    best, plain = best or fastest(found), next(one for one in found if not one.out)
    median = statistics.median(best.seconds)
    chunk = None
    for size, seconds in (per_sample or {}).items():
        if chunk is None or seconds < GAIN * (per_sample or {})[chunk]:
            chunk = size
    evidence = [one.told() for one in found]
    if per_sample:
        rows = ", ".join(f"{size}: {1 / seconds:.3g}" for size, seconds in per_sample.items())
        evidence.append(f"samples per second, by samples in one pass: {rows}")
    gain = statistics.median(plain.seconds) / median
    reason = f"measured: {median * 1e3:.3g} ms" + (
        f", {gain:.2g} times as fast as {plain.name}" if best is not plain else ", the fastest"
    )
    return PrecisionPlan(
        request,
        best.dtype,
        reason,
        tuple(evidence),
        memory_format=LAYOUTS[best.layout],
        chunk=chunk,
        compiled=best.compiled,
    )


def candidates(model: torch.nn.Module, capabilities: Capabilities) -> Iterator[Candidate]:
    """What is worth a measurement; fp32 contiguous first, against which the rest is checked."""
    dtypes = [torch.float32]
    if capabilities.autocast and capabilities.bfloat16 is not Support.ABSENT:
        dtypes.append(torch.bfloat16)
    if capabilities.grad_scaler and capabilities.float16 is Support.NATIVE:
        dtypes.append(torch.float16)
    has_images = any(weight.dim() == 4 for weight in model.parameters())
    for layout in LAYOUTS if has_images else ("contiguous",):
        last = LAYOUTS[layout] is torch.channels_last
        fault = backend_for(capabilities.device_type).channels_last_fault(model) if last else ""
        for dtype in dtypes:
            yield Candidate(dtype, layout, fault)


def copier(
    model: torch.nn.Module, batch: Any, move: Callable[[Any], Any]
) -> Callable[[str], tuple[torch.nn.Module, Any]]:
    """What makes a copy of the model and the batch on the device, in a layout."""

    def copied(layout: str) -> tuple[torch.nn.Module, Any]:
        there = laid_out(move(copy.deepcopy(model)), LAYOUTS[layout])
        there.zero_grad(set_to_none=True)
        return there, laid_out(move(batch), LAYOUTS[layout])

    return copied


class _Run:
    """One candidate, on a copy of the model that it may share with others of its layout."""

    def __init__(
        self,
        candidate: Candidate,
        prepared: Callable[[str], tuple[torch.nn.Module, Any]],
        device: torch.device,
        loss: Loss,
        wait: Callable[[], None],
        *,
        training: bool,
    ) -> None:
        self.candidate, self.loss, self.wait, self.device = candidate, loss, wait, device
        self.training = training
        if candidate.out:
            return
        with self.guarded():
            self.model, self.batch = prepared(candidate.layout)
            if candidate.compiled:
                self.model.compile()

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """A candidate that fails is out; so is one for which memory does not suffice."""
        try:
            yield
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            self.candidate.out = f"{type(error).__name__}: {first}"[:160]

    def step(self) -> torch.Tensor:
        """Forward, and backward where the model trains."""
        dtype = self.candidate.dtype
        half = None if dtype is torch.float32 else dtype
        region = maybe_autocast(self.device, half, enabled=half is not None)
        with torch.set_grad_enabled(self.training), region:
            loss = self.loss(self.model, self.batch)
        if self.training:
            # A scale as fp16's scaler begins with; a power of two changes no other dtype's digits.
            (loss * 2.0**10 if dtype is torch.float16 else loss).backward()
        return loss.detach()

    def check(self, reference: _Result | None) -> _Result | None:
        """Loss and gradient, without the model's randomness; out if too far from the reference."""
        if self.candidate.out:
            return None
        result = None
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            with self.guarded():
                # Some, such as LeViT, keep in evaluation what an earlier pass computed.
                self.model.train().eval()
                loss = float(self.step())
                scale = 2.0**10 if self.candidate.dtype is torch.float16 else 1.0
                gradient = {
                    name: one.grad.detach().float().cpu() / scale
                    for name, one in self.model.named_parameters()
                    if one.grad is not None
                }
                result = _Result(loss, gradient)
                self.candidate.out = differs(result, reference, self.candidate.dtype)
        finally:
            self.model.zero_grad(set_to_none=True)
            for module, mode in modes:
                module.training = mode
            self.wait()
        return result

    def timed(self) -> None:
        """One step more."""
        with self.guarded():
            self.wait()
            start = time.perf_counter()
            self.step()
            self.wait()
            self.candidate.seconds.append(time.perf_counter() - start)
        self.model.zero_grad(set_to_none=True)

    def chunks(self, clock: _Clock) -> dict[int, float]:
        """Seconds per sample of the whole batch in passes of so many samples, interleaved."""
        whole = self.batch
        try:
            total = length_of(whole)
        except ValueError:  # no samples that could be counted
            return {}
        sizes = [total >> halved for halved in range(total.bit_length())]
        seconds: dict[int, list[float]] = {size: [] for size in sizes}
        for turn in range(CHUNK_ROUNDS + 1):
            if turn > 2 and clock.over(MOST_STEPS):
                break
            for size in sizes:
                if not turn and size == total:
                    continue  # the first round warms up, as the race has done for this one
                with self.guarded():  # a model may refuse a single sample
                    self.batch = slice_of(whole, 0, size)
                    self.wait()
                    start = time.perf_counter()
                    self.step()
                    self.wait()
                    if turn:
                        seconds[size].append((time.perf_counter() - start) / size)
        self.batch, self.candidate.out = whole, ""
        # The least: what else the machine does only ever makes a pass slower.
        return {size: min(one) for size, one in seconds.items() if one}


@dataclass
class _Result:
    loss: float
    gradient: dict[str, torch.Tensor]
    """By the name of the parameter, float32 on the CPU."""


def differs(result: _Result, reference: _Result | None, dtype: torch.dtype) -> str:
    """Why a result cannot stand for fp32's; "" where it can."""
    mine = result.gradient
    if not all(map(math.isfinite, (result.loss, *(float(one.sum()) for one in mine.values())))):
        return "its loss or gradient is infinite or NaN"
    if reference is None:
        return ""
    most, most_whole, most_part = TOLERANCE[dtype]
    off = abs(result.loss - reference.loss) / max(abs(reference.loss), 1e-6)
    if off > most:
        return f"its loss is {off:.1%} off fp32's, allowed are {most:.1%}"
    theirs = reference.gradient
    if mine.keys() != theirs.keys():
        return "it has gradients of other parameters than fp32"
    # In float64: norms of millions of numbers lose a thousandth in float32.
    norms = {name: float(one.double().norm()) for name, one in theirs.items()}
    offs = {name: float((mine[name] - one).double().norm()) for name, one in theirs.items()}
    whole = math.hypot(*norms.values())
    if (off := math.hypot(*offs.values())) > most_whole * whole:
        return f"its gradient is {off / (whole or 1):.1%} off fp32's, allowed are {most_whole:.1%}"
    for name, norm in norms.items():
        if norm >= 0.01 * whole and offs[name] > most_part * norm:
            return (
                f"its gradient of {name} is {offs[name] / norm:.1%} off fp32's, "
                f"allowed are {most_part:.1%}"
            )
    return ""


class _Clock:
    """What measuring may cost."""

    def __init__(self, found: list[Candidate], budget_s: float) -> None:
        self.found, self.budget_s, self.started = found, budget_s, time.perf_counter()

    def over(self, steps: int) -> bool:
        """So many steps of the slowest candidate, or the seconds, are spent."""
        each = [statistics.median(one.seconds) for one in self.found if one.seconds]
        allowed = max(steps * max(each, default=0.0), AT_LEAST_S)
        return time.perf_counter() - self.started > min(self.budget_s, allowed)


def _race(runs: list[_Run], clock: _Clock) -> None:
    """Rounds in which every candidate has its turn, until losers and time are out."""
    for run in runs:
        run.timed()
    for turn in range(ROUNDS):
        alive = [run for run in runs if not run.candidate.out]
        least = min((min(run.candidate.seconds) for run in alive), default=0.0)
        for run in alive:
            seconds = run.candidate.seconds
            if min(seconds) > (LOST_AT_ONCE if turn < 2 else LOSER) * least:
                continue
            # The first step warms up. In inference the check has done that.
            if turn == 0 and run.training:
                seconds.clear()
            run.timed()
        steps = MOST_STEPS if alive and alive[0].training else MOST_STEPS_BEFORE_CHUNKS
        if clock.over(steps):
            break


def laid_out(value: Any, layout: torch.memory_format) -> Any:
    """A module, or the images (N, C, H, W) of a batch, in that memory format."""
    if isinstance(value, torch.nn.Module):
        return value.to(memory_format=layout)
    return map_tensors(
        lambda one: one.contiguous(memory_format=layout) if one.dim() == 4 else one, value
    )


def mean_square(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """A loss for any model: of what it makes of the batch's inputs, the mean square."""
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    made = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    floats = [one.float() for one in tensors_in(made) if one.is_floating_point()]
    return torch.stack([one.square().mean() for one in floats]).sum()
