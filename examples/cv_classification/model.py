"""The classifier: one of timm's models, with the normalisation it was made for built in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.layers import create_act_layer  # type: ignore[attr-defined]
from timm.models import group_parameters, load_state_dict
from torch import nn

from cv_classification.config import (
    Config,
    HeadConfig,
    InputError,
    ModelConfig,
    check_config,
    check_same_run,
    nearest,
    override_runtime,
)
from cv_classification.data import Classes
from cv_classification.plain import brief
from portable_amp import PortableAmpError, load_checkpoint


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

    def train(self, mode: bool = True) -> Classifier:
        """As in torch, but what is frozen stays as in evaluation, statistics of BatchNorm too."""
        super().train(mode)
        for module in self.net.modules() if mode else ():
            needed = [parameter.requires_grad for parameter in module.parameters()]
            if needed and not any(needed):
                module.eval()
        return self


def check_model(config: ModelConfig) -> None:
    """Look the model up, without building it.

    Raises:
        InputError: timm has no such model or weights, or they do not go with `tune`.
    """
    architecture, dot, tag = config.name.partition(".")
    if not timm.is_model(architecture):
        hint = nearest(architecture, timm.list_models())
        raise InputError(f"model.name={brief(config.name)} is no model of timm; {hint}")
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if dot and tag not in tags:
        why = f"{architecture} has no such weights; {nearest(tag, tags)}"
        raise InputError(f"model.name={brief(config.name)}: {why}")
    if config.weights is not None and not config.weights.is_file():
        raise InputError(f"model.weights={str(config.weights)!r} is no file")
    # timm would only log that it has none, and train from scratch.
    if config.pretrained and config.weights is None and not timm.is_model_pretrained(config.name):
        raise InputError(f"model.pretrained=true: timm has no weights for {config.name!r}")
    given = config.pretrained or config.weights is not None
    if config.tune != "full" and given == (config.tune == "scratch"):  # frozen noise learns nothing
        way = f"model.tune={config.tune!r} works {'without' if given else 'with'}"
        raise InputError(f"{way} model.pretrained=true or model.weights")


def build_model(config: ModelConfig, classes: int, *, weights: bool = True) -> Classifier:
    """A classifier with one output per class; without pretrained weights if a checkpoint follows.

    Raises:
        InputError: timm has no such model or weights for it, or the size does not suit it.
    """
    if weights:
        check_model(config)
    options: dict[str, Any] = {"drop_rate": config.drop_rate} if config.drop_rate else {}
    preset = timm.get_pretrained_cfg(config.name)
    if config.image_size and preset is not None and preset.fixed_input_size:
        options["img_size"] = config.image_size
    create: Any = partial(timm.create_model, config.name, num_classes=classes, **options)
    try:
        net = create(pretrained=weights and config.pretrained and config.weights is None)
        if weights and config.weights is not None:
            # timm would pass over whatever a file lacks, unless it has as many classes as wanted.
            state = load_state_dict(str(config.weights))
            # A checkpoint of this program has them as those of a Classifier.
            own = {key[4:]: value for key, value in state.items() if key.startswith("net.")}
            state = (own or state) | _head(net)
            overlay = {"state_dict": state, "num_classes": classes, "label_offset": 0}
            net = create(pretrained=True, pretrained_cfg_overlay=overlay)
            del net.pretrained_cfg["state_dict"]
        if config.head.hidden or config.head.dropout:
            _set_head(net, config.head)
        if config.tune not in ("full", "scratch"):
            _freeze(net, config.tune)
        data = resolve_model_data_config(net)  # type: ignore[no-untyped-call]
        size = config.image_size or data["input_size"][-1]
        model = Classifier(net, size, data["mean"], data["std"])
        with torch.inference_mode():  # an architecture may refuse the size only when it runs
            model.eval()(torch.zeros(1, 3, size, size))
    # Files, downloads and architectures each fail in their own way.
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"model.name={config.name!r} cannot be built so: {why}") from error
    return model


def _head(net: Any) -> dict[str, torch.Tensor]:
    """The weights of the classifier, as timm names it: what it makes anew for other classes."""
    name = net.pretrained_cfg["classifier"]  # some have several, in a tuple
    return {key: value for key, value in net.state_dict().items() if key.startswith(name)}


def _set_head(net: Any, config: HeadConfig) -> None:
    name = net.pretrained_cfg["classifier"]
    old = net.get_submodule(name) if isinstance(name, str) else None
    if not isinstance(old, nn.Linear):
        raise ValueError("model.head replaces a single linear classifier, which it has not")
    width = config.hidden or old.in_features
    hidden = [nn.Linear(old.in_features, width), create_act_layer(config.activation)]
    last = [nn.Dropout(config.dropout), nn.Linear(width, old.out_features)]
    parent, _, attribute = name.rpartition(".")
    head = nn.Sequential(*(hidden if config.hidden else []), *last)
    setattr(net.get_submodule(parent), attribute, head)


def _freeze(net: Any, tune: str | int) -> None:
    """Freeze all but the head and the last `tune` stages, of which the stem is the first."""
    trained = set(_head(net))
    if isinstance(tune, int):
        matcher: Any = getattr(net, "group_matcher", lambda coarse: {})  # a few have none
        # In the order of the network; the last group is all that follows the stages.
        *stages, end = group_parameters(net, matcher(coarse=True)).values()
        if tune > len(stages):
            raise ValueError(f"model.tune={tune}: it has {len(stages)} stages that timm can tell")
        trained.update(end, *stages[-tune:])
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in trained)


class Trained(NamedTuple):
    """What a checkpoint holds, ready to run."""

    model: Classifier
    config: Config
    classes: Classes
    split: str
    """The digest of the images it was trained and validated on."""
    path: Path


def describe(config: Config, classes: Classes, split: str) -> dict[str, Any]:
    """The part of a checkpoint that `load_trained` needs besides the weights, as "model"."""
    return {
        "config": config.model_dump(mode="json"),
        "classes": list(classes),
        "split": split,
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


def load_trained(path: Path, overrides: Sequence[str] = ()) -> list[Trained]:
    """The model of a checkpoint; or the best one in a run's folder, or in each of its folds'.

    Raises:
        InputError: the checkpoint is not of this program, or an override would change the model; or
            the folder does not have all folds of one run.
        CheckpointError: it is missing, damaged, or not safe to load.
    """
    if not path.is_dir():
        return [_load_one(path, overrides)]
    alone, found = path / "best.pt", sorted(path.glob("fold*/best.pt"))
    if not found:
        return [_load_one(alone, overrides)]
    if alone.exists():
        raise InputError(f"{str(path)!r} holds a run and the folds of another; name a checkpoint")
    folds = [_load_one(checkpoint, overrides) for checkpoint in found]
    first, known = folds[0], {one.config.data.fold: one for one in folds}
    for one in folds:
        data = {**one.config.model_dump(mode="json")["data"], "fold": first.config.data.fold}
        try:
            check_same_run({**one.config.model_dump(mode="json"), "data": data}, first.config)
        except InputError as error:
            raise InputError(f"{one.path} is of another run than {first.path}: {error}") from error
        if one.classes != first.classes:
            raise InputError(f"{one.path} has other classes than {first.path}")
    missing = sorted({*range(first.config.data.folds or 0)} ^ known.keys(), key=str)
    if missing:
        raise InputError(
            f"{str(path)!r} has {len(folds)} of {first.config.data.folds} folds, without "
            f"{missing[0]}: `train --resume` goes on with it, or name a checkpoint"
        )
    return [known[fold] for fold in range(len(folds))]


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Whatever it is that does not fit in a checkpoint, as an InputError about it."""
    try:
        yield
    except (InputError, PortableAmpError):
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{str(path)!r} is not such a checkpoint: {why}") from error


def _load_one(path: Path, overrides: Sequence[str]) -> Trained:
    state = read_state(path)
    with understood(path):
        config = override_runtime(check_config(state["config"], str(path)), overrides)
        targets, names = state["classes"]
        classes = Classes(tuple(map(int, targets)), tuple(map(str, names)))
        if not len(targets) == len(names) == len({*targets}):
            raise ValueError("its classes have no names")
        model = build_model(config.model, len(targets), weights=False)
        load_weights(model, state["model"], path)
        return Trained(model, config, classes, str(state["split"]), path)


class Ensemble(nn.Module):
    """images, as a Classifier takes them -> log of the models' mean probabilities: (N, C)."""

    def __init__(self, models: Sequence[Classifier]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.size = models[0].size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return torch.stack([one(images).float().softmax(-1) for one in self.models]).mean(0).log()


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
    # Some architectures, such as LeViT, keep what they computed of old weights until then.
    mode = model.training
    model.train(not mode).train(mode)
