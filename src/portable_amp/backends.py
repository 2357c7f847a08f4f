"""One record per kind of device: how torch is asked about it, and what it needs from us.

This module and `capabilities` are the only ones that know device types by name. Everything is
asked of torch when it is needed, never at import.
"""

from __future__ import annotations

import difflib
import os
import platform
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from portable_amp.errors import DeviceError, shown
from portable_amp.launchers import local_rank
from portable_amp.notices import tell_once

DEVICE_VARIABLE = "PORTABLE_AMP_DEVICE"


@dataclass(frozen=True)
class Hardware:
    """One device as torch and the system report it: raw readings, no judgement."""

    device_type: str
    name: str
    torch_version: tuple[int, int]
    autocast: bool
    """torch.amp.is_autocast_available: this build has autocast kernels for the device type."""
    total_memory: int | None = None
    """Bytes of memory the device can use, None where torch does not tell."""
    compute_capability: tuple[int, int] | None = None
    """NVIDIA only: (8, 0) is an A100."""
    arch: str = ""
    """AMD only: the compiler's name of the chip, such as gfx90a."""
    macos: tuple[int, int] | None = None
    system: str = ""
    """platform.system(): "Linux", "Darwin" or "Windows"; empty where nobody asked."""
    cpu_features: frozenset[str] = frozenset()
    float64: bool | None = None
    float16: bool | None = None
    bfloat16: bool | None = None
    """What the driver says of the dtype, None where there is no such question to ask."""


@dataclass(frozen=True)
class MemoryStats:
    """Bytes on one device; None where torch cannot tell."""

    allocated: int | None = None
    """Held by live tensors."""
    reserved: int | None = None
    """Held by torch's allocator, cache included."""
    total: int | None = None
    """What the device can give to this process."""


class Float32Setting(NamedTuple):
    """What torch computes one kind of operation in, of float32 tensors."""

    operation: str
    """"matmul", "conv" or "rnn"."""
    library: str = ""
    """As `fp32_precision` has it, from torch 2.9 on; empty where that does not rule."""
    old: str = ""
    """The name before, or until now: a flag, or "float32_matmul_precision"."""


class Float32Variable(NamedTuple):
    """Of the environment, read by the libraries below torch, whatever torch's settings say."""

    name: str
    denies: str
    """"ieee" or "tf32": what cannot be had with it."""
    values: str
    """A regular expression: with these."""


@dataclass(frozen=True)
class Backend:
    """How to deal with one device type."""

    device_type: str
    count: Callable[[], int]
    """Devices present, 0 for none; never raises."""
    read: Callable[[torch.device], Hardware]
    memory: Callable[[torch.device], MemoryStats]
    empty_cache: str | None = None
    """Name of torch's function, None where there is no cache to empty."""
    manual_seed_all: str | None = None
    """None where torch.manual_seed does it."""
    get_rng_state: str | None = None
    set_rng_state: str | None = None
    synchronize: str | None = None
    takes_device: bool = True
    """These three functions take a device; with MPS there is but one."""
    set_device: str | None = None
    pins_memory: bool = False
    """Copies from page-locked memory may be asynchronous, and stay ordered with later work."""
    copies: str = "synchronous: nobody has said that more is safe"
    """How batches get there, for `explain`."""
    distributed: str | None = None
    """The torch.distributed backend that talks between such devices."""
    out_of_memory: tuple[str, ...] = ()
    """What an out-of-memory error of this device says."""
    channels_last_fault: Callable[[torch.nn.Module], str] = lambda model: ""
    """Why a model is not to be laid out channels last there; empty where nothing is known."""
    float32: tuple[Float32Setting, ...] = ()
    float32_variables: tuple[Float32Variable, ...] = ()
    replaces_parameters: bool = False
    """Module.to makes new parameters, and unties those that are shared (pytorch#116255)."""


def torch_function(dotted: str | None) -> Callable[..., Any] | None:
    """`torch.<dotted>`, or None where this torch has no such function."""
    found: Any = torch
    for part in (dotted or "").split("."):
        found = getattr(found, part, None)
    return found if callable(found) else None


def torch_version() -> tuple[int, int]:
    """The running torch as (major, minor)."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(re.match(r"\d*", minor)[0] or 0)  # type: ignore[index]


# --- CUDA, and ROCm under the same name ------------------------------------------------------


def _count_cuda() -> int:
    # A broken driver makes torch warn and answer "no CUDA". The user must hear why the GPU is not
    # used, but as our one notice: is_available() repeats its own warning from several places.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0  # noqa: PAM402
    for warning in caught:
        tell_once(("cuda", "driver"), f"cuda is not usable: {warning.message}")
    return count


def _read_cuda(device: torch.device) -> Hardware:
    found = torch.cuda.get_device_properties(device)  # noqa: PAM307
    amd = torch.version.hip is not None
    return Hardware(
        "cuda",
        found.name,
        torch_version(),
        autocast=torch.amp.is_autocast_available("cuda"),
        system=platform.system(),
        total_memory=found.total_memory,
        compute_capability=None if amd else (found.major, found.minor),
        arch=found.gcnArchName.split(":")[0] if amd else "",
        float64=True,
    )


def _memory_cuda_like(device: torch.device) -> MemoryStats:
    module = torch.get_device_module(device)

    def ask(name: str) -> Any:  # a vendor's module may have some of them only
        return getattr(module, name, lambda device: None)(device)

    return MemoryStats(
        allocated=ask("memory_allocated"),
        reserved=ask("memory_reserved"),
        total=(ask("mem_get_info") or (None, None))[1],
    )


# --- Intel XPU -------------------------------------------------------------------------------


def _count_xpu() -> int:
    return torch.xpu.device_count() if torch.xpu.is_available() else 0


def _read_xpu(device: torch.device) -> Hardware:
    found = torch.xpu.get_device_properties(device)
    return Hardware(
        "xpu",
        found.name,
        torch_version(),
        autocast=torch.amp.is_autocast_available("xpu"),
        system=platform.system(),
        total_memory=found.total_memory,
        # These three attributes came with torch 2.5; without them nothing is claimed.
        float64=getattr(found, "has_fp64", None),
        float16=getattr(found, "has_fp16", None),
        bfloat16=getattr(found, "has_bfloat16_conversions", None),
    )


# --- Apple MPS -------------------------------------------------------------------------------


def _count_mps() -> int:
    return int(torch.backends.mps.is_available())


def _read_mps(device: torch.device) -> Hardware:
    release = platform.mac_ver()[0].split(".")
    name = torch_function("backends.mps.get_name")
    return Hardware(
        "mps",
        str(name()) if name else "Apple GPU",
        torch_version(),
        autocast=torch.amp.is_autocast_available("mps"),
        system=platform.system(),
        total_memory=_mps_total(),
        macos=(int(release[0] or 0), int(release[1]) if len(release) > 1 else 0),
        float64=False,
    )


def _mps_total() -> int | None:
    recommended = torch_function("mps.recommended_max_memory")
    return int(recommended()) if recommended else None


def _memory_mps(device: torch.device) -> MemoryStats:
    return MemoryStats(
        allocated=torch.mps.current_allocated_memory(),
        reserved=torch.mps.driver_allocated_memory(),
        total=_mps_total(),
    )


# --- CPU -------------------------------------------------------------------------------------


def _cpu_name_and_features() -> tuple[str, frozenset[str]]:
    """What the processor is and can do, in torch's spelling; no features where nobody tells."""
    ask = torch_function("cpu.get_capabilities")  # torch 2.11+
    if ask:
        told = ask()
        features = frozenset(name for name, value in told.items() if value is True)
        return str(told.get("cpu_name") or platform.machine() or "CPU"), features
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    # Linux and torch spell this one differently.
    features = frozenset((flags[1] if flags else "").replace("avx512fp16", "avx512_fp16").split())
    return name[1].strip() if name else platform.machine() or "CPU", features


def _read_cpu(device: torch.device) -> Hardware:
    name, features = _cpu_name_and_features()
    return Hardware(
        "cpu",
        name,
        torch_version(),
        autocast=torch.amp.is_autocast_available("cpu"),
        system=platform.system(),
        cpu_features=features,
        float64=True,
    )


def _cpu_channels_last_fault(model: torch.nn.Module) -> str:
    # Source: uxlfoundation/oneDNN#6035, seen with torch 2.15 on AVX512: the gradient of such a
    # weight is computed beyond the end of its workspace, which corrupts memory or the result.
    for name, module in model.named_modules() if model.training else ():
        if (
            isinstance(module, torch.nn.Conv2d)
            and module.kernel_size == (1, 1)
            and max(module.stride) > 1
            and module.in_channels // module.groups < 16
        ):
            return (
                f"{name}, a 1x1 convolution with a stride and fewer than 16 channels, "
                "corrupts memory in training (uxlfoundation/oneDNN#6035)"
            )
    return ""


def _no_memory(device: torch.device) -> MemoryStats:
    return MemoryStats()


# --- any other accelerator -------------------------------------------------------------------


def _device_module(device_type: str) -> ModuleType | None:
    """The vendor's module, registered as torch.<device_type>; None where there is none."""
    try:
        module: ModuleType = torch.get_device_module(device_type)
    except RuntimeError:
        return None
    return module


def _generic(device_type: str) -> Backend:
    """A row for an accelerator without one of its own, from what its module offers."""

    def count() -> int:
        module = _device_module(device_type)
        try:
            return int(module.device_count()) if module and module.is_available() else 0
        except Exception:  # whatever a vendor's module throws, the device is of no use
            return 0

    def read(device: torch.device) -> Hardware:
        module = _device_module(device_type)
        supported = getattr(module, "get_amp_supported_dtype", None)
        dtypes = supported() if supported else None
        bf16 = getattr(module, "is_bf16_supported", None)
        name = getattr(module, "get_device_name", None)
        # torch.autocast refuses a plugin's device without this function, even when it is off.
        plugin = device_type == torch._C._get_privateuse1_backend_name()
        return Hardware(
            device_type,
            str(name(device)) if name else device_type,
            torch_version(),
            autocast=torch.amp.is_autocast_available(device_type)
            and not (plugin and supported is None),
            system=platform.system(),
            float16=None if dtypes is None else torch.float16 in dtypes,
            bfloat16=torch.bfloat16 in dtypes
            if dtypes is not None
            else (bool(bf16()) if bf16 else None),
        )

    return Backend(
        device_type,
        count,
        read,
        _memory_cuda_like,
        empty_cache=f"{device_type}.empty_cache",
        # Source: torch.manual_seed knows one plugin; Gaudi's examples seed torch.hpu besides.
        manual_seed_all=f"{device_type}.manual_seed_all",
        get_rng_state=f"{device_type}.get_rng_state",
        set_rng_state=f"{device_type}.set_rng_state",
        set_device=f"{device_type}.set_device",
        synchronize=f"{device_type}.synchronize",
        distributed=_VENDOR_DISTRIBUTED.get(device_type),
        replaces_parameters=True,
    )


# Source: the vendors' torch.distributed back ends (Ascend, Gaudi, Cambricon).
_VENDOR_DISTRIBUTED = {"npu": "hccl", "hpu": "hccl", "mlu": "cncl"}

# Source: the libraries of Gaudi and Ascend (vllm-ascend#3141), XLA (xla#1735, #3470), DirectML
# (DirectML#579). Others say their name, as torch does: "MLU out of memory".
_VENDORS_OUT_OF_MEMORY = (
    "PT_DEVMEM Allocation failed",
    "EL0004",
    "RESOURCE_EXHAUSTED",
    "Resource exhausted: ",
    "not enough GPU video memory available",
)

_ASYNCHRONOUS = "asynchronous from pinned memory; loader_options() pins"

CUDA = Backend(
    "cuda",
    _count_cuda,
    _read_cuda,
    _memory_cuda_like,
    empty_cache="cuda.empty_cache",
    get_rng_state="cuda.get_rng_state",
    set_rng_state="cuda.set_rng_state",
    set_device="cuda.set_device",
    synchronize="cuda.synchronize",
    pins_memory=True,
    copies=_ASYNCHRONOUS,
    distributed="nccl",
    float32=(
        Float32Setting("matmul", "cuda", "cuda.matmul.allow_tf32"),
        Float32Setting("conv", "cuda", "cudnn.allow_tf32"),
        Float32Setting("rnn", "cuda", "cudnn.allow_tf32"),
    ),
    # Source: NVIDIA's documentation of cuBLAS and cuDNN: 0 turns TF32 off for good.
    float32_variables=(Float32Variable("NVIDIA_TF32_OVERRIDE", "tf32", "0"),),
    # Source: torch's and ROCm's sources and reports; pytorch#112377 (NVML, on a part of a card),
    # pytorch#20123 (cuDNN), ROCm/TheRock#1708 (hipBLAS).
    out_of_memory=(
        "CUDA out of memory",
        "HIP out of memory",
        "CUDA error: out of memory",
        "HIP error: out of memory",
        "CUDA driver error: out of memory",
        "Cuda failure 2 'out of memory'",  # NCCL's
        "Cuda failure 'out of memory'",
        "CUDA ran out of memory outside PyTorch's allocator",
        "cudaErrorMemoryAllocation",
        "hipErrorOutOfMemory",
        "NVML_SUCCESS == r INTERNAL ASSERT FAILED",
        # CUBLAS_STATUS_ALLOC_FAILED; CUDNN_, CUSOLVER_, CUSPARSE_, HIPBLAS_..., and CUFFT's without
        # STATUS. The second is cuRAND's, and cuDNN's from 9 on.
        "_ALLOC_FAILED",
        "_ALLOCATION_FAILED",
        "miopenStatusAllocFailed",
        # cuDNN finds no algorithm when none fits into what memory is left.
        "Unable to find a valid cuDNN algorithm",
        "unable to find an engine",
    ),
)
XPU = Backend(
    "xpu",
    _count_xpu,
    _read_xpu,
    _memory_cuda_like,
    empty_cache="xpu.empty_cache",
    get_rng_state="xpu.get_rng_state",
    set_rng_state="xpu.set_rng_state",
    set_device="xpu.set_device",
    synchronize="xpu.synchronize",
    pins_memory=True,
    copies=_ASYNCHRONOUS,
    distributed="xccl",
    # Source: torch's mkldnn/xpu sources, Matmul.cpp and Conv.cpp, which ask this flag alone.
    float32=(
        Float32Setting("matmul", old="mkldnn.allow_tf32"),
        Float32Setting("conv", old="mkldnn.allow_tf32"),
    ),
    # Source: the error codes of Unified Runtime, of the plugins before it, and of Level Zero;
    # pytorch#177714, intel-extension-for-pytorch#325, #629.
    out_of_memory=(
        "XPU out of memory",
        "UR_RESULT_ERROR_OUT_OF_",
        "UR_RESULT_ERROR_MEM_OBJECT_ALLOCATION_FAILURE",
        "PI_ERROR_OUT_OF_",
        "PI_ERROR_MEM_OBJECT_ALLOCATION_FAILURE",
        "ZE_RESULT_ERROR_OUT_OF_",
        "can NOT allocate memory block with size larger than",
    ),
)
MPS = Backend(
    "mps",
    _count_mps,
    _read_mps,
    _memory_mps,
    # Absent from the earliest builds that have MPS; clear_cache looks before it calls.
    empty_cache="mps.empty_cache",
    get_rng_state="mps.get_rng_state",
    set_rng_state="mps.set_rng_state",
    takes_device=False,
    synchronize="mps.synchronize",
    # Source: pytorch#175189, open; not seen on hardware.
    channels_last_fault=lambda model: "batch norm's gradients can be wrong (pytorch#175189)",
    copies="synchronous: a non_blocking copy to MPS can corrupt data (pytorch#139550)",
    # Source: torch's documentation of MPS environment variables: Metal kernels with fast math.
    float32_variables=(Float32Variable("PYTORCH_MPS_FAST_MATH", "ieee", "(?!0$).+"),),
    # Source: torch's MPS allocator (pytorch#141909), and Metal's own error.
    out_of_memory=(
        "MPS backend out of memory",
        "Invalid buffer size: ",
        "kIOGPUCommandBufferCallbackErrorOutOfMemory",
    ),
)
CPU = Backend(
    "cpu",
    lambda: 1,
    _read_cpu,
    _no_memory,
    channels_last_fault=_cpu_channels_last_fault,
    copies="none: batches are there already",
    distributed="gloo",
    float32=(
        Float32Setting("matmul", "mkldnn", "float32_matmul_precision"),
        Float32Setting("conv", "mkldnn"),
        Float32Setting("rnn", "mkldnn"),
    ),
    # Source: oneDNN's documentation, primitive attributes, fpmath mode.
    float32_variables=tuple(
        Float32Variable(f"{library}_DEFAULT_FPMATH_MODE", "ieee", "(?i)(?!strict$).+")
        for library in ("ONEDNN", "DNNL")
    ),
    out_of_memory=(
        "DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough memory",
        "std::bad_alloc",  # of C++, as torch passes it on; on Windows the next
        "bad allocation",
    ),
)

BACKENDS = (CUDA, XPU, MPS, CPU)
"""Every row, in order of preference; accelerators without a row come before the CPU."""

OUT_OF_MEMORY = (
    *(text for row in BACKENDS for text in row.out_of_memory),
    *_VENDORS_OUT_OF_MEMORY,
)
"""What the out-of-memory errors of any device say."""


def _vendor_types() -> tuple[str, ...]:
    """Device types without a row that this build may have: in-tree ones, and the plugin's name.

    The plugin's name has no public question that works on every version; this one was tried on
    torch 2.4 and 2.15.
    """
    return ("hpu", "mtia", str(torch._C._get_privateuse1_backend_name()))


def backend_for(device_type: str) -> Backend:
    """The row of one device type; a generic one where none was written."""
    for row in BACKENDS:
        if row.device_type == device_type:
            return row
    return _generic(device_type)


def present(which: Callable[[Backend], object] = lambda row: True) -> tuple[Backend, ...]:
    """The rows of what this machine has, best first; the CPU is always there, and last.

    Of rows that are not asked for, no driver is asked.
    """
    *accelerators, cpu = BACKENDS
    candidates = (*accelerators, *map(_generic, _vendor_types()), cpu)
    return tuple(row for row in candidates if which(row) and row.count() > 0)


def parse_device(value: object) -> torch.device:
    """The torch.device that `value` names, present or not.

    Raises:
        DeviceError: torch knows no such device.
    """
    if isinstance(value, torch.device):
        return value
    if isinstance(value, str):
        try:
            device = torch.device(value)
        except (RuntimeError, ValueError):
            pass
        else:  # torch takes "cuda:256" for cuda:0
            if str(device) == value:
                return device
    raise DeviceError(
        f"{shown(value)} is not a device torch knows.{_hint(value)} "
        f"This machine has: {_inventory()}."
    )


# What people call them; torch's name for ROCm is CUDA's. None: whatever accelerator is here.
_OTHER_NAMES = {
    **dict.fromkeys(("nvidia", "geforce", "rocm", "hip", "amd", "radeon"), CUDA.device_type),
    **dict.fromkeys(("metal", "apple"), MPS.device_type),
    **dict.fromkeys(("intel", "sycl", "arc"), XPU.device_type),
    **dict.fromkeys(("gpu", "accelerator", "auto", ""), None),
}
# torch knows these once the package of their vendor is imported.
_PACKAGES = {"npu": "torch_npu", "mlu": "torch_mlu", "musa": "torch_musa", "xla": "torch_xla"}


def _hint(value: object) -> str:
    """What was probably meant by something that is no device here; empty where nothing was."""
    if not isinstance(value, str):
        return ""
    word = value.partition(":")[0].strip().lower()
    if word in _PACKAGES:
        return f" It comes with {_PACKAGES[word]}, to be imported first."
    names = [*(row.device_type for row in BACKENDS), *_vendor_types()]
    best = present()[0].device_type
    if word in _OTHER_NAMES:
        meant = _OTHER_NAMES[word] or (best if best != CPU.device_type else "")
    elif word.isdecimal():
        meant = f"{best}:{word}" if best != CPU.device_type else ""
    else:
        meant = next(iter(difflib.get_close_matches(word, names, n=1, cutoff=0.7)), "")
    return f" Did you mean {meant!r}?" if meant else ""


def resolve_device(value: str | torch.device | int | None = None) -> torch.device:
    """The device to use, with its index: as told, else $PORTABLE_AMP_DEVICE, else the best present.

    A number is the index of an accelerator, as in torch. Without an index it is that of the process
    on its node, as the launcher tells, else torch's current one.

    Raises:
        DeviceError: there is no such device here.
    """
    origin = ""
    if value is None and os.environ.get(DEVICE_VARIABLE):
        value, origin = os.environ[DEVICE_VARIABLE], f" (from ${DEVICE_VARIABLE})"
    if isinstance(value, Integral) and not isinstance(value, bool):
        value = f"{_accelerator(int(value))}:{int(value)}"
    device = torch.device(present()[0].device_type) if value is None else parse_device(value)
    count = backend_for(device.type).count()
    if device.type == CPU.device_type:
        if device.index:
            raise DeviceError(f"'{device}'{origin} is not available: the CPU is one device, 'cpu'.")
        return torch.device("cpu")
    index = device.index
    if index is None:
        index, source = _local_index(device.type, count)
        if index >= count > 0:
            origin += source
    if index >= count:
        have = (
            f"{count} {device.type} device{'s' * (count != 1)}" if count else "there is none here"
        )
        hint = _hint(device.type) if device.type in {*_OTHER_NAMES, *_PACKAGES} else ""
        raise DeviceError(
            f"'{device.type}:{index}'{origin} is not available: {have}.{hint} This machine has: "
            f"{_inventory()}. Use device=None to let portable-amp choose."
        )
    return torch.device(device.type, index)


def _local_index(device_type: str, count: int) -> tuple[int, str]:
    """The index for this process, and from where: its launcher, else the one current in torch.

    0 where there is but one: some launchers show each process its own.
    """
    if count <= 1:
        return 0, ""
    if told := local_rank():
        return told[1], f" (from ${told[0]})"
    current = torch_function(f"{device_type}.current_device")
    try:
        return int(current()) if current else 0, ""
    except (RuntimeError, AssertionError):
        return 0, ""


def _accelerator(index: int) -> str:
    best = present()[0].device_type
    if best == CPU.device_type or index < 0:
        raise DeviceError(
            f"{index} is no index of an accelerator of this machine, which has: {_inventory()}."
        )
    return best


def _inventory() -> str:
    """The devices of this machine, such as "cuda:0, cuda:1, cpu"."""
    return ", ".join(
        name
        for row in present()
        for name in (
            [row.device_type]
            if row is CPU
            else [f"{row.device_type}:{index}" for index in range(row.count())]
        )
    )
