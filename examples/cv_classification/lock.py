"""One training to a folder: a lock that dies with its process, and what killed ones left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cv_classification.config import InputError

WAIT = 10.0
"""Seconds for which a killed run's last processes may still hold its folder."""
OLD = 3600.0
"""Seconds after which nobody writes to a temporary file any more: each takes seconds."""

# Not flock: the loader's workers would inherit it, and hold it after the trainer was killed.
if sys.platform == "win32":
    import msvcrt

    def _take(file: IO[str]) -> None:
        file.seek(1 << 30)  # what is locked cannot be read by others
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)
else:
    import fcntl

    def _take(file: IO[str]) -> None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def locked(folder: Path, wait: float = WAIT) -> Iterator[None]:
    """A block in which no other process trains in `folder`; made, and if it stays empty, removed.

    Raises:
        InputError: another process does, and goes on for `wait` seconds.
    """
    path, until = folder / ".lock", time.monotonic() + wait
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(path.open("a+", encoding="utf-8"))
            try:
                _take(file)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                    if time.monotonic() > until:
                        file.seek(0)
                        holder = file.read(200) or "another process"
                        raise InputError(f"{str(folder)!r} is in use: {holder} trains") from error
                    time.sleep(0.2)
                    continue
                print(f"{str(folder)!r} cannot be locked ({error.strerror}): train there once only")
            # Else its holder has left, and removed it, since we opened it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    stack.pop_all()
                    break
    with file:
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
                for place in made:
                    place.rmdir()


def sweep(path: Path, age: float = OLD) -> None:
    """Remove what killed processes left of writing `path`, and did not touch for `age` seconds."""
    now = time.time()
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):  # finished, or removed by another
            if now - left.stat().st_mtime >= age:
                left.unlink()
