"""Tensors of an absent device: another backend's dispatch keys and device, numbers on the CPU.

A shadow is an outline on the "meta" device that carries the dispatch keys of cuda, mps or xpu, so
that torch's own rules for that backend apply, autocast's above all. Inside is `raw`, a CPU tensor
with the numbers and the autograd graph.

What follows from this: autograd works on `raw`, so the outline itself never requires a gradient,
and autocast's cache of weights, which looks at the outline, is not exercised.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.overrides import enable_reentrant_dispatch
from torch.utils._pytree import tree_flatten, tree_map

from portable_amp.errors import DeviceError
from portable_amp.testing.ledger import Ledger

_aten = torch.ops.aten

# What hardware computes in 16 bits; elsewhere a slow or broken dtype does not show.
_PRODUCTS = {
    _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default,
    _aten.mv.default, _aten.addmv.default, _aten.convolution.default,
}  # fmt: skip
# Their second argument may stay on the CPU: indices, lengths.
_TAKE_CPU_TENSORS = {
    _aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default,
    _aten._pack_padded_sequence.default,
}  # fmt: skip
_SOFTMAX = {_aten._softmax.default, _aten._log_softmax.default}
_SECONDS_PER_SLOW_PRODUCT = 1e-3


@dataclass(frozen=True)
class Place:
    """One played device: where it is, what it holds, what it cannot do."""

    device: torch.device
    ledger: Ledger
    missing: tuple[torch.dtype, ...]
    """Dtypes of which it has no tensors."""
    no_dtype: Callable[[torch.dtype], Exception]
    """Makes the backend's own error for these."""
    slow: frozenset[torch.dtype]
    """Dtypes whose matrix products take a millisecond more."""
    wrong: frozenset[torch.dtype]
    """Dtypes whose matrix products are NaN."""
    late_copies: bool
    """An asynchronous copy reads its source only when the device needs it."""

    pending: list[weakref.ref[Shadow]] = field(default_factory=list)

    def check(self, dtype: torch.dtype) -> None:
        """Raise what the backend raises of a dtype that it lacks."""
        if dtype in self.missing:
            raise self.no_dtype(dtype)

    def admit(self, raw: torch.Tensor) -> None:
        """Let a tensor onto the device, or raise what the backend raises."""
        self.check(raw.dtype)
        self.ledger.take(raw)

    def postpone(self, shadow: Shadow, source: torch.Tensor, *, kept: bool) -> None:
        """Let an asynchronous copy arrive at its first use, or when the device is waited for.

        `kept`: torch keeps page-locked memory until the device has read it. Any other memory may
        be somebody else's by then, where the backend reads it late.
        """
        if kept or self.late_copies:
            shadow._late = _Late(source, kept=kept)
            self.pending.append(weakref.ref(shadow))

    def settle(self) -> None:
        """Wait for the copies under way."""
        while self.pending:
            shadow = self.pending.pop()()
            if shadow is not None:
                _ = shadow.raw


class _Late:
    """Where an asynchronous copy will read."""

    def __init__(self, source: torch.Tensor, *, kept: bool) -> None:
        storage = source.untyped_storage()
        self.memory: Any = (lambda: storage) if kept else weakref.ref(storage)
        self.view = (source.storage_offset(), source.size(), source.stride())

    def arrive(self, raw: torch.Tensor) -> None:
        memory = self.memory()
        with torch.no_grad(), _unwatched():
            if memory is not None:
                raw.copy_(torch.tensor((), dtype=raw.dtype).set_(memory, *self.view))
            elif raw.is_floating_point():
                raw.fill_(float("nan"))
            else:
                raw.zero_()


class Shadow(torch.Tensor):
    """A tensor of a played device; the numbers are in `raw`."""

    place: Place
    _raw: torch.Tensor
    _late: _Late | None
    _grad_shadow: Shadow | None
    _is_param: bool
    """The mark of torch.nn.Parameter."""

    # Subclasses' __torch_function__ would run for each call; the dispatcher is where we work.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, raw: torch.Tensor, place: Place) -> Shadow:
        place.admit(raw)
        # A view of an ordinary tensor is one in inference mode, too.
        with torch.inference_mode(raw.is_inference()), torch.no_grad(), _unwatched():
            outline = torch.empty_strided(raw.shape, raw.stride(), dtype=raw.dtype, device="meta")
            # Private to torch, tested on 2.4 to 2.15: the one way to other dispatch keys.
            made: Shadow = torch.Tensor._make_subclass(
                cls, outline, False, dispatch_device=True, device_for_backend_keys=place.device
            )
        made._raw, made.place, made._late, made._grad_shadow = raw, place, None, None
        return made

    def __init__(self, raw: torch.Tensor, place: Place) -> None: ...

    @property
    def raw(self) -> torch.Tensor:
        """The numbers, once an asynchronous copy has arrived."""
        late, self._late = self._late, None
        if late is not None:
            late.arrive(self._raw)
        return self._raw

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place.device

    @property
    def requires_grad(self) -> bool:
        return self._raw.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self._raw.requires_grad = value

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        return self._raw.is_leaf

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        return self._raw.grad_fn

    @property  # type: ignore[override]
    def grad(self) -> Shadow | None:
        raw = self._raw.grad
        if raw is None:
            self._grad_shadow = None
        elif self._grad_shadow is None or self._grad_shadow._raw is not raw:
            self._grad_shadow = Shadow(raw, self.place)
        return self._grad_shadow

    @grad.setter
    def grad(self, value: Shadow | None) -> None:
        self._raw.grad = None if value is None else value.raw

    @property  # type: ignore[override]
    def data(self) -> Shadow:
        return Shadow(self.raw.data, self.place)

    @data.setter
    def data(self, value: Shadow) -> None:
        fresh = Shadow(value.raw.detach().requires_grad_(self.requires_grad), value.place)
        fresh._is_param = isinstance(self, torch.nn.Parameter)
        torch.utils.swap_tensors(self, fresh)

    def requires_grad_(self, requires_grad: bool = True) -> Shadow:
        self._raw.requires_grad_(requires_grad)
        return self

    def retain_grad(self) -> None:
        self._raw.retain_grad()

    def backward(
        self,
        gradient: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        torch.autograd.backward(self, gradient, retain_graph, create_graph, inputs=inputs)

    def register_hook(self, hook: Callable[[Shadow], Any]) -> Any:
        return self._raw.register_hook(lambda grad: bare(hook(Shadow(grad, self.place))))

    def register_post_accumulate_grad_hook(self, hook: Callable[[Shadow], None]) -> Any:
        def run(raw: torch.Tensor) -> None:
            hook(self)

        return self._raw.register_post_accumulate_grad_hook(run)

    def record_stream(self, stream: Any) -> None:
        stream.played.record("record_stream")

    def tolist(self) -> Any:
        return self.raw.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.raw.numpy(force=True)
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy "
            "the tensor to host memory first."
        )

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Shadow:
        if id(self) not in memo:
            copied = Shadow(
                self.raw.detach().clone().requires_grad_(self.requires_grad), self.place
            )
            copied._is_param = isinstance(self, torch.nn.Parameter)
            if self.grad is not None:
                copied._raw.grad = self.grad.raw.clone()
            memo[id(self)] = copied
        found: Shadow = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A checkpoint of a played device is one of the CPU: nothing else could ever read it.
        return self.raw.detach().requires_grad_(self.requires_grad).__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.raw.detach()!r} on {self.device}"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        shadows = shadows_in((args, kwargs))
        place = shadows[0].place
        if func is torch.ops.prim.device.default:
            return place.device
        leaves = kwargs.get("device") is not None  # for the CPU, from where `Operations` goes on
        if leaves:
            kwargs.pop("pin_memory", None)
        elif func in _TAKE_CPU_TENSORS:
            one_device(place, (args[0], shadows_in(args[1]), args[2:]))
            if func is _aten._pack_padded_sequence.default and shadows_in(args[1]):
                raise RuntimeError("'lengths' argument should be a 1D CPU int64 tensor")
        elif func is not _aten.copy_.default:
            one_device(place, (args, kwargs))
        args, kwargs = bare((args, kwargs))
        # Above autograd again, for `raw` has the graph; and past the modes, which saw the shadows.
        with enable_reentrant_dispatch(), torch._C._DisableTorchDispatch():
            if func in _SOFTMAX and args[2]:  # half to float in one kernel is for GPUs only
                args = (args[0].float(), args[1], False)
            out = func(*args, **kwargs)
            if func in _PRODUCTS:
                out = _with_quirks(out, place)
        if leaves:
            return out
        if func is _aten._pack_padded_sequence.default:
            return Shadow(out[0], place), out[1]  # the batch sizes are the CPU's
        known = {id(shadow._raw): shadow for shadow in shadows}

        def wrap(item: Any) -> Any:
            if not isinstance(item, torch.Tensor):
                return item
            outer = known.get(id(item))
            if outer is None:
                return Shadow(item, place)
            if _lies(outer) != _lies(item):
                raise NotImplementedError(
                    f"{func} changes the shape of a tensor in place, which is not played; "
                    "use the function that returns a new tensor"
                )
            return outer

        return tree_map(wrap, out)


def _lies(one: torch.Tensor) -> list[tuple[int, int]]:
    """Sizes and strides; that of a single element is nobody's: pooling in channels last sets it."""
    return [(size, step if size > 1 else 0) for size, step in zip(one.shape, one.stride())]  # noqa: B905


def bare(value: Any) -> Any:
    """`value` with each shadow in it replaced by its CPU tensor."""
    return tree_map(lambda item: item.raw if isinstance(item, Shadow) else item, value)


def shadows_in(value: Any) -> list[Shadow]:
    """Every shadow in nested containers."""
    return [item for item in tree_flatten(value)[0] if isinstance(item, Shadow)]


def on_raw(func: Callable[..., Any], place: Place, *args: Any, **kwargs: Any) -> Any:
    """Call `func` with the CPU tensors, and make shadows of the tensors it returns.

    For functions that choose a kernel by the device's name, or keep autograd state of their own.
    """
    out = func(*bare(args), **bare(kwargs))
    return tree_map(
        lambda item: Shadow(item, place) if isinstance(item, torch.Tensor) else item, out
    )


def one_device(place: Place, arguments: Any) -> None:
    """Raise what torch raises of tensors that are elsewhere."""
    for item in tree_flatten(arguments)[0]:
        if not isinstance(item, torch.Tensor):
            continue
        here = item.place.device if isinstance(item, Shadow) else item.device
        # A number on the CPU goes everywhere, as in torch.
        if here != place.device and (item.dim() or isinstance(item, Shadow)):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{place.device} and {here}!"
            )


def _with_quirks(out: torch.Tensor, place: Place) -> torch.Tensor:
    if out.dtype in place.slow:
        time.sleep(_SECONDS_PER_SLOW_PRODUCT)
    if out.dtype in place.wrong:
        out = out * float("nan")
    return out


@contextlib.contextmanager
def _unwatched() -> Iterator[None]:
    """No mode and no subclass sees what happens here."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        yield


# --- the device guard ------------------------------------------------------------------------

# c10::DeviceType, whose numbers are part of torch's ABI.
_DEVICE_NUMBER = {"cuda": 1, "xpu": 12, "mps": 13, "meta": 14}
_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"


@contextlib.contextmanager
def guarded(device_type: str) -> Iterator[None]:
    """Let torch switch to a device of this type: by a guard that does nothing.

    torch asks c10's registry for one before each operation, and a build without the backend, or a
    machine without the device, has none that works. There is no public way to put one there.

    Raises:
        DeviceError: no live device can be played on this system, or of this type.
    """
    if device_type not in _DEVICE_NUMBER:
        known = ", ".join(sorted(_DEVICE_NUMBER.keys() - {"meta"}))
        raise DeviceError(
            f"live=True plays {known}, not {device_type}, whose rules come with the vendor's "
            "plugin. Leave live out, or give a process of its own a new_accelerator()"
        )
    library = next(Path(torch.__file__).parent.glob("lib/libc10.*"), None)  # Windows has c10.dll
    if library is None:
        raise DeviceError(f"live=True needs Linux or macOS; this is {sys.platform}. Leave live out")
    slots = ctypes.pointer(ctypes.c_void_p.in_dll(ctypes.CDLL(str(library)), _REGISTRY))
    number = _DEVICE_NUMBER[device_type]
    before, slots[number] = slots[number], slots[_DEVICE_NUMBER["meta"]]
    try:
        yield
    finally:
        slots[number] = before
