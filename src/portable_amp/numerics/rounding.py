"""What a dtype allows: the same computation in float64, each result as far off as that dtype is."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from portable_amp.nested import map_tensors, tensors_in

PRODUCTS = {
    "mm": None, "bmm": None, "addmm": 0, "baddbmm": 0, "convolution": 2,
    "convolution_backward": None,
}  # fmt: skip
"""What tensor cores compute, below autograd; and which of its arguments is only added."""


WIDER = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    torch.complex64: torch.complex128,
}


class _Mode(TorchDispatchMode):
    """Of a reference, which is not compiled."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """To skip it torch imports Dynamo, which takes two seconds. Asked from torch 2.11 on."""
        return False


class Wide(_Mode):
    """In this region everything is computed in float64, also what asks for fewer bits.

    Models ask for float32 where autocast is not to reach, and make tensors of torch's default.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute it, wider."""
        kwargs = dict(kwargs or {})
        dtype = kwargs.get("dtype")
        # What is drawn at random would be another number.
        if dtype in WIDER and torch.Tag.nondeterministic_seeded not in function.tags:
            kwargs["dtype"] = WIDER[dtype]
        if function._schema.is_mutable:
            return map_tensors(_wider, function(*args, **kwargs))
        wide = map_tensors(_wider, (args, kwargs))
        try:
            made = function(*wide[0], **wide[1])
        except (RuntimeError, TypeError):  # some know no float64: in float32, as they can
            made = function(*map_tensors(_single, args), **map_tensors(_single, kwargs))
        return map_tensors(_wider, made)


def _single(one: torch.Tensor) -> torch.Tensor:
    return one.float() if one.dtype is torch.float64 else one


def _wider(one: torch.Tensor) -> torch.Tensor:
    return one.to(WIDER[one.dtype]) if one.dtype in WIDER else one


class Rounding(_Mode):
    """In this region each float64 result is off by up to the dtype's epsilon, by chance.

    It is how good a device may be that computes each operation right. What comes out far from the
    exact result here does so on any device: sums that cancel, values that this dtype cannot hold.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype
        self.random = torch.Generator().manual_seed(0)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute it, and put its results off."""
        kwargs = kwargs or {}
        dense = [one for one in tensors_in((args, kwargs)) if one.layout is torch.strided]
        held = {one.untyped_storage().data_ptr() for one in dense}
        most = torch.finfo(self.dtype).max

        def given(one: torch.Tensor) -> torch.Tensor:
            """What is too large for the dtype is infinite there; nothing else is copied."""
            if not _is_plain(one) or not bool((one.abs() > most).any()):
                return one
            return one.to(self.dtype).double()

        def off(one: torch.Tensor) -> torch.Tensor:
            if not _is_plain(one):
                return one
            if one.untyped_storage().data_ptr() in held:  # a view, or written into
                return one
            noise = torch.rand(one.shape, generator=self.random, dtype=one.dtype)
            noise = 1 + torch.finfo(self.dtype).eps * (2 * noise - 1)
            return (one * noise).to(self.dtype).double()

        if function.overloadpacket.__name__ in PRODUCTS:
            args = map_tensors(given, args)
        return map_tensors(off, function(*args, **kwargs))


class Narrow(_Mode):
    """In this region products of float64 are taken of numbers with so many bits of mantissa.

    It is what tensor cores do with float32 where TF32 (10 bits) or bf16 (7) is allowed.
    """

    def __init__(self, bits: int, *, nearest: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dropped, self.nearest = 52 - bits, nearest

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute it, of shorter numbers if it is a product."""
        name = function.overloadpacket.__name__
        if name in PRODUCTS:
            short = map_tensors(self._short, args)
            args = [one if at == PRODUCTS[name] else short[at] for at, one in enumerate(args)]
        return function(*args, **(kwargs or {}))

    def _short(self, one: torch.Tensor) -> torch.Tensor:
        if not _is_plain(one):
            return one
        whole = one.contiguous().view(torch.int64)
        if self.nearest:
            whole = whole + (1 << (self.dropped - 1))
        return (whole & -(1 << self.dropped)).view(torch.float64)


def _is_plain(one: torch.Tensor) -> bool:
    return one.dtype is torch.float64 and one.layout is torch.strided
