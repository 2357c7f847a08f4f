"""What a run is made of: YAML in, a checked and frozen Config out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

# Strict, because pydantic would otherwise read `true` as 1 and "3" as 3.
Count = Annotated[int, Field(strict=True, ge=1)]
WholeNumber = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
# Not strict: YAML 1.1 reads 1e-3 as a string, and everybody writes 1e-3.
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


class InputError(ValueError):
    """The user's input cannot be used; the message is one line: what, why not, what works."""


class Section(BaseModel):
    """Settings that refuse unknown names and later changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# The meaning of each setting is told once, in docs/reference/example-config.md.
class DataConfig(Section):
    """Where the images are, and how they are read and augmented."""

    path: Path = Path("data")
    preset: str = "none"
    offline: bool = False
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0
    balance: Literal["none", "sampler", "copies"] = "none"
    validation: Annotated[Share, Field(gt=0)] = 0.2
    folds: Annotated[Count, Field(ge=2)] | None = None
    fold: WholeNumber | None = None
    batch_size: Count = 32
    cache: Path | None = None
    cache_gb: Positive = 10.0
    workers: WholeNumber = 0


class HeadConfig(Section):
    """Layers between the network's features and the classes."""

    hidden: Count | None = None
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    dropout: Share = 0.0


class ModelConfig(Section):
    """Which of timm's models, and how much of it is trained."""

    name: str = "resnet18"
    pretrained: bool = False
    weights: Path | None = None
    image_size: Count | None = None
    drop_rate: Share = 0.0
    tune: Literal["full", "head", "scratch"] | Count = "full"
    head: HeadConfig = HeadConfig()


class TrainConfig(Section):
    """How the weights are found."""

    epochs: Count = 20
    optimizer: str = "adamw"
    lr: Positive = 1e-3
    weight_decay: NotNegative = 0.01
    schedule: str = "cosine"
    schedule_options: dict[str, Any] = {}
    warmup_epochs: WholeNumber = 0
    accumulate: Count = 1
    max_norm: Positive | None = None
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    focal_gamma: NotNegative = 2.0
    class_weights: Literal["none", "balanced"] = "none"
    label_smoothing: Share = 0.0
    ema: Share = 0.0
    validation_views: Count = 1
    monitor: Literal["macro_f1", "accuracy", "log_loss"] = "macro_f1"
    patience: Count | None = None
    save_every: Count | None = None
    give_up_after: Count = 10
    sharded: bool = False


class Config(Section):
    """One run."""

    seed: WholeNumber = 0
    device: str | None = None
    precision: Any = "auto"
    """What DeviceContext takes, and checks."""
    output: Path = Path("runs/run")
    tracking: tuple[Literal["tensorboard", "wandb"], ...] = ()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()


# What a trained model may be run with; anything else would not be the model that was trained.
RUNTIME = ("device", "precision", "data.batch_size", "data.workers")
# What may differ when training is resumed; the batch size may not.
RESUMABLE = (
    *("device", "precision", "output", "tracking", "data.path", "data.workers"),
    *("data.cache", "data.cache_gb"),
    *("train.patience", "train.save_every", "train.give_up_after"),
)


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The settings of a YAML file with `section.key=value` on top; None: only those.

    Raises:
        InputError: unreadable, invalid, or a setting is unknown or of the wrong type.
    """
    settings = {} if path is None else _read_yaml(path)
    for override in overrides:
        _override(settings, override)
    return check_config(settings, "command line" if path is None else str(path))


def override_runtime(config: Config, overrides: Sequence[str]) -> Config:
    """A trained model's settings with other `RUNTIME` ones.

    Raises:
        InputError: an override is wrong, or would change what was trained.
    """
    settings = config.model_dump(mode="json")
    for override in overrides:
        if _override(settings, override) not in RUNTIME:
            works = ", ".join(RUNTIME)
            raise InputError(f"{override!r} is fixed by training; {works} can be set here")
    return check_config(settings, "command line")


def check_config(settings: dict[str, Any], source: str) -> Config:
    """A Config of plain settings; `source` is named when they are wrong.

    Raises:
        InputError: a setting is unknown or of the wrong type.
    """
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] != "extra_forbidden":
        # Where the value is wrong for each member of a union, that member is named, too.
        name = ".".join(part for part in place if re.fullmatch(r"(?!int$)\w+", part))
        raise InputError(f"{source}: {name}={first['input']!r}: {first['msg']}")
    name = ".".join(place)
    section: Any = Config
    for part in place[:-1]:
        section = section.model_fields[part].annotation
    hint = nearest(place[-1], section.model_fields)
    raise InputError(f"{source}: there is no setting {name!r}; {hint}")


def check_same_run(saved: dict[str, Any], config: Config) -> None:
    """Refuse settings that are not those of the run to resume, but for the `RESUMABLE` ones.

    Raises:
        InputError: one differs.
    """
    old, new = _flat(saved), _flat(config.model_dump(mode="json"))
    for name in sorted(new.keys() - set(RESUMABLE)):
        if new[name] != old.get(name):
            raise InputError(f"{name}={new[name]!r}: the run to resume has {old.get(name)!r}")


def check_folder(path: Path) -> None:
    """See that a folder can be made at `path`, without making it.

    Raises:
        InputError: a file is in the way.
    """
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise InputError(f"{str(path)!r} cannot be a folder: {str(place)!r} is a file")


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say after an unknown name: the nearest known ones, or some of all.

    >>> nearest("modle", ["model", "train"])
    "did you mean 'model'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"there are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the config {str(path)!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"the config {str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(loaded, dict | None):
        raise InputError(f"the config {str(path)!r} holds a {type(loaded).__name__}, not settings")
    return loaded or {}


def _override(settings: dict[str, Any], override: str) -> str:
    """Put `section.key=value` into nested settings; return the name."""
    name, equals, text = override.partition("=")
    if not equals or not name or name.startswith("-"):
        raise InputError(f"{override!r} is not understood; settings are given as section.key=value")
    *sections, key = name.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise InputError(f"{override!r}: {section!r} is a value, and has no settings in it")
    try:
        settings[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{override!r}: the value is not valid YAML") from error
    return name


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = isinstance(value, dict)
        flat.update(_flat(value, f"{prefix}{name}.") if inner else {prefix + name: value})
    return flat
