"""Machines to play in tests: the rows of absent back ends, made to answer from readings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import torch

from portable_amp import backends, capabilities, notices
from portable_amp.backends import Backend, Hardware
from portable_amp.testing import machine

SETTINGS = (
    "PORTABLE_AMP_DEVICE",
    "PORTABLE_AMP_STRICT",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
)


# The device types this torch has autocast kernels for; 2.4 has none for MPS.
KINDS = [kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)]


def forget() -> None:
    """Nothing was probed, decided or told yet."""
    capabilities._probe.cache_clear()
    capabilities.look_up.cache_clear()
    notices.forget()
    # torch remembers the modules that vendors register
    getattr(torch.get_device_module, "cache_clear", lambda: None)()


@contextlib.contextmanager
def playing(hardware: Hardware | str, count: int = 1, **changes: object) -> Iterator[Hardware]:
    """This machine has `count` such devices, and no other accelerator.

    Autocast of the played type really runs, for its kernels are in every build.
    `changes` replace fields of the back end's row.
    """
    seen = machine(hardware).hardware if isinstance(hardware, str) else hardware

    def row(real: Backend) -> Backend:
        if real.device_type == seen.device_type:
            return replace(real, count=lambda: count, read=lambda device: seen, **changes)  # type: ignore[arg-type]
        return real if real.device_type == "cpu" else replace(real, count=lambda: 0)

    rows = tuple(row(real) for real in backends.BACKENDS)
    forget()
    with (
        mock.patch.object(backends, "BACKENDS", rows),
        mock.patch.object(backends, "_vendor_types", return_value=()),
        mock.patch.object(
            torch.cuda.amp.common, "amp_definitely_not_available", return_value=False
        ),
        mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
        # torch 2.6 to 2.9 asks this for bf16 on MPS, and off a Mac the question itself raises.
        mock.patch.object(
            torch.backends.mps,
            "is_macos_or_newer",
            lambda major, minor: (seen.macos or (0, 0)) >= (major, minor),
        ),
    ):
        yield seen
    forget()
