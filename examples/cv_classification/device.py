"""The device and its precision: as the settings say, or measured for the model."""

from __future__ import annotations

import torch

from cv_classification.config import Config
from cv_classification.model import Classifier, Ensemble
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
    if ranks().is_main:
        mode = "training" if model.training else "prediction"
        print(f"{mode}: {made.plan.name}, {made.plan.memory_format}, {made.plan.reason}")
    return made
