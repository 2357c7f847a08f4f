"""What a dtype allows: the same computation in float64, each result as far off as that dtype is."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from portable_amp.nested import map_tensors, tensors_in


class Rounding(TorchDispatchMode):
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
        held = {one.untyped_storage().data_ptr() for one in tensors_in((args, kwargs))}

        def off(one: torch.Tensor) -> torch.Tensor:
            if one.dtype is not torch.float64 or one.layout is not torch.strided:
                return one
            if one.untyped_storage().data_ptr() in held:  # a view, or written into
                return one
            noise = torch.rand(one.shape, generator=self.random, dtype=one.dtype)
            noise = 1 + torch.finfo(self.dtype).eps * (2 * noise - 1)
            return (one * noise).to(self.dtype).double()

        return map_tensors(off, function(*args, **kwargs))
