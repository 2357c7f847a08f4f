"""Checkpoints that are whole or not there, hold no code, and cross devices."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import secrets
import stat
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from portable_amp.errors import CheckpointError

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)
# Mappings that torch.load takes; schedulers of torch keep a Counter in their state.
_MAPPINGS = (dict, collections.OrderedDict, collections.Counter)


def save_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write `state` so that `path` holds either what it held before or all of the new one.

    It goes to a temporary file beside `path`, onto the disk, and into place by renaming.

    Args:
        path: its folder must exist.
        state: tensors, numbers, strings and None, nested in dicts, lists and tuples; what
            `load_checkpoint` could not load safely is refused now. NumPy's scalars and arrays are
            written as Python's numbers and as tensors.

    Raises:
        CheckpointError: something in the state cannot be loaded safely, or the disk refuses.
    """
    plain = _plain(state, "state")
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(plain, file)
    # A full disk reaches us as RuntimeError, from inside torch's zip writer.
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot write {str(path)!r}: {_one_line(error)}") from error


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; every tensor comes to the CPU, and no code is ever run.

    `load_state_dict` of modules and optimizers moves it on to their own device, so a checkpoint
    goes from any machine to any other.

    Raises:
        CheckpointError: missing, truncated, not a checkpoint, or a pickle that would run code.
    """
    target = Path(path)
    if not target.is_file():
        raise CheckpointError(f"there is no checkpoint {str(target)!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch muses about pickles that it then refuses
            loaded = torch.load(target, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        why = (
            "it holds Python objects whose code would run on loading, and is refused"
            if zipfile.is_zipfile(target) or "Unsupported" in str(error)
            else "it is no checkpoint, or damaged"
        )
        raise CheckpointError(f"cannot load {str(target)!r}: {why}") from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"cannot load {str(target)!r}: it is truncated, damaged, or no checkpoint "
            f"({_one_line(error)})"
        ) from error
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


def _plain(value: Any, where: str) -> Any:
    """`value` in types that torch.load takes with weights_only=True; refuses what it would not."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if type(value) in _PLAIN:
        return value
    if isinstance(value, str):  # a subclass, such as an Enum's member: its text alone
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, (str, int, float, bool, tuple)):
                raise CheckpointError(f"{where} has the key {key!r}: keys are strings or numbers")
        kind: Any = type(value) if type(value) in _MAPPINGS else dict
        return kind({key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        items = [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if type(value).__module__ == "numpy":
        return torch.from_numpy(value.copy()) if getattr(value, "ndim", 0) else value.item()
    raise CheckpointError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be loaded "
        "without running code: save its numbers, strings and tensors instead"
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
