"""One record per kind of played device: what torch offers for it, and the words it fails with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from portable_amp.testing import functions
from portable_amp.testing.ledger import Shortage


@dataclass(frozen=True)
class Kind:
    """One kind of device, and the errors it gives."""

    device_type: str
    functions: Callable[[Any], functions.Fakes]
    """What torch answers where such a device is."""
    out_of_memory: Callable[[Shortage], Exception]
    not_here: Exception
    """What moving a tensor there raises on a machine without one."""
    no_dtype: Callable[[torch.dtype], Exception]
    """What a tensor of a dtype that the device lacks raises."""
    late_copies: bool = False
    """Asynchronous copies read their source late, also from memory that is not page-locked."""
    pins: bool = False
    """Data loaders can give it page-locked memory."""
    accelerator: bool = True


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"


def _cuda_like(name: str) -> Callable[[Shortage], Exception]:
    # Source: c10/cuda/CUDACachingAllocator.cpp, c10/xpu/XPUCachingAllocator.cpp, 2.4 to 2.15.
    return lambda short: torch.OutOfMemoryError(
        f"{name} out of memory. Tried to allocate {_mib(short.wanted)}. GPU 0 has a total capacity "
        f"of {_mib(short.limit)} of which {_mib(short.limit - short.allocated)} is free. Of the "
        f"allocated memory {_mib(short.allocated)} is allocated by PyTorch, and "
        f"{_mib(short.reserved - short.allocated)} is reserved by PyTorch but unallocated."
    )


def _mps(short: Shortage) -> Exception:
    # Source: aten/src/ATen/mps/MPSAllocator.mm, 2.4 to 2.15; a plain RuntimeError.
    return RuntimeError(
        f"MPS backend out of memory (MPS allocated: {_mib(short.allocated)}, other allocations: "
        f"0 bytes, max allowed: {_mib(short.limit)}). Tried to allocate {_mib(short.wanted)} on "
        "private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory "
        "allocations (may cause system failure)."
    )


def _cpu(short: Shortage) -> Exception:
    # Source: c10/core/impl/alloc_cpu.cpp, 2.4 to 2.15; a plain RuntimeError.
    return RuntimeError(
        f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {short.wanted} bytes. "
        "Error code 12 (Cannot allocate memory)"
    )


def _no_fp64(dtype: torch.dtype) -> Exception:
    # Source: pytorch#147731, the SYCL runtime's words on Arc.
    return RuntimeError("Required aspect fp64 is not supported on the device")


def _not_in_metal(dtype: torch.dtype) -> Exception:
    # Source: aten/src/ATen/mps and native/mps/OperationUtils.mm, 2.4 to 2.15.
    if dtype is torch.float64:
        return TypeError(
            "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support "
            "float64. Please use float32 instead."
        )
    if dtype is torch.bfloat16:
        return TypeError("MPS bfloat16 type is supported on MacOS 14.0 or newer.")
    return TypeError(
        "Trying to convert ComplexDouble to the MPS backend but it does not have support for that "
        "dtype."
    )


def _not_compiled(device_type: str) -> Exception:
    return AssertionError(f"Torch not compiled with {device_type.upper()} enabled")


def _not_linked(device_type: str) -> Exception:
    return RuntimeError(f"PyTorch is not linked with support for {device_type} devices")


KINDS = (
    Kind(
        "cuda",
        functions.cuda_like,
        _cuda_like("CUDA"),
        _not_compiled("cuda"),
        _no_fp64,
        pins=True,
    ),
    Kind(
        "xpu",
        functions.cuda_like,
        _cuda_like("XPU"),
        _not_compiled("xpu"),
        _no_fp64,
        pins=True,
    ),
    Kind(
        "mps",
        functions.mps,
        _mps,
        _not_linked("mps"),
        _not_in_metal,
        late_copies=True,  # pytorch#139550
    ),
    Kind("cpu", functions.host, _cpu, _not_linked("cpu"), _no_fp64, accelerator=False),
)


def kind_of(device_type: str, *, amd: bool = False) -> Kind:
    """The record of this device type; AMD's cards are "cuda" with words of their own."""
    for kind in KINDS:
        if kind.device_type == device_type:
            return replace(kind, out_of_memory=_cuda_like("HIP")) if amd else kind
    return Kind(
        device_type,
        functions.vendor,
        _cuda_like(device_type.upper()),
        _not_linked(device_type),
        _no_fp64,
    )
