"""The device and its precision: as the settings say, or measured for the model."""

from __future__ import annotations

import torch
from torch import nn

from cv_classification.config import Config, InputError
from cv_classification.model import Classifier, Ensemble
from cv_classification.parallel import tell
from portable_amp import DeviceContext, ranks

TUNED = "tuned"


def make_context(config: Config) -> DeviceContext:
    """The device that the settings name; "tuned" is decided once there is a model.

    Raises:
        PortableAmpError: there is no such device or precision.
    """
    precision = "auto" if config.precision == TUNED else config.precision
    return DeviceContext(config.device, precision=precision)


def tuned(ctx: DeviceContext, model: Classifier | Ensemble, config: Config) -> DeviceContext:
    """With `precision: tuned` the plan that is fastest for this model in the mode it is in."""
    if config.precision != TUNED:
        return ctx
    shape = (max(1, config.data.batch_size // ranks().world_size), 3, model.size, model.size)
    images = torch.randint(
        256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    made = ctx.tuned(model, images)
    mode = "training" if model.training else "prediction"
    tell(f"{mode}: {made.plan.name}, {made.plan.memory_format}, {made.plan.reason}")
    return made


def check_batch(size: int, model: nn.Module, config: Config) -> None:
    """See that the batches of a process, which may have fewer images than one, can be trained on.

    Raises:
        InputError: they cannot.
    """
    if (config.data.mixup or config.data.cutmix) and size % 2:
        raise InputError(f"data.mixup, data.cutmix: pair images, and a batch would have {size}")
    norms = [one for one in model.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    if size == 1 and any(norm.training for norm in norms):
        raise InputError(
            f"data.batch_size={config.data.batch_size}: a batch would have 1 image, and BatchNorm, "
            "which the model trains, compares 2 or more"
        )
