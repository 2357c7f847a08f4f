"""Say a thing, and mostly once: per subject, per process, and on the first rank only."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Hashable
from pathlib import Path

from portable_amp.launchers import is_first

logger = logging.getLogger("portable_amp")

_HERE = str(Path(__file__).parent)
_told: set[Hashable] = set()
_lock = threading.Lock()


def tell_once(key: Hashable, message: str, category: type[Warning] | None = None) -> None:
    """Give `message` the first time `key` comes by: as a warning of `category`, else as a log line.

    A warning is for a request that was changed; a log line is for a default that was decided.
    """
    with _lock:
        if key in _told:
            return
        _told.add(key)
    tell(message, category)


def tell(message: str, category: type[Warning] | None = None) -> None:
    """Give `message` on the first rank, however often it was given before."""
    if not is_first():
        return
    if category is None:
        logger.warning(message)
    else:
        warnings.warn(message, category, stacklevel=_callers_level())


def forget() -> None:
    """Make every notice new again, for tests."""
    with _lock:
        _told.clear()


def _callers_level() -> int:
    """The `stacklevel` that blames the first frame outside this package."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        level, frame = level + 1, frame.f_back
    return level
