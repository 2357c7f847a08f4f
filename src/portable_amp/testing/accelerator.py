"""A new accelerator for your own tests: torch's plugin device, with real numbers, in plain Python.

torch's dispatcher, autograd, autocast and GradScaler meet a device that is not their own, as with
a vendor's plugin. Its numbers lie in CPU memory, and the CPU's operations compute them.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Collection
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from portable_amp.errors import DeviceError
from portable_amp.testing.ledger import Ledger, Shortage
from portable_amp.testing.plugin import Plugin

_UNNAMED = "privateuseone"
"""torch's name for the plugin's device type until a plugin gives it another."""
_ENDLESS = 2**40
"""Bytes that mem_get_info tells where there is no limit."""


@dataclass(frozen=True)
class Accelerator:
    """The new device of this process."""

    name: str
    """Its device type; the vendor's module is `torch.<name>`."""
    ledger: Ledger
    """Its memory, to look at and to make scarce: set `limit`, call `fail_after`."""

    @property
    def device(self) -> torch.device:
        """The one device of this type."""
        return torch.device(self.name, 0)


def new_accelerator(
    name: str = "fakegpu",
    *,
    limit: int | None = None,
    without: Collection[str] = (),
    amp_dtypes: Collection[torch.dtype] = (torch.float16, torch.bfloat16),
) -> Accelerator:
    """Give this process an accelerator that torch did not know, for good.

    torch takes one plugin per process and never forgets its name: use a process of its own. Asked
    again, it is the same device, with the options of the latest call.

    Args:
        name: its device type.
        limit: bytes of memory; None: no end.
        without: functions that the vendor's module lacks.
        amp_dtypes: what the vendor's module says autocast may compute in.

    Raises:
        DeviceError: this torch cannot have it, or has another plugin already.
        ValueError: the vendor's module has no such function to leave out.
    """
    for missing in without:
        if missing not in _OFFERED:
            near = difflib.get_close_matches(missing, _OFFERED, n=3) or _OFFERED
            raise ValueError(f"without={missing!r}: the module offers {', '.join(near)}")
    if not _made or _made[0].name != name:
        _refuse(name)
    if not _made:
        _made.append(_Vendor(name))
    vendor = _made[0]
    vendor.ledger.limit = limit
    vendor.amp_dtypes = list(amp_dtypes)
    for function in _OFFERED:
        if function not in without:
            setattr(vendor.module, function, getattr(vendor, function))
        elif hasattr(vendor.module, function):
            delattr(vendor.module, function)
    return Accelerator(name, vendor.ledger)


def _refuse(name: str) -> None:
    """Raise where torch cannot have a new device of that name, before anything is changed."""
    asked = f"new_accelerator({name!r}) is refused"
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        raise DeviceError(
            f"{asked}: torch {torch.__version__} takes no plugin device written in Python. torch "
            "2.10 and later do; portable_amp.testing.machine() works on every version."
        )
    taken = torch._C._get_privateuse1_backend_name()
    if taken != _UNNAMED:
        raise DeviceError(
            f"{asked}: torch takes one plugin per process, and this one has {taken!r}. Use a new "
            "process."
        )
    if not name.isidentifier() or not name.islower() or hasattr(torch, name):
        raise DeviceError(
            f"{asked}: the vendor's module becomes torch.{name}, which must be a new lower-case "
            "name. 'fakegpu' works here."
        )


class _Vendor:
    """What the vendor's module offers: each public function of this class, unless left out."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.amp_dtypes: list[torch.dtype] = []
        self.ledger = Ledger(None, self._out_of_memory)
        self.generator = torch.Generator("cpu")
        self.module = ModuleType(f"torch.{name}")
        vars(self.module)["_initialized"] = True  # torch.utils.checkpoint looks at it
        self.plugin = Plugin(name, self.module, self.ledger, self.generator)

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        index = device if isinstance(device, int) else torch.device(device).index
        if index:
            raise RuntimeError(f"invalid device ordinal {index}: there is {self.name}:0")

    def device(self, device: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def synchronize(self, device: Any = None) -> None:
        pass

    def get_device_name(self, device: Any = None) -> str:
        return f"{self.name} of portable_amp.testing"

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return self.amp_dtypes

    def is_bf16_supported(self) -> bool:
        return torch.bfloat16 in self.amp_dtypes

    def empty_cache(self) -> None:
        self.ledger.empty_cache()

    def memory_allocated(self, device: Any = None) -> int:
        return self.ledger.allocated

    def memory_reserved(self, device: Any = None) -> int:
        return self.ledger.reserved

    def max_memory_allocated(self, device: Any = None) -> int:
        return self.ledger.peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self.ledger.peak = self.ledger.allocated

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        total = _ENDLESS if self.ledger.limit is None else self.ledger.limit
        return max(total - self.ledger.reserved, 0), total

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        self.generator.set_state(state)

    def manual_seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def _is_in_bad_fork(self) -> bool:
        return False

    def _out_of_memory(self, short: Shortage) -> Exception:
        free = max(short.limit - short.allocated, 0)
        # A plain RuntimeError, as from most plugins: torch.OutOfMemoryError is CUDA's and XPU's.
        return RuntimeError(
            f"{self.name.upper()} out of memory. Tried to allocate {_mib(short.wanted)}. "
            f"{self.name.upper()} 0 has a total capacity of {_mib(short.limit)} of which "
            f"{_mib(free)} is free."
        )


# torch asks for _is_in_bad_fork before it seeds.
_OFFERED = (
    *(name for name in vars(_Vendor) if not name.startswith("_")),
    "_is_in_bad_fork",
)
_made: list[_Vendor] = []


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
