"""Plans that were measured, kept on disk: safe against damage, other versions and other writers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from portable_amp.backends import BACKENDS
from portable_amp.callables import opened
from portable_amp.capabilities import Capabilities
from portable_amp.checkpoint import replacing
from portable_amp.copies import LAYOUT_NAMES, LAYOUTS
from portable_amp.fp32_state import settings
from portable_amp.nested import tensors_in
from portable_amp.precision import PrecisionPlan
from portable_amp.tuning import NAMES

CACHE_VARIABLE = "PORTABLE_AMP_CACHE"

# What decides which kernels run, below `torch`; a function is called. Which exist depends on the
# version of torch and how it was built.
_MODES = (
    "get_default_dtype", "are_deterministic_algorithms_enabled", "is_anomaly_enabled",
    "is_deterministic_algorithms_warn_only_enabled",
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_fp16_accumulation", "backends.mkldnn.enabled",
    "backends.mkldnn.deterministic", "backends.cudnn.enabled", "backends.cudnn.benchmark",
    "backends.cudnn.deterministic", "backends.cuda.flash_sdp_enabled",
    "backends.cuda.mem_efficient_sdp_enabled", "backends.cuda.math_sdp_enabled",
    "backends.cuda.cudnn_sdp_enabled", "backends.cuda.preferred_linalg_library",
    "backends.cuda.preferred_blas_library",
)  # fmt: skip
# Read by the libraries below torch.
_VARIABLES = (
    "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA", "NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA", "PYTORCH_MPS_FAST_MATH", "PYTORCH_MPS_PREFER_METAL",
)  # fmt: skip


def signature(
    model: torch.nn.Module,
    batch: Any,
    capabilities: Capabilities,
    *,
    loss: Callable[..., Any],
    dtype: torch.dtype | None = None,
    compiled: bool = False,
    fp32: str = "as_is",
) -> str:
    """A key for all that a measurement depends on."""
    facts = (
        _model(model),
        [_lies(one) for one in tensors_in(batch)],
        _computes(loss),
        (str(dtype), compiled, fp32),
        (capabilities.name, capabilities.device_type, capabilities.evidence),
        numeric_modes(),
        (torch.__version__, torch.get_num_threads(), os.cpu_count(), "6"),
    )
    text = re.sub(r"\b0x[0-9a-fA-F]+", "", json.dumps(facts, default=repr))  # addresses
    return hashlib.sha256(text.encode()).hexdigest()


def numeric_modes() -> list[str]:
    """How this process computes, as far as torch and the environment tell."""
    found = [f"{name}={os.environ.get(name)}" for name in _VARIABLES]
    found += [f"float32 of {row.device_type}: {settings(row)}" for row in BACKENDS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old names
        for name in _MODES:
            value: Any = torch
            try:
                for part in name.split("."):
                    value = getattr(value, part)
                found.append(f"{name}={value() if callable(value) else value}")
            except (AttributeError, RuntimeError):
                found.append(f"{name} is not to be read")
    return found


def _model(model: torch.nn.Module) -> Any:
    """What a model computes, and what its weights are like."""
    modules = [
        (name, module.extra_repr(), _functions(module.forward), *_settings(module))
        for name, module in model.named_modules()
    ]
    state = model.state_dict(keep_vars=True)
    return modules, [(name, *_lies(one)) for name, one in state.items()]


def _settings(thing: Any) -> tuple[Any, ...]:
    """Of an object: its class, and what is plainly written in it."""
    there = getattr(thing, "__dict__", {}).items()
    return type(thing).__qualname__, sorted((key, repr(one)) for key, one in there if _plain(one))


def _plain(one: Any) -> bool:
    return type(one) in (bool, int, float, complex, str, bytes, type(None))


def _computes(call: Any) -> tuple[Any, ...]:
    """A callable as its functions and what they hold, as far as Python tells."""
    _, owners, held = opened(call)
    return _functions(call), [_holds(one) for one in (*owners, *held)]


def _functions(call: Any) -> list[Any]:
    """The functions that it is made of, and what each does."""
    functions = opened(call).functions
    return [(one.__module__, one.__qualname__, _code(one.__code__)) for one in functions]


def _code(code: types.CodeType) -> tuple[Any, ...]:
    """What it does, wherever it stands."""
    consts = [
        _code(one) if isinstance(one, types.CodeType) else repr(one) for one in code.co_consts
    ]
    return code.co_code.hex(), code.co_names, consts


def _holds(one: Any) -> Any:
    """What is known of an object that a function holds."""
    if isinstance(one, torch.nn.Module):
        return _model(one)
    if isinstance(one, torch.Tensor):
        return _lies(one)
    if isinstance(one, type) or not callable(one):
        return repr(one) if _plain(one) else getattr(one, "__qualname__", type(one).__qualname__)
    # It is called: an object with `__call__`, or a function that is not written in Python.
    return _functions(type(one).__call__) or repr(one), _settings(one)


def _lies(one: Any) -> tuple[Any, ...]:
    """What a tensor is like, but for its values."""
    if not isinstance(one, torch.Tensor) or torch.nn.parameter.is_lazy(one):
        return (type(one).__qualname__,)
    strides = one.stride() if one.layout is torch.strided else one.layout
    return [*one.shape], str(one.dtype), one.requires_grad, repr(strides)


def cache_folder() -> Path:
    """Where plans are kept: $PORTABLE_AMP_CACHE, or portable-amp in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(home) / "portable-amp"


def recall(key: str) -> PrecisionPlan | None:
    """A plan that was kept; None where there is none that can be read."""
    try:
        path = cache_folder() / f"{key}.json"
        data = json.loads(path.read_bytes())
        chunk, compiled, evidence = data["chunk"], data["compiled"], data["evidence"]
        names = data["fp32_modules"]
        if (
            not (chunk is None or (type(chunk) is int and chunk > 0))
            or type(compiled) is not bool
            or type(evidence) is not list
            or type(names) is not list
        ):
            return None
        dtypes = {name: dtype for dtype, name in NAMES.items()}
        return PrecisionPlan(
            str(data["request"]),
            dtypes[data["dtype"]],
            f"{data['reason']} (kept from an earlier run in {str(path)!r}: delete it, or call "
            "tuned(cache='renew'), to measure anew)",
            tuple(map(str, evidence)),
            memory_format=LAYOUTS[data["layout"]],
            chunk=chunk,
            compiled=compiled,
            fp32_modules=tuple(map(str, names)),
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None  # damaged, or written by another version: measured again


def forget_plan(key: str) -> None:
    """Delete a plan that was kept, if there is one."""
    with contextlib.suppress(OSError, RuntimeError):
        (cache_folder() / f"{key}.json").unlink()


def keep(key: str, plan: PrecisionPlan) -> None:
    """Keep a plan; whoever reads meanwhile sees all of it or none. No folder, no memory."""
    data = {
        "request": plan.request,
        "dtype": NAMES[plan.dtype],
        "fp32_modules": plan.fp32_modules,
        "layout": LAYOUT_NAMES[plan.memory_format],
        "reason": plan.reason,
        "evidence": plan.evidence,
        "chunk": plan.chunk,
        "compiled": plan.compiled,
    }
    with contextlib.suppress(OSError, RuntimeError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{key}.json") as new:
            new.write_bytes(json.dumps(data).encode())
