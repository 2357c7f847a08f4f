"""The classifier: one of timm's models, with the normalisation it was made for built in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

from cv_classification.config import (
    Config,
    InputError,
    ModelConfig,
    check_config,
    nearest,
    override_runtime,
)
from cv_classification.data import Classes
from portable_amp import load_checkpoint


class Classifier(nn.Module):
    """images: (N, 3, S, S) RGB, 0 to 255, uint8 or float -> logits: (N, C).

    Raw bytes travel to the device, a quarter of what floats would be, and nobody can forget to
    normalise, or do it with another model's numbers.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, net: nn.Module, size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.net = net
        self.size = size
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See the class."""
        logits: torch.Tensor = self.net((images.float() - self.mean) / self.std)
        return logits


def check_model(config: ModelConfig) -> None:
    """Look the model up, without building it.

    Raises:
        InputError: timm has no such model, or there are no such weights.
    """
    architecture = config.name.partition(".")[0]  # what follows the dot names pretrained weights
    if not timm.is_model(architecture):
        hint = nearest(architecture, timm.list_models())
        raise InputError(f"model.name={config.name!r} is no model of timm; {hint}")
    if config.weights is not None and not config.weights.is_file():
        raise InputError(f"model.weights={str(config.weights)!r} is no file")
    # timm would only log that it has none, and train from scratch.
    if config.pretrained and config.weights is None and not timm.is_model_pretrained(config.name):
        raise InputError(f"model.pretrained=true: timm has no weights for {config.name!r}")


def build_model(config: ModelConfig, classes: int, *, weights: bool = True) -> Classifier:
    """A classifier with one output per class; without pretrained weights if a checkpoint follows.

    Raises:
        InputError: timm has no such model or weights for it, or the size does not suit it.
    """
    check_model(config)
    pretrained = weights and (config.pretrained or config.weights is not None)
    options: dict[str, Any] = {"drop_rate": config.drop_rate} if config.drop_rate else {}
    if pretrained and config.weights is not None:
        options["pretrained_cfg_overlay"] = {"file": str(config.weights)}
    preset = timm.get_pretrained_cfg(config.name)
    if config.image_size and preset is not None and preset.fixed_input_size:
        options["img_size"] = config.image_size
    try:
        net = timm.create_model(config.name, pretrained=pretrained, num_classes=classes, **options)
        data = resolve_model_data_config(net)  # type: ignore[no-untyped-call]
        size = config.image_size or data["input_size"][-1]
        model = Classifier(net, size, data["mean"], data["std"])
        with torch.inference_mode():  # an architecture may refuse the size only when it runs
            model.eval()(torch.zeros(1, 3, size, size))
    # Files, downloads and architectures each fail in their own way.
    except Exception as error:
        raise InputError(f"model.name={config.name!r} cannot be built so: {error}") from error
    return model


class Trained(NamedTuple):
    """What a checkpoint holds, ready to run."""

    model: Classifier
    config: Config
    classes: Classes
    split: str
    """The digest of the images it was trained and validated on."""
    path: Path


def describe(trained: Trained) -> dict[str, Any]:
    """The part of a checkpoint that `load_trained` needs."""
    return {
        "model": trained.model.state_dict(),
        "config": trained.config.model_dump(mode="json"),
        "classes": list(trained.classes),
        "split": trained.split,
    }


def read_state(path: Path, *more: str) -> dict[str, Any]:
    """What a checkpoint of this program holds, `more` than the model if needed.

    Raises:
        InputError: it is a checkpoint of something else, or lacks `more`.
        CheckpointError: it is missing, damaged, or not safe to load.
    """
    state = load_checkpoint(path)
    missing = {"model", "config", "classes", "split", *more} - state.keys()
    if missing:
        raise InputError(f"{str(path)!r} is not such a checkpoint: it has no {min(missing)!r}")
    return state


def load_trained(path: Path, overrides: Sequence[str]) -> Trained:
    """The model of a checkpoint, or of the best one in a run's folder.

    Raises:
        InputError: the checkpoint is not of this program, or an override would change the model.
        CheckpointError: it is missing, damaged, or not safe to load.
    """
    found = path / "best.pt" if path.is_dir() else path
    state = read_state(found)
    config = override_runtime(check_config(state["config"], str(found)), overrides)
    targets, names = state["classes"]
    model = build_model(config.model, len(targets), weights=False)
    load_weights(model, state["model"], found)
    return Trained(model, config, Classes(tuple(targets), tuple(names)), state["split"], found)


def load_weights(model: nn.Module, weights: Mapping[str, Any], path: Path) -> None:
    """Put the weights of a checkpoint into a model of the same kind.

    Raises:
        InputError: the model is another, or has another number of classes.
    """
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{str(path)!r} is of another model or other classes: {why}") from error
