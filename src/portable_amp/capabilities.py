"""What a device can do, as plain facts: `probe` reads them, `derive` judges the readings.

Nothing here decides what to use; that is `precision.choose`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch

from portable_amp.backends import Hardware, backend_for, parse_device, resolve_device


class Support(str, Enum):
    """How a device computes in a dtype."""

    NATIVE = "native"
    """In hardware: correct, and no slower than float32 for matrix products."""
    EMULATED = "emulated"
    """Correct, but slower than float32."""
    ABSENT = "absent"
    """Refused, or wrong."""


@dataclass(frozen=True)
class Capabilities:
    """What one device can do with this torch."""

    device_type: str
    name: str
    float16: Support
    bfloat16: Support
    float64: bool | None
    """float64 tensors exist there; None where nobody tells."""
    autocast: bool
    """torch.autocast works for this device type with this torch."""
    grad_scaler: bool
    """torch.amp.GradScaler works on tensors of this device."""
    missing_dtypes: tuple[torch.dtype, ...] = ()
    """Floating dtypes of which there are no tensors there."""
    autocast_float32: bool = False
    """torch.autocast(dtype=torch.float32) means something: it runs the fp32 list in fp32."""
    tf32: bool | None = None
    """It can multiply float32 matrices in TF32; None where nobody tells."""
    mixed_precision_caveat: str = ""
    """Why automatic mixed precision is not to be trusted blindly here; empty where it is."""
    evidence: tuple[str, ...] = ()
    """The readings behind these facts, in words."""
    total_memory: int | None = None
    """Bytes."""

    def support(self, dtype: torch.dtype) -> Support:
        """How this device computes in `dtype`, one of the floating dtypes a plan can have."""
        if dtype is torch.float32:
            return Support.NATIVE
        return self.float16 if dtype is torch.float16 else self.bfloat16


def probe(device: torch.device | str | None = None) -> Capabilities:
    """The facts about one device of this machine; read once per process.

    >>> probe("cpu").float64
    True

    Raises:
        DeviceError: there is no such device here.
    """
    return _probe(resolve_device(device))


class Asleep(Exception):  # noqa: N818 no error: decide later
    """Asking what the device can do would initialise it, and no process could be forked for it."""


@functools.cache
def look_up(device: str | torch.device) -> tuple[str, Capabilities | None]:
    """The device type, and what it can do; None where this machine has none of that type.

    Raises:
        DeviceError: torch knows no such device.
    """
    named = parse_device(device)
    count = backend_for(named.type).count()
    if not count:
        return named.type, None
    there = named.index is None or named.index < count
    return named.type, probe(named if there else named.type)


@functools.cache
def look_up_awake(device: str | torch.device) -> tuple[str, Capabilities | None]:
    """The same, of a device that is initialised already.

    Raises:
        DeviceError: torch knows no such device.
        Asleep: it is not. That is not cached, and another answer when it is asked for next.
    """
    kind = parse_device(device).type
    if torch.amp.is_autocast_available(kind) and backend_for(kind).count() and _asleep(kind):
        raise Asleep(kind)
    return look_up(device)


def _asleep(device_type: str) -> bool:
    # Source: torch.cuda and torch.xpu initialise a device to read its properties, 2.4 to 2.15.
    initialised = getattr(torch.get_device_module(device_type), "is_initialized", lambda: True)
    return not initialised()


@functools.cache
def _probe(device: torch.device) -> Capabilities:
    return derive(backend_for(device.type).read(device))


def forget() -> None:
    """Read everything anew when it is asked for next, for tests."""
    _probe.cache_clear()
    look_up.cache_clear()
    look_up_awake.cache_clear()
    # torch, too, remembers the modules that vendors register.
    getattr(torch.get_device_module, "cache_clear", lambda: None)()


def derive(hardware: Hardware) -> Capabilities:
    """The facts that follow from the readings; pure, so readings alone can play a machine."""
    return _DERIVE.get(hardware.device_type, _derive_generic)(hardware)


def _derive_cuda(hw: Hardware) -> Capabilities:
    return (_derive_amd if hw.arch else _derive_nvidia)(hw)


# The cards with a TU116 or TU117 chip, by name: nothing else tells them from a T4 or an RTX.
# Source: NaN under fp16: pytorch#58123 (GTX 16xx), ultralytics#17977 (T400 to T2000, MX450),
# easydiffusion#803 (T600, T1000, T1200, T2000); the chips: techpowerup.com/gpu-specs, TU116, TU117.
_WITHOUT_TENSOR_CORES = re.compile(
    r"\b(GTX 16\d0|T(400|500|550|600|1000|1200|2000)|MX[45]50|CMP 30HX)\b", re.IGNORECASE
)


def _derive_nvidia(hw: Hardware) -> Capabilities:
    cc = hw.compute_capability or (0, 0)
    # Source: CUDA C Programming Guide, arithmetic throughput: half precision runs at twice the
    # float32 rate on 5.3, 6.0, 6.2 and from 7.0 on, and at 1/64 of it on 6.1.
    fast_half = cc[0] >= 7 or cc in {(5, 3), (6, 0), (6, 2)}
    broken_half = cc == (7, 5) and bool(_WITHOUT_TENSOR_CORES.search(hw.name))
    evidence = [f"{hw.name}, compute capability {cc[0]}.{cc[1]}"]
    if broken_half:
        evidence.append("fp16 autocast gives NaN on Turing cards without tensor cores")
    # Source: torch.cuda.is_bf16_supported (2.4 to 2.15) also answers True where bf16 is emulated;
    # its own test for native support is the one below. cuDNN has no bf16 convolution under sm80.
    native_bf16 = cc[0] >= 8
    if not native_bf16:
        evidence.append("bf16 is emulated below compute capability 8.0, and slower than fp32")
    return _assemble(
        hw,
        float16=Support.ABSENT if broken_half else _native_or_slow(fast_half),
        bfloat16=_native_or_slow(native_bf16),
        autocast_float32=True,
        tf32=cc[0] >= 8,  # Source: CUDA C Programming Guide, tensor cores of 8.0 and later
        evidence=evidence,
    )


def _derive_amd(hw: Hardware) -> Capabilities:
    # Source: AMD's matrix-instruction tables: bf16 in CDNA (gfx908, gfx90a, gfx94x, gfx95x) and
    # from RDNA3 (gfx11xx) on. torch.cuda.is_bf16_supported answers True on every ROCm device.
    native_bf16 = hw.arch.startswith(("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12"))
    rdna_without = hw.arch.startswith("gfx10")
    native_fp16 = hw.arch.startswith(("gfx9", "gfx10", "gfx11", "gfx12"))
    return _assemble(
        hw,
        float16=_native_or_slow(native_fp16),
        bfloat16=Support.ABSENT if rdna_without else _native_or_slow(native_bf16),
        autocast_float32=True,
        # Source: AMD's instruction set of CDNA3 has XF32; that of CDNA4 has it no more.
        tf32=hw.arch.startswith("gfx94"),
        evidence=[f"{hw.name}, {hw.arch}"]
        + ([] if native_bf16 else [f"{hw.arch} has no bf16 instructions"]),
    )


def _derive_xpu(hw: Hardware) -> Capabilities:
    says = {None: "unknown", True: "yes", False: "no"}
    return _assemble(
        hw,
        float16=Support.NATIVE if hw.float16 else Support.ABSENT,
        bfloat16=_native_or_slow(bool(hw.bfloat16)),
        evidence=[
            f"{hw.name}; the driver says fp16 {says[hw.float16]}, "
            f"bf16 {says[hw.bfloat16]}, fp64 {says[hw.float64]}"
        ],
    )


def _derive_mps(hw: Hardware) -> Capabilities:
    # Source: torch's release notes and source: fp16 autocast on MPS since 2.5, bf16 since 2.6 and
    # macOS 14; the kernels GradScaler needs since 2.8.
    fp16 = hw.torch_version >= (2, 5)
    macos = hw.macos or (0, 0)
    has_bf16 = macos[0] >= 14
    bf16 = hw.torch_version >= (2, 6) and has_bf16
    return _assemble(
        hw,
        float16=Support.NATIVE if fp16 else Support.ABSENT,
        bfloat16=Support.NATIVE if bf16 else Support.ABSENT,
        autocast=hw.autocast and fp16,
        grad_scaler=hw.torch_version >= (2, 8),
        tf32=False,
        lacks=() if has_bf16 else (torch.bfloat16,),
        caveat="torch's autocast covers only part of its operations on MPS",
        evidence=[
            f"macOS {macos[0]}.{macos[1]}, torch {hw.torch_version[0]}.{hw.torch_version[1]}",
            "MPS autocast needs torch 2.5 for fp16, torch 2.6 and macOS 14 for bf16; "
            "a gradient scaler needs torch 2.8",
        ],
    )


def _derive_cpu(hw: Hardware) -> Capabilities:
    # Source: pytorch#118499: bf16 without these instructions is slower than fp32. Measured: fp16
    # without its own is about ten times slower.
    for_bf16 = hw.cpu_features & {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"}
    for_fp16 = hw.cpu_features & {"avx512_fp16", "amx_fp16"}
    found = ", ".join(sorted(for_bf16 | for_fp16)) or "none"
    return _assemble(
        hw,
        float16=_native_or_slow(bool(for_fp16)),
        bfloat16=_native_or_slow(bool(for_bf16)),
        tf32=False,
        caveat="on a CPU mixed precision can be slower than fp32, depending on the model",
        evidence=[f"{hw.name}, 16-bit instructions: {found}"],
    )


def _derive_generic(hw: Hardware) -> Capabilities:
    return _assemble(
        hw,
        float16=Support.NATIVE if hw.float16 else Support.ABSENT,
        bfloat16=Support.NATIVE if hw.bfloat16 else Support.ABSENT,
        # Every accelerator without a row may lack the scaler's kernels or float64; ask by name.
        caveat=f"portable-amp knows {hw.device_type} only by what its torch module says",
        evidence=[
            f"{hw.name}; torch.{hw.device_type} says fp16 {hw.float16}, bf16 {hw.bfloat16} "
            "(None: it does not say)"
        ],
    )


def _native_or_slow(native: bool) -> Support:
    return Support.NATIVE if native else Support.EMULATED


def _assemble(
    hw: Hardware,
    *,
    float16: Support,
    bfloat16: Support,
    evidence: list[str],
    autocast: bool | None = None,
    grad_scaler: bool = True,
    autocast_float32: bool = False,
    tf32: bool | None = None,
    lacks: tuple[torch.dtype, ...] = (),
    caveat: str = "",
) -> Capabilities:
    return Capabilities(
        device_type=hw.device_type,
        name=hw.name,
        float16=float16,
        bfloat16=bfloat16,
        float64=hw.float64,
        missing_dtypes=(
            *((torch.float64, torch.complex128) if hw.float64 is False else ()),
            *lacks,
        ),
        autocast=hw.autocast if autocast is None else autocast,
        grad_scaler=grad_scaler,
        autocast_float32=autocast_float32,
        tf32=tf32,
        mixed_precision_caveat=caveat,
        evidence=tuple(evidence),
        total_memory=hw.total_memory,
    )


_DERIVE: dict[str, Callable[[Hardware], Capabilities]] = {
    "cuda": _derive_cuda,
    "xpu": _derive_xpu,
    "mps": _derive_mps,
    "cpu": _derive_cpu,
}
