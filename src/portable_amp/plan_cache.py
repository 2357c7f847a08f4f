"""Plans that were measured, kept on disk: safe against damage, other versions and other writers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from portable_amp.capabilities import Capabilities
from portable_amp.checkpoint import replacing
from portable_amp.nested import tensors_in
from portable_amp.precision import PrecisionPlan
from portable_amp.tuning import LAYOUTS, NAMES

CACHE_VARIABLE = "PORTABLE_AMP_CACHE"


def signature(
    model: torch.nn.Module,
    batch: Any,
    capabilities: Capabilities,
    *,
    dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> str:
    """A key for all that a measurement depends on."""
    facts = (
        [(name, type(module).__name__) for name, module in model.named_modules()],
        [(name, [*one.shape], str(one.dtype)) for name, one in model.state_dict().items()],
        [([*one.shape], str(one.dtype)) for one in tensors_in(batch)],
        (
            model.training,
            str(dtype),
            compiled,
            capabilities.name,
            capabilities.device_type,
            capabilities.evidence,
        ),
        (torch.__version__, torch.get_num_threads(), os.cpu_count(), "3"),
    )
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:32]


def cache_folder() -> Path:
    """Where plans are kept: $PORTABLE_AMP_CACHE, or portable-amp in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(home) / "portable-amp"


def recall(key: str) -> PrecisionPlan | None:
    """A plan that was kept; None where there is none that can be read."""
    try:
        data = json.loads((cache_folder() / f"{key}.json").read_text("utf-8"))
        dtypes = {name: dtype for dtype, name in NAMES.items()}
        return PrecisionPlan(
            str(data["request"]),
            dtypes[data["dtype"]],
            str(data["reason"]) + " (kept from an earlier run)",
            tuple(map(str, data["evidence"])),
            memory_format=LAYOUTS[data["layout"]],
            chunk=None if data["chunk"] is None else int(data["chunk"]),
            compiled=bool(data["compiled"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None  # damaged, or written by another version: measured again


def keep(key: str, plan: PrecisionPlan) -> None:
    """Keep a plan; whoever reads meanwhile sees all of it or none. No folder, no memory."""
    layouts = {layout: name for name, layout in LAYOUTS.items()}
    data = {
        "request": plan.request,
        "dtype": NAMES[plan.dtype],
        "layout": layouts[plan.memory_format],
        "reason": plan.reason,
        "evidence": plan.evidence,
        "chunk": plan.chunk,
        "compiled": plan.compiled,
    }
    with contextlib.suppress(OSError, RuntimeError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{key}.json") as new:
            new.write_text(json.dumps(data), encoding="utf-8")
