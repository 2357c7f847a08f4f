"""maybe_autocast: torch.autocast that can be left in the code on every machine."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Generator
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import (  # by name: they are called in every step
    autocast_decrement_nesting,
    autocast_increment_nesting,
    clear_autocast_cache,
    get_autocast_dtype,
    is_autocast_cache_enabled,
    is_autocast_enabled,
    is_grad_enabled,
    set_autocast_cache_enabled,
    set_autocast_dtype,
    set_autocast_enabled,
)
from torch.compiler import is_compiling
from torch.optim.optimizer import register_optimizer_step_post_hook

from portable_amp.backends import resolve_device, torch_version
from portable_amp.capabilities import Asleep, Support, look_up, look_up_awake
from portable_amp.errors import PrecisionFallbackWarning
from portable_amp.notices import tell_once
from portable_amp.precision import Precision, choose, parse_dtype

F = TypeVar("F", bound=Callable[..., Any])

# Source: pytorch#112583, seen with torch 2.4 to 2.10: a weight whose first use in a region is under
# no_grad or inference_mode is cached without its gradient, for what is trained there later, too.
_CACHE_LOSES_GRADIENTS = torch_version() < (2, 11)

_FP16, _Dtype = torch.float16, torch.dtype
_modes = torch._C._is_torch_function_mode_enabled
_Region = tuple["Autocast", "str | None", bool, Any, bool, "torch.autocast | None"]
"""One entry: who entered, and what to restore: device, whether on, dtype, whether cached.

The device is None where nothing was changed, as autocast was off already. The last is an instance
of torch's own, where modes such as those of torch.export are to be told. A tuple, as it is made in
every step.
"""


class _Entered(threading.local):
    """The autocast regions this thread is inside of, outermost first."""

    def __init__(self) -> None:
        self.regions: list[_Region] = []
        self.fp16 = False
        """The latest region was one in fp16, with gradients, and no scaler has stepped since."""


entered = _Entered()


class Region(Protocol):
    """What to compute in: a context manager, and a decorator that keeps the types."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *exc: Any) -> Literal[False] | None: ...

    def __call__(self, func: F) -> F: ...


class Autocast(torch.autocast):
    """torch.autocast whose one instance may be nested in itself, shared by threads and recursion.

    torch keeps the state to restore on the instance, so that entering it twice leaves autocast on
    for good. Here each entry has its own, kept per thread. Entering calls the functions that
    torch's own `__enter__` calls, and costs half as much.
    """

    inherits_cache = False
    """Whether weights are cached is up to the region around; torch asks when one is made."""

    def __init__(
        self,
        device_type: str,
        dtype: torch.dtype | None,
        enabled: bool,
        cache_enabled: bool | None,
    ) -> None:
        super().__init__(device_type, dtype, enabled, cache_enabled)
        if cache_enabled is None and _CACHE_LOSES_GRADIENTS:
            self.inherits_cache, self._cache_enabled = True, False
        _watch_optimizers()

    def __enter__(self) -> Any:
        device = self.device
        on = is_autocast_enabled(device)
        dtype, cached = get_autocast_dtype(device), is_autocast_cache_enabled()
        fast_dtype, caches = self.fast_dtype, self._cache_enabled
        if (
            caches is not cached
            and self.inherits_cache
            and not (_CACHE_LOSES_GRADIENTS and is_grad_enabled())
        ):
            caches = cached
        entered.fp16 = fast_dtype is _FP16 and self._enabled and is_grad_enabled()
        live = None
        if _modes():
            live = torch.autocast.__new__(torch.autocast)
            live.__dict__.update(self.__dict__)
            live._cache_enabled = caches
            live.__enter__()
        else:  # what torch does, but for setting what is so already
            if on is not self._enabled:
                set_autocast_enabled(device, self._enabled)
            if dtype is not fast_dtype:
                set_autocast_dtype(device, fast_dtype)
            autocast_increment_nesting()
            if cached is not caches:
                set_autocast_cache_enabled(caches)
        entered.regions.append((self, device, on, dtype, cached, live))
        return self

    def __exit__(self, *exc: Any) -> Literal[False]:
        regions = entered.regions
        if regions and regions[-1][0] is self:
            _, device, on, dtype, cached, live = regions.pop()
        else:
            _, device, on, dtype, cached, live = self._leave_out_of_order(regions)
        if device is None:
            return False
        if live:
            live.prev, live.prev_fastdtype, live.prev_cache_enabled = on, dtype, cached
            live.__exit__(*exc)
            return False
        if autocast_decrement_nesting() == 0:
            clear_autocast_cache()
        set_autocast_enabled(device, on)
        set_autocast_dtype(device, dtype)
        set_autocast_cache_enabled(cached)
        return False

    def _leave_out_of_order(self, regions: list[_Region]) -> _Region:
        """As interleaved generators do; returns what is left to restore.

        The region that was entered after this one is still in force. It inherits what is to be
        restored: torch keeps whether the cache is used for all devices, the rest for each.
        """
        for at in reversed(range(len(regions))):
            if regions[at][0] is self:
                break
        else:
            raise RuntimeError("this autocast was not entered in this thread; nothing to leave")
        _, device, on, dtype, cached, live = regions.pop(at)
        later = [i for i in range(at, len(regions)) if regions[i][1]] if device else []
        for i in later:
            owner, kind, its_on, its_dtype, its_cached, its_live = regions[i]
            if i == later[0]:
                its_cached, cached = cached, torch.is_autocast_cache_enabled()
            same = kind == device
            if same:
                its_on, its_dtype = on, dtype
            regions[i] = (owner, kind, its_on, its_dtype, its_cached, its_live)
            if same:
                torch.autocast_decrement_nesting()
                return self, None, False, None, False, None
        return self, device, on, dtype, cached, live

    def __call__(self, func: F) -> F:
        return decorate(self, func, super().__call__)


class OffAutocast(Autocast):
    """Autocast that is off: where nothing is on, entering it changes nothing."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._idle: _Region = (self, None, False, None, False, None)

    def __enter__(self) -> Any:
        # torch.export is to know of the region, whatever its graph will be called in.
        if is_autocast_enabled(self.device) or is_compiling():
            return super().__enter__()
        entered.fp16 = False
        entered.regions.append(self._idle)
        return self

    def __exit__(self, *exc: Any) -> Literal[False]:
        regions = entered.regions
        if regions and regions[-1] is self._idle:
            del regions[-1]
            return False
        return super().__exit__(*exc)


class UndecidedAutocast(Autocast):
    """Decided when somebody looks, at the first entry: asking now would initialise the device."""

    def __init__(
        self, asked: tuple[Any, ...], device_type: str, cache_enabled: bool | None
    ) -> None:
        super().__init__(device_type, None, False, cache_enabled)
        self._asked = asked
        del self._enabled, self.fast_dtype

    def __getattr__(self, name: str) -> Any:
        if name not in ("_enabled", "fast_dtype"):
            raise AttributeError(name)
        # None: it turns out to have no autocast, and this is off.
        _, dtype, self._enabled = _decide(*self._asked) or (None, None, False)
        self.fast_dtype = dtype or get_autocast_dtype(self.device)
        return self.__dict__[name]


class NoAutocast(contextlib.ContextDecorator):
    """Changes nothing: for a device that has no autocast."""

    def __enter__(self) -> NoAutocast:
        return self

    def __exit__(self, *exc: Any) -> None:
        return None


def decorate(region: Region, func: F, plain: Callable[[F], Any]) -> F:
    """The function in the region, entered at each call; `plain` does it for one that is simple.

    Raises:
        TypeError: it is a coroutine.
    """
    if inspect.iscoroutinefunction(func) or inspect.isasyncgenfunction(func):
        raise TypeError(
            f"maybe_autocast cannot decorate the coroutine {func.__name__!r}: the event loop "
            "would run other tasks inside it. Use `with` around the code that computes."
        )
    generates = inspect.isgeneratorfunction(func)
    decorated: F = _decorate_generator(region, func) if generates else plain(func)  # type: ignore[assignment]
    return decorated


def _decorate_generator(
    region: Region, func: Callable[..., Generator[Any, Any, Any]]
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
            except BaseException as error:  # GeneratorExit, too
                resume, value = inner.throw, error

    return wrapper


@functools.cache
def _watch_optimizers() -> None:
    """From the first region on: a step makes the low-precision copies of weights stale.

    They would outlive it in a region around the whole loop, and the loop would never learn.
    """
    register_optimizer_step_post_hook(_stepped)


def _stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    clear_autocast_cache()
    regions = entered.regions
    if regions and is_autocast_cache_enabled() and any(region[0]._enabled for region in regions):
        tell_once(
            ("autocast", "step inside"),
            "an optimizer stepped inside an autocast region: the low-precision copies of its "
            "weights were dropped. Weights that change there in another way (copied, swapped, "
            "loaded) need torch.clear_autocast_cache(); better leave the region before.",
        )


def maybe_autocast(
    device_type: str | torch.device | None = None,
    dtype: Precision = None,
    enabled: bool = True,
    cache_enabled: bool | None = None,
) -> Region:
    """torch.autocast where this machine can autocast, nothing where it cannot, and it says so once.

    Args:
        device_type: "cuda", "cuda:0", a torch.device; None: the best device of this machine.
        dtype: what to compute in, "bf16" and the like too; None: torch's default for the device,
            or, where the device is None too, what `DeviceContext()` would choose.
        enabled: False computes the region in the dtypes of its tensors.
        cache_enabled: as in torch.autocast.

    Returns:
        A context manager and decorator; one instance may be entered again, nested and in threads.
        It is decided when it is first entered, where asking now would initialise the device.

    Raises:
        DeviceError: torch knows no such device.
        UnsupportedPrecisionError: nobody spells a dtype like that.

    >>> with maybe_autocast("cpu", torch.bfloat16):
    ...     torch.ones(2, 2).mm(torch.ones(2, 2)).dtype
    torch.bfloat16
    """
    enabled = bool(enabled)
    if is_compiling():
        decided = _decide(device_type, dtype, enabled)
        if decided is None:
            return NoAutocast()
        return torch.autocast(*decided, cache_enabled)
    if device_type is not None and dtype is not None and type(dtype) is not _Dtype:
        dtype = parse_dtype(dtype) or "auto"
    where = resolve_device() if device_type is None else device_type
    try:
        kind, capabilities = look_up_awake(where)
    except Asleep as asleep:
        kind = asleep.args[0]
        if device_type is not None and dtype is None:
            dtype = get_autocast_dtype(kind)  # that of the region around, as in torch
        return UndecidedAutocast((device_type, dtype, enabled), kind, cache_enabled)
    wanted, key = dtype, None
    if device_type is not None and capabilities and capabilities.autocast:
        wanted = get_autocast_dtype(kind) if dtype is None else dtype
        key = kind, wanted, enabled, cache_enabled, is_autocast_cache_enabled()
        known, attributes = _known.get(key, (None, None))
        if known is capabilities:
            made = Autocast.__new__(Autocast)
            made.__dict__.update(attributes)
            return made
    decided = _decide(device_type, dtype, enabled)
    if decided is None:
        return NoAutocast()
    made = Autocast(*decided, cache_enabled)
    if key and decided[1:] == (wanted if enabled else dtype, enabled):  # as asked; nothing to tell
        _known[key] = capabilities, dict(made.__dict__)
    return made


_known: dict[Any, tuple[Any, Any]] = {}
"""What was asked for before: what the device could do then, and the attributes of the region."""


def _decide(
    device_type: str | torch.device | None, dtype: Precision, enabled: bool
) -> tuple[str, torch.dtype | None, bool] | None:
    """The arguments for torch.autocast, or None where it is to be left alone."""
    if device_type is None:
        device_type, dtype = resolve_device(), "auto" if dtype is None else dtype
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
    if dtype is not None:
        named = parse_dtype(dtype)
        if named is None:  # "auto"
            plan = choose("auto", capabilities)
            named, enabled = plan.dtype, enabled and plan.autocast
        dtype = named
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

# What torch.jit.script says, after "TorchScript error:", in place of what it does not understand.
maybe_autocast.__script_unsupported = (  # type: ignore[attr-defined]
    "maybe_autocast decides on this machine, which a script cannot. Enter it around the call of "
    "the scripted function, or use torch.jit.trace with cache_enabled=False."
)


def _tell(subject: object, message: str) -> None:
    tell_once(("autocast", subject), message, PrecisionFallbackWarning)
