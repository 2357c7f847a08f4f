"""Known traps of torch and its devices, as rows: where each applies, what happens, the cure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from portable_amp.backends import Hardware
from portable_amp.capabilities import Capabilities, Support


@dataclass(frozen=True)
class Trap:
    """Something that goes wrong on some machines, and what to do about it."""

    device_types: tuple[str, ...]
    """Where it can happen; empty for everywhere."""
    what: str
    cure: str
    source: str
    applies: Callable[[Hardware, Capabilities], bool] = lambda hardware, capabilities: True


def traps_for(hardware: Hardware, capabilities: Capabilities) -> list[Trap]:
    """The traps that apply to this device with this torch."""
    return [
        trap
        for trap in TRAPS
        if hardware.device_type in (trap.device_types or (hardware.device_type,))
        and trap.applies(hardware, capabilities)
    ]


TRAPS = (
    Trap(
        ("cuda",),
        "torch.cuda.is_bf16_supported() says True although bf16 is slow or missing here",
        "precision='auto', which does not count emulation",
        "torch.cuda.is_bf16_supported, 2.4 to 2.15",
        lambda hw, can: can.bfloat16 is not Support.NATIVE,
    ),
    Trap(
        ("cuda",),
        "fp16 autocast gives NaN on this card",
        "precision='auto' or 'fp32'",
        "pytorch#58123, ultralytics#17977: Turing cards without tensor cores",
        lambda hw, can: can.float16 is Support.ABSENT,
    ),
    Trap(
        ("mps",),
        "a non_blocking copy to MPS can corrupt the data silently",
        "ctx.to(batch), which copies synchronously there",
        "pytorch#139550",
    ),
    Trap(
        ("mps",),
        "channels_last with BatchNorm gives a wrong backward pass, or crashes",
        "keep the model and its images contiguous on MPS",
        "pytorch#175189",
    ),
    Trap(
        ("mps",),
        "a graph is cached for each input shape, and memory grows without bound",
        "fixed shapes, and drop_last=True in the training DataLoader",
        "pytorch#181485",
    ),
    Trap(
        ("mps",),
        "scaled_dot_product_attention fails under autocast in this torch",
        "torch 2.6 or newer, or precision='fp32'",
        "torch 2.5 on MPS",
        lambda hw, can: hw.torch_version == (2, 5),
    ),
    Trap(
        ("mps",),
        "torch.accelerator.empty_cache() hits an internal assertion in this torch",
        "ctx.clear_cache(), which calls torch.mps.empty_cache()",
        "pytorch#186430",
        lambda hw, can: (2, 9) <= hw.torch_version <= (2, 12),
    ),
    Trap(
        (),
        "DataLoader workers are spawned here: the data set and its transforms are pickled",
        "no lambdas in them; start the training from `if __name__ == '__main__':`",
        "Python's multiprocessing on macOS and Windows",
        lambda hw, can: hw.system in ("Darwin", "Windows"),
    ),
    Trap(
        ("cuda", "xpu"),
        "torch.compile needs Triton, which torch for Windows does not bring",
        "install triton-windows, or run the model as it is",
        "torch's wheels, 2.4 to 2.15",
        lambda hw, can: hw.system == "Windows",
    ),
    Trap(
        ("xpu", "mps"),
        "float64 does not exist here; torch's GradScaler fails on devices without it",
        "ctx.scaler(), which works in float32; ctx.to(batch), which moves float64 as float32",
        "pytorch#142397, pytorch#147731",
        lambda hw, can: can.float64 is False,
    ),
    Trap(
        ("cpu",),
        "torch.autocast('cpu') computes in bf16, which this CPU emulates: slower than fp32",
        "ctx.autocast(), or enabled=False",
        "pytorch#118499",
        lambda hw, can: can.bfloat16 is Support.EMULATED,
    ),
    Trap(
        ("cpu",),
        "fp16 on this CPU is about ten times slower than fp32",
        "precision='auto'",
        "measured on Linux CPUs without fp16 instructions",
        lambda hw, can: can.float16 is Support.EMULATED,
    ),
    Trap(
        (),
        "training inside one torch.autocast region never learns: it goes on with cached weights",
        "leave the region before the step; maybe_autocast() and ScalerShim drop them after one",
        "torch.autocast, seen with 2.4 to 2.15",
    ),
    Trap(
        (),
        "a pass under no_grad or inference_mode inside torch.autocast leaves its weights without "
        "gradients for the rest of the region",
        "maybe_autocast(), which caches none while there are gradients; or cache_enabled=False",
        "pytorch#112583, seen with torch 2.4 to 2.10",
        lambda hw, can: hw.torch_version < (2, 11),
    ),
    Trap(
        ("cpu",),
        "torch.autocast('mps') and torch.autocast('xpu') say enabled on machines without them",
        "maybe_autocast(), which looks for the device",
        "torch.autocast, 2.5 to 2.15",
    ),
)
