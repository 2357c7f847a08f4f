from __future__ import annotations

import enum
import io
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from portable_amp import CheckpointError, load_checkpoint, save_checkpoint
from portable_amp import checkpoint as module


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "best": np.float64(0.5),
        "confusion": np.arange(4).reshape(2, 2),
        "classes": ("ä", "b"),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
        "size": torch.Size([1, 2]),
        "nothing": None,
        "flags": OrderedDict(a=True),
    }
    save_checkpoint(tmp_path / "größe.pt", state)
    loaded = load_checkpoint(str(tmp_path / "größe.pt"))
    torch.testing.assert_close(loaded["model"], dict(model.state_dict()))
    optimizer.load_state_dict(loaded["optimizer"])
    assert loaded["best"] == 0.5
    assert type(loaded["best"]) is float
    assert loaded["confusion"].tolist() == [[0, 1], [2, 3]]
    for key in ("epoch", "classes", "dtype", "device", "size", "nothing", "flags"):
        assert loaded[key] == state[key]
    assert [path.name for path in tmp_path.iterdir()] == ["größe.pt"]


class Colour(str, enum.Enum):
    RED = "red"


class Count(enum.IntEnum):
    TWO = 2


def test_subclasses_of_plain_types_become_plain(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", {"a": Colour.RED, "b": Count.TWO, "c": np.str_("x")})
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert loaded == {"a": "red", "b": 2, "c": "x"}
    assert [type(value) for value in loaded.values()] == [str, int, str]


def test_schedulers_of_torch_resume(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    save_checkpoint(tmp_path / "c.pt", scheduler.state_dict())
    scheduler.load_state_dict(load_checkpoint(tmp_path / "c.pt"))
    assert sorted(scheduler.milestones.elements()) == [2, 2, 5]


class Code:
    """A pickle that would run code on loading."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "value",
    [{1, 2}, b"x", object(), Code(), lambda: None, {"deep": [Path("x")]}, {None: 1}],
    ids=["set", "bytes", "object", "code", "function", "path", "none"],
)
def test_what_could_not_be_loaded_is_refused_when_saving(tmp_path: Path, value: Any) -> None:
    save_checkpoint(tmp_path / "c.pt", {"epoch": 1})
    with pytest.raises(CheckpointError, match=r"state\['x'\]"):
        save_checkpoint(tmp_path / "c.pt", {"x": value})
    assert load_checkpoint(tmp_path / "c.pt") == {"epoch": 1}
    assert len(list(tmp_path.iterdir())) == 1


def zipped(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def legacy(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def other_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.txt", "text")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no checkpoint at all",
        bytes(1000),
        zipped({"a": torch.ones(100)})[:-200],
        zipped({"a": torch.ones(100)})[:10],
        legacy({"a": torch.ones(100)})[:-100],
        pickle.dumps(Code()),
        zipped(Code()),
        zipped({"model": Code()}),
        legacy(Code()),
        zipped([1, 2]),
        other_zip(),
    ],
    ids=range(12),
)
def test_damaged_foreign_and_malicious_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"c\.pt") as caught:
        load_checkpoint("c.pt")
    assert "\n" not in str(caught.value)
    assert not Path("executed").exists()


def test_the_malicious_pickle_would_have_worked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Code()))
    assert Path("executed").exists()


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            load_checkpoint(path)


@pytest.mark.parametrize("where", ["absent/c.pt", "file/c.pt", "."])
def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(tmp_path / where, {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("fails", ["save", "fsync", "replace"])
def test_a_failure_at_any_step_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    save_checkpoint(tmp_path / "c.pt", {"epoch": 1})

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    target = {"save": torch, "fsync": os, "replace": module.Path}[fails]
    monkeypatch.setattr(target, fails, fail)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(tmp_path / "c.pt", {"epoch": 2})
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "c.pt") == {"epoch": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_it_is_on_the_disk_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: order.append("fsync") or fsync(fd))
    monkeypatch.setattr(
        Path, "replace", lambda self, to: order.append("replace") or replace(self, to)
    )
    save_checkpoint(tmp_path / "c.pt", {"a": 1})
    assert order[:2] == ["fsync", "replace"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    save_checkpoint(tmp_path / "c.pt", {"a": 1})
    assert (tmp_path / "c.pt").stat().st_mode == (tmp_path / "plain").stat().st_mode
