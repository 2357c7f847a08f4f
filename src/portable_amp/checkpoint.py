"""Checkpoints that are whole or not there, hold no code, and cross devices."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import secrets
import stat
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from portable_amp.errors import CheckpointError, shown

_PLAIN = (bool, type(None), torch.dtype, torch.device, torch.Size)
# The value alone of what is a subclass, such as an Enum's member, whatever its own methods say.
_BASES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__pos__),
    (float, float.__pos__),
    (complex, complex.__pos__),
)
# Mappings that torch.load takes; schedulers of torch keep a Counter in their state.
_MAPPINGS = (dict, collections.OrderedDict, collections.Counter)

_ZIP = b"PK\3\4"  # what torch itself goes by
# What else people give: how it begins, and what it is.
_FOREIGN = (
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"\x93NUMPY", "an array of NumPy: numpy.load reads it"),
    (b"\x89HDF", "an HDF5 file"),
    (b"version https://git-lfs", "a pointer of Git LFS: `git lfs pull` fetches the file itself"),
)


def save_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write `state` so that `path` holds either what it held before or all of the new one.

    It goes to a temporary file beside `path`, onto the disk, and into place by renaming; see
    `replacing`. Before that it is proven that `load_checkpoint` takes it.

    Args:
        path: its folder must exist.
        state: tensors, numbers, strings and None, nested in dicts, lists and tuples. Subclasses of
            these, such as the members of a `str` enum, are written as what they are subclasses of,
            and NumPy's numbers and arrays as Python's numbers and as tensors.

    Raises:
        CheckpointError: something in the state could not be loaded safely and equal, or the disk
            refuses. `path` holds what it held before.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"state is a {type(state).__name__}, and a checkpoint is a dict")
    try:
        plain = _plain(state, "state")
    except RecursionError:
        raise CheckpointError("state is nested too deeply, or contains itself") from None
    try:
        with replacing(path) as temporary:
            with temporary.open("wb") as file, _checksums():
                torch.save(plain, file)
            _prove(temporary)
    # Whatever is amiss: torch has no class for what it cannot save, and a full disk reaches us as
    # RuntimeError, from inside its zip writer.
    except Exception as error:
        raise CheckpointError(f"cannot write {str(path)!r}: {_one_line(error)}") from error


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; every tensor comes to the CPU, and no code is ever run.

    `load_state_dict` of modules and optimizers moves it on to their own device, so a checkpoint
    goes from any machine to any other. Checksums are compared: a flipped bit is found.

    Raises:
        CheckpointError: missing, truncated, damaged, not a checkpoint, or a pickle that would run
            code.
    """
    target = Path(path)
    if not target.is_file():
        what = ": it is a folder, a device or a pipe" if target.exists() else ""
        raise CheckpointError(f"there is no checkpoint {str(target)!r}{what}")
    zipped = False
    cause: Exception | None = None
    try:
        with target.open("rb") as file:
            head = file.read(64)
            zipped = head.startswith(_ZIP)
            why = _why_no_checkpoint(file, head)
            file.seek(0)
            loaded = None if why else _load(file)
    except pickle.UnpicklingError as error:
        why, cause = "it holds Python objects whose code would run on loading", error
        if not zipped:  # then there are no checksums, and junk may look like that
            why = f"it is no checkpoint, or damaged, or {why}"
    except Exception as error:  # of junk torch.load raises what it likes
        why, cause = f"it is truncated, damaged, or no checkpoint ({_one_line(error)})", error
    if why:
        raise CheckpointError(f"cannot load {str(target)!r}: {why}") from cause
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{str(target)!r} holds a {type(loaded).__name__}, and a checkpoint is a dict"
        )
    return loaded


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file to write, which becomes `path` at the end of the block: whole, or not at all.

    The new file is `.NAME.*.tmp` in the same folder; it is put onto the disk and renamed. An
    exception in the block leaves `path` as it was, and no new file. A symbolic link stays, and what
    it points to is replaced. A file that is replaced hands its permissions on.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(f"{folder}/notes.txt") as new:
    ...         _ = new.write_text("all of it")
    ...     Path(folder, "notes.txt").read_text()
    'all of it'

    Raises:
        OSError: `path` is a device, a pipe, a folder, this program's own output or write-protected;
            its folder does not exist; or the disk refuses.
    """
    try:
        target = Path(os.path.realpath(path))
        old = Path(path).stat()  # as given: what /dev/stdout leads to may have no name
    except FileNotFoundError:
        old = None
    except ValueError as error:  # a NUL, or what the file system's encoding lacks
        raise OSError(f"no path: {error}") from None
    if old and (why := _why_not_replaceable(path, old)):
        raise OSError(why)
    # By `open`, and not by `tempfile`: its permissions are those of any new file.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    temporary.open("xb").close()
    try:
        if old:
            temporary.chmod(stat.S_IMODE(old.st_mode))
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # gone already if all went well
    _sync_folder(target.parent)


def _why_not_replaceable(path: str | os.PathLike[str], old: os.stat_result) -> str:
    if stat.S_ISDIR(old.st_mode):
        return "it is a folder"
    if not stat.S_ISREG(old.st_mode):
        return "it is a device, a pipe or a socket, and no file"
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # closed
            if os.path.samestat(old, os.fstat(stream)):
                return "this program's own output goes there"
    return "" if os.access(path, os.W_OK) else "it is write-protected"


def _load(file: Any, **how: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch muses about pickles that it then refuses
        return torch.load(file, map_location="cpu", weights_only=True, **how)


def _prove(path: Path) -> None:
    """Raise what loading it would raise; it costs milliseconds, whatever the size."""
    try:
        _load(str(path), mmap=True)
    except Exception:  # also where a file system maps no files, or the name is not in UTF-8
        try:
            with path.open("rb") as file:
                _load(file)
        except pickle.UnpicklingError as error:
            raise CheckpointError("this torch cannot load it without running code") from error


@contextlib.contextmanager
def _checksums() -> Iterator[None]:
    """torch.save writes checksums that are right, also where somebody told it not to (2.6+)."""
    ask = getattr(torch.serialization, "get_crc32_options", None)
    if ask is None or ask():
        yield
        return
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(False)


def _why_no_checkpoint(file: BinaryIO, head: bytes) -> str:
    """What else the file is, or where it is damaged; empty where neither is seen."""
    if head.startswith(_ZIP):
        with zipfile.ZipFile(file) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
            if "constants.pkl" in names:
                return "it is a TorchScript program: torch.jit.load reads it"
            if "data.pkl" not in names:
                return "it is a zip archive without a checkpoint in it"
            if damaged := archive.testzip():  # torch does not look at the checksums
                return f"it is damaged: the checksum of {damaged!r} is wrong"
    if not head:
        return "it is empty"
    # Source: the safetensors format: 8 bytes of length, little endian, and a header in JSON.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < os.fstat(file.fileno()).st_size:
        return "it is a safetensors file: safetensors.torch.load_file reads it"
    return next((f"it is {what}" for begin, what in _FOREIGN if head.startswith(begin)), "")


def _plain(value: Any, where: str) -> Any:
    """`value` in types that torch.load takes with weights_only=True; refuses what has none."""
    if isinstance(value, torch.Tensor):
        return _plain_tensor(value, where)
    if type(value) in _PLAIN:
        return value
    for kind, base in _BASES:
        if isinstance(value, kind):
            return base(value)
    if isinstance(value, Mapping):
        return _plain_mapping(value, where)
    if isinstance(value, (list, tuple)):
        items = [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    numpy = sys.modules.get("numpy")
    if numpy and (isinstance(value, numpy.generic) or type(value) in (numpy.ndarray, numpy.memmap)):
        return _plain_array(value, where)
    raise CheckpointError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be loaded "
        "without running code: save its numbers, strings and tensors instead"
    )


def _plain_mapping(value: Mapping[Any, Any], where: str) -> Any:
    kind: Any = type(value) if type(value) in _MAPPINGS else dict
    made = kind({_key(k, where): _plain(item, f"{where}[{k!r}]") for k, item in value.items()})
    if len(made) < len(value):
        raise CheckpointError(f"{where} has keys that are one key when they are written")
    if hasattr(value, "_metadata"):  # a state_dict's: the versions of its modules
        made._metadata = _plain(value._metadata, f"{where}._metadata")
    return made


def _key(key: Any, where: str) -> Any:
    if isinstance(key, tuple):
        return tuple(_key(part, where) for part in key)
    made = None if isinstance(key, torch.Tensor) else _plain(key, f"a key of {where}")
    if isinstance(made, (str, bool, int, float)):
        return made
    raise CheckpointError(f"{where} has the key {shown(key)}: keys are strings or numbers")


def _plain_tensor(value: torch.Tensor, where: str) -> torch.Tensor:
    try:
        plain = value.detach()
        is_subclass = type(plain) is not torch.Tensor
        if is_subclass and type(plain).__torch_dispatch__ is torch.Tensor.__torch_dispatch__:
            plain = plain.as_subclass(torch.Tensor)
        # Others hold something else than their own numbers, and write themselves; or fail to.
    except Exception as error:
        why = f"{where} is a tensor that cannot be read: {_one_line(error)}"
        raise CheckpointError(why) from error
    if plain.is_meta:
        raise CheckpointError(f"{where} is a tensor on 'meta', which holds no numbers")
    return plain


def _plain_array(value: Any, where: str) -> Any:
    """A number of NumPy as Python's, an array as a tensor, in this machine's byte order."""
    plain: Any = None
    if value.dtype.kind in "biufc":
        with contextlib.suppress(TypeError):  # torch has no long double
            native = value.astype(value.dtype.newbyteorder("="), order="C")
            plain = torch.from_numpy(native) if value.ndim else value.item()
    if isinstance(plain, (torch.Tensor, int, float, complex)):
        return plain
    raise CheckpointError(
        f"{where} holds {value.dtype} of NumPy, which torch has not: save numbers or strings"
    )


def _sync_folder(folder: Path) -> None:
    """Put the renaming itself onto the disk, where folders can be opened and synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
