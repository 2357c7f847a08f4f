"""What a run is made of: YAML in, a checked and frozen Config out."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cv_classification.plain import brief, fault_of, parse

# Strict, because pydantic would otherwise read `true` as 1 and "3" as 3.
Count = Annotated[int, Field(strict=True, ge=1)]
# Of what is made at once, so that a slip of the finger does not fill the memory.
Few = Annotated[int, Field(strict=True, ge=1, le=10_000)]
Workers = Annotated[int, Field(strict=True, ge=0, le=1024)]
WholeNumber = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
Positive = Annotated[float, Field(strict=True, gt=0)]
NotNegative = Annotated[float, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, ge=0, lt=1)]


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
    folds: Annotated[Few, Field(ge=2)] | None = None
    fold: WholeNumber | None = None
    batch_size: Count = 32
    cache: Path | None = None
    cache_gb: Positive = 10.0
    workers: Workers = 0


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
    image_size: Annotated[Few, Field(le=4096)] | None = None
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
    validation_views: Few = 1
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
RUNTIME = ("device", "precision", "data.path", "data.batch_size", "data.workers")
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
    settings = {} if path is None else read_yaml(path)
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
    if fault := fault_of(settings):
        raise InputError(f"{source}: {fault}")
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] != "extra_forbidden":
        # Where the value is wrong for each member of a union, that member is named, too.
        name = ".".join(part for part in place if re.fullmatch(r"(?!int$)\w+", part))
        raise InputError(f"{source}: {name}={brief(first['input'])}: {first['msg']}")
    name = ".".join(place)
    section: Any = Config
    for part in place[:-1]:
        section = section.model_fields[part].annotation
    hint = nearest(place[-1], section.model_fields)
    raise InputError(f"{source}: there is no setting {brief(name)}; {hint}")


def check_same_run(saved: dict[str, Any], config: Config) -> None:
    """Refuse settings that are not those of the run to resume, but for the `RESUMABLE` ones.

    Raises:
        InputError: one differs.
    """
    # What a setting is that came after the run was saved is told by its default.
    old = _flat(check_config(saved, "the run to resume").model_dump(mode="json"))
    new = _flat(config.model_dump(mode="json"))
    for name in sorted((old.keys() | new.keys()) - set(RESUMABLE)):
        if (have := new.get(name)) != (had := old.get(name)):
            raise InputError(f"{name}={brief(have)}: the run to resume has {brief(had)}")


def check_path(text: str) -> Path:
    """The path that a word of the command line names.

    Raises:
        ValueError: nothing can have that name.
    """
    if b"\0" in os.fsencode(text):
        raise ValueError
    return Path(text)


def check_folder(path: Path) -> None:
    """See that there can be a folder at `path`, with files in it, without making it.

    Raises:
        InputError: a file is in the way, or the place is not ours to write to.
    """
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"{str(path)!r} cannot be a folder: {str(there)!r} is a file")
    try:  # to ask for permission is not enough: of root, or of what no file can be made in
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error.strerror}") from error


def check_output(path: Path) -> None:
    """See that a file can be written at `path`, without writing it.

    Raises:
        InputError: it is a folder, or not ours to write to.
    """
    if path.is_dir():
        raise InputError(f"the output {str(path)!r} is a folder; name a file")
    if path.exists() and not os.access(path, os.W_OK):
        raise InputError(f"{str(path)!r} cannot be written: it is write-protected")
    if not path.exists() or (path.is_file() and not own_stream(path)):  # no device, no pipe
        check_folder(Path(os.path.realpath(path)).parent)


def own_stream(path: Path) -> TextIO | None:
    """What this program prints to, if that is what is at `path`, such as /dev/stdout."""
    for number, stream in enumerate((sys.stdout, sys.stderr), 1):
        with contextlib.suppress(OSError):  # nothing is there, or it is closed
            if os.path.samestat(path.stat(), os.fstat(number)):
                return stream
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say after an unknown name: the nearest known ones, or some of all.

    >>> nearest("modle", ["model", "train"])
    "did you mean 'model'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"there are {', '.join(names[:8]) or 'none'}{', ...' if len(names) > 8 else ''}"


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a file.

    Raises:
        InputError: it is unreadable, no YAML, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read the config {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the config {str(path)!r} is not valid YAML: {error}") from error
    loaded = _parse(text, f"the config {str(path)!r}")
    if not isinstance(loaded, dict | None):
        raise InputError(f"the config {str(path)!r} holds a {type(loaded).__name__}, not settings")
    return loaded or {}


def _parse(text: str, source: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise InputError(f"{source} is not valid YAML: {error}") from error


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
    settings[key] = _parse(text, f"the value of {brief(override)}")
    return name


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = isinstance(value, dict)
        flat.update(_flat(value, f"{prefix}{name}.") if inner else {prefix + name: value})
    return flat
