"""The rules as plain data: what each finds, what happens there on which platform, what to write.

On ROCm torch itself answers to the name `cuda`, so that column mostly equals CUDA's.
"""

from __future__ import annotations

from dataclasses import dataclass

from portable_amp.migrate.findings import Applicability, Level


@dataclass(frozen=True)
class Rule:
    """One row: what is reported under `code`."""

    code: str
    title: str
    level: Level
    """Where no guard surrounds the place; a guarded one is `info`."""
    message: str
    """What it does off CUDA, and what to write instead, in one sentence."""
    fix: Applicability
    """The most that `fix` does about it; a single place may get less."""
    elsewhere: tuple[str, str, str]
    """What happens on MPS, XPU and CPU."""
    rocm: str = "works"
    cuda: str = "works"

    @property
    def platforms(self) -> dict[str, str]:
        """Platform -> what happens there, in a few words."""
        mps, xpu, cpu = self.elsewhere
        return {"CUDA": self.cuda, "ROCm": self.rocm, "MPS": mps, "XPU": xpu, "CPU": cpu}


def _all(effect: str) -> tuple[str, str, str]:
    return effect, effect, effect


_CRASH = _all("crashes")
_MIXED = "can raise, from torch 2.9 on"
_SILENT_FP32 = _all("silently fp32")

_TABLE = (
    Rule(
        "PAM101",
        "torch.cuda.amp.autocast",
        "error",
        "torch.cuda.amp.autocast does nothing off CUDA, and training runs in fp32 without a word: "
        "use autocast() of a portable_amp.DeviceContext.",
        "safe",
        _SILENT_FP32,
    ),
    Rule(
        "PAM102",
        "torch.autocast for cuda alone",
        "error",
        'torch.autocast("cuda") does nothing off CUDA, and training runs in fp32 without a word: '
        "use autocast() of a portable_amp.DeviceContext.",
        "safe",
        _SILENT_FP32,
    ),
    Rule(
        "PAM103",
        "GradScaler of cuda",
        "error",
        "This GradScaler is disabled off CUDA, and fp16 gradients there go unscaled: use "
        "scaler() of a portable_amp.DeviceContext.",
        "safe",
        ("disabled: fp16 unscaled", "disabled: fp16 unscaled", "disabled"),
    ),
    Rule(
        "PAM104",
        "custom_fwd and custom_bwd of cuda",
        "warning",
        "custom_fwd and custom_bwd follow the autocast state of CUDA alone, so the function runs "
        "in the caller's dtype elsewhere: give torch.amp.custom_fwd the device type in use.",
        "advice",
        _all("runs, follows no autocast"),
    ),
    Rule(
        "PAM105",
        "apex",
        "error",
        "apex exists for CUDA only: use torch's own autocast and scaler, through "
        "portable_amp.DeviceContext.",
        "advice",
        _all("cannot be imported"),
        rocm="needs a build of its own",
    ),
    Rule(
        "PAM201",
        ".cuda()",
        "error",
        ".cuda() crashes where there is no CUDA: use .to(device) with a device chosen once.",
        "safe",
        _CRASH,
    ),
    Rule(
        "PAM202",
        "a device written as cuda",
        "error",
        "This names a CUDA device, which crashes on use where there is none: use a device chosen "
        "once, such as portable_amp.DeviceContext().device.",
        "safe",
        _CRASH,
    ),
    Rule(
        "PAM203",
        "cuda as the default device",
        "error",
        "The default device is CUDA, so that the plain run crashes where there is none: default to "
        "None and choose the device with portable_amp.DeviceContext.",
        "unsafe",
        _CRASH,
    ),
    Rule(
        "PAM204",
        "cuda or else cpu",
        "info",
        "This leaves MPS and XPU unused: use portable_amp.DeviceContext().device, which takes the "
        "best device present.",
        "unsafe",
        ("runs on the CPU", "runs on the CPU", "works"),
    ),
    Rule(
        "PAM205",
        "CUDA tensor types",
        "error",
        "CUDA tensor types crash where there is no CUDA, and no tensor elsewhere is one: create "
        "tensors with device= and dtype=, ask for .device and .dtype.",
        "advice",
        _CRASH,
    ),
    Rule(
        "PAM301",
        "torch.cuda.empty_cache",
        "error",
        "torch.cuda.empty_cache() frees nothing off CUDA, without a word: use "
        "portable_amp.clear_cache().",
        "safe",
        ("frees nothing", "frees nothing", "nothing to free"),
    ),
    Rule(
        "PAM302",
        "torch.cuda.synchronize",
        "error",
        "torch.cuda.synchronize() crashes where there is no CUDA: use "
        "portable_amp.DeviceContext().synchronize().",
        "safe",
        _CRASH,
    ),
    Rule(
        "PAM303",
        "CUDA memory statistics",
        "warning",
        "CUDA's memory statistics are 0 or crash elsewhere: use portable_amp.memory_stats().",
        "advice",
        _all("0, or crashes"),
    ),
    Rule(
        "PAM304",
        "torch.cuda.manual_seed",
        "info",
        "torch.manual_seed seeds every device already, CUDA included: drop this, or use "
        "portable_amp.seed_everything.",
        "safe",
        _all("harmless"),
    ),
    Rule(
        "PAM305",
        "CUDA events, streams, graphs and profiler ranges",
        "error",
        "CUDA events, streams and graphs crash where there is no CUDA: keep them behind a check of "
        "the device's type, and time elsewhere with time.perf_counter after a synchronize.",
        "advice",
        _CRASH,
    ),
    Rule(
        "PAM306",
        "torch.cuda.set_device and the current device",
        "error",
        "CUDA's current device crashes where there is no CUDA: pass the device explicitly, as "
        "portable_amp.DeviceContext does.",
        "advice",
        _CRASH,
    ),
    Rule(
        "PAM307",
        "CUDA device properties and random state",
        "error",
        "This asks CUDA, and crashes where there is none: use portable_amp.probe for what a device "
        "can do, portable_amp.rng_state for random states.",
        "advice",
        _CRASH,
    ),
    Rule(
        "PAM401",
        "the nccl backend",
        "error",
        "nccl crashes where there is no CUDA: use portable_amp.init_distributed, or gloo there.",
        "advice",
        _CRASH,
    ),
    Rule(
        "PAM402",
        "DataParallel and torch.cuda.device_count",
        "info",
        "Off CUDA, DataParallel passes through and device_count is 0: use "
        "DistributedDataParallel, and portable_amp.ranks() for the count.",
        "advice",
        _all("one device, or 0"),
    ),
    Rule(
        "PAM501",
        "map_location of cuda",
        "error",
        "Loading onto CUDA crashes where there is none: give map_location the device at hand, or "
        "use portable_amp.load_checkpoint.",
        "safe",
        _CRASH,
    ),
    Rule(
        "PAM502",
        "torch.load without map_location",
        "info",
        "A checkpoint saved on CUDA cannot be loaded where there is none: give map_location, or "
        "use portable_amp.load_checkpoint.",
        "unsafe",
        _all("a CUDA checkpoint fails"),
    ),
    Rule(
        "PAM503",
        "pinned memory",
        "info",
        "Pinned memory serves CUDA: a DataLoader warns elsewhere, and .pin_memory() crashes on a "
        "CPU alone: use portable_amp.DeviceContext().loader_options().",
        "advice",
        ("a warning", "works", "a warning, or crashes"),
    ),
    Rule(
        "PAM601",
        "insisting on CUDA",
        "error",
        "The program stops where there is no CUDA: let portable_amp.DeviceContext choose a device.",
        "advice",
        _all("stops"),
    ),
    Rule(
        "PAM602",
        "CUDA_VISIBLE_DEVICES and CUDA's out-of-memory error",
        "info",
        "Elsewhere CUDA_VISIBLE_DEVICES is ignored and torch.cuda.OutOfMemoryError not raised: "
        "choose with $PORTABLE_AMP_DEVICE, catch with portable_amp.is_oom_error.",
        "advice",
        _all("ignored, or not caught"),
    ),
    Rule(
        "PAM701",
        "old and new names of how float32 is computed",
        "warning",
        "From torch 2.9 on a program that has set fp32_precision can raise where it reads "
        "allow_tf32 or float32_matmul_precision: keep to one of the two, or give "
        "portable_amp.DeviceContext its fp32=.",
        "advice",
        _all(_MIXED),
        rocm=_MIXED,
        cuda=_MIXED,
    ),
)

RULES: dict[str, Rule] = {rule.code: rule for rule in _TABLE}
