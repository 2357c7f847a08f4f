"""Seeds, and the state of every random generator a training loop draws from."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from numbers import Integral
from typing import Any, SupportsIndex

import torch

from portable_amp.backends import present, torch_function
from portable_amp.errors import StateWarning, shown
from portable_amp.notices import tell_once


def seed_everything(seed: SupportsIndex) -> int:
    """Seed Python, NumPy (where it is loaded) and torch on every device; return the seed.

    With several processes, give each its own: `seed_everything(seed + rank)`.

    >>> seed_everything(7)
    7
    >>> first = torch.rand(2)
    >>> _ = seed_everything(7)
    >>> bool((torch.rand(2) == first).all())
    True

    Raises:
        ValueError: the seed is not a whole number from 0 to 2**32 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**32:
        raise ValueError(f"seed={shown(seed)}: a whole number from 0 to 2**32 - 1 works here")
    seed = int(seed)  # NumPy's, too
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy:
        numpy.random.seed(seed)
    torch.manual_seed(seed)  # of every device that torch itself knows
    for row in present(lambda row: row.manual_seed_all):
        seed_all = torch_function(row.manual_seed_all)
        if seed_all:
            seed_all(seed)
    return seed


def rng_state() -> dict[str, Any]:
    """The state of all those generators, in plain types and tensors that a checkpoint can hold."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy:
        name, keys, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = (name, keys.tolist(), int(position), int(has_gauss), float(cached))
    for row in present():
        get = torch_function(row.get_rng_state)
        if get:
            indexes = range(row.count()) if row.takes_device else [None]
            state[row.device_type] = [get() if i is None else get(i) for i in indexes]
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` gave, on this machine's devices; says once what cannot be restored.

    Raises:
        ValueError: that is no state of `rng_state`.
    """
    if not {"python", "torch"} <= state.keys():
        raise ValueError(f"not a state of rng_state(): it has only {sorted(state)}")
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"].cpu())
    numpy = sys.modules.get("numpy")
    if "numpy" in state and numpy:
        name, keys, position, has_gauss, cached = state["numpy"]
        numpy.random.set_state(
            (name, numpy.asarray(keys, numpy.uint32), position, has_gauss, cached)
        )
    here = {row.device_type: row for row in present()}
    for device_type in sorted(state.keys() - {"python", "torch", "numpy"}):
        row = here.get(device_type)
        put = torch_function(row.set_rng_state) if row else None
        saved = state[device_type]
        if row is None or put is None or len(saved) > row.count():
            tell_once(
                ("rng", device_type),
                f"the saved random state of {len(saved)} {device_type} device(s) does not fit this "
                "machine: what is drawn there will differ from an uninterrupted run.",
                StateWarning,
            )
            continue
        for index, one in enumerate(saved):
            put(one.cpu(), *([index] if row.takes_device else []))
