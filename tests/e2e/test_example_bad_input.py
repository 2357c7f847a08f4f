"""What a user can get wrong: one line on standard error, exit status 2, and nothing written."""

from __future__ import annotations

import importlib
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch

from cv_classification.__main__ import main
from cv_classification.config import Config, InputError, load_config
from cv_classification.data import read_rows
from cv_classification.model import Classifier
from cv_classification.tracking import Tracker, check_tracking
from portable_amp import load_checkpoint, save_checkpoint

from .conftest import MODEL, write_csv, write_image, write_tiny
from .test_example_survival import environment

Change = Callable[[Path], object]


class Case(NamedTuple):
    """`argv` and what `said` must say may hold {root}, the folder that `change` has altered."""

    argv: str
    said: str
    change: Change = lambda root: None


TRAIN = f"train data.path={{root}}/data output={{root}}/new device=cpu {' '.join(MODEL)}"
EVALUATE = "evaluate {root}/run device=cpu"
PREDICT = "predict {root}/run device=cpu"
RESUME = (
    f"{TRAIN} output={{root}}/run --resume train.epochs=1 data.batch_size=4 data.validation=0.25 "
    "precision=fp32"
)
OTHER_OPTIMIZER = "its optimizer is another"


def edit(name: str, old: str, new: str) -> Change:
    def change(root: Path) -> None:
        text = (root / name).read_text("utf-8")
        assert old in text
        (root / name).write_text(text.replace(old, new, 1), "utf-8")

    return change


def write(name: str, content: str | bytes) -> Change:
    def change(root: Path) -> None:
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def remove(name: str) -> Change:
    def change(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def truncate(name: str) -> Change:
    def change(root: Path) -> None:
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: len(content) // 2])

    return change


def change_checkpoint(**values: Any) -> Change:
    def change(root: Path) -> None:
        for name in ("best.pt", "last.pt"):
            state = load_checkpoint(root / "run" / name)
            save_checkpoint(root / "run" / name, {**state, **values})

    return change


def flip_a_weight(root: Path) -> None:
    path = root / "run/best.pt"
    content = bytearray(path.read_bytes())
    weight = load_checkpoint(path)["model"]["net.conv1.0.weight"].numpy().tobytes()
    content[content.index(weight) + len(weight) // 2] ^= 1
    path.write_bytes(content)


def change_last(change: Callable[[dict[str, Any]], object]) -> Change:
    def changed(root: Path) -> None:
        state = load_checkpoint(root / "run/last.pt")
        change(state)
        save_checkpoint(root / "run/last.pt", state)

    return changed


def change_moments(change: Callable[[dict[str, Any]], object]) -> Change:
    """What the optimizer keeps of one parameter."""
    return change_last(lambda state: change(state["optimizer"]["state"][2]))


def replace(name: str, make: Callable[[Path], object]) -> Change:
    def change(root: Path) -> None:
        (root / name).unlink()
        make(root / name)

    return change


def config(text: str, said: str) -> Case:
    """Training with a config of that text."""
    return Case(f"{TRAIN} --config {{root}}/c.yaml", said, write("c.yaml", text))


def write_png_header(path: Path, side: int) -> None:
    """Of a picture of so many pixels, and nothing after it."""
    write_image(path, 0)
    content = bytearray(path.read_bytes())
    content[16:24] = 2 * side.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


def change_config(root: Path, **sections: dict[str, Any]) -> None:
    saved = load_checkpoint(root / "run/last.pt")["config"]
    merged = {name: {**saved[name], **section} for name, section in sections.items()}
    change_checkpoint(config={**saved, **merged})(root)


class Code:
    """Leaves a trace if it is ever unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def hide_code(root: Path) -> None:
    torch.save({"model": Code(root / "executed")}, root / "run/best.pt")
    with (root / "run/last.pt").open("wb") as file:
        pickle.dump({"model": Code(root / "executed")}, file)


def write_folders(root: Path, *names: str) -> None:
    for name in names:
        for index in range(4):
            write_image(root / "folders" / name / f"{index}.png", 100, index)


def one_image_of_a_class(root: Path) -> None:
    lines = (root / "data/train.csv").read_text("utf-8").splitlines()
    kept = [line for line in lines if not line.endswith(",9") or " 0.png" in line]
    (root / "data/train.csv").write_text("\n".join(kept), "utf-8")


def other_classes(root: Path) -> None:
    (root / "data/meta.csv").unlink()
    text = (root / "data/train.csv").read_text("utf-8").replace(",9\r\n", ",11\r\n")
    (root / "data/train.csv").write_bytes(text.encode())


FIRST = "data/train/naïve 3 写真 0.png"

CASES = {
    # The command line.
    "no command": Case("", "required: command"),
    "unknown command": Case("trian", "invalid choice: 'trian'"),
    "unknown option": Case(f"{TRAIN} --resmue", "'--resmue' is not understood"),
    "seed is no number": Case("demo --seed x --out {root}/new", "invalid int value: 'x'"),
    "no setting": Case(f"{TRAIN} epochs", "'epochs' is not understood"),
    # Settings.
    "unknown device": Case(f"{TRAIN} device=gpu", "'gpu' is not a device torch knows"),
    "absent device": Case(f"{TRAIN} device=xpu:7", "'xpu:7' is not available"),
    "unknown precision": Case(f"{TRAIN} precision=fp12", "precision='fp12': it is no precision"),
    "unknown model": Case(
        f"{TRAIN} model.name=resnet1818", "'resnet1818' is no model of timm; did you mean"
    ),
    "unknown weights of a model": Case(
        f"{TRAIN} model.name=resnet18.a1_in2k", "has no such weights; did you mean 'a1_in1k'"
    ),
    "no pretrained weights": Case(
        f"{TRAIN} model.name=resnet20ts model.pretrained=true", "is no model of timm"
    ),
    "no file of weights": Case(f"{TRAIN} model.weights={{root}}/no.pth", "is no file"),
    "weights that are none": Case(
        f"{TRAIN} model.weights={{root}}/data/train.csv", "cannot be built so"
    ),
    "impossible size": Case(
        f"{TRAIN} model.name=test_vit model.image_size=5", "model.name='test_vit' cannot be built"
    ),
    "unknown preset": Case(f"{TRAIN} data.preset=digit", "is no preset; did you mean 'digits'?"),
    "unknown optimizer": Case(f"{TRAIN} train.optimizer=adamv", "did you mean 'adam"),
    "unknown schedule": Case(f"{TRAIN} train.schedule=cosin", "did you mean 'cosine'?"),
    "unknown key": Case(
        f"{TRAIN} train.epoch=3", "no setting 'train.epoch'; did you mean 'epochs'"
    ),
    "unknown section": Case(f"{TRAIN} trian.epochs=3", "no setting 'trian'; did you mean 'train'"),
    "unknown part to train": Case(f"{TRAIN} model.tune=tail", "model.tune='tail'"),
    "head of nothing": Case(f"{TRAIN} model.tune=head", "model.tune='head'"),
    "unknown key of the head": Case(
        f"{TRAIN} model.head.hiden=4", "no setting 'model.head.hiden'; did you mean 'hidden'"
    ),
    "one fold": Case(f"{TRAIN} data.folds=1", "data.folds=1"),
    "a fold of none": Case(f"{TRAIN} data.fold=0", "data.folds=None has no such fold"),
    "a fold too many": Case(f"{TRAIN} data.folds=3 data.fold=3", "data.folds=3 has no such fold"),
    "more folds than images": Case(f"{TRAIN} data.folds=9", "has 8 images; 9 work"),
    "unknown tracker": Case(f"{TRAIN} tracking=[mlflow]", "tracking.0='mlflow'"),
    "offline stages of many sizes": Case(
        f"{TRAIN} data.offline=true data.preset=documents", "data.offline=true: the stages"
    ),
    "odd batch to mix": Case(
        f"{TRAIN} data.mixup=0.2 data.batch_size=5", "data.batch_size=5: mixup and cutmix"
    ),
    "shards of one process": Case(f"{TRAIN} train.sharded=true", "nobody to share with"),
    "shards of an average": Case(
        f"{TRAIN} train.sharded=true train.ema=0.9", "train.ema and train.sharded"
    ),
    "options of no schedule": Case(
        f"{TRAIN} train.schedule=onecycle train.schedule_options.speed=3", "unexpected keyword"
    ),
    "optimizer for another loop": Case(f"{TRAIN} train.optimizer=LBFGS", "LBFGS"),
    "a negative number of passes": Case(f"{PREDICT} --mc-dropout -3", "--mc-dropout"),
    "no passes": Case(f"{PREDICT} --mc-dropout 0", "--mc-dropout"),
    "dropout where there is none": Case(f"{PREDICT} --mc-dropout 3", "no layer that drops"),
    "resume what": Case(f"{TRAIN} --resume=perhaps", "invalid choice: 'perhaps'"),
    "resumed with other settings": Case(
        f"{TRAIN} output={{root}}/run --resume auto train.lr=3", "the run to resume has"
    ),
    "resumed without an option": Case(
        f"{TRAIN} output={{root}}/run --resume auto precision=fp32 data.batch_size=4 "
        "data.validation=0.25 train.epochs=1",
        "train.schedule_options.cycle_mul=None: the run to resume has 2",
        lambda root: change_config(root, train={"schedule_options": {"cycle_mul": 2}}),
    ),
    "resumed with no config": Case(
        f"{TRAIN} output={{root}}/run --resume auto", "the run to resume: =3.5",
        change_checkpoint(config=3.5),
    ),
    "report of nothing": Case("report {root}/data", "there is no checkpoint"),
    "a setting in a value": Case(f"{TRAIN} seed=3 seed.x=1", "'seed' is a value"),
    "word for a number": Case(f"{TRAIN} train.epochs=many", "train.epochs='many'"),
    "truth for a number": Case(f"{TRAIN} train.epochs=true", "train.epochs=True"),
    "no epochs": Case(f"{TRAIN} train.epochs=0", "greater than or equal to 1"),
    "negative rate": Case(f"{TRAIN} train.lr=-1", "train.lr=-1"),
    "value is no YAML": Case(f"{TRAIN} train.lr=[", "not valid YAML"),
    "missing config": Case(f"{TRAIN} --config {{root}}/no.yaml", "no.yaml': No such file"),
    "config is no YAML": Case(
        f"{TRAIN} --config {{root}}/c.yaml", "not valid YAML", write("c.yaml", "a: [\n b: }")
    ),
    "config is binary": Case(
        f"{TRAIN} --config {{root}}/c.yaml", "not valid YAML", write("c.yaml", b"\xff\xfe\x00\x81")
    ),
    "config is a list": Case(
        f"{TRAIN} --config {{root}}/c.yaml", "holds a list", write("c.yaml", "- 1")
    ),
    "config with a typo": Case(
        f"{TRAIN} --config {{root}}/c.yaml", "c.yaml: there is no setting 'sede'; did you mean",
        write("c.yaml", "sede: 3"),
    ),
    # YAML that is valid, and no settings.
    "key twice": config("seed: 1\nseed: 2", "line 2: 'seed' is there twice"),
    "section twice": config(
        "train: {epochs: 3}\nseed: 1\ntrain: {lr: 1}", "line 3: 'train' is there twice"
    ),
    "no integer by its tag": config("seed: !!int abc", "invalid literal for int()"),
    "no date by its tag": config("seed: !!timestamp now", "is not valid YAML"),
    "date": config("seed: 2001-01-01", "seed='2001-01-01'"),
    "date by its tag": config("seed: !!timestamp 2001-01-01", "seed is a date, not a word"),
    "set": config("tracking: !!set {wandb}", "tracking is a set, not a word"),
    "bytes": config("data: {cache: !!binary aGk=}", "data.cache is a bytes, not a word"),
    "5,000 digits": config(f"seed: {'9' * 5000}", "is not valid YAML: Exceeds the limit"),
    "400 digits": config(f"train: {{lr: {'9' * 400}}}", "train.lr is beyond 64 bits"),
    "1,500 levels": config("[" * 1500 + "]" * 1500, "nested too deep"),
    "key that is no word": config("train: {schedule_options: {1: 2}}", "has the key 1, which is"),
    "key that is a list": config("? [1]\n: 2", "unhashable key"),
    "cycle": config("train: {schedule_options: &a {x: *a}}", "hold too much, or themselves"),
    "ten thousand million laughs": config(
        "a0: &a0 x\n"
        + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 11)),
        "hold too much, or themselves",
    ),
    "NUL": config('data: {cache: "a\\0b"}', "data.cache has a NUL in it"),
    "half a surrogate": config('data: {cache: "\\uD800"}', "data.cache is no text"),
    "NaN": config("train: {schedule_options: {min_lr: .nan}}", "min_lr is not finite"),
    "infinity": config("train: {max_norm: 1e999}", "max_norm is not finite"),
    "truth for a rate": Case(f"{TRAIN} train.lr=true", "train.lr=True: Input should be a valid"),
    "too many processes": Case(f"{TRAIN} data.workers=99999", "data.workers=99999"),
    "too many folds": Case(f"{TRAIN} data.folds=1000000000", "data.folds=1000000000"),
    "endless word": config(f"train: {{optimizer: {'x' * 5000}}}", "train.optimizer='xxx"),
    # Tables.
    "no data": Case(f"{TRAIN} data.path={{root}}/no", "there is no data folder"),
    "no column": Case(
        TRAIN, "train.csv has no column 'target', only", edit("data/train.csv", "target", "label")
    ),
    "empty table": Case(TRAIN, "has no column 'ID'", write("data/train.csv", "")),
    "no rows": Case(TRAIN, "has no rows", write("data/train.csv", "ID,target\n")),
    "binary table": Case(TRAIN, "not a CSV table", write("data/train.csv", b"ID,target\n\xff,1")),
    "unknown ID": Case(TRAIN, "elsewhere.png: no such file", edit(
        "data/train.csv", "naïve 3 写真 0", "elsewhere")),
    "ID twice": Case(TRAIN, "line 3: the ID 'naïve 3 写真 0.png' is there twice", edit(
        "data/train.csv", "3 写真 1", "3 写真 0")),
    "ID climbs": Case(TRAIN, "'../x.png' is not a path inside", edit(
        "data/train.csv", "naïve 3 写真 0", "../x")),
    "ID is absolute": Case(TRAIN, "'/etc/x.png' is not a path inside", edit(
        "data/train.csv", "naïve 3 写真 0", "/etc/x")),
    "target in words": Case(TRAIN, "line 2: the target 'three' is not a whole number", edit(
        "data/train.csv", "0.png,3", "0.png,three")),
    "target is missing": Case(TRAIN, "line 2 has 1 fields, not 2", edit(
        "data/train.csv", "0.png,3", "0.png")),
    "target not in meta": Case(TRAIN, "the target 4 of", edit(
        "data/train.csv", "0.png,3", "0.png,4")),
    "column twice": Case(TRAIN, "train.csv has the column 'target' twice", edit(
        "data/train.csv", "ID,target", "ID,target,target")),
    "comma in a name": Case(TRAIN, "meta.csv, line 2 has 3 fields, not 2", edit(
        "data/meta.csv", "dark", "dark, very")),
    "field too many": Case(TRAIN, "train.csv, line 2 has 3 fields, not 2", edit(
        "data/train.csv", "0.png,3", "0.png,3,5")),
    "ID twice in two spellings": Case(TRAIN, "the ID './/naïve 3 写真 0.png' is there twice", edit(
        "data/train.csv", "naïve 3 写真 1", ".//naïve 3 写真 0")),
    "NUL in an ID": Case(TRAIN, "not a path inside" if sys.version_info >= (3, 11) else "NUL", edit(
        "data/train.csv", "naïve 3 写真 0", "a\0b")),
    "target in other digits": Case(TRAIN, "is not a whole number", edit(
        "data/train.csv", "0.png,3", "0.png,\N{FULLWIDTH DIGIT THREE}")),
    "target of 5,000 digits": Case(TRAIN, "is not a whole number", edit(
        "data/train.csv", "0.png,3", f"0.png,{'3' * 5000}")),
    "meta twice": Case(TRAIN, "meta.csv, line 3: the target 3 is there twice", edit(
        "data/meta.csv", "5,grey", "3,grey")),
    "one image of a class": Case(TRAIN, "'bright' has 1 images; 2 work", one_image_of_a_class),
    "too little to divide": Case(f"{TRAIN} data.validation=0.01", "data.validation=0.01"),
    # Images.
    "image missing": Case(TRAIN, "no such file", remove(FIRST)),
    "image truncated": Case(TRAIN, "写真 0.png: truncated or damaged", truncate(FIRST)),
    "image is none": Case(TRAIN, "写真 0.png: not an image", write(FIRST, "GIF? No.")),
    "image is empty": Case(TRAIN, "写真 0.png: not an image", write(FIRST, "")),
    "image is a pipe": Case(TRAIN, "写真 0.png: not a file", replace(FIRST, os.mkfifo)),
    "image is a folder": Case(TRAIN, "写真 0.png: not a file", replace(FIRST, os.mkdir)),
    "image is a device": Case(TRAIN, "写真 0.png: not a file", replace(
        FIRST, lambda path: path.symlink_to("/dev/zero"))),
    "image is a link to itself": Case(TRAIN, "too many levels of symbolic links", replace(
        FIRST, lambda path: path.symlink_to(path))),
    "image is a drawing": Case(TRAIN, "写真 0.png: not an image", write(
        FIRST, '<svg xmlns="http://www.w3.org/2000/svg"/>')),
    "image is a program": Case(TRAIN, "写真 0.png: not an image", write(  # for Ghostscript
        FIRST, "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")),
    "image of too many pixels": Case(TRAIN, "50000 x 50000 pixels are too many", replace(
        FIRST, lambda path: write_png_header(path, 50_000))),
    "photos of a phone": Case(
        f"{TRAIN} data.path={{root}}/folders", "cat/0.HEIC: not an image that can be read here",
        lambda root: (write_folders(root, "cat", "dog"), write("folders/cat/0.HEIC", "heic")(root)),
    ),
    "photos of a phone to predict": Case(
        f"{PREDICT} --data {{root}}/folders", "cat/0.HEIC: not an image that can be read here",
        lambda root: (write_folders(root, "cat"), write("folders/cat/0.HEIC", "heic")(root)),
    ),
    "folders in a class": Case(
        f"{TRAIN} data.path={{root}}/split", "train' has a folder in it: {root}/split/train/cat",
        lambda root: (write_folders(root, "cat"), (root / "split").mkdir(),
                      (root / "folders").rename(root / "split/train")),
    ),
    "name that is no UTF-8": Case(
        f"{PREDICT} --data {{root}}/folders", r"cannot hold the name 'cat/caf\udce9.png'",
        lambda root: (write_folders(root, "cat"), (root / "folders/cat/0.png").rename(
            os.fsdecode(os.fsencode(root) + b"/folders/cat/caf\xe9.png"))),
    ),
    "name that is a drive on Windows": Case(
        f"{PREDICT} --data {{root}}/folders/cat", "cannot hold the name 'c:0.png'",
        lambda root: (write_folders(root, "cat"), (root / "folders/cat/0.png").rename(
            root / "folders/cat/c:0.png")),
    ),
    "test image truncated": Case(PREDICT, "0.png: truncated", truncate("data/test/0.png")),
    # Folders.
    "empty folder": Case(
        f"{TRAIN} data.path={{root}}/folders", "neither a train.csv nor a folder per class",
        lambda root: (root / "folders").mkdir(),
    ),
    "folder without images": Case(
        f"{TRAIN} data.path={{root}}/folders", "has no images",
        lambda root: (root / "folders/cat").mkdir(parents=True),
    ),
    "one class only": Case(
        f"{TRAIN} data.path={{root}}/folders", "all images are of class 'cat'",
        lambda root: write_folders(root, "cat"),
    ),
    "class of no model": Case(
        f"{EVALUATE} --data {{root}}/folders", "cat' is no class of the trained model",
        lambda root: write_folders(root, "cat"),
    ),
    "target of no model": Case(
        f"{EVALUATE} --data {{root}}/t.csv", "the target 7",
        lambda root: write_csv(root / "t.csv", ("ID", "target"), [("x.png", 7)]),
    ),
    # Checkpoints.
    "no checkpoint": Case("evaluate {root}/no.pt", "there is no checkpoint"),
    "run without checkpoints": Case("predict {root}/data", "there is no checkpoint"),
    "nothing to resume": Case(f"{TRAIN} --resume", "holds no run to resume"),
    "nothing to resume from": Case(
        f"{TRAIN} output={{root}}/run --resume", "it has no 'ema'",
        lambda root: shutil.copy(root / "run/best.pt", root / "run/last.pt"),
    ),
    "one bit of a weight is flipped": Case(PREDICT, "the checksum of", flip_a_weight),
    "truncated checkpoint": Case(EVALUATE, "truncated, damaged", truncate("run/best.pt")),
    "checkpoint is none": Case(EVALUATE, "cannot load", write("run/best.pt", "hello")),
    "checkpoint with code": Case(EVALUATE, "would run", hide_code),
    "bare pickle with code": Case(
        f"{TRAIN} output={{root}}/run --resume", "cannot load", hide_code
    ),
    "checkpoint of something": Case(
        EVALUATE, "is not such a checkpoint: it has no",
        lambda root: save_checkpoint(root / "run/best.pt", {"model": {}}),
    ),
    "other model": Case(
        EVALUATE, "of another model or other classes", change_checkpoint(
            model={"net.weight": torch.zeros(2)})
    ),
    "other number of classes": Case(
        EVALUATE, "of another model or other classes", change_checkpoint(
            classes=[[1, 2], ["one", "two"]])
    ),
    "other settings": Case(
        "evaluate {root}/run model.name=test_vit", "is fixed by training; device, precision"
    ),
    "resumed with another model": Case(
        f"{RESUME} model.name=test_vit",
        "model.name='test_vit': the run to resume has 'test_resnet'",
    ),
    "best is damaged, and resumed": Case(
        RESUME, "removed, it is made of the last epoch", truncate("run/best.pt")
    ),
    "moments are lost": Case(
        RESUME, OTHER_OPTIMIZER, change_last(lambda state: state["optimizer"]["state"].clear())
    ),
    "moments of one parameter are lost": Case(
        RESUME, OTHER_OPTIMIZER, change_last(lambda state: state["optimizer"]["state"].pop(3))
    ),
    "one moment is lost": Case(
        RESUME, OTHER_OPTIMIZER, change_moments(lambda kept: kept.pop("exp_avg"))
    ),
    "moments of another shape": Case(
        RESUME, OTHER_OPTIMIZER, change_moments(lambda kept: kept.update(exp_avg=torch.zeros(3)))
    ),
    "moments of another type": Case(
        RESUME, OTHER_OPTIMIZER, change_moments(lambda kept: kept.update(exp_avg_sq="x"))
    ),
    "parameters in another order": Case(
        RESUME, OTHER_OPTIMIZER,
        change_last(lambda state: state["optimizer"]["param_groups"][0]["params"].reverse()),
    ),
    "other data": Case(EVALUATE, "has changed since", other_classes),
    # Output.
    "output is a file": Case(
        f"{TRAIN} output={{root}}/data/train.csv", "cannot be a folder"
    ),
    "output in a file": Case(
        f"{TRAIN} output={{root}}/data/train.csv/run", "cannot be a folder"
    ),
    "output nowhere": Case(f"{TRAIN} output=/proc/nowhere/run", "/proc/nowhere"),
    "demo into a file": Case("demo --out {root}/data/train.csv", "cannot be a folder"),
    "demo of no model": Case("demo --out {root}/new model.name=nothing", "is no model of timm"),
    "submission is a folder": Case(f"{PREDICT} --output {{root}}/data", "is a folder"),
    "submission nowhere": Case(f"{PREDICT} --output /proc/x.csv", "'/proc' cannot be written"),
    "report nowhere": Case("report {root}/run --output /proc/x.html", "'/proc' cannot be written"),
    "submission onto a full disk": Case(f"{PREDICT} --output /dev/full", "No space left"),
    "damaged history": Case(
        "report {root}/run", "metrics.jsonl, line 1: not the numbers of an epoch",
        truncate("run/metrics.jsonl"),
    ),
    "history of something": Case(
        "report {root}/run", "metrics.jsonl, line 2: not the numbers of an epoch",
        edit("run/metrics.jsonl", "}\n", '}\n{"epoch": [1]}\n'),
    ),
    "submission in a file": Case(
        f"{PREDICT} --output {{root}}/data/train.csv/x.csv", "cannot be a folder"
    ),
    "sample with an unknown ID": Case(
        PREDICT, "unknown.png: no such file",
        edit("data/sample_submission.csv", "0.png", "unknown.png"),
    ),
    "sample without a column": Case(
        PREDICT, "no column 'ID'", edit("data/sample_submission.csv", "ID", "id")
    ),
    "nothing to predict": Case(
        f"{PREDICT} --data {{root}}/run", "neither a sample_submission.csv nor images"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good data and a trained model, for each case to spoil a copy of; the path stays the same."""
    root = tmp_path_factory.mktemp("template")
    write_tiny(root / "data")
    argv = [
        "train", f"data.path={root}/data", f"output={root}/run", "device=cpu", "precision=fp32",
        "data.batch_size=4", "data.validation=0.25", "train.epochs=1", *MODEL,
    ]  # fmt: skip
    assert main(argv) == 0
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Any:
    """The template itself, put back as it was afterwards: checkpoints remember its path."""
    shutil.copytree(template, tmp_path / "kept")
    yield template
    shutil.rmtree(template)
    shutil.copytree(tmp_path / "kept", template)


def snapshot(root: Path) -> dict[str, bytes | None]:
    def is_read(path: Path) -> bool:
        try:
            return stat.S_ISREG(path.stat().st_mode)
        except OSError:  # a link to itself
            return False

    return {
        str(path.relative_to(root)): path.read_bytes() if is_read(path) else None
        for path in root.rglob("*")
    }


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    case.change(root)
    before = snapshot(root)
    status = main([word.replace("{root}", str(root)) for word in case.argv.split()])
    said = capsys.readouterr().err
    assert status == 2, said
    assert said.endswith("\n")
    assert said.count("\n") == 1, said
    assert case.said.replace("{root}", str(root)) in said
    assert snapshot(root) == before
    assert not (root / "executed").exists()


def test_bad_images_can_be_skipped(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncate(FIRST)(root)
    argv = TRAIN.replace("{root}", str(root)).split()
    assert main([*argv, "train.epochs=1", "--skip-bad-images"]) == 0
    said = capsys.readouterr()
    assert "写真 0.png: truncated or damaged" in said.out
    assert "18 images to train on, 5 to validate" in said.out
    assert said.err == ""


def run(root: Path, argv: str) -> int:
    return main([word.replace("{root}", str(root)) for word in argv.split()])


def test_junk_is_passed_over_and_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folders(root, "cat", "dog")
    for junk in ("cat/._0.png", "dog/notes.txt", "__MACOSX/cat/._0.png", ".DS_Store"):
        (root / "folders" / junk).parent.mkdir(parents=True, exist_ok=True)
        write(f"folders/{junk}", b"\0\5\x16\7")(root)
    argv = TRAIN.replace("data.path={root}/data", "data.path={root}/folders")
    assert run(root, f"{argv} train.epochs=1") == 0
    said = capsys.readouterr()
    assert said.err == ""
    (line,) = [line for line in said.out.splitlines() if "passed over" in line]
    assert line.startswith("passed over 4 that are no images: ")
    assert "6 images to train on, 2 to validate" in said.out
    argv = "predict {root}/run --data {root}/folders --output {root}/new/s.csv device=cpu"
    assert run(root, argv) == 0
    assert "passed over 4" in capsys.readouterr().out
    assert [name for name, _ in read_rows(root / "new/s.csv")] == [
        f"{name}/{index}.png" for name in ("cat", "dog") for index in range(4)
    ]


def test_settings_stand_anywhere(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "data").rename(root / "moved")
    argv = "evaluate device=cpu data.path={root}/moved {root}/run --explain data.batch_size=2"
    assert run(root, argv) == 0
    assert "validation images" in capsys.readouterr().out
    assert run(root, "predict --output {root}/a=b.csv --data {root}/moved {root}/run") == 0
    assert (root / "a=b.csv").is_file()


def test_yaml_means_what_it_seems_to(root: Path) -> None:
    text = "train: {lr: 1e-3, epochs: 010, schedule_options: {min_lr: 1e-6}}\r\ndata: {offline: no}"
    (root / "c.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())  # as an editor on Windows
    read = load_config(root / "c.yaml", ["train.warmup_epochs=+1", "seed=7"])
    assert (read.train.lr, read.train.epochs, read.train.warmup_epochs) == (0.001, 10, 1)
    assert read.train.schedule_options == {"min_lr": 1e-6}
    assert read.data.offline is False
    assert read.seed == 7


@pytest.mark.parametrize("command", ["train", "predict", "report"])
def test_where_nothing_can_be_written_nothing_is_computed(
    command: str, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is there, and takes no files: read-only, even for root."""

    def computed(*_: object, **__: object) -> NoReturn:
        raise AssertionError("it began")

    for module in ("train.read_split", "tta.predict_samples", "evaluate.predict_samples"):
        monkeypatch.setattr(f"cv_classification.{module}", computed)
    output = "output=/proc/self" if command == "train" else "--output /proc/self/x"
    start = TRAIN if command == "train" else f"{command} {{root}}/run"
    assert run(root, f"{start} {output}") == 2
    assert "'/proc/" in capsys.readouterr().err


def test_a_link_stays_and_its_target_is_written(root: Path) -> None:
    (root / "results").mkdir()
    (root / "s.csv").symlink_to("results/s.csv")
    for _ in range(2):  # it leads nowhere, at first
        assert run(root, f"{PREDICT} --output {{root}}/s.csv") == 0
        assert (root / "s.csv").is_symlink()
        assert len(read_rows(root / "results/s.csv")) == 3
        assert [path.name for path in (root / "results").iterdir()] == ["s.csv"]


@pytest.mark.parametrize("to", ["pipe", "file", "null"])
def test_a_device_and_standard_output_are_written_to(to: str, root: Path) -> None:
    before = Path("/dev/null").stat()
    output = "/dev/null" if to == "null" else "/dev/stdout"
    command = [sys.executable, "-m", "cv_classification", "predict", f"{root}/run"]
    with (root / "out").open("wb") as file:
        done = subprocess.run(
            [*command, "--output", output, "device=cpu"], env=environment(), check=False,
            stdout=file if to == "file" else subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    said = (root / "out").read_bytes() if to == "file" else done.stdout
    assert (b"ID,target\n2.png," in said) == (to != "null")
    assert said.rstrip().endswith(f"3 predictions: {output}".encode())
    assert Path("/dev/null").stat().st_ino == before.st_ino


def test_a_folder_is_no_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """W&B leaves ./wandb where it has run, which Python would import as an empty package."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "wandb").mkdir()
    with pytest.raises(InputError, match="not installed here"):
        check_tracking(Config(tracking=("wandb",)))
    (tmp_path / "wandb" / "__init__.py").write_text("def init(**_): raise OSError('no key')")
    importlib.invalidate_caches()
    check_tracking(Config(tracking=("wandb",)))
    with pytest.raises(InputError, match="wandb' does not start: no key"):
        Tracker(Config(output=tmp_path, tracking=("wandb",)), 0)


@pytest.mark.parametrize("how", ["killed", "exits", "fails"])
def test_a_dead_worker_is_one_line(
    how: str, root: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> NoReturn:
        if how == "fails":
            raise PermissionError(13, "Permission denied", "the cache")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(3)

    monkeypatch.setattr("cv_classification.images.ImageDataset.__getitems__", die)
    assert run(root, f"{PREDICT} data.workers=1") == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    assert ("Permission denied" if how == "fails" else "fewer data.workers") in said
    assert "Traceback" not in said


def test_out_of_memory_is_one_line(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> NoReturn:
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr("cv_classification.images.ImageDataset.__getitems__", full)
    assert run(root, PREDICT) == 2
    assert capsys.readouterr().err.startswith("out of memory: Unable to allocate 9 TiB; a smaller")


def test_where_one_image_alone_fits_and_does_not_work(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Classifier.forward

    def small(model: Classifier, images: torch.Tensor) -> torch.Tensor:
        if model.training and len(images) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return usual(model, images)

    monkeypatch.setattr(Classifier, "forward", small)
    assert run(root, TRAIN) == 2
    said = capsys.readouterr().err
    assert said.startswith("out of memory, and one image alone does not work: Expected more than 1")
    assert said.count("\n") == 1, said


def test_a_name_that_no_terminal_shows_is_trained_on(root: Path) -> None:
    write_folders(root, "cat", "dog")
    latin = os.fsdecode(os.fsencode(root / "folders") + b"/caf\xe9")
    (root / "folders/cat").rename(latin)
    argv = TRAIN.replace("{root}/data", "{root}/folders").replace("{root}", str(root))
    command = [sys.executable, "-m", "cv_classification", *argv.split(), "train.epochs=1"]
    done = subprocess.run(
        command, env=environment() | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert (root / "new/report.html").read_text("utf-8").count("caf?")
    assert main(["evaluate", str(root / "new")]) == 0
