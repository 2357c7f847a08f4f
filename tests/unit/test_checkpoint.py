from __future__ import annotations

import enum
import gzip
import io
import os
import pickle
import stat
import sys
import warnings
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portable_amp import CheckpointError, checkpoint, load_checkpoint, save_checkpoint
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
    [{1, 2}, b"x", object(), Code(), lambda: None, {"deep": [Path("x")]}, {b"x": 1}],
    ids=["set", "bytes", "object", "code", "function", "path", "key"],
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


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(2))
    return buffer.getvalue()


def script() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torches say that it is going away
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), buffer)
    return buffer.getvalue()


def safetensors() -> bytes:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return len(header).to_bytes(8, "little") + header + bytes(4)


FOREIGN = {
    "is empty": b"",
    "gzip": gzip.compress(zipped({"a": 1})),
    "safetensors.torch.load_file": safetensors(),
    "torch.jit.load": script(),
    "without a checkpoint": npz(),
    "numpy.load": b"\x93NUMPY\x01\0",
    "HDF5": b"\x89HDF\r\n",
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\n",
    "whose code would run": zipped({"model": Code()}),
    "no checkpoint, or damaged, or": pickle.dumps(Code()),
    "holds a list": zipped([1]),
}


@pytest.mark.parametrize("why", FOREIGN)
def test_it_is_said_what_a_file_is(tmp_path: Path, why: str) -> None:
    path = tmp_path / "c.pt"
    path.write_bytes(FOREIGN[why])
    with pytest.raises(CheckpointError, match=why) as caught:
        load_checkpoint(path)
    assert ("code" in str(caught.value)) is (b"mkdir" in FOREIGN[why])


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    """In every byte one: what loads has the same in it; torch alone would not see it."""
    path, state = tmp_path / "c.pt", {"a": torch.zeros(40), "b": 1.5, "c": [True, "x"]}
    save_checkpoint(path, state)
    good, refused = path.read_bytes(), 0
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        try:
            loaded = load_checkpoint(path)
        except CheckpointError:
            refused += 1
        else:  # a date, or what fills up to a multiple of 64 bytes
            assert torch.equal(loaded.pop("a"), state["a"])
            assert loaded == {"b": 1.5, "c": [True, "x"]}
    assert refused > 700
    at = good.index(bytes(160)) + 7
    path.write_bytes(good[:at] + b"\1" + good[at + 1 :])
    assert torch.load(path, weights_only=True)["a"].any()
    with pytest.raises(CheckpointError, match="checksum of 'archive/data/0' is wrong"):
        load_checkpoint(path)


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    for good in (zipped({"a": torch.zeros(40)}), legacy({"a": torch.zeros(40)})):
        for length in range(len(good)):
            path.write_bytes(good[:length])
            with pytest.raises(CheckpointError):
                load_checkpoint(path)


@given(
    st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04", b"\x80\x02}q\x00X", legacy({"a": 1})[:99]]),
    st.binary(max_size=300),
    st.sampled_from([b"", b".", zipped({"a": 1})[-300:]]),
)
@settings(max_examples=200)
def test_junk_is_refused_in_one_line(
    tmp_path: Path, start: bytes, middle: bytes, end: bytes
) -> None:
    (tmp_path / "c.pt").write_bytes(start + middle + end)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "c.pt")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="a device or a pipe"):
        load_checkpoint(tmp_path / "c.pt")


def test_checksums_are_written_where_torch_was_told_not_to(tmp_path: Path) -> None:
    put = getattr(torch.serialization, "set_crc32_options", None)
    if put is None:
        pytest.skip(f"torch {torch.__version__} always writes them")
    save_checkpoint(tmp_path / "c.pt", {})
    assert torch.serialization.get_crc32_options() is True
    put(False)
    try:
        save_checkpoint(tmp_path / "c.pt", {"a": torch.ones(2)})
        assert torch.serialization.get_crc32_options() is False
    finally:
        put(True)
    assert load_checkpoint(tmp_path / "c.pt")["a"].tolist() == [1, 1]


def test_what_torch_would_not_load_again_never_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever gets through our own list: a later torch may load less."""
    save_checkpoint(tmp_path / "c.pt", {"epoch": 1})
    monkeypatch.setattr(checkpoint, "_plain", lambda state, where: state)
    with pytest.raises(CheckpointError, match=r": this torch cannot load it without running code$"):
        save_checkpoint(tmp_path / "c.pt", {"x": Path("x")})
    assert load_checkpoint(tmp_path / "c.pt") == {"epoch": 1}


def test_it_is_proven_where_files_cannot_be_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = torch.load

    def no_maps(file: Any, *args: Any, mmap: bool = False, **how: Any) -> Any:
        if mmap:
            raise RuntimeError("unable to mmap: No such device")
        return load(file, *args, **how)

    monkeypatch.setattr(torch, "load", no_maps)
    save_checkpoint(tmp_path / "c.pt", {"epoch": 1})
    with pytest.raises(CheckpointError, match="cannot load it"):
        save_checkpoint(tmp_path / "c.pt", {"x": 10**700})
    assert load_checkpoint(tmp_path / "c.pt") == {"epoch": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8")
def test_names_may_be_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"gr\xf6\xdfe.pt")
    save_checkpoint(path, {"a": torch.ones(2)})
    assert load_checkpoint(path)["a"].tolist() == [1, 1]


def test_the_versions_of_modules_come_along(tmp_path: Path) -> None:
    state = torch.nn.BatchNorm1d(1).state_dict()
    save_checkpoint(tmp_path / "c.pt", {"model": state})
    loaded = load_checkpoint(tmp_path / "c.pt")["model"]
    assert loaded._metadata == state._metadata == {"": {"version": 2}}


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    weight = torch.ones(100_000)
    save_checkpoint(tmp_path / "c.pt", {"a": weight, "b": torch.nn.Parameter(weight)})
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()
    assert (tmp_path / "c.pt").stat().st_size < 500_000


def test_a_state_is_a_mapping(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="state is a list"):
        save_checkpoint(tmp_path / "c.pt", [1])  # type: ignore[arg-type]
    assert [*tmp_path.iterdir()] == []


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

    target = {"save": torch, "fsync": os, "replace": Path}[fails]
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


class Own(torch.Tensor):
    """As the images and masks of torchvision: a tensor of another name."""


def test_tensors_of_other_names_and_arrays_of_other_order_come_back_plain(tmp_path: Path) -> None:
    state = {
        "own": torch.arange(6).reshape(2, 3).as_subclass(Own),
        "columns first": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "backwards": np.arange(5, -1, -1)[::-1].reshape(2, 3),
        "big end first": np.arange(6, dtype=">i8").reshape(2, 3),
    }
    save_checkpoint(tmp_path / "c.pt", state)
    for loaded in load_checkpoint(tmp_path / "c.pt").values():
        assert type(loaded) is torch.Tensor
        assert loaded.is_contiguous()
        assert loaded.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_missing_file_is_said_to_be_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint '.*c\.pt'$"):
        load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("key", ["a", 1, 1.5, True, (1, "a", 2.5)])
def test_what_may_be_a_key(tmp_path: Path, key: Any) -> None:
    save_checkpoint(tmp_path / "c.pt", {"state": {key: 3}})
    assert load_checkpoint(tmp_path / "c.pt") == {"state": {key: 3}}


@pytest.mark.parametrize("number", [np.float32(1.5), np.float64(0.1), np.int8(-3), np.bool_(True)])
def test_a_number_of_numpy_comes_back_as_pythons(tmp_path: Path, number: Any) -> None:
    save_checkpoint(tmp_path / "c.pt", {"number": number})
    found = load_checkpoint(tmp_path / "c.pt")["number"]
    assert found == number
    assert type(found) is type(number.item())
