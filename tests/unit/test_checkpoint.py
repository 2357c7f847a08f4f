from __future__ import annotations

import enum
import io
import os
import pickle
import stat
import sys
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from portable_amp import CheckpointError, load_checkpoint, save_checkpoint
from portable_amp import checkpoint as module
from portable_amp.checkpoint import replacing


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
    """Whole in the temporary file, synced, renamed, and then the renaming itself is synced."""
    order: list[Any] = []
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        on = Path(f"/proc/self/fd/{handle}").resolve()
        order.append("the folder" if on == tmp_path else on.read_bytes())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(
        Path, "replace", lambda self, to: order.append("replace") or replace(self, to)
    )
    save_checkpoint(tmp_path / "c.pt", {"a": 1})
    assert order == [(tmp_path / "c.pt").read_bytes(), "replace", "the folder"]


def test_a_folder_that_cannot_be_synced_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is in its place by then, and some file systems sync no folders."""
    fsync = os.fsync

    def files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    save_checkpoint(tmp_path / "c.pt", {"a": 1})
    assert load_checkpoint(tmp_path / "c.pt") == {"a": 1}


def test_two_threads_may_save_one_path(tmp_path: Path) -> None:
    path, states = tmp_path / "c.pt", [{"of": torch.full((5000,), i)} for i in range(4)]

    def save(state: dict[str, Any]) -> None:
        for _ in range(10):
            save_checkpoint(path, state)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, states))
    loaded = load_checkpoint(path)["of"]
    assert any(torch.equal(loaded, state["of"]) for state in states)
    assert list(tmp_path.iterdir()) == [path]


def test_the_names_of_temporary_files_are_never_the_same_and_can_be_found(tmp_path: Path) -> None:
    seen = set()
    for _ in range(20):
        with replacing(tmp_path / "a.txt") as new:
            assert list(tmp_path.glob(".a.txt.*.tmp")) == [new]
            seen.add(new.name)
    assert len(seen) == 20


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_permissions_are_those_of_any_new_file_or_of_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"a": 1})
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    path.chmod(0o600)
    with replacing(path) as new:
        assert new.stat().st_mode == path.stat().st_mode
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links and devices of POSIX")
def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "last.pt", tmp_path / "disk/epoch1.pt"
    link.symlink_to("disk/epoch1.pt")
    for epoch in (1, 2):  # its target is made, then replaced
        save_checkpoint(link, {"epoch": epoch})
        assert link.is_symlink()
        assert load_checkpoint(target) == {"epoch": epoch}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "epoch1.pt", "last.pt"]


def other_kinds(folder: Path) -> dict[str, str]:
    """What is no file to replace, and what is said of it."""
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "device").symlink_to("/dev/null")
    return {
        "fifo": "a device, a pipe or a socket",
        "device": "a device, a pipe or a socket",
        "/dev/null": "a device, a pipe or a socket",
        "folder": "a folder",
        "loop": "Too many levels",
        "nul\0": "no path",
        "\ud800": "no path",
        "a" * 300: "too long",
    }


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links and devices of POSIX")
def test_only_files_are_replaced(tmp_path: Path) -> None:
    said = other_kinds(tmp_path)
    before = sorted(tmp_path.iterdir())
    for name, why in said.items():
        with pytest.raises(CheckpointError, match=f"cannot write .*{why}") as caught:
            save_checkpoint(tmp_path / name, {"a": 1})
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.mark.skipif(sys.platform == "win32", reason="/dev/stdout")
@pytest.mark.usefixtures("capfd")  # which sends both to files
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_programs_own_output_is_not_replaced(stream: str) -> None:
    assert Path(f"/dev/{stream}").is_file()
    with pytest.raises(CheckpointError, match="own output"):
        save_checkpoint(f"/dev/{stream}", {"a": 1})


def test_a_write_protected_file_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "c.pt", {"a": 1})
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may do anything
    with pytest.raises(CheckpointError, match="write-protected"):
        save_checkpoint(tmp_path / "c.pt", {"a": 2})
    assert load_checkpoint(tmp_path / "c.pt") == {"a": 1}


def test_a_block_that_fails_leaves_the_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.txt") as new:
        new.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"
