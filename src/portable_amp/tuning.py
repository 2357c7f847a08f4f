"""Which plan is fastest for one model and batch: measured here, and checked against fp32."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from portable_amp.autocast import maybe_autocast
from portable_amp.capabilities import Capabilities, Support
from portable_amp.nested import length_of, map_tensors, slice_of, tensors_in
from portable_amp.precision import PrecisionPlan
from portable_amp.rng import rng_state, set_rng_state

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# What a candidate's loss may differ from fp32's, relatively, and the least cosine between its
# gradient and fp32's. Rounding to 8 bits of mantissa is 0.4 % per operation.
TOLERANCE = {
    torch.float32: (1e-3, 0.999),
    torch.bfloat16: (0.05, 0.98),
    torch.float16: (0.05, 0.98),
}
# A later candidate has to be faster by this much: what is equally fast stays simple.
GAIN = 0.97
LOSER = 1.25  # this much slower than the best after two rounds, it is not measured on;
LOST_AT_ONCE = 2.0  # this much, not even for those
ROUNDS = 7
CHUNK_ROUNDS = 4
MOST_STEPS = 28  # in all, in steps of the slowest candidate

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
    compiled: bool = False,
) -> PrecisionPlan:
    """The fastest plan that computes what fp32 does, measured on copies of the model, interleaved.

    Raises:
        RuntimeError: the model fails in fp32.
    """
    found = [*candidates(model, capabilities)]
    before = rng_state()
    started = time.perf_counter()
    try:
        runs, reference = [], None
        for one in found:
            run = _Run(one, model, batch, device, loss, wait, move)
            result = run.check(reference)
            reference = reference or result
            if found[0].out:
                raise RuntimeError(f"the model cannot be measured: {found[0].out}")
            runs += [] if one.out else [run]
        _race(runs, started, budget_s)
        runs = [run for run in runs if run.candidate is fastest(found)]
        if compiled:
            winner = runs[0].candidate
            found.append(Candidate(winner.dtype, winner.layout, compiled=True))
            run = _Run(found[-1], model, batch, device, loss, wait, move)
            run.check(reference)
            runs += [] if found[-1].out else [run]
            _race(runs, time.perf_counter(), budget_s)
            runs = [run for run in runs if run.candidate is fastest(found)]
        per_sample = {} if model.training else runs[0].chunks()
    finally:
        set_rng_state(before)
    return decide(found, per_sample)


def fastest(found: list[Candidate]) -> Candidate:
    """The fastest; simple ones, which come first, win where it makes no odds."""
    alive = [one for one in found if not one.out]
    best = alive[0]
    for one in alive[1:]:
        if statistics.median(one.seconds) < GAIN * statistics.median(best.seconds):
            best = one
    return best


def decide(found: list[Candidate], per_sample: Mapping[int, float] | None = None) -> PrecisionPlan:
    """The plan of what was measured; per_sample: seconds, by the samples in one pass."""
    best, plain = fastest(found), next(one for one in found if not one.out)
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
        "tuned",
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
        for dtype in dtypes:
            yield Candidate(dtype, layout)


class _Run:
    """One candidate with its own copy of the model."""

    def __init__(
        self,
        candidate: Candidate,
        model: torch.nn.Module,
        batch: Any,
        device: torch.device,
        loss: Loss,
        wait: Callable[[], None],
        move: Callable[[Any], Any],
    ) -> None:
        self.candidate, self.loss, self.wait, self.device = candidate, loss, wait, device
        self.training = model.training
        with self.guarded():
            layout = LAYOUTS[candidate.layout]
            self.model = laid_out(move(copy.deepcopy(model)), layout)
            self.model.zero_grad(set_to_none=True)
            self.batch = laid_out(move(batch), layout)
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
        result = None
        if self.candidate.out:
            return None
        try:
            with self.guarded():
                modes = [(module, module.training) for module in self.model.modules()]
                self.model.eval()
                loss = float(self.step())
                scale = 2.0**10 if self.candidate.dtype is torch.float16 else 1.0
                gradient = [
                    one.grad.detach().float().cpu().flatten() / scale
                    for one in self.model.parameters()
                    if one.grad is not None
                ]
                result = _Result(loss, torch.cat(gradient) if gradient else torch.zeros(0))
                self.candidate.out = differs(result, reference, self.candidate.dtype)
                self.model.zero_grad(set_to_none=True)
                for module, mode in modes:
                    module.training = mode
        finally:
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

    def chunks(self) -> dict[int, float]:
        """Seconds per sample of the whole batch in passes of so many samples, interleaved."""
        whole = self.batch
        try:
            total = length_of(whole)
        except ValueError:  # no samples that could be counted
            return {}
        sizes = [total >> halved for halved in range(total.bit_length())]
        seconds: dict[int, list[float]] = {size: [] for size in sizes}
        for turn in range(CHUNK_ROUNDS + 1):
            for size in sizes:
                with self.guarded():  # a model may refuse a single sample
                    self.batch = slice_of(whole, 0, size)
                    self.wait()
                    start = time.perf_counter()
                    self.step()
                    self.wait()
                    if turn:  # the first round warms up
                        seconds[size].append((time.perf_counter() - start) / size)
        self.batch, self.candidate.out = whole, ""
        # The least: what else the machine does only ever makes a pass slower.
        return {size: min(one) for size, one in seconds.items() if one}


@dataclass
class _Result:
    loss: float
    gradient: torch.Tensor


def differs(result: _Result, reference: _Result | None, dtype: torch.dtype) -> str:
    """Why a result cannot stand for fp32's; "" where it can."""
    finite = torch.isfinite(result.gradient).all() and abs(result.loss) < float("inf")
    if not finite:
        return "its loss or gradient is infinite or NaN"
    if reference is None:
        return ""
    most, least = TOLERANCE[dtype]
    off = abs(result.loss - reference.loss) / max(abs(reference.loss), 1e-6)
    if off > most:
        return f"its loss is {off:.1%} off fp32's, allowed are {most:.1%}"
    norms = result.gradient.norm() * reference.gradient.norm()
    if not norms:
        return ""
    cosine = float(result.gradient @ reference.gradient / norms)
    if cosine < least:
        return f"its gradient has a cosine of {cosine:.3f} with fp32's, allowed are {least}"
    return ""


def _race(runs: list[_Run], started: float, budget_s: float) -> None:
    """Rounds in which every candidate has its turn, until losers and time are out."""
    for run in runs:
        run.timed()
    for turn in range(ROUNDS):
        alive = [run for run in runs if not run.candidate.out]
        least = min(min(run.candidate.seconds) for run in alive) if alive else 0.0
        for run in alive:
            seconds = run.candidate.seconds
            if min(seconds) > (LOST_AT_ONCE if turn < 2 else LOSER) * least:
                continue
            if turn == 0:
                seconds.clear()  # the first step warms up
            run.timed()
        spent = time.perf_counter() - started
        slowest = max((max(run.candidate.seconds, default=0.0) for run in alive), default=0.0)
        if spent > min(budget_s, MOST_STEPS * slowest):
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
