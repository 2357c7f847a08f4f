from __future__ import annotations

import random
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from portable_amp import DeviceContext, PrecisionFallbackWarning
from portable_amp.backends import backend_for
from portable_amp.testing import play
from portable_amp.transfer import to_device
from support import playing

Pair = namedtuple("Pair", "image label")
CPU = torch.device("cpu")


class Copies:
    """What every tensor was asked to be copied with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, pinned: bool) -> None:
        self.non_blocking: list[bool] = []
        real = torch.Tensor.to

        def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if "non_blocking" in kwargs:
                self.non_blocking.append(kwargs["non_blocking"])
                return tensor
            return real(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "to", to)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: pinned)


@pytest.mark.parametrize(
    ("key", "pinned", "expected"),
    [
        ("t4", True, True),
        ("t4", False, False),
        ("arc-a770", True, True),
        ("m2-macos14", True, False),
        ("m2-macos14", False, False),
        ("cpu", True, False),
    ],
)
def test_copies_are_asynchronous_only_where_that_is_safe(
    monkeypatch: pytest.MonkeyPatch, key: str, pinned: bool, expected: bool
) -> None:
    copies = Copies(monkeypatch, pinned=pinned)
    with playing(key):
        DeviceContext(precision="fp32").to([torch.ones(1)])
    assert copies.non_blocking == [expected]


def test_a_narrowed_copy_is_not_in_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = Copies(monkeypatch, pinned=True)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.dtype is torch.float64)
    with playing("arc-a770"), pytest.warns(PrecisionFallbackWarning):
        DeviceContext(precision="fp32").to(torch.ones(1, dtype=torch.float64))
    assert copies.non_blocking == [False]


def test_containers_keep_their_type_and_other_things_their_identity() -> None:
    thing = object()
    moved = DeviceContext("cpu").to(
        {
            "pair": Pair(torch.ones(1), "name"),
            "list": [torch.ones(1), (torch.ones(2), thing)],
            "ordered": OrderedDict(a=torch.ones(1)),
            "array": np.ones(2),
        }
    )
    assert isinstance(moved["pair"], Pair)
    assert moved["list"][1][1] is thing
    assert type(moved["ordered"]) is OrderedDict
    assert isinstance(moved["array"], np.ndarray)


def test_modules_are_moved_in_place() -> None:
    model = torch.nn.Linear(1, 1)
    assert DeviceContext("cpu").to(model) is model


def test_float64_becomes_float32_where_it_does_not_exist_and_is_told_once() -> None:
    with playing("arc-a770") as hardware:
        from portable_amp.capabilities import derive

        can = derive(hardware)
    model = torch.nn.Linear(2, 2).double()
    model.register_buffer("count", torch.tensor(1))
    with pytest.warns(PrecisionFallbackWarning, match="no float64") as caught:
        batch = to_device(
            [torch.ones(1).double(), torch.ones(1, dtype=torch.int64)], CPU, backend_for("xpu"), can
        )
        to_device(model, CPU, backend_for("xpu"), can)
    assert len(caught) == 1
    assert [tensor.dtype for tensor in batch] == [torch.float32, torch.int64]
    assert model.weight.dtype is torch.float32
    assert model.count.dtype is torch.int64


def test_float64_stays_where_it_exists() -> None:
    assert DeviceContext("cpu").to(torch.ones(1).double()).dtype is torch.float64


@pytest.mark.parametrize(("key", "pins"), [("t4", True), ("m2-macos14", False), ("cpu", False)])
def test_only_devices_that_read_pinned_memory_pin(key: str, pins: bool) -> None:
    with playing(key):
        ctx = DeviceContext(precision="fp32")
        assert ctx.loader_options()["pin_memory"] is pins
        assert ctx.loader_options(pin_memory=not pins)["pin_memory"] is not pins


class Draws(Dataset[tuple[float, float, float, float]]):
    """Each sample is a draw from each generator a data set may use."""

    def __init__(self) -> None:
        self.own = np.random.default_rng(0)

    def set_random_seed(self, seed: int) -> None:
        self.own = np.random.default_rng(seed)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[float, float, float, float]:
        return (
            random.random(),
            float(np.random.random()),
            float(torch.rand(())),
            float(self.own.random()),
        )


def draws(dataset: Dataset[Any], seed: int, **options: Any) -> list[list[float]]:
    ctx = DeviceContext("cpu")
    torch.manual_seed(seed)
    loader = DataLoader(dataset, batch_size=2, **ctx.loader_options(2, **options))
    return [[float(x) for column in batch for x in column] for _ in range(2) for batch in loader]


def test_every_worker_and_epoch_draws_its_own_and_a_seed_repeats_them() -> None:
    first = draws(Subset(Draws(), range(8)), seed=0)
    flat = [x for batch in first for x in batch]
    assert len(set(flat)) == len(flat)
    assert draws(Subset(Draws(), range(8)), seed=0) == first
    assert draws(Subset(Draws(), range(8)), seed=1) != first


def test_without_the_worker_seeding_workers_repeat_each_other() -> None:
    """The fault that worker_init_fn cures; without it the test above would prove nothing."""
    flat = [x for batch in draws(Draws(), seed=0, worker_init_fn=None) for x in batch]
    assert len(set(flat)) < len(flat)


def test_a_seed_fixes_the_order() -> None:
    ctx = DeviceContext("cpu")

    def order() -> list[int]:
        loader = DataLoader(range(20), shuffle=True, batch_size=None, **ctx.loader_options(seed=3))  # type: ignore[arg-type]
        return list(loader)

    assert order() == order() != list(range(20))


def test_prefetching_is_one_batch_ahead_and_changes_nothing() -> None:
    asked: list[int] = []
    second = threading.Event()

    def numbers() -> Iterator[int]:
        for number in range(3):
            asked.append(number)
            if number == 1:
                second.set()
            yield number
        raise ValueError("damaged")

    here = DeviceContext("cpu")
    assert list(here.prefetch(range(3))) == [0, 1, 2]
    assert next(here.prefetch(numbers())) == 0
    assert asked.pop() == 0
    with play("a100"):
        there = DeviceContext("cuda")
        assert list(there.prefetch(range(3))) == [0, 1, 2]
        assert list(there.prefetch(range(3), lambda number: -number)) == [0, -1, -2]
        batches = there.prefetch(numbers())
        assert next(batches) == 0
        assert second.wait(10)  # is loaded while nobody asks for it
        assert asked == [0, 1]
        assert next(batches) == 1
        assert next(batches) == 2
        with pytest.raises(ValueError, match="damaged"):
            next(batches)
        assert list(there.prefetch([])) == []
        left = there.prefetch(iter(range(9)))
        next(left)
        left.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["h100", "arc-a770", "m2-macos14"])
def test_prefetched_batches_are_waited_for_and_kept(name: str) -> None:
    data = TensorDataset(torch.arange(6.0), torch.arange(6))
    with play(name, live=True) as played:
        ctx = DeviceContext(precision="fp32")
        loader = DataLoader(data, **ctx.loader_options(batch_size=2))
        found = []
        for values, labels in ctx.prefetch(loader):
            assert values.device.type == labels.device.type == ctx.device.type
            if ctx.backend.pins_memory:
                # The copy of this batch is over, for this stream, and its memory in use by it.
                count = len(found) // 2 + 1
                assert len(played.asked("wait_event")) == count
                assert len(played.asked("record_stream")) == 2 * count
                assert len(played.asked("record_event")) >= count
                assert len(played.asked("stream")) >= count
            found += values.cpu().tolist()
        assert found == data.tensors[0].tolist()
        copies = played.asked("copy", non_blocking=True)
        assert len(copies) == (6 if ctx.backend.pins_memory else 0)
        assert all(one.pinned for one in copies)
        assert bool(played.asked("stream")) == ctx.backend.pins_memory
        assert not played.asked("synchronize")


@pytest.mark.parametrize("name", ["cpu", "h100", "arc-a770", "m2-macos14"])
def test_what_is_fetched_is_as_it_was_and_waits_for_itself_alone(name: str) -> None:
    with play(name, live=name != "cpu") as played:
        ctx = DeviceContext(precision="fp32")
        loss = torch.ones(2, requires_grad=True, device=ctx.device).sum() * 3
        seen = ctx.fetch(loss)
        waited = len(played.asked("wait_event"))
        with torch.no_grad():
            loss += 1
        assert seen().item() == 6.0
        assert seen().device.type == "cpu"
        assert not seen().requires_grad
        assert len(played.asked("wait_event")) > waited or not ctx.backend.pins_memory
        assert not played.asked("synchronize")
