"""DeviceContext: one device, its precision plan, and everything a loop needs for both."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from torch.compiler import is_dynamo_compiling  # by name: it is asked in every step

from portable_amp.autocast import Autocast, NoAutocast, OffAutocast, Region
from portable_amp.backends import (
    DEVICE_VARIABLE,
    Backend,
    MemoryStats,
    backend_for,
    resolve_device,
    torch_function,
)
from portable_amp.capabilities import Capabilities, probe
from portable_amp.copies import Loss, mean_square, unwrapped
from portable_amp.distributed import agree_on_plan, common_to_ranks, of_rank_0
from portable_amp.errors import PrecisionFallbackWarning, UnsupportedPrecisionError
from portable_amp.fp32 import explained, obstacle, parse_fp32, region_of
from portable_amp.memory import clear_cache, memory_stats
from portable_amp.notices import tell_once
from portable_amp.numerics import nonfinite
from portable_amp.numerics.headroom import HeadroomReport, headroom
from portable_amp.numerics.islands import islands, keep_in_fp32
from portable_amp.numerics.nonfinite import NonfiniteReport
from portable_amp.numerics.replay import Place
from portable_amp.numerics.report import Report
from portable_amp.numerics.trace import Trace
from portable_amp.numerics.verify import verify
from portable_amp.plan_cache import forget_plan, keep, recall, signature
from portable_amp.precision import Precision, PrecisionPlan, choose
from portable_amp.scaler import ScalerShim
from portable_amp.transfer import fetch, loader_options, prefetch, to_device
from portable_amp.tuning import TUNED, tune

STRICT_VARIABLE = "PORTABLE_AMP_STRICT"
_OFF = ("", "0", "false", "no", "off")

T = TypeVar("T")


class DeviceContext:
    """One device and one precision plan; immutable, cheap, picklable, and decided once.

    Args:
        device: "cuda:1", "mps", a torch.device, the index of an accelerator; None:
            $PORTABLE_AMP_DEVICE, else the best present.
        precision: "auto" or True: mixed precision where it is complete and native, fp32 elsewhere;
            "fp32", "fp16", "bf16", or the spellings of other libraries.
        unsupported: what becomes of a request this machine cannot honour: "fallback" to fp32 with
            one PrecisionFallbackWarning, or "raise". $PORTABLE_AMP_STRICT=1 always raises.
        fp32: what float32 is computed in, inside of `autocast()` and of the scaler's
            `backward_step`: "ieee" or "tf32", or "as_is", as torch's settings have it. These are of
            the whole process, and restored at the end of the region.

    Raises:
        DeviceError: there is no such device here.
        UnsupportedPrecisionError: no such precision, or refused under "raise".

    >>> ctx = DeviceContext("cpu", precision="fp32")
    >>> print(ctx.summary())
    Device: cpu
    Mixed precision: disabled
    Autocast device type: None
    """

    device: torch.device
    capabilities: Capabilities
    plan: PrecisionPlan
    unsupported: str
    fp32: str
    _autocast: Region | None

    def __init__(
        self,
        device: str | torch.device | int | None = None,
        *,
        precision: Precision = "auto",
        unsupported: str = "fallback",
        fp32: str = "as_is",
    ) -> None:
        if unsupported not in ("fallback", "raise"):
            raise ValueError(f"unsupported={unsupported!r}: 'fallback' or 'raise' work here")
        word = parse_fp32(fp32)
        where = resolve_device(device)
        capabilities = probe(where)
        self._fill(where, capabilities, choose(precision, capabilities), unsupported, word)
        self._tell()
        why = obstacle(word, self.backend, capabilities)
        if why:
            _unhonoured(f"fp32={word!r}", where, "changes nothing", why, unsupported)

    @property
    def backend(self) -> Backend:
        """The record of this kind of device."""
        return backend_for(self.device.type)

    @property
    def autocast_device_type(self) -> str | None:
        """What torch.autocast is given as device_type; None where autocast is off."""
        return self.device.type if self.plan.autocast else None

    def autocast(
        self,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        cache_enabled: bool | None = None,
    ) -> Region:
        """The region to compute in: autocast under the plan, or float32 where the plan is fp32.

        It may be nested, entered in threads, and used as a decorator. Without arguments it is the
        same object each time.

        Args:
            enabled: False: a block that stays in float32.
            dtype: torch.float32 likewise. float16 and bfloat16 as if asked for by `precision`:
                float32 where this device does not honour them. None: that of the plan.
            cache_enabled: whether weights are cached in low precision, False for torch.jit.trace;
                None: as around the region.

        Raises:
            UnsupportedPrecisionError: no such precision, or refused under "raise".

        >>> ctx = DeviceContext("cpu", precision="fp32")
        >>> with torch.autocast("cpu", torch.bfloat16), ctx.autocast():
        ...     torch.ones(2, 2).mm(torch.ones(2, 2)).dtype
        torch.float32
        """
        compiling = is_dynamo_compiling()
        if compiling or not enabled or dtype is not None or cache_enabled is not None:
            if self.fp32 == "as_is":
                return self._region(enabled, dtype, cache_enabled, compiling)
            return self._float32_region(enabled, dtype, cache_enabled)
        region = self._autocast
        if region is None:
            make = self._region if self.fp32 == "as_is" else self._float32_region
            made: Any = make(True, None, None)
            getattr(made, "inner", made).inherits_cache = True
            region = self.__dict__["_autocast"] = made
        return region

    def tuned(
        self,
        model: torch.nn.Module,
        batch: Any,
        *,
        loss: Loss = mean_square,
        budget_s: float = 60.0,
        cache: bool | str = True,
        compile: bool = False,
    ) -> DeviceContext:
        """The same device with the plan that is fastest for this model and batch, measured.

        Tried are fp32, bf16 and fp16, each with images contiguous and channels last, on copies: the
        model, its gradients and the random state stay as they are. A precision that was asked for
        is kept, and only the rest is tried. What is further from fp32 than `tuning.TOLERANCE` is
        out, unless keeping some modules in fp32 mends it. The winner is replayed against float64 on
        the CPU, module by module, and is out if it is wrong. `explain()` has all times. The first
        of the rest, contiguous and in fp32, is kept unless another is faster beyond doubt.
        Where noise hides whether one is, `plan.settled` is False, and the plan is not kept. For a
        model in evaluation mode `plan.chunk` is how many samples of the batch one pass is fastest
        with. Every rank must call it; rank 0 decides, for ranks that can all compute its plan.

        Args:
            model: in training mode forward and backward are measured, else the forward pass.
            batch: as the loop has it; its tensors are moved.
            loss: called with the model and the batch, returns a scalar tensor. By default the mean
                square of what the model makes of the batch, or of its first part.
            budget_s: seconds after which no further round begins.
            compile: measure the fastest one compiled, too; that compiles, for up to minutes.
                Where `plan.compiled` says that it pays, call `model.compile()`.
            cache: keep the plan for the next run, in $PORTABLE_AMP_CACHE or ~/.cache/portable-amp;
                "renew" forgets the one that was kept, and measures anew.

        Raises:
            RuntimeError: the model fails on this batch in fp32 already, or computes something else
                in the precision that was asked for; it cannot be copied, or has 16-bit weights.
            UnsupportedPrecisionError: under "raise", some rank cannot compute rank 0's plan.

        >>> ctx = DeviceContext("cpu").tuned(torch.nn.Linear(8, 3), torch.randn(4, 8), cache=False)
        >>> ctx.plan.request
        'tuned'
        """
        if cache not in (True, False, "renew"):
            raise ValueError(f"cache={cache!r}: True, False or 'renew' work here")
        # What torch.compile made would be compiled anew for every candidate.
        model = unwrapped(model)
        open_to_all = self.plan.request in ("auto", TUNED)
        dtype = None if open_to_all else self.plan.dtype

        def measured() -> PrecisionPlan:
            can = self.capabilities
            key = signature(
                model, batch, can, loss=loss, dtype=dtype, compiled=compile, fp32=self.fp32
            )
            if cache == "renew":
                forget_plan(key)
            kept = recall(key) if cache else None
            if kept:
                return kept
            # Whatever surrounds the call; a backward pass is not to run in a region.
            with torch.inference_mode(False), self.autocast(enabled=False):
                plan = tune(
                    model, batch, self.device, can,
                    loss=loss, budget_s=budget_s, dtype=dtype, compiled=compile,
                    wait=self.synchronize, move=self._moved,
                )  # fmt: skip
            if cache and plan.settled:
                keep(key, plan)
            return plan

        plan = common_to_ranks(of_rank_0(measured), self.capabilities)
        tuned = _restore(self.device, self.capabilities, plan, self.unsupported, self.fp32)
        tuned._tell()
        return tuned

    def verify(
        self,
        model: torch.nn.Module,
        batch: Any,
        *,
        loss: Loss = mean_square,
        repeats: int = 2,
        sizes: Sequence[int] = (),
        budget_s: float = math.inf,
        backward: bool = True,
    ) -> Report:
        """Whether this device computes the model right under the plan, module by module.

        Each module runs alone, here and on the CPU in float64, with the inputs and the gradient
        that it gets there; the modules inside of it answer as they do there. So no error adds up,
        and what is off is named. It works on copies: model, gradients and random states stay.

        Args:
            model: in the mode it is in. What draws at random is compared without.
            batch: as the loop has it.
            loss: called with the model and the batch, returns a scalar tensor. By default the mean
                square of what the model makes of the batch, or of its first part. What it calls of
                the model is compared.
            repeats: how many times each module runs on the device.
            sizes: numbers of samples to try, too, cut from the batch or repeated. Some devices are
                wrong for many elements alone, or for odd numbers of them.
            budget_s: seconds after which no further module is compared; `notes` has how many.
            backward: False: the forward pass alone, without gradients.

        Returns:
            `ok`; `faults` of the device; `limits`, where the dtype is as far off on any device;
            `notes`. Printed, it is a verdict in words.

        Raises:
            RuntimeError: the model fails on this batch, or in float64 on the CPU; it cannot be
                copied, or torch.jit compiled it; the loss calls none of its modules.
            TypeError: the loss is no scalar tensor.
            ValueError: `sizes` of a batch whose samples cannot be counted; there are no repeats.

        >>> ctx = DeviceContext("cpu", precision="fp32")
        >>> ctx.verify(torch.nn.Linear(8, 3), torch.randn(4, 8)).ok
        True
        """
        return self._verified(
            model, batch, loss, self.plan.fp32_modules, repeats,
            sizes=sizes, budget_s=budget_s, backward=backward,
        )  # fmt: skip

    def _verified(
        self,
        model: torch.nn.Module,
        batch: Any,
        loss: Loss,
        fp32_modules: tuple[str, ...],
        repeats: int = 1,
        **more: Any,
    ) -> Report:
        plan = self.plan
        place = Place(self.device, self.autocast, plan.dtype, plan.memory_format, repeats)
        with self.autocast(enabled=False):  # for backward passes; the place has a region of its own
            report = verify(
                unwrapped(model), batch, place,
                loss=loss, move=self._moved, plan=plan.name, fp32_modules=fp32_modules, **more,
            )  # fmt: skip
        return report.accepting(self.fp32)

    def with_fp32_modules(
        self, model: torch.nn.Module, batch: Any, *, loss: Loss = mean_square
    ) -> DeviceContext:
        """The same context, whose plan keeps in float32 the modules that 16 bits do not hold.

        They are the fewest with which `verify` finds no overflow, and no result that rounding alone
        puts off by a tenth. `to` makes them compute in float32; it has to be called with the model
        afterwards. Where it is the model's own forward pass, the plan becomes fp32. Every rank must
        call it; rank 0 decides.

        Args:
            model: as in `verify`.
            batch: likewise.
            loss: likewise.

        Raises:
            RuntimeError: the model fails on this batch, or cannot be copied.

        >>> ctx = DeviceContext("cpu", precision="fp32")
        >>> ctx.with_fp32_modules(torch.nn.Linear(8, 3), torch.randn(4, 8)).plan.fp32_modules
        ()
        """

        def found() -> PrecisionPlan:
            if not self.plan.autocast:
                return self.plan
            names = islands(lambda names: self._verified(model, batch, loss, names))
            if "" not in names:
                return replace(self.plan, fp32_modules=names)
            why = f"{self.plan.name} does not hold what the model itself computes"
            return replace(choose("fp32", self.capabilities), reason=why)

        plan = common_to_ranks(of_rank_0(found), self.capabilities)
        return _restore(self.device, self.capabilities, plan, self.unsupported, self.fp32)

    def find_nonfinite(
        self,
        model: torch.nn.Module,
        batch: Any,
        *,
        loss: Loss = mean_square,
        scale: float = 1.0,
        passes: int = 3,
    ) -> NonfiniteReport:
        """Which module makes the first infinity or NaN that reaches the loss or a gradient.

        For after a loss that is NaN, or a step that was skipped. It is the operation that makes it
        of finite values, not those that pass it on; what vanishes again, such as a mask of -inf in
        a softmax, is not accused. Model, gradients, buffers and random states stay as they are. The
        model is not copied, unless it is elsewhere, or has to be to stay as it is.

        Args:
            model: on the device, in the mode it is in, with its weights as they are.
            batch: as the loop has it.
            loss: called with the model and the batch, returns a scalar tensor. By default the mean
                square of what the model makes of the batch, or of its first part.
            scale: what the loss is multiplied by, such as `scaler.last_step.scale`.
            passes: so many at most where the model draws at random, such as with dropout: the first
                with the random state as it is.

        Returns:
            `ok`, `module` and `operation`; printed, it is a sentence.

        Raises:
            RuntimeError: the model fails on this batch.
            TypeError: the loss is no tensor.
            ValueError: there are no passes, or the scale is not above 0.

        >>> ctx = DeviceContext("cpu", precision="fp32")
        >>> print(ctx.find_nonfinite(torch.nn.Identity(), torch.ones(2) / 0))
        the batch: tensor 0 holds inf before the pass. It reaches the loss.
        """
        return nonfinite.find_nonfinite(
            unwrapped(model), batch, self.device, partial(self.autocast, cache_enabled=False),
            loss=loss, scale=scale, passes=passes, move=self._moved, plan=self.plan.name,
        )  # fmt: skip

    def headroom(
        self,
        model: torch.nn.Module,
        batch: Any,
        *,
        loss: Loss = mean_square,
        scale: float = 2.0**16,
    ) -> HeadroomReport:
        """How far a model is from what fp16 holds, module by module, wherever it runs now.

        One pass in fp32, forward and backward, on copies, tells what a GPU would do under fp16
        autocast: which values are beyond 65,504, and which gradients vanish at a loss scale. Which
        operations compute in fp16 follows torch's rules for CUDA; in doubt, they do. Where the
        model casts itself, such as by `x.float()`, is not seen.

        Args:
            model: in the mode it is in.
            batch: as the loop has it.
            loss: called with the model and the batch, returns a scalar tensor. By default the mean
                square of what the model makes of the batch, or of its first part.
            scale: a loss scale, above 0.

        Returns:
            `ok`, `scales` that fit, and `rows`, one for each module; printed, it is a verdict.

        Raises:
            RuntimeError: the model fails on this batch, or cannot be copied.
            ValueError: the scale is not above 0.

        >>> ctx = DeviceContext("cpu")
        >>> ctx.headroom(torch.nn.Linear(8, 3), torch.full((4, 8), 1e5)).ok
        False
        """
        return headroom(
            unwrapped(model), batch, self.device.type, loss=loss, scale=scale, move=self._moved
        )

    def trace(
        self, model: torch.nn.Module, path: str | os.PathLike[str], *, steps: int | None = None
    ) -> Trace:
        """Record what training computes, module by module, for a comparison with another machine.

        A context manager: inside of its block, and until `steps` steps are recorded, forward passes
        with gradients on, backward passes and steps of optimizers are followed. Nothing is put into
        the model, no random number is drawn, and nothing waits for the device until a step is over.
        A step ends where the model is called again after an optimizer of torch has stepped. For
        another optimizer call `Trace.step(loss)` at the end of each step. Passes without gradients
        are not recorded, and of what torch.compile compiled only the outermost call is.
        `portable-amp trace compare` says where two files first differ.

        Args:
            model: the one that is trained; several in a ModuleDict.
            path: becomes the file at the end; until then it is `PATH.PID.partial`. Each rank but
                the first adds `.rankN`.
            steps: how many; None: until the block is left.

        Raises:
            TraceError: the file cannot be written.
            RuntimeError: on entering, another one is being recorded.

        >>> import tempfile
        >>> model = torch.nn.Linear(8, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with DeviceContext("cpu").trace(model, f"{folder}/cpu.trace") as trace:
        ...         model(torch.ones(4, 8)).sum().backward()
        ...         optimizer.step()
        ...     trace.recorded
        1
        """
        about = {"device": str(self.device), "name": self.capabilities.name, "plan": self.plan.name}
        return Trace(model, path, steps=steps, about=about)

    def scaler(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> ScalerShim:
        """A gradient scaler for this device, on where the plan is fp16; enabled=False: never."""
        return ScalerShim(
            self.device,
            init_scale,
            growth_factor,
            backoff_factor,
            growth_interval,
            enabled=enabled and self.plan.scaler,
            region=region_of(self.fp32, self.backend, self.capabilities, NoAutocast()),
        )

    def to(self, value: T) -> T:
        """A module, moved in place, or a batch: tensors nested in containers and data classes.

        Containers keep their type. What has a method `to` of its own is moved by it, its tensors as
        all others. Copies are asynchronous where that is safe. A dtype that the device lacks, such
        as float64 on MPS, becomes a narrower one, and what has to stay where it is stays; each is
        said once. A tuned context lays out images, too. Of a model that has them, the modules that
        the plan names are kept in float32.
        """
        layout = self.plan.memory_format
        moved: T = self._moved(value, None if layout is torch.contiguous_format else layout)
        if isinstance(moved, torch.nn.Module):
            keep_in_fp32(unwrapped(moved), self.plan.fp32_modules, self.device.type)
        return moved

    def loader_options(
        self, num_workers: int = 0, *, seed: int | None = None, **options: Any
    ) -> dict[str, Any]:
        """Arguments for a DataLoader that feeds this device.

        Pinned memory where the device reads it, workers that keep running between epochs and have
        random states of their own: a data set with a method `set_random_seed(seed: int)` is seeded
        through it.

        Args:
            num_workers: processes that load data.
            seed: makes the order of a shuffling loader reproducible.
            options: anything else a DataLoader takes; it wins over what is chosen here.
        """
        return {**loader_options(self.backend, num_workers, seed), **options}

    def prefetch(
        self, batches: Iterable[T], move: Callable[[T], Any] | None = None
    ) -> Iterator[Any]:
        """The same batches on the device, copied while it computes with the one before.

        With CUDA and XPU they are copied on a stream of their own, which the device computes beside
        if they are pinned (see `loader_options`). What the workers of a DataLoader have ready is
        copied one batch ahead, and takes memory on the device. Anything else is loaded when it is
        asked for, in the loop's own thread: loading ahead would draw from the random state beside
        the loop, and no seed would repeat the run.

        Args:
            batches: a DataLoader, or anything else that yields batches.
            move: what to move of one, and how, if not all of it; None: `to`.

        >>> ctx = DeviceContext("cpu", precision="fp32")
        >>> [int(x.sum()) for x, name in ctx.prefetch([(torch.ones(2), "a"), (torch.ones(3), "b")])]
        [2, 3]
        """
        return prefetch(batches, move or self.to, self.device, self.backend)

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to copy a small tensor to the CPU; what is returned gives it, and waits for it.

        `loss.item()` waits for all that the device was asked for before. Fetch the loss before the
        backward pass, call the result after it, and with CUDA and XPU nothing but the forward pass
        is waited for.

        >>> seen = DeviceContext("cpu", precision="fp32").fetch(torch.tensor(0.5))
        >>> seen().item()
        0.5
        """
        return fetch(tensor, self.backend)

    def clear_cache(self, *, min_pressure: float | None = None) -> int | None:
        """Give this device's cached memory back; see `portable_amp.clear_cache`."""
        return clear_cache(self.device, min_pressure=min_pressure)

    def memory(self) -> MemoryStats:
        """Bytes allocated, reserved and in all; None where torch cannot tell."""
        return memory_stats(self.device)

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it: before taking times."""
        wait = torch_function(self.backend.synchronize)
        if wait:
            wait(*([self.device] if self.backend.takes_device else []))

    def agreed(self) -> DeviceContext:
        """The same context with the plan that all ranks can follow; every rank must call it."""
        if self.plan.tuned:  # rank 0 has decided
            return self
        plan = agree_on_plan(self.plan.request, self.capabilities)
        plan = replace(plan, fp32_modules=self.plan.fp32_modules)
        if plan == self.plan:
            return self
        agreed = _restore(self.device, self.capabilities, plan, self.unsupported, self.fp32)
        agreed._tell()
        return agreed

    def summary(self) -> str:
        """Three lines to print at the start: device, mixed precision, autocast device type."""
        return (
            f"Device: {self.device}\n"
            f"Mixed precision: {'enabled' if self.plan.autocast else 'disabled'}\n"
            f"Autocast device type: {self.autocast_device_type}"
        )

    def explain(self) -> str:
        """Every decision, why it was taken, and how to change it."""
        plan, row = self.plan, self.backend
        others = [
            f'"{name}"'
            for name in ("fp32", "fp16", "bf16")
            if name != plan.name and not choose(name, self.capabilities).fell_back
        ]
        cache = f"torch.{row.empty_cache}()" if row.empty_cache else "nothing to clear"
        lines = [
            self.summary(),
            "",
            f"Precision: {plan.name}, asked for {plan.request!r}: {plan.reason}.",
            *(f"  Seen: {seen}." for seen in plan.evidence),
            "  To change it: "
            + (
                f"DeviceContext(precision={' | '.join(others)})."
                if others
                else "nothing else is native here."
            ),
            *(
                [f"Kept in fp32: {', '.join(plan.fp32_modules)}; {plan.name} does not hold them."]
                if plan.fp32_modules
                else []
            ),
            *explained(self.fp32, row, self.capabilities),
            "Gradient scaler: "
            + (
                "on; fp16 gradients underflow without it."
                if plan.scaler
                else "off; only fp16 needs it."
            ),
            f"Cache: {cache}.",
            f"Copies: {row.copies}.",
            f"Several processes: {row.distributed or 'not on this kind of device'}.",
            f"To choose a device: DeviceContext('{self.device}') or ${DEVICE_VARIABLE}.",
        ]
        return "\n".join(lines)

    def _moved(self, value: Any, layout: torch.memory_format | None) -> Any:
        return to_device(value, self.device, self.backend, self.capabilities, layout)

    def _region(
        self,
        enabled: bool,
        dtype: torch.dtype | None,
        cache_enabled: bool | None,
        compiling: bool = False,
    ) -> Region:
        if not enabled:
            dtype = torch.float32
        elif dtype is None:
            dtype = self.plan.dtype
        else:
            dtype = self._honoured(dtype)
        if not self.capabilities.autocast:
            return NoAutocast()
        on = dtype is not torch.float32
        made: Any = Autocast if on else OffAutocast
        if compiling:
            made = torch.autocast
        region: Region = made(self.device.type, dtype if on else None, on, cache_enabled)
        return region

    def _honoured(self, dtype: torch.dtype) -> torch.dtype:
        """What a plan for this dtype computes in; told where it is another one."""
        plan = choose(dtype, self.capabilities)
        _tell(plan, self.device, self.unsupported)
        return plan.dtype

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _float32_region(self, *arguments: Any) -> Region:
        """One in which float32 is as `fp32` says; torch.compile calls this, and cannot trace it."""
        return region_of(self.fp32, self.backend, self.capabilities, self._region(*arguments))

    # torch.compile takes it while tracing, as it takes autocast._decide.
    _honoured._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _tell(self) -> None:
        _tell(self.plan, self.device, self.unsupported)

    def _fill(
        self,
        device: torch.device,
        capabilities: Capabilities,
        plan: PrecisionPlan,
        unsupported: str,
        fp32: str,
    ) -> None:
        state = {"device": device, "capabilities": capabilities, "plan": plan}
        self.__dict__.update(state, unsupported=unsupported, fp32=fp32, _autocast=None)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a DeviceContext is immutable: make a new one to change {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("a DeviceContext is immutable")

    def __reduce__(self) -> tuple[Any, ...]:
        state = self.device, self.capabilities, self.plan, self.unsupported, self.fp32
        return _restore, state

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DeviceContext) and self.__reduce__() == other.__reduce__()

    def __hash__(self) -> int:
        return hash((self.device, self.plan, self.fp32))

    def __repr__(self) -> str:
        fp32 = "" if self.fp32 == "as_is" else f", fp32={self.fp32!r}"
        return f"DeviceContext('{self.device}', precision={self.plan.name!r}{fp32})"


def _restore(
    device: torch.device,
    capabilities: Capabilities,
    plan: PrecisionPlan,
    unsupported: str,
    fp32: str = "as_is",
) -> DeviceContext:
    """A context as it was, decided elsewhere: nothing is probed, chosen or told again."""
    context = DeviceContext.__new__(DeviceContext)
    context._fill(device, capabilities, plan, unsupported, fp32)
    return context


def _tell(plan: PrecisionPlan, device: torch.device, unsupported: str) -> None:
    key = (str(device), plan.request, plan.reason)
    if not plan.fell_back:
        if plan.request == "auto" and not plan.autocast:
            tell_once(key, f"{device}: mixed precision is off, computing in fp32: {plan.reason}.")
        return
    _unhonoured(f"precision={plan.request!r}", device, "becomes fp32", plan.reason, unsupported)


def _unhonoured(
    request: str, device: torch.device, becomes: str, why: str, unsupported: str
) -> None:
    """One warning of a request that this machine cannot honour, or an error where it is to be one.

    Raises:
        UnsupportedPrecisionError: under "raise", and $PORTABLE_AMP_STRICT.
    """
    strict = os.environ.get(STRICT_VARIABLE, "").strip().lower() not in _OFF
    if strict or unsupported == "raise":
        raise UnsupportedPrecisionError(f"{request} is refused on {device}: {why}.")
    key = (str(device), request, why)
    tell_once(key, f"{request} on {device} {becomes}: {why}.", PrecisionFallbackWarning)
