"""What `portable-amp doctor` finds out: each device, what it can do, and one real training step.

And, where it is asked to be thorough, whether they compute right.
"""

from __future__ import annotations

import difflib
import logging
import platform
import shutil
import warnings
from typing import Any

import torch

from portable_amp.backends import present, resolve_device
from portable_amp.context import DeviceContext
from portable_amp.errors import DeviceError, PortableAmpError, shown
from portable_amp.notices import logger
from portable_amp.numerics import certificate as numbers
from portable_amp.numerics.cases import BY_NAME
from portable_amp.numerics.children import here, in_children
from portable_amp.precision import choose
from portable_amp.traps import traps_for

# A loss scale that starts at 2**16 may have to be halved this often before the first step is taken.
_ATTEMPTS = 24


def diagnose() -> dict[str, Any]:
    """Everything the doctor tells, as plain data: what `portable-amp doctor --json` prints."""
    names = _names()
    notes = _build_notes()
    try:
        chosen = str(resolve_device())
    except DeviceError as error:
        chosen, notes = "none", [*notes, str(error)]
    level = logger.level
    logger.setLevel(logging.ERROR)  # the report says what the notices would
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            devices = [examine(name) for name in names]
    finally:
        logger.setLevel(level)
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "chosen": chosen,
        "notes": [*notes, *dict.fromkeys(str(warning.message) for warning in caught)],
        "devices": devices,
        "ok": all(device["step"]["ok"] for device in devices),
    }


def _names() -> list[str]:
    return [f"{row.device_type}:{index}" for row in present() for index in range(row.count())]


def certificate(
    *,
    device: str | None = None,
    seconds: float = 120.0,
    only: str | None = None,
    seed: int = 0,
    in_process: bool = False,
) -> dict[str, Any]:
    """Whether each device computes right: what `portable-amp doctor --thorough --json` prints.

    Args:
        device: the one to try; None: all that are here.
        seconds: in all, an equal share for each device.
        only: the name of the one operation to try; None: all.
        seed: of weights and inputs.
        in_process: a process of their own is what keeps a crash of one from ending all.

    Raises:
        DeviceError: there is no such device here.
        PortableAmpError: there is no such operation.
    """
    if only is not None and only not in BY_NAME:
        near = difflib.get_close_matches(only, BY_NAME)
        hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(BY_NAME)}"
        raise PortableAmpError(f"there is no operation {shown(only)}; {hint}")
    devices = [resolve_device(one) for one in ([device] if device else _names())]
    run = here if in_process else in_children
    return numbers.certify(devices, seconds=seconds, only=only, seed=seed, run=run)


def certified(found: dict[str, Any], *, as_markdown: bool = False) -> str:
    """The findings of `certificate` for a person to read, or to paste into a report."""
    return numbers.markdown(found) if as_markdown else numbers.text(found)


def examine(device: str) -> dict[str, Any]:
    """One device: facts, what "auto" and each explicit request become, a training step, traps."""
    ctx = DeviceContext(device)
    can, hardware = ctx.capabilities, ctx.backend.read(ctx.device)
    plans = {request: choose(request, can) for request in ("auto", "fp16", "bf16")}
    return {
        "device": str(ctx.device),
        "name": can.name,
        "total_memory": can.total_memory,
        "dtypes": {
            "float32": "native",
            "float16": can.float16.value,
            "bfloat16": can.bfloat16.value,
            "float64": {None: "unknown", True: "yes", False: "absent"}[can.float64],
        },
        "autocast": can.autocast,
        "grad_scaler": can.grad_scaler,
        "evidence": list(can.evidence),
        "plans": {
            request: {"precision": plan.name, "scaler": plan.scaler, "reason": plan.reason}
            for request, plan in plans.items()
        },
        "step": training_step(ctx),
        "traps": [
            {"what": trap.what, "cure": trap.cure, "source": trap.source}
            for trap in traps_for(hardware, can)
        ],
    }


def training_step(ctx: DeviceContext) -> dict[str, Any]:
    """Train a small convolutional network until it has taken one step under the context's plan.

    Returns:
        "ok": the weights changed, and are finite; "error": what happened instead, else None.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the devices, too
            model = torch.nn.Sequential(
                torch.nn.Conv2d(3, 8, 3, padding=1),
                torch.nn.BatchNorm2d(8),
                torch.nn.ReLU(),
                torch.nn.Flatten(),
                torch.nn.Linear(8 * 8 * 8, 4),
            )
            images, targets = torch.randn(4, 3, 8, 8), torch.arange(4)
        model = ctx.to(model)
        images, targets = ctx.to((images, targets))
        optimizer = torch.optim.Adam(model.parameters())  # without a gradient it changes nothing
        scaler = ctx.scaler()
        before = [weight.detach().cpu().clone() for weight in model.parameters()]
        for _ in range(_ATTEMPTS):
            with ctx.autocast():
                loss = torch.nn.functional.cross_entropy(model(images), targets)
            # Not to be skipped: gradients that are not finite are what is looked for.
            done = scaler.backward_step(loss, optimizer, max_norm=1.0, skip_nonfinite=False)
            if done.stepped:
                break
        after = [weight.detach().cpu() for weight in model.parameters()]
        if not all(bool(weight.isfinite().all()) for weight in after):
            return {"ok": False, "error": "the weights are not finite after a step"}
        if all(torch.equal(old, new) for old, new in zip(before, after)):  # noqa: B905
            return {"ok": False, "error": f"no step was taken in {_ATTEMPTS} attempts"}
    # Whatever a driver throws is the finding: the doctor reports it and goes on to the next device.
    except Exception as error:
        return {"ok": False, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"ok": True, "error": None}


def report(found: dict[str, Any]) -> str:
    """The findings of `diagnose` for a person to read."""
    lines = [f"torch {found['torch']}, Python {found['python']}, {found['system']}"]
    lines += [f"Note: {note}" for note in found["notes"]]
    for device in found["devices"]:
        memory = device["total_memory"]
        size = f", {memory / 2**30:.0f} GiB" if memory else ""
        chosen = "  <- DeviceContext() takes it" if device["device"] == found["chosen"] else ""
        dtypes = ", ".join(f"{name} {support}" for name, support in device["dtypes"].items())
        lines += ["", f"{device['device']}: {device['name']}{size}{chosen}", f"  dtypes: {dtypes}"]
        lines += [f"  seen: {seen}" for seen in device["evidence"]]
        for request, plan in device["plans"].items():
            with_scaler = " with a gradient scaler" if plan["scaler"] else ""
            lines.append(f"  {request} -> {plan['precision']}{with_scaler}: {plan['reason']}")
        step = device["step"]
        lines.append("  training step: " + ("ran" if step["ok"] else f"FAILED: {step['error']}"))
        for trap in device["traps"]:
            lines += [f"  trap: {trap['what']}", f"    cure: {trap['cure']} ({trap['source']})"]
    return "\n".join(lines)


def _build_notes() -> list[str]:
    """What the machine has and this build of torch cannot use."""
    no_gpu_build = torch.version.cuda is None and torch.version.hip is None
    if no_gpu_build and shutil.which("nvidia-smi"):
        return [
            "nvidia-smi is installed, but this torch is built without CUDA: install a CUDA build "
            "to use the GPU"
        ]
    return []
