"""A played device's books, to the byte: all that out-of-memory tests rest on."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from portable_amp.testing.ledger import Ledger, Shortage


class FullError(RuntimeError):
    """What the ledger raises here."""

    def __init__(self, shortage: Shortage) -> None:
        super().__init__(str(shortage))
        self.shortage = shortage


def size(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8)


def books(ledger: Ledger) -> tuple[int, int, int, int | None]:
    return ledger.allocated, ledger.peak, ledger.reserved, ledger.free


def test_what_is_held_what_was_and_what_is_cached() -> None:
    ledger = Ledger(100, FullError)
    assert books(ledger) == (0, 0, 0, 100)
    a, b = size(10), size(20)
    ledger.take(a)
    ledger.take(b)
    ledger.take(b[3:])  # the same storage
    assert books(ledger) == (30, 30, 30, 70)
    del a
    assert books(ledger) == (20, 30, 30, 70)
    ledger.empty_cache()
    assert books(ledger) == (20, 30, 20, 80)
    c = size(5)
    ledger.take(c)
    assert books(ledger) == (25, 30, 25, 75)
    del b, c
    d = size(10)  # its memory may be where b's was: it counts all the same
    ledger.take(d)
    assert books(ledger) == (10, 30, 25, 75)
    assert Ledger(None, FullError).free is None


def test_the_last_byte_fits_and_the_next_does_not() -> None:
    ledger = Ledger(10, FullError)
    kept = [size(4), size(6)]
    for tensor in kept:
        ledger.take(tensor)
    with pytest.raises(FullError) as caught:
        ledger.take(size(1))
    assert caught.value.shortage == Shortage(wanted=1, allocated=10, reserved=10, limit=10)
    assert books(ledger) == (10, 10, 10, 0)  # nothing is entered
    ledger.limit = 11
    last = size(1)
    ledger.take(last)
    assert ledger.free == 0


@pytest.mark.parametrize("limit", [None, 1000])
def test_it_fails_once_and_when_told(limit: int | None) -> None:
    ledger = Ledger(limit, FullError)
    kept = [size(7) for _ in range(5)]
    ledger.fail_after(2)
    failed = []
    for number, tensor in enumerate(kept):
        try:
            ledger.take(tensor)
        except FullError as error:
            failed.append((number, error.shortage))
    assert failed == [(2, Shortage(7, 14, 14, 14 if limit is None else limit))]
    assert ledger.allocated == 28


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40)), max_size=20))
def test_whatever_is_taken_and_dropped_the_sums_are_right(steps: list[tuple[int, int]]) -> None:
    ledger, peak = Ledger(None, FullError), 0
    held: dict[int, torch.Tensor] = {}
    for name, count in steps:
        held.pop(name, None)
        held[name] = size(count)
        ledger.take(held[name])
        total = sum(tensor.nbytes for tensor in held.values())
        peak = max(peak, total)
        assert (ledger.allocated, ledger.peak) == (total, peak)
        assert ledger.reserved >= total
    held.clear()
    gc.collect()
    assert ledger.allocated == 0


def test_the_books_are_changed_by_one_thread_at_a_time() -> None:
    ledger = Ledger(100, FullError)
    tensor, done = size(1), threading.Event()

    def take() -> None:
        ledger.take(tensor)
        done.set()

    with ledger._lock:
        thread = threading.Thread(target=take)
        thread.start()
        assert not done.wait(0.05)
        assert ledger.allocated == 0
    thread.join()
    assert ledger.allocated == 1
