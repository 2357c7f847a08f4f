"""maybe_autocast: torch.autocast that can be left in the code on every machine."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Generator
from typing import Any, Literal

import torch

from portable_amp.backends import resolve_device
from portable_amp.capabilities import Support, look_up, probe
from portable_amp.errors import PrecisionFallbackWarning
from portable_amp.notices import tell_once
from portable_amp.precision import choose


class _Entered(threading.local):
    """The autocast regions this thread is inside of, outermost first."""

    def __init__(self) -> None:
        self.regions: list[tuple[Autocast, torch.autocast]] = []


_entered = _Entered()


class Autocast(torch.autocast):
    """torch.autocast whose one instance may be nested in itself, shared by threads and recursion.

    torch keeps the state to restore on the instance, so that entering it twice leaves autocast on
    for good. Here each entry has an instance of torch's own, kept per thread.
    """

    def __enter__(self) -> Any:
        if torch.compiler.is_compiling():  # traced, not run: there is nothing to restore
            super().__enter__()  # type: ignore[no-untyped-call]
            return self
        region = torch.autocast.__new__(torch.autocast)
        region.__dict__.update(self.__dict__)
        region.__enter__()
        _entered.regions.append((self, region))
        return self

    def __exit__(self, *exc: Any) -> Literal[False]:
        if torch.compiler.is_compiling():
            super().__exit__(*exc)
            return False
        regions = _entered.regions
        for at in reversed(range(len(regions))):
            if regions[at][0] is self:
                break
        else:
            raise RuntimeError("this autocast was not entered in this thread; nothing to leave")
        region = regions.pop(at)[1]
        # Interleaved generators leave out of order. The region that was entered after this one is
        # still in force; it inherits what is to be restored: torch keeps whether the cache is used
        # for all devices, the rest for each.
        later = [other for _, other in regions[at:]]
        if later:
            later[0].prev_cache_enabled = region.prev_cache_enabled
            region.prev_cache_enabled = torch.is_autocast_cache_enabled()
        for other in later:
            if other.device == region.device:
                other.prev, other.prev_fastdtype = region.prev, region.prev_fastdtype
                torch.autocast_decrement_nesting()
                return False
        region.__exit__(*exc)
        return False

    def __call__(self, func: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(func) or inspect.isasyncgenfunction(func):
            raise TypeError(
                f"maybe_autocast cannot decorate the coroutine {func.__name__!r}: the event loop "
                "would run other tasks inside it. Use `with` around the code that computes."
            )
        if inspect.isgeneratorfunction(func):
            return _decorate_generator(self, func)
        decorated: Callable[..., Any] = super().__call__(func)  # type: ignore[no-untyped-call]
        return decorated


class NoAutocast(contextlib.ContextDecorator):
    """Changes nothing: for a device that has no autocast."""

    def __enter__(self) -> NoAutocast:
        return self

    def __exit__(self, *exc: Any) -> None:
        return None


def _decorate_generator(
    region: Autocast, func: Callable[..., Generator[Any, Any, Any]]
) -> Callable[..., Generator[Any, Any, Any]]:
    """Autocast around each resumption, not around the call that only makes the generator."""

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        inner = func(*args, **kwargs)
        resume: Callable[[Any], Any] = inner.send
        value: Any = None
        while True:
            try:
                with region:
                    produced = resume(value)
            except StopIteration as stop:
                return stop.value
            try:
                value = yield produced
                resume = inner.send
            except GeneratorExit:
                with region:
                    inner.close()
                raise
            except BaseException as error:
                resume, value = inner.throw, error

    return wrapper


def maybe_autocast(
    device_type: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    enabled: bool = True,
    cache_enabled: bool | None = None,
) -> Autocast | NoAutocast:
    """torch.autocast where this machine can autocast, nothing where it cannot, and it says so once.

    Args:
        device_type: "cuda", "cuda:0", a torch.device; None: the best device of this machine.
        dtype: what to compute in; None: torch's default for the device, or, where the device is
            None too, what `DeviceContext()` would choose.
        enabled: False computes the region in the dtypes of its tensors.
        cache_enabled: as in torch.autocast.

    Returns:
        A context manager and decorator; one instance may be entered again, nested and in threads.

    Raises:
        DeviceError: torch knows no such device.

    >>> with maybe_autocast("cpu", torch.bfloat16):
    ...     torch.ones(2, 2).mm(torch.ones(2, 2)).dtype
    torch.bfloat16
    """
    decided = _decide(device_type, dtype, bool(enabled))
    if decided is None:
        return NoAutocast()
    kind = torch.autocast if torch.compiler.is_compiling() else Autocast
    made: Autocast = kind(*decided, cache_enabled)  # type: ignore[assignment]
    return made


def _decide(
    device_type: str | torch.device | None, dtype: torch.dtype | None, enabled: bool
) -> tuple[str, torch.dtype | None, bool] | None:
    """The arguments for torch.autocast, or None where it is to be left alone."""
    if device_type is None:
        device_type = resolve_device()
        if dtype is None:
            plan = choose("auto", probe(device_type))
            dtype = plan.dtype if plan.autocast else None
            enabled = enabled and plan.autocast
    kind, capabilities = look_up(device_type)
    if capabilities is None or not capabilities.autocast:
        if enabled:
            why = (
                f"torch has no working autocast for {kind} in this version."
                if capabilities
                else f"this machine has no {kind} device. maybe_autocast() takes the best one."
            )
            _tell(kind, f"maybe_autocast({kind!r}) does nothing: {why}")
        return None
    halves = (torch.float16, torch.bfloat16)
    if not enabled:  # torch complains of dtypes it does not like even then
        fine = dtype in halves and capabilities.support(dtype) is not Support.ABSENT
        return kind, dtype if fine else None, False
    # As in torch, the default is asked for now: inside a region it is that region's dtype.
    wanted = torch.get_autocast_dtype(kind) if dtype is None else dtype
    if wanted is torch.float32:
        return (kind, wanted, True) if capabilities.autocast_float32 else (kind, None, False)
    if wanted not in halves:
        why = "autocast knows torch.float16 and torch.bfloat16."
    elif capabilities.support(wanted) is Support.ABSENT:
        why = "; ".join(capabilities.evidence) + "."
    else:
        return kind, wanted, True
    _tell((kind, wanted), f"maybe_autocast({kind!r}, {wanted}) computes in float32: {why}")
    return kind, None, False


# torch.compile traces maybe_autocast; the decision is a constant to it, taken while tracing. This
# is what torch.compiler.assume_constant_result sets (2.4 to 2.15); calling that imports Dynamo.
_decide._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _tell(subject: object, message: str) -> None:
    tell_once(("autocast", subject), message, PrecisionFallbackWarning)
