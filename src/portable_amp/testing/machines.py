"""The catalogue: machines as torch would report them, one row each."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from portable_amp.backends import Hardware
from portable_amp.capabilities import Capabilities, derive

_GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """One accelerator, or one CPU, with the version of torch it runs."""

    key: str
    hardware: Hardware
    source: str
    """Where the readings are from."""

    @property
    def capabilities(self) -> Capabilities:
        """The facts `probe` would find there."""
        return derive(self.hardware)


def machine(key: str) -> Machine:
    """The machine of that name in the catalogue.

    >>> from portable_amp import choose
    >>> choose("auto", machine("t4").capabilities).name
    'fp16'

    Raises:
        KeyError: there is no such machine; the nearest names are told.
    """
    for row in MACHINES:
        if row.key == key:
            return row
    names = [row.key for row in MACHINES]
    near = difflib.get_close_matches(key, names, n=3) or names
    raise KeyError(f"no machine {key!r} in the catalogue; there is {', '.join(near)}")


def _nvidia(key: str, name: str, cc: tuple[int, int], gib: int) -> Machine:
    hardware = Hardware(
        "cuda", name, (2, 15), True, gib * _GIB, compute_capability=cc, float64=True
    )
    return Machine(key, hardware, "NVIDIA's table of compute capabilities; data sheet")


def _amd(key: str, name: str, arch: str, gib: int) -> Machine:
    hardware = Hardware("cuda", name, (2, 15), True, gib * _GIB, arch=arch, float64=True)
    return Machine(key, hardware, "ROCm's table of supported GPUs; data sheet")


def _intel(key: str, name: str, gib: int, *, float64: bool) -> Machine:
    hardware = Hardware(
        "xpu", name, (2, 15), True, gib * _GIB, float64=float64, float16=True, bfloat16=True
    )
    return Machine(key, hardware, "Intel's data sheet; pytorch#147731 for float64")


def _mac(key: str, chip: str, macos: tuple[int, int], torch: tuple[int, int]) -> Machine:
    hardware = Hardware("mps", chip, torch, True, 16 * _GIB, macos=macos, float64=False)
    return Machine(key, hardware, "torch's release notes on MPS; no such machine was seen")


def _cpu(key: str, name: str, *features: str) -> Machine:
    hardware = Hardware("cpu", name, (2, 15), True, cpu_features=frozenset(features), float64=True)
    return Machine(key, hardware, "torch.cpu.get_capabilities' names for the vendor's features")


MACHINES = (
    _nvidia("v100", "Tesla V100-SXM2-16GB", (7, 0), 16),
    _nvidia("t4", "Tesla T4", (7, 5), 15),
    _nvidia("gtx1080", "NVIDIA GeForce GTX 1080", (6, 1), 8),
    _nvidia("gtx1660", "NVIDIA GeForce GTX 1660 Ti", (7, 5), 6),
    _nvidia("a100", "NVIDIA A100-SXM4-40GB", (8, 0), 40),
    _nvidia("rtx4090", "NVIDIA GeForce RTX 4090", (8, 9), 24),
    _nvidia("h100", "NVIDIA H100 80GB HBM3", (9, 0), 80),
    _amd("mi250", "AMD Instinct MI250X", "gfx90a", 64),
    _amd("rx6800", "AMD Radeon RX 6800", "gfx1030", 16),
    _intel("arc-a770", "Intel(R) Arc(TM) A770 Graphics", 16, float64=False),
    _intel("max1550", "Intel(R) Data Center GPU Max 1550", 64, float64=True),
    _mac("m1-macos13", "Apple M1", (13, 6), (2, 8)),
    _mac("m2-macos14", "Apple M2", (14, 5), (2, 15)),
    _mac("m2-macos15-torch24", "Apple M2", (15, 0), (2, 4)),
    _cpu("cpu", "x86_64", "avx2"),
    _cpu("cpu-avx512bf16", "x86_64", "avx2", "avx512_f", "avx512_bf16"),
    _cpu("cpu-amx", "x86_64", "avx512_f", "avx512_bf16", "amx_bf16", "amx_tile"),
    _cpu("cpu-arm-bf16", "aarch64", "neon", "bf16"),
)
