"""Hypothesis strategies: machines that never existed, and what users ask of them."""

from __future__ import annotations

from hypothesis import strategies as st

from portable_amp.backends import Hardware
from portable_amp.capabilities import Capabilities, Support, derive
from portable_amp.precision import SPELLINGS, Precision
from portable_amp.testing.machines import MACHINES

_maybe = st.none() | st.booleans()


def hardware(*device_types: str) -> st.SearchStrategy[Hardware]:
    """Readings of devices, catalogued and made up, of these device types (all by default)."""
    kinds = device_types or ("cuda", "xpu", "mps", "cpu", "npu")
    made_up = st.builds(
        Hardware,
        device_type=st.sampled_from(kinds),
        name=st.sampled_from(["Card", "NVIDIA GeForce GTX 1650", "Apple M9", "x86_64"]),
        torch_version=st.tuples(st.just(2), st.integers(4, 20)),
        autocast=st.booleans(),
        total_memory=st.none() | st.integers(1, 2**40),
        compute_capability=st.none() | st.tuples(st.integers(3, 13), st.integers(0, 9)),
        arch=st.sampled_from(["", "gfx803", "gfx906", "gfx908", "gfx90a", "gfx1030", "gfx1100"]),
        macos=st.none() | st.tuples(st.integers(12, 27), st.integers(0, 7)),
        cpu_features=st.frozensets(
            st.sampled_from(["avx2", "avx512_bf16", "amx_bf16", "amx_fp16", "bf16", "neon"])
        ),
        float64=_maybe,
        float16=_maybe,
        bfloat16=_maybe,
    )
    catalogued = [row.hardware for row in MACHINES if row.hardware.device_type in kinds]
    return made_up | st.sampled_from(catalogued) if catalogued else made_up


def capabilities(*device_types: str) -> st.SearchStrategy[Capabilities]:
    """Facts about devices: those that follow from readings, and combinations no maker built."""
    derived = hardware(*device_types).map(derive)
    support = st.sampled_from(Support)
    free = st.builds(
        Capabilities,
        device_type=st.sampled_from(device_types or ("cuda", "xpu", "mps", "cpu", "npu")),
        name=st.text(max_size=8),
        float16=support,
        bfloat16=support,
        float64=_maybe,
        autocast=st.booleans(),
        grad_scaler=st.booleans(),
        autocast_float32=st.booleans(),
        mixed_precision_caveat=st.sampled_from(["", "a reason to be careful"]),
        evidence=st.tuples(st.text(max_size=8)),
    )
    return derived | free


def requests() -> st.SearchStrategy[Precision]:
    """Every spelling of a precision that is understood."""
    return st.sampled_from(list(SPELLINGS))
