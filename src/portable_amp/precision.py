"""Which precision to compute in: facts in, plan out. Pure: no torch call, no environment."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from portable_amp.capabilities import Capabilities, Support
from portable_amp.errors import UnsupportedPrecisionError, shown

Precision = str | bool | int | torch.dtype | None
"""What a user may ask for; see `parse_precision`."""

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# The spellings of torch, accelerate, Lightning and timm.
SPELLINGS: dict[object, str] = {
    "auto": "auto", True: "auto", None: "auto",
    "fp32": "fp32", "float32": "fp32", "float": "fp32", "32": "fp32", "32-true": "fp32",
    "no": "fp32",
    "fp16": "fp16", "float16": "fp16", "16": "fp16", "16-mixed": "fp16", "half": "fp16",
    "bf16": "bf16", "bfloat16": "bf16", "bf16-mixed": "bf16",
    False: "fp32",
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
}  # fmt: skip

# What is something else, or less than that: in whose words, and what works.
_NO_PRECISION: dict[object, str] = {
    **dict.fromkeys(
        ("16-true", "bf16-true", "transformer-engine"),
        "it casts the model itself, and portable-amp only does mixed precision",
    ),
    **dict.fromkeys(
        ("tf32", "tensorfloat32", "tensorfloat-32"),
        "it is how some cards multiply float32 matrices: 'fp32', and DeviceContext(fp32='tf32')",
    ),
    **dict.fromkeys(
        ("64", "64-true", "fp64", "float64", "double", torch.float64),
        "it is the model's own dtype: model.double(), and 'fp32' to leave it alone",
    ),
    **dict.fromkeys(
        ("fp8", "float8", "8", "int8", "int4", "fp4"),
        "autocast has 16 bits and no fewer; 8 and 4 need a library of their own, such as torchao",
    ),
    **dict.fromkeys(
        ("mixed", "amp", "mixed_precision", "on", "true", "yes"), "did you mean 'auto'"
    ),
    **dict.fromkeys(("off", "false", "none"), "did you mean 'fp32'"),
}


@dataclass(frozen=True)
class PrecisionPlan:
    """What one device will compute in, and why."""

    request: str
    """What was asked for: "auto", "fp32", "fp16" or "bf16"; "tuned" where it was measured, "tuned
    fp32" where only the rest was, in the precision that was asked for."""
    dtype: torch.dtype
    """What autocast lowers operations to; float32 where autocast is off."""
    reason: str
    evidence: tuple[str, ...] = ()
    fell_back: bool = False
    """An explicit request that this machine cannot honour was replaced."""
    memory_format: torch.memory_format = torch.contiguous_format
    """How images (N, C, H, W) and the weights of convolutions lie in memory."""
    chunk: int | None = None
    """Samples in one forward pass that inference is fastest with, for `split_on_oom(size=...)`."""
    compiled: bool = False
    """`model.compile()` was measured to be faster still; calling it is the loop's part."""
    fp32_modules: tuple[str, ...] = ()
    """Names of modules that `DeviceContext.to` keeps in float32, for 16 bits do not hold what they
    compute."""
    settled: bool = True
    """False where noise hid whether another plan is faster; such a plan is not kept on disk."""

    @property
    def tuned(self) -> bool:
        """It was measured."""
        return self.request.startswith("tuned")

    @property
    def autocast(self) -> bool:
        """Autocast is on."""
        return self.dtype is not torch.float32

    @property
    def scaler(self) -> bool:
        """Gradients need loss scaling: fp16 has too few exponent bits without it."""
        return self.dtype is torch.float16

    @property
    def name(self) -> str:
        """The dtype in the spelling `precision` takes."""
        return next(name for name, dtype in _DTYPES.items() if dtype is self.dtype)


def parse_precision(value: Precision) -> str:
    """The request in its one spelling: "auto", "fp32", "fp16" or "bf16".

    >>> [parse_precision(p) for p in (True, "no", "bf16-mixed", torch.float16)]
    ['auto', 'fp32', 'bf16', 'fp16']

    Raises:
        UnsupportedPrecisionError: nobody spells a precision like that.
    """
    key: object = ()  # of what is none of these, nothing is asked: it may have no hash
    if isinstance(value, str):
        key = value.strip().lower().removeprefix("torch.")
    elif value is None or isinstance(value, (bool, torch.dtype)):
        key = value
    elif isinstance(value, int):  # True == 1 in a dict, so a bare 1 or 0 would slip in as a bool
        key = str(value)
    found = SPELLINGS.get(key)
    if found:
        return found
    why = _NO_PRECISION.get(key)
    if why is None:
        word = str(key).removesuffix("-mixed")
        close = difflib.get_close_matches(word, ["auto", *_DTYPES], n=1)
        why = "it is no precision" + (f"; did you mean {close[0]!r}" if close else "")
    raise UnsupportedPrecisionError(
        f"precision={shown(value)}: {why}. Use 'auto', 'fp32', 'fp16' or 'bf16' (or True, False, "
        "'no', '16-mixed', 'bf16-mixed', '32-true', a torch dtype)."
    )


def parse_dtype(value: Precision) -> torch.dtype | None:
    """The dtype that `value` names, None for "auto"; any torch dtype is itself.

    Raises:
        UnsupportedPrecisionError: nobody spells a precision like that.
    """
    return value if isinstance(value, torch.dtype) else _DTYPES.get(parse_precision(value))


def choose(request: Precision, capabilities: Capabilities) -> PrecisionPlan:
    """The plan for `request` on a device with these capabilities.

    "auto" takes mixed precision only where it is complete and native, bf16 before fp16. An explicit
    request is honoured where the device computes it natively; otherwise the plan is fp32, marked
    `fell_back`, for fp32 is right everywhere.

    Raises:
        UnsupportedPrecisionError: the request is no precision at all.
    """
    wanted = parse_precision(request)
    if wanted == "auto":
        return _choose_auto(capabilities)
    dtype = _DTYPES[wanted]
    if dtype is torch.float32:
        return PrecisionPlan(wanted, dtype, "fp32 was asked for", capabilities.evidence)
    obstacle = _obstacle(wanted, capabilities)
    if obstacle is None:
        return PrecisionPlan(
            wanted, dtype, f"{wanted} was asked for, and is native here", capabilities.evidence
        )
    others = [name for name in ("bf16", "fp16") if _obstacle(name, capabilities) is None]
    advice = f"; {others[0]} works here" if others else ""
    return PrecisionPlan(
        wanted, torch.float32, obstacle + advice, capabilities.evidence, fell_back=True
    )


def common_plan(request: Precision, machines: Sequence[Capabilities]) -> PrecisionPlan:
    """The best plan that every one of these machines can follow, whatever their order.

    Raises:
        UnsupportedPrecisionError: the request is no precision at all.
        ValueError: there are no machines.
    """
    if not machines:
        raise ValueError("common_plan needs the capabilities of at least one machine")
    plans = [choose(request, machine) for machine in machines]
    if len({plan.dtype for plan in plans}) == 1:
        # The reason may differ per rank; the first in the alphabet makes it the same on all.
        return min(plans, key=lambda plan: (plan.reason, plan.evidence))
    wanted = parse_precision(request)
    seen = sorted({f"{machine.name}: {plan.name}" for machine, plan in zip(machines, plans)})  # noqa: B905
    for name in ("bf16", "fp16") if wanted == "auto" else ():
        if all(plan.autocast for plan in plans) and all(
            _obstacle(name, machine) is None for machine in machines
        ):
            return PrecisionPlan(
                wanted, _DTYPES[name], f"{name} is what all ranks can do", tuple(seen)
            )
    return PrecisionPlan(
        wanted,
        torch.float32,
        "the ranks have no mixed precision in common",
        tuple(seen),
        fell_back=wanted != "auto",
    )


def _choose_auto(capabilities: Capabilities) -> PrecisionPlan:
    def plan(dtype: torch.dtype, reason: str) -> PrecisionPlan:
        return PrecisionPlan("auto", dtype, reason, capabilities.evidence)

    obstacles = {name: _obstacle(name, capabilities) for name in ("bf16", "fp16")}
    native = [name for name, why in obstacles.items() if why is None]
    if capabilities.bfloat16 is capabilities.float16 is Support.EMULATED:
        return plan(torch.float32, "bf16 and fp16 are emulated on this device, slower than fp32")
    if not native:
        why = dict.fromkeys(filter(None, obstacles.values()))
        return plan(torch.float32, "; ".join(why))
    if capabilities.mixed_precision_caveat:
        return plan(torch.float32, capabilities.mixed_precision_caveat)
    if native[0] == "bf16":
        return plan(torch.bfloat16, "bf16 is native here, and needs no gradient scaler")
    return plan(
        torch.float16, "fp16 is native here and bf16 is not; a gradient scaler goes with it"
    )


def _obstacle(name: str, capabilities: Capabilities) -> str | None:
    """Why training in `name` is not possible at full speed and correctness; None where it is."""
    device_type = capabilities.device_type
    if not capabilities.autocast:
        return f"torch has no working autocast for {device_type} in this version"
    support = capabilities.support(_DTYPES[name])
    if support is Support.ABSENT:
        return f"{name} does not work on this device"
    if support is Support.EMULATED:
        return f"{name} is emulated on this device, slower than fp32"
    if name == "fp16" and not capabilities.grad_scaler:
        return f"fp16 needs a gradient scaler, and torch has none for {device_type} in this version"
    return None


__all__ = ["Precision", "PrecisionPlan", "choose", "common_plan", "parse_dtype", "parse_precision"]
