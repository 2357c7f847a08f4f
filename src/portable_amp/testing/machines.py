"""The catalogue: machines as torch would report them, one row each."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

import torch

from portable_amp.backends import Hardware
from portable_amp.capabilities import Capabilities, derive
from portable_amp.errors import MachineError

_GIB = 2**30

TORCH_VERSIONS = ((2, 4), (2, 15))
"""The oldest and the newest torch that a machine can be said to run."""


@dataclass(frozen=True)
class Machine:
    """One accelerator, or one CPU, with the version of torch it runs."""

    key: str
    hardware: Hardware
    source: str
    """Where the readings are from."""
    slow: tuple[torch.dtype, ...] = ()
    """What it computes correctly, but slower than float32."""
    wrong: tuple[torch.dtype, ...] = ()
    """What it refuses, or computes wrongly."""
    triton: bool = True
    """torch.compile finds the compiler it needs."""

    @property
    def capabilities(self) -> Capabilities:
        """The facts `probe` would find there."""
        return derive(self.hardware)


def machine(key: str, torch_version: str | None = None) -> Machine:
    """The machine of that name in the catalogue, with its torch or another.

    >>> from portable_amp import choose
    >>> choose("auto", machine("t4").capabilities).name
    'fp16'
    >>> choose("fp16", machine("m2-macos14", torch_version="2.7").capabilities).name
    'fp32'

    Raises:
        MachineError: there is no such machine or version; the nearest names are told.
    """
    for row in MACHINES:
        if row.key == key:
            break
    else:
        names = [row.key for row in MACHINES]
        near = [name for name in names if name.startswith(str(key))]
        near = near or difflib.get_close_matches(str(key), names, cutoff=0.5) or names
        raise MachineError(f"no machine {key!r} in the catalogue; there is {', '.join(near)}")
    if torch_version is None:
        return row
    return replace(row, hardware=replace(row.hardware, torch_version=_version(torch_version)))


def _version(text: str) -> tuple[int, int]:
    oldest, newest = TORCH_VERSIONS
    known = [f"{oldest[0]}.{minor}" for minor in range(oldest[1], newest[1] + 1)]
    found = re.match(r"(\d+)\.(\d+)(\.|$)", str(text))
    if found and f"{found[1]}.{found[2]}" in known:
        return int(found[1]), int(found[2])
    near = difflib.get_close_matches(str(text), known) or [known[0], "...", known[-1]]
    raise MachineError(f"no torch {text!r} for a machine to run; there is {', '.join(near)}")


_FP16, _BF16 = torch.float16, torch.bfloat16
_BOTH = (_FP16, _BF16)


def _nvidia(
    key: str,
    name: str,
    cc: tuple[int, int],
    gib: int,
    *,
    slow: tuple[torch.dtype, ...] = (),
    wrong: tuple[torch.dtype, ...] = (),
    system: str = "Linux",
) -> Machine:
    hardware = Hardware(
        "cuda", name, (2, 15), True, gib * _GIB, compute_capability=cc, system=system, float64=True
    )
    # Source: torch's wheels for Windows do not bring Triton, those for Linux do.
    triton = system != "Windows"
    source = f"NVIDIA: CUDA GPUs, sm{cc[0]}{cc[1]}; data sheet"
    return Machine(key, hardware, source, slow, wrong, triton)


def _amd(
    key: str, name: str, arch: str, gib: int, *, wrong: tuple[torch.dtype, ...] = ()
) -> Machine:
    hardware = Hardware(
        "cuda", name, (2, 15), True, gib * _GIB, arch=arch, system="Linux", float64=True
    )
    source = f"ROCm: accelerator and GPU specifications, {arch}"
    return Machine(key, hardware, source, wrong=wrong)


def _intel(key: str, name: str, gib: int, *, float64: bool, source: str) -> Machine:
    hardware = Hardware(
        "xpu", name, (2, 15), True, gib * _GIB,
        system="Linux", float64=float64, float16=True, bfloat16=True,
    )  # fmt: skip
    return Machine(key, hardware, source)


def _mac(
    key: str,
    chip: str,
    macos: tuple[int, int],
    version: tuple[int, int],
    *,
    wrong: tuple[torch.dtype, ...] = (),
) -> Machine:
    hardware = Hardware(
        "mps", chip, version, True, 16 * _GIB, macos=macos, system="Darwin", float64=False
    )
    source = "torch's release notes on MPS; Metal has no float64"
    return Machine(key, hardware, source, wrong=wrong)


def _cpu(
    key: str, name: str, *features: str, slow: tuple[torch.dtype, ...] = (), source: str
) -> Machine:
    hardware = Hardware(
        "cpu", name, (2, 15), True,
        system="Linux", cpu_features=frozenset(features), float64=True,
    )  # fmt: skip
    return Machine(key, hardware, source, slow)


def _vendor(
    key: str, device_type: str, name: str, gib: int, *, float16: bool, source: str
) -> Machine:
    hardware = Hardware(
        device_type, name, (2, 15), True, gib * _GIB,
        system="Linux", float16=float16, bfloat16=True,
    )  # fmt: skip
    return Machine(key, hardware, source)


MACHINES = (
    # NVIDIA: name as the driver gives it, compute capability, GiB. cuBLAS and cuDNN emulate bf16
    # below 8.0; fp16 runs at 1/64 of the float32 rate on 6.1; reports of NaN on GTX 16xx and other
    # Turing cards without tensor cores.
    _nvidia("gtx1080", "NVIDIA GeForce GTX 1080", (6, 1), 8, slow=_BOTH),
    _nvidia("v100", "Tesla V100-SXM2-16GB", (7, 0), 16, slow=(_BF16,)),
    _nvidia("t4", "Tesla T4", (7, 5), 15, slow=(_BF16,)),
    _nvidia("gtx1660", "NVIDIA GeForce GTX 1660 Ti", (7, 5), 6, slow=(_BF16,), wrong=(_FP16,)),
    _nvidia("t1000", "NVIDIA T1000 8GB", (7, 5), 8, slow=(_BF16,), wrong=(_FP16,)),
    _nvidia("a100", "NVIDIA A100-SXM4-40GB", (8, 0), 40),
    _nvidia("orin", "Orin", (8, 7), 30),
    _nvidia("l4", "NVIDIA L4", (8, 9), 22),
    _nvidia("rtx4090", "NVIDIA GeForce RTX 4090", (8, 9), 24),
    _nvidia("rtx4090-windows", "NVIDIA GeForce RTX 4090", (8, 9), 24, system="Windows"),
    _nvidia("h100", "NVIDIA H100 80GB HBM3", (9, 0), 80),
    _nvidia("b200", "NVIDIA B200", (10, 0), 180),
    # AMD: the compiler's name of the chip, GiB. RDNA2 has no bf16.
    _amd("mi250", "AMD Instinct MI250X", "gfx90a", 64),
    _amd("mi300x", "AMD Instinct MI300X", "gfx942", 192),
    _amd("rx6800", "AMD Radeon RX 6800", "gfx1030", 16, wrong=(_BF16,)),
    _amd("rx7900", "AMD Radeon RX 7900 XTX", "gfx1100", 24),
    # Intel: GiB, float64
    _intel(
        "arc-a770", "Intel(R) Arc(TM) A770 Graphics", 16, float64=False,
        source="Intel: Arc A-series has no fp64 in hardware; pytorch#147731",
    ),
    _intel(
        "max1550", "Intel(R) Data Center GPU Max 1550", 64, float64=True,
        source="Intel: Data Center GPU Max data sheet, one tile",
    ),
    # Apple: chip, macOS, torch. bf16 needs macOS 14 and torch 2.6, fp16 autocast torch 2.5.
    _mac("m1-macos13", "Apple M1", (13, 6), (2, 8), wrong=(_BF16,)),
    _mac("m2-macos14", "Apple M2", (14, 5), (2, 15)),
    _mac("m2-macos15", "Apple M2", (15, 0), (2, 15)),
    _mac("m2-macos15-torch24", "Apple M2", (15, 0), (2, 4), wrong=_BOTH),
    # Back ends without a row of their own: what the vendor's torch module says
    _vendor(
        "gaudi2", "hpu", "GAUDI2", 96, float16=True,
        source="Intel Gaudi: mixed precision with torch.autocast takes bf16 and fp16",
    ),
    _vendor(
        "ascend-910b", "npu", "Ascend910B", 64, float16=True,
        source="torch_npu: get_amp_supported_dtype gives fp16, and bf16 from 910B on",
    ),
    # CPUs: features in the words of torch.cpu.get_capabilities; 16-bit floats want instructions.
    _cpu(
        "cpu", "x86_64", "avx2", slow=_BOTH, source="x86-64-v3: most desktops and cloud machines"
    ),
    _cpu(
        "cpu-avx512bf16", "x86_64", "avx2", "avx512_f", "avx512_bf16", slow=(_FP16,),
        source="Intel Cooper Lake, AMD Zen 4: AVX512-BF16",
    ),
    _cpu(
        "cpu-amx", "x86_64", "avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16",
        "amx_tile", source="Intel Sapphire Rapids: AMX and AVX512-FP16",
    ),
    _cpu(
        "cpu-arm-bf16", "aarch64", "neon", "bf16", slow=(_FP16,),
        source="Armv8.6-A: BF16 (Graviton 3, Apple M2 under Linux)",
    ),
)  # fmt: skip
