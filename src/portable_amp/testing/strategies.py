"""Hypothesis strategies: machines, also some that nobody built, and what users feed them."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from portable_amp.backends import Hardware
from portable_amp.capabilities import Capabilities, derive
from portable_amp.precision import SPELLINGS, Precision
from portable_amp.testing.machines import MACHINES, Machine

_KINDS = ("cuda", "xpu", "mps", "cpu", "npu")


def hardware(*device_types: str) -> st.SearchStrategy[Hardware]:
    """Readings of devices, catalogued and made up, of these device types (all by default)."""
    kinds = device_types or _KINDS
    made_up = st.builds(  # `...`: whatever the field's type allows
        Hardware,
        device_type=st.sampled_from(kinds),
        name=st.sampled_from(["Card", "NVIDIA GeForce GTX 1650"]),
        torch_version=st.tuples(st.just(2), st.integers(4, 20)),
        total_memory=st.none() | st.integers(1, 2**40),
        compute_capability=st.none() | st.tuples(st.integers(3, 13), st.integers(0, 9)),
        arch=st.sampled_from(["", "gfx803", "gfx906", "gfx908", "gfx90a", "gfx1030", "gfx1100"]),
        macos=st.none() | st.tuples(st.integers(12, 27), st.integers(0, 7)),
        cpu_features=st.frozensets(
            st.sampled_from(["avx2", "avx512_bf16", "amx_bf16", "amx_fp16", "bf16", "neon"])
        ),
        float64=...,
        float16=...,
        bfloat16=...,
    )
    catalogued = [row.hardware for row in MACHINES if row.hardware.device_type in kinds]
    return made_up | st.sampled_from(catalogued) if catalogued else made_up


def capabilities(*device_types: str) -> st.SearchStrategy[Capabilities]:
    """Facts about devices: those that follow from readings, and combinations no maker built."""
    derived = hardware(*device_types).map(derive)
    free = st.builds(
        Capabilities,
        device_type=st.sampled_from(device_types or _KINDS),
        autocast_float32=...,
        mixed_precision_caveat=st.sampled_from(["", "a reason to be careful"]),
        evidence=...,
    )
    return derived | free


def requests() -> st.SearchStrategy[Precision]:
    """Every spelling of a precision that is understood."""
    return st.sampled_from([*SPELLINGS, 32, 16])


def machines(*device_types: str) -> st.SearchStrategy[Machine]:
    """Rows of the catalogue, of these device types (all by default)."""
    return st.sampled_from(
        [row for row in MACHINES if not device_types or row.hardware.device_type in device_types]
    )


def gradient_streams(
    *, min_steps: int = 0, max_steps: int = 12, overflows: Collection[int] | None = None
) -> st.SearchStrategy[list[float]]:
    """What each step's gradients are multiplied with: finite factors, from tiny to large.

    At the steps in `overflows`, counted from 0, it is inf, -inf or NaN, and nowhere else; None:
    wherever Hypothesis likes. Streams are long enough to reach those steps.
    """
    finite = st.sampled_from([1.0, -0.5, 0.0, 3e-5, 1e4, 1e-30, 1e30]) | st.floats(-8, 8, width=32)
    infinite = st.sampled_from([float("inf"), float("-inf"), float("nan")])
    if overflows is None:
        return st.lists(finite | infinite, min_size=min_steps, max_size=max_steps)
    shortest = max(min_steps, *(step + 1 for step in overflows), 0)
    return st.integers(shortest, max(shortest, max_steps)).flatmap(
        lambda steps: st.tuples(
            *(infinite if step in overflows else finite for step in range(steps))
        ).map(list)
    )


class _Pair(NamedTuple):
    image: Any
    label: Any


_KEYS = ("image", "label", "name", "weight", "index")
_DTYPES = (
    torch.float32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.float64,
    torch.float16,
    torch.bfloat16,
)


def nested_batches(*, max_samples: int = 8) -> st.SearchStrategy[Any]:
    """Batches of 1 to `max_samples` samples: tensors (N, ...) of any dtype, at least one, nested.

    They lie in dicts, lists, tuples and named tuples, among strings, numbers and None, which may be
    one per sample. `portable_amp.nested.length_of` tells N.
    """
    return st.integers(1, max_samples).flatmap(_batches)


@functools.cache  # building a recursive strategy takes longer than drawing from it
def _batches(samples: int) -> st.SearchStrategy[Any]:
    def tensor(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        sizes = torch.Size([samples, *shape])
        return torch.arange(sizes.numel()).reshape(sizes).to(dtype)

    tensors = st.builds(tensor, st.lists(st.integers(1, 3), max_size=2), st.sampled_from(_DTYPES))
    others = (
        st.none()
        | st.integers()
        | st.text(max_size=3)
        | st.lists(st.text(max_size=3), min_size=samples, max_size=samples)
    )

    def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        # Each container has something of `inner` in it, hence each batch a tensor.
        beside = st.lists(inner | others, max_size=2)
        parts = st.builds(lambda a, one, b: [*a, one, *b], beside, inner, beside)
        return st.one_of(
            parts.map(lambda items: dict(zip(_KEYS, items, strict=False))),
            parts,
            parts.map(tuple),
            st.builds(_Pair, inner, inner | others),
        )

    return st.recursive(tensors, containers, max_leaves=6)
