"""What a user can get wrong: one line on standard error, exit status 2, and nothing written."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from cv_classification.__main__ import main
from portable_amp import load_checkpoint, save_checkpoint

from .conftest import MODEL, write_csv, write_image, write_tiny

Change = Callable[[Path], object]


class Case(NamedTuple):
    """`argv` and what `said` must say may hold {root}, the folder that `change` has altered."""

    argv: str
    said: str
    change: Change = lambda root: None


TRAIN = f"train data.path={{root}}/data output={{root}}/new device=cpu {' '.join(MODEL)}"
EVALUATE = "evaluate {root}/run device=cpu"
PREDICT = "predict {root}/run device=cpu"


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
    "dropout where there is none": Case(f"{PREDICT} --mc-dropout 3", "no layer that drops"),
    "resume what": Case(f"{TRAIN} --resume=perhaps", "invalid choice: 'perhaps'"),
    "resumed with other settings": Case(
        f"{TRAIN} output={{root}}/run --resume auto train.lr=3", "the run to resume has"
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
    "target is missing": Case(TRAIN, "the target '' is not a whole number", edit(
        "data/train.csv", "0.png,3", "0.png")),
    "target not in meta": Case(TRAIN, "the target 4 of", edit(
        "data/train.csv", "0.png,3", "0.png,4")),
    "meta twice": Case(TRAIN, "meta.csv, line 3: the target 3 is there twice", edit(
        "data/meta.csv", "5,grey", "3,grey")),
    "one image of a class": Case(TRAIN, "'bright' has 1 images; 2 work", one_image_of_a_class),
    "too little to divide": Case(f"{TRAIN} data.validation=0.01", "data.validation=0.01"),
    # Images.
    "image missing": Case(TRAIN, "no such file", remove(FIRST)),
    "image truncated": Case(TRAIN, "写真 0.png: truncated or damaged", truncate(FIRST)),
    "image is none": Case(TRAIN, "写真 0.png: not an image", write(FIRST, "GIF? No.")),
    "image is empty": Case(TRAIN, "写真 0.png: not an image", write(FIRST, "")),
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
    "nothing to resume": Case(f"{TRAIN} --resume", "there is no checkpoint"),
    "nothing to resume from": Case(
        f"{TRAIN} output={{root}}/run --resume", "has no 'optimizer'",
        lambda root: shutil.copy(root / "run/best.pt", root / "run/last.pt"),
    ),
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
        f"{TRAIN} output={{root}}/run --resume train.epochs=1 data.batch_size=4 "
        "data.validation=0.25 precision=fp32 model.name=test_vit",
        "model.name='test_vit': the run to resume has 'test_resnet'",
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
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
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
