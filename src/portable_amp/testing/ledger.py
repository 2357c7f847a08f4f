"""The books of a played device's memory: what is live, what is cached, and when it is full."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shortage:
    """What an out-of-memory error can tell, in bytes."""

    wanted: int
    allocated: int
    reserved: int
    limit: int


class Ledger:
    """Counts the bytes of live storages, and refuses those that exceed the limit.

    It counts what tensors hold, with neither rounding nor fragmentation: a real allocator needs
    somewhat more.

    Args:
        limit: bytes there are; None: no end. May be changed at any time.
        error: the exception to raise when an allocation does not fit.
    """

    def __init__(self, limit: int | None, error: Callable[[Shortage], Exception]) -> None:
        self.limit = limit
        self.allocated = 0
        self.peak = 0
        self.reserved = 0
        """Bytes held, the cache of freed ones included; `empty_cache` gives those back."""
        self._error = error
        self._fail_after: int | None = None
        self._live: set[int] = set()
        # A finalizer may run in the middle of anything, this class included.
        self._lock = threading.RLock()

    @property
    def free(self) -> int | None:
        """Bytes that are neither held nor cached."""
        return None if self.limit is None else self.limit - self.reserved

    def fail_after(self, allocations: int) -> None:
        """Run out of memory once, at the allocation after that many more."""
        self._fail_after = allocations

    def take(self, tensor: torch.Tensor) -> None:
        """Enter the tensor's storage, until it dies; one that is entered already costs nothing.

        Raises:
            Exception: the device's own out-of-memory error; nothing is entered then.
        """
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        with self._lock:
            if key in self._live:
                return
            self._refuse(size)
            self._live.add(key)
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
            self.reserved = max(self.reserved, self.allocated)
        weakref.finalize(storage, self._give_back, key, size).atexit = False

    def empty_cache(self) -> None:
        """Keep only what live tensors hold."""
        with self._lock:
            self.reserved = self.allocated

    def _refuse(self, size: int) -> None:
        full = self.limit is not None and self.allocated + size > self.limit
        if self._fail_after is not None:
            full = full or self._fail_after == 0
            self._fail_after = self._fail_after - 1 if self._fail_after else None
        if full:
            limit = self.allocated if self.limit is None else self.limit
            raise self._error(Shortage(size, self.allocated, self.reserved, limit))

    def _give_back(self, key: int, size: int) -> None:
        with self._lock:
            self._live.discard(key)
            self.allocated -= size
