"""Which plan is fastest for one model and batch: measured here, and checked against fp32."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from portable_amp.autocast import maybe_autocast
from portable_amp.backends import backend_for
from portable_amp.capabilities import Capabilities, Support
from portable_amp.copies import LAYOUTS, Loss, UncopiedError, copier, one_line
from portable_amp.nested import length_of, map_tensors, slice_of
from portable_amp.numerics.islands import keep_in_fp32
from portable_amp.numerics.proof import Proof
from portable_amp.precision import PrecisionPlan
from portable_amp.rng import rng_state, set_rng_state

TUNED = "tuned"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# What may differ from fp32, relatively: the loss, the gradient, and the gradient of each parameter
# with at least a hundredth of the whole. Fp16's are 6, 26 and 100 times its epsilon: of 17 models
# the furthest off were 2, 8 and 90 times. With bf16 that would be no gradient any more: it has 6,
# 26 and 58 times its epsilon, and of these models one in random weights is beyond. Products of fp32
# may be taken in TF32, whose epsilon is that of fp16. Replay judges each module by itself.
TOLERANCE = {
    torch.float32: (1e-3, 0.01, 0.05),
    torch.bfloat16: (0.05, 0.2, 0.45),
    torch.float16: (6e-3, 0.025, 0.1),
}
# A later candidate has to be faster by this much: what is equally fast stays simple.
GAIN = 0.97
# Whether another is faster counts as settled where it is, at most, this many times as fast.
SETTLED = 1.1
# Student's t for 1, 2, 3 degrees of freedom: an interval of 95 %.
STUDENT = (12.71, 4.30, 3.18)
# A CPU that runs a step for less of its time than this is busy: threads that wait for each other
# are slowed by how often they wait then, in every round alike, and pairs do not show it.
OURS = 0.75
ROUNDS = 21
CHUNK_ROUNDS = 3  # at least, where MOST_STEPS are spent
# When no further round begins, in steps of the slowest candidate; a round may take four.
MOST_STEPS = 24
MOST_STEPS_BEFORE_CHUNKS = 13
AT_LEAST_S = 0.2  # is spent however quick the steps are: the quickest need the most rounds


@dataclass(frozen=True)
class Gain:
    """How many times as fast one is as another: the median of pairs, and its interval (94 %)."""

    median: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """It is faster, by enough, and noise does not explain it."""
        return self.low > 1 and self.median * GAIN > 1 and not self.vague

    @property
    def vague(self) -> bool:
        """It says too little to be told, or to decide."""
        return self.high > 4 * self.low

    def __str__(self) -> str:
        if self.vague:
            return "too noisy to compare"
        return f"{self.median:.2f} times as fast ({self.low:.2f} to {self.high:.2f})"


def gain(base: Sequence[float], other: Sequence[float]) -> Gain:
    """How many times as fast `other` is as `base`; seconds, the n-th of both from one round.

    From five rounds on the interval is one of order statistics: were the two equally fast, the
    median would be outside in 1 of 16 cases at most, whatever the noise is distributed like, and
    few stalled rounds do not move it. Fewer rounds have to agree with each other: Student's t.
    """
    rounds = zip(base, other)  # noqa: B905, one may have left earlier
    logs = sorted(math.log(one / two) for one, two in rounds)
    count = len(logs)
    if count < 2:
        return Gain(math.exp(logs[0]) if logs else 1.0, 0.0, math.inf)
    middle = statistics.median(logs)
    if count < 5:
        mean = statistics.fmean(logs)
        half = STUDENT[count - 2] * statistics.stdev(logs) / math.sqrt(count)
        low, high = min(mean - half, middle), max(mean + half, middle)
    else:
        # So many of the least, and of the greatest, are cut off.
        tails = [sum(math.comb(count, few) for few in range(k + 1)) for k in range(count // 2)]
        cut = max(k for k, tail in enumerate(tails) if tail * 32 <= 2**count)
        low, high = logs[cut], logs[count - 1 - cut]
    most = math.log(1e6)  # more than any plan gains, and less than overflows
    return Gain(*(math.exp(min(max(one, -most), most)) for one in (middle, low, high)))


@dataclass
class Candidate:
    """One way to compute, and what became of it."""

    dtype: torch.dtype
    layout: str
    out: str = ""
    """Why it is none, "" while it is one."""
    seconds: list[float] = field(default_factory=list)
    """Of its step in each round; one that is clearly slower leaves before the others."""
    compiled: bool = False
    fp32_modules: tuple[str, ...] = ()
    """Those that are kept in float32."""
    proof: str = ""
    """What its replay found, "" where there was none."""

    @property
    def name(self) -> str:
        """As `explain` has it."""
        name = f"{NAMES[self.dtype]} {self.layout}" + (" compiled" if self.compiled else "")
        return name + (f" but for {', '.join(self.fp32_modules)}" if self.fp32_modules else "")

    def told(self, base: Candidate | None = None) -> str:
        """A line for `explain`, beside what it is compared with."""
        if self.out:
            return f"{self.name}: out, {self.out}"
        line = f"{self.name}: {statistics.median(self.seconds) * 1e3:.3g} ms"
        return line if base in (None, self) else f"{line}, {gain(base.seconds, self.seconds)}"


def tune(
    model: torch.nn.Module,
    batch: Any,
    device: torch.device,
    capabilities: Capabilities,
    *,
    loss: Loss,
    budget_s: float,
    wait: Callable[[], None],
    move: Callable[[Any, torch.memory_format], Any],
    dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> PrecisionPlan:
    """The fastest plan that computes what fp32 does, measured on copies of the model, interleaved.

    With a dtype only plans that compute in it.

    Raises:
        RuntimeError: the model fails in fp32, or computes something else in that dtype; its
            weights are of 16 bits already; or it cannot be copied.
    """
    halves = {one.dtype for one in model.parameters()} & {torch.float16, torch.bfloat16}
    if halves:
        raise RuntimeError(
            f"the model cannot be measured: it has weights in {halves.pop()}, and every plan is "
            "compared with fp32: model.float() first"
        )
    prepared = copier(model, batch, move)
    shared = functools.cache(prepared)
    found = [
        one
        for one in candidates(model, capabilities)
        if dtype in (None, one.dtype) or one.name == "fp32 contiguous"  # the reference
    ]
    before = rng_state()
    clock = _Clock(found, budget_s)
    proof = Proof(model, batch, device, loss=loss, move=move, budget_s=budget_s / 3)
    duel: list[Candidate] = []
    try:
        runs, reference = [], None
        for one in found:
            known = one.out
            run = _Run(one, shared, device, loss, wait, training=model.training)
            result = run.check(reference)
            if one.out and not known and one.dtype is not torch.float32:
                one.fp32_modules = proof.islands(one.dtype, LAYOUTS[one.layout])
            if one.fp32_modules:
                one.out = ""
                run = _Run(one, prepared, device, loss, wait, training=model.training)
                run.check(reference)
            reference = reference or result
            if one is found[0] and one.out:
                raise RuntimeError(f"the model cannot be measured: {one.out}")
            if dtype not in (None, one.dtype):
                one.out = f"{NAMES[dtype]} was asked for"
            runs += [] if one.out else [run]
        _race(runs, clock)
        while True:
            if all(one.out for one in found):
                raise RuntimeError("; ".join(one.told() for one in found))
            best = fastest(found)
            if best.proof:
                break
            layout = LAYOUTS[best.layout]
            best.out, best.proof = proof.judge(best.dtype, layout, best.fp32_modules)
        (run,) = (one for one in runs if one.candidate is best)
        if compiled:
            # The two alone, measured anew: what others took before is not to be compared with that.
            duel = [replace(best, seconds=[], compiled=also) for also in (False, True)]
            run.candidate = duel[0]
            clock = _Clock(duel, budget_s)
            other = _Run(duel[1], prepared, device, loss, wait, training=model.training)
            other.check(reference)
            _race([run] if duel[1].out else [run, other], clock)
            if duel[0].out:
                raise RuntimeError(duel[0].told())
            runs.append(other)
            run = other if fastest(duel) is duel[1] else run
        chunks = {} if model.training else run.chunks(clock)
    finally:
        set_rng_state(before)
    ours = statistics.median(share for run in runs for share in run.shares)
    request = f"tuned {NAMES[dtype]}" if dtype else TUNED
    return decide(found, chunks, request, duel=duel, ours=ours)


def fastest(found: Sequence[Candidate]) -> Candidate:
    """The fastest; the first, unless another is clearly faster, and simple ones come first."""
    alive = [one for one in found if not one.out]
    return alive[_fastest([one.seconds for one in alive])]


def _fastest(rows: Sequence[Sequence[float]]) -> int:
    best = 0
    for at, row in enumerate(rows):
        if gain(rows[0], row).clear and gain(rows[best], row).median * GAIN > 1:
            best = at
    return best


def decide(
    found: Sequence[Candidate],
    chunks: Mapping[int, Sequence[float]] | None = None,
    request: str = TUNED,
    *,
    duel: Sequence[Candidate] = (),
    ours: float = 1.0,
) -> PrecisionPlan:
    """The plan of what was measured: the first candidate, unless another is clearly faster.

    Args:
        found: candidates, the plain one first.
        chunks: seconds per sample in each round, by the samples in one pass, the most first.
        request: what the plan says was asked for.
        duel: the fastest of `found`, and its compiled self, measured anew.
        ours: the part of a step's time in which the processor ran it.
    """
    busy = ours < OURS
    plain = next(one for one in found if not one.out)
    best, chunks = plain if busy else fastest(found), chunks or {}
    evidence = [one.told(plain) for one in found] + [one.told(duel[0]) for one in duel[1:]]
    gained = "" if best is plain else f", {gain(plain.seconds, best.seconds)} as {plain.name}"
    hidden = _hidden({one.name: one.seconds for one in (best, *found) if not one.out})
    if duel and not busy:
        best = fastest(duel)
        hidden += _hidden({one.name: one.seconds for one in (best, *duel) if not one.out})
        gained += f"; {gain(duel[0].seconds, best.seconds)} compiled" if best.compiled else ""
    sizes = list(chunks)
    chunk = sizes[0 if busy else _fastest([*chunks.values()])] if chunks else None
    if chunk:
        passes = {f"{size} samples in a pass": chunks[size] for size in (chunk, *sizes)}
        hidden += _hidden(passes)
    if chunks:
        rows = ", ".join(f"{size}: {1 / statistics.median(chunks[size]):.3g}" for size in chunks)
        evidence.append(f"samples per second, by samples in one pass: {rows}")
    if busy:
        hidden = [f"the processor ran other programs for {1 - ours:.0%} of a step"]
    reason = f"measured: {statistics.median(best.seconds) * 1e3:.3g} ms"
    if hidden:
        why = "; ".join(hidden)
        reason += f"{gained}; noise hides the answer ({why}), and it is not kept for the next run"
    else:
        reason += gained or ", the fastest"
    if best.proof:
        reason += f"; {best.proof}"
    return PrecisionPlan(
        request,
        best.dtype,
        reason,
        tuple(evidence),
        memory_format=LAYOUTS[best.layout],
        chunk=chunk,
        compiled=best.compiled,
        fp32_modules=best.fp32_modules,
        settled=not hidden,
    )


def _hidden(seconds: Mapping[str, Sequence[float]]) -> list[str]:
    """What may be faster than the first of them, for all that noise lets us see."""
    (name, first), *others = seconds.items()
    return [
        f"{other} may be faster than {name}"
        for other, row in others
        if gain(first, row).high > SETTLED
    ]


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
        self.shares: list[float] = []
        """Of each timed step, the part of its time in which the processor ran it."""
        fine = time.get_clock_info("thread_time").resolution < 1e-4
        # An accelerator computes while this thread waits.
        self.counts = fine and backend_for(device.type).synchronize is None
        if candidate.out:
            return
        with self.guarded():
            self.model, self.batch = prepared(candidate.layout)
            keep_in_fp32(self.model, candidate.fp32_modules, device.type)
            if candidate.compiled:
                self.model.compile()

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """A candidate that fails is out; so is one for which memory does not suffice."""
        try:
            yield
        except UncopiedError:
            raise
        except Exception as error:
            self.candidate.out = one_line(error)

    def fresh(self, size: int | None = None) -> Any:
        """The batch, or its first samples, for one step: a model may write into its input."""
        batch = self.batch if size is None else slice_of(self.batch, 0, size)
        return map_tensors(
            lambda one: one.detach().clone().requires_grad_(one.requires_grad), batch
        )

    def step(self, batch: Any) -> torch.Tensor:
        """Forward, and backward where the model trains."""
        dtype = self.candidate.dtype
        half = None if dtype is torch.float32 else dtype
        region = maybe_autocast(self.device, half, enabled=half is not None)
        with torch.set_grad_enabled(self.training), region:
            loss = self.loss(self.model, batch)
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
                loss = float(self.step(self.fresh()))
                scale = 2.0**10 if self.candidate.dtype is torch.float16 else 1.0
                gradient = {
                    name: one.grad.detach().float().cpu() / scale
                    for name, one in self.model.named_parameters()
                    if one.grad is not None
                }
                result = _Result(loss, gradient)
                self.candidate.out = differs(result, reference, self.candidate.dtype)
        finally:
            self.model.zero_grad()
            for module, mode in modes:
                module.training = mode
            self.wait()
        return result

    def timed(self, size: int | None = None) -> float | None:
        """Seconds of one step more, of the first `size` samples; None where it fails."""
        seconds = None
        with self.guarded():
            batch = self.fresh(size)
            self.wait()
            start, ran = time.perf_counter(), time.thread_time()
            self.step(batch)
            self.wait()
            # A clock may be coarser than a step.
            seconds = max(time.perf_counter() - start, 1e-9)
            self.shares.append((time.thread_time() - ran) / seconds if self.counts else 1.0)
        self.model.zero_grad()
        # Within the caller's own region weights would be cast once, and never again.
        torch.clear_autocast_cache()
        return seconds

    def chunks(self, clock: _Clock) -> dict[int, list[float]]:
        """Seconds per sample of each round, by the samples in one pass: all, half of them, ..."""
        try:
            total = length_of(self.batch)
        except ValueError:  # no samples that could be counted
            return {}
        sizes = [total >> halved for halved in range(total.bit_length())]
        for size in sizes[1:]:  # warms up, as the race has done for the whole
            self.timed(size)
        found: dict[int, list[float]] = {size: [] for size in sizes}
        for turn in range(ROUNDS):
            for size in sizes if turn % 2 else sizes[::-1]:
                seconds = self.timed(size)
                if seconds:  # a model may refuse a single sample
                    found[size].append(seconds / size)
            if turn + 1 >= CHUNK_ROUNDS and clock.over(MOST_STEPS):
                break
        self.candidate.out = ""
        return {size: one for size, one in found.items() if one}


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

    def __init__(self, found: Sequence[Candidate], budget_s: float) -> None:
        self.found, self.budget_s, self.started = found, budget_s, time.perf_counter()

    def warmed(self, each: int) -> None:
        """So many steps of each are done. They may have taken long: kernels were looked for."""
        self.steps, self.rounds = each * len(self.found), time.perf_counter()

    def over(self, steps: int) -> bool:
        """So many steps of the slowest candidate, or the seconds, are spent."""
        each = [statistics.median(one.seconds) for one in self.found if one.seconds]
        allowed = max((steps - self.steps) * max(each, default=0.0), AT_LEAST_S)
        now = time.perf_counter()
        return now - self.started > self.budget_s or now - self.rounds > allowed


def _race(runs: list[_Run], clock: _Clock) -> None:
    """Rounds in which every candidate has its turn, until time is out; the first is the base.

    One that is clearly slower than the fastest leaves. The first stays: all are paired with it.
    """
    training = any(run.training for run in runs)
    for run in runs if training else ():  # in inference the check has warmed up
        run.timed()
    clock.warmed(1 + training)
    for turn in range(ROUNDS):
        runs = [run for run in runs if not run.candidate.out]
        # There and back again: a machine that becomes faster, or slower, favours none of them.
        for run in runs[:: -1 if turn % 2 else 1]:
            run.candidate.seconds += filter(None, [run.timed()])
        alive = [run for run in runs if not run.candidate.out]
        lead = min((statistics.median(run.candidate.seconds) for run in alive), default=0.0)
        ahead = [run for run in alive if statistics.median(run.candidate.seconds) == lead]
        runs = alive[:1] + [
            run
            for run in alive[1:]
            if gain(ahead[0].candidate.seconds, run.candidate.seconds).high > GAIN
        ]
        steps = MOST_STEPS if training else MOST_STEPS_BEFORE_CHUNKS
        if clock.over(steps) or not runs:
            break
