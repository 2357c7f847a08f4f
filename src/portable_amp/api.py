"""The public names."""

from portable_amp.autocast import maybe_autocast
from portable_amp.backends import MemoryStats
from portable_amp.capabilities import Capabilities, Support, probe
from portable_amp.checkpoint import load_checkpoint, save_checkpoint
from portable_amp.context import DeviceContext
from portable_amp.distributed import Ranks, init_distributed, ranks
from portable_amp.errors import (
    CheckpointError,
    DeviceError,
    DistributedError,
    GradientWarning,
    MachineError,
    PortableAmpError,
    PortableAmpWarning,
    PrecisionFallbackWarning,
    ScaleCollapseWarning,
    StateWarning,
    TraceError,
    UnsupportedPrecisionError,
)
from portable_amp.memory import clear_cache, is_oom_error, memory_stats, split_on_oom
from portable_amp.precision import PrecisionPlan, choose, common_plan
from portable_amp.rng import rng_state, seed_everything, set_rng_state
from portable_amp.scaler import ScalerShim, StepResult

__all__ = [
    "Capabilities",
    "CheckpointError",
    "DeviceContext",
    "DeviceError",
    "DistributedError",
    "GradientWarning",
    "MachineError",
    "MemoryStats",
    "PortableAmpError",
    "PortableAmpWarning",
    "PrecisionFallbackWarning",
    "PrecisionPlan",
    "Ranks",
    "ScaleCollapseWarning",
    "ScalerShim",
    "StateWarning",
    "StepResult",
    "Support",
    "TraceError",
    "UnsupportedPrecisionError",
    "choose",
    "clear_cache",
    "common_plan",
    "init_distributed",
    "is_oom_error",
    "load_checkpoint",
    "maybe_autocast",
    "memory_stats",
    "probe",
    "ranks",
    "rng_state",
    "save_checkpoint",
    "seed_everything",
    "set_rng_state",
    "split_on_oom",
]
