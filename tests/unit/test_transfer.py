from __future__ import annotations

import dataclasses
import random
import threading
import types
import warnings
from collections import ChainMap, OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from collections.abc import Iterator, MutableMapping, MutableSequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from portable_amp import DeviceContext, PrecisionFallbackWarning
from portable_amp.nested import held_by, slice_of, tensors_in
from portable_amp.notices import forget as forget_notices
from portable_amp.testing import play
from portable_amp.transfer import seed_worker, to_device
from support import playing

Pair = namedtuple("Pair", "image label")


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


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    name: str = "cat"
    length: int = dataclasses.field(init=False, default=0)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    image: torch.Tensor
    more: list[torch.Tensor]


class Attrs:
    """As the attrs package makes them: fields without a place for more, and their names."""

    __slots__ = ("image",)
    __attrs_attrs__ = (types.SimpleNamespace(name="image"),)

    def __init__(self, *, image: torch.Tensor) -> None:
        self.image = image


class Encoding(UserDict):  # type: ignore[type-arg]
    """As BatchEncoding of transformers: a mapping with state of its own, and a method to."""

    def __init__(self, data: Any, encodings: str) -> None:
        super().__init__(data)
        self.encodings = encodings

    def to(self, device: Any) -> Encoding:
        self.data = {name: one.to(device) for name, one in self.data.items()}
        return self


class Graph:
    """As Data of PyTorch Geometric: no mapping, with a method to."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def to(self, device: Any) -> Graph:
        return Graph(self.x.to(device))


class Bag:
    """Holds a tensor, and can do nothing with it."""

    def __init__(self) -> None:
        self.parts = [torch.ones(1)]


class Words(list[Any]):
    """A list with a note."""


def kinds(x: torch.Tensor) -> dict[str, Any]:
    noted = Words([x])
    noted.note = "kept"  # type: ignore[attr-defined]
    packed = torch.nn.utils.rnn.pack_sequence([x, x[:1]], enforce_sorted=False)
    return {
        "tensor": x,
        "list": [x, (x, "name")],
        "pair": Pair(x, "name"),
        "ordered": OrderedDict(b=x, a=x),
        "default": defaultdict(list, a=x),
        "user": UserDict(a=x),
        "chain": ChainMap({"a": x}, {"b": x}),
        "view": types.MappingProxyType({"a": x}),
        "queue": deque([x, x], maxlen=5),
        "words": noted,
        "frozen dict": immutable_dict(a=x),
        "frozen list": immutable_list([x]),
        "set": {x},
        "data": Sample(x),
        "frozen": Frozen(x, [x]),
        "attrs": Attrs(image=x),
        "packed": packed,
        "encoding": Encoding({"ids": x}, "kept"),
        "graph": Graph(x),
        "parameter": torch.nn.Parameter(x.clone()),
        "module": torch.nn.ParameterList([x.clone()]),
        "sparse": x.to_sparse(),
        "found": torch.max(x.reshape(1, -1), 1),
    }


def there(thing: Any) -> list[bool]:
    """Of each tensor in it, whether it is on the played device."""
    if isinstance(thing, torch.nn.Module):
        return [parameter.device.type == "cuda" for parameter in thing.parameters()]
    found = [*tensors_in(thing)] or [*held_by(thing)]
    return [one.device.type == "cuda" for one in found]


@pytest.mark.parametrize("kind", kinds(torch.ones(2)))
def test_what_a_batch_is_made_of_moves_whole_and_keeps_its_type(kind: str) -> None:
    if kind == "sparse":
        pytest.skip("played machines have no sparse tensors; CPU alone below")
    with play("a100", live=True):
        thing = kinds(torch.ones(2))[kind]
        before = there(thing)
        moved = DeviceContext(precision="fp32").to([thing])[0]
        assert before
        assert not any(before)
        assert there(moved) == [True] * len(before)
        assert type(moved) is type(thing) or kind in ("tensor", "parameter")
        if kind == "module":
            assert moved is thing
        elif kind not in ("encoding", "set"):  # BatchEncoding moves itself in place
            assert not any(there(thing))


def test_what_containers_have_besides_their_content_is_kept() -> None:
    moved = DeviceContext("cpu").to(kinds(torch.ones(2)))
    assert moved["default"]["new"] == []
    assert list(moved["ordered"]) == ["b", "a"]
    assert moved["queue"].maxlen == 5
    assert moved["words"].note == "kept"
    assert moved["encoding"].encodings == "kept"
    assert (moved["data"].name, moved["data"].length) == ("cat", 0)
    assert moved["packed"].batch_sizes.tolist() == [2, 1]
    assert moved["packed"].sorted_indices.tolist() == [0, 1]
    assert moved["packed"].unsorted_indices.tolist() == [0, 1]
    assert moved["sparse"].is_sparse
    thing = object()
    assert DeviceContext("cpu").to({"a": (1, 2.5, None, "s", thing)})["a"][4] is thing


class Fields(MutableMapping):  # type: ignore[type-arg]
    def __init__(self) -> None:
        self.content: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.content[key] = value

    def __delitem__(self, key: str) -> None:
        del self.content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)


class Row(MutableSequence):  # type: ignore[type-arg]
    __slots__ = ("content", "never_set")

    def __init__(self) -> None:
        self.content: list[Any] = []

    def __getitem__(self, at: Any) -> Any:
        return self.content[at]

    def __setitem__(self, at: Any, value: Any) -> None:
        self.content[at] = value

    def __delitem__(self, at: Any) -> None:
        del self.content[at]

    def __len__(self) -> int:
        return len(self.content)

    def insert(self, index: int, value: Any) -> None:
        self.content.insert(index, value)


def test_the_batch_that_was_given_stays_as_it_was() -> None:
    fields, row, x = Fields(), Row(), torch.arange(4)
    fields["x"] = x
    row.append(x)
    for batch, at in ((fields, "x"), (row, 0)):
        part: Any = slice_of(batch, 0, 2)
        assert type(part) is type(batch)
        assert part[at].tolist() == [0, 1]
        assert batch[at] is x  # type: ignore[index]
    for several in (row, UserList([x])):  # as many as there are samples, and no list of samples
        several.extend(x + part for part in range(3))
        assert [one.tolist() for one in slice_of(several, 0, 1)] == [[0], [0], [1], [2]]


def test_what_stays_behind_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    forget_notices()
    ctx = DeviceContext("cpu", precision="fp32")
    bag, numbers = Bag(), np.ones(2)
    for _ in range(2):
        moved = ctx.to(
            (
                bag,
                numbers,
                np.array(["name"]),
                np.float32(1),
                np.float32(1),
                object(),
                "text",
                range(3),
            )
        )
    assert moved[0] is bag
    assert moved[1] is numbers
    told = [record.message for record in caplog.records]
    assert len(told) == 2
    assert "Bag, which ctx.to leaves where it is: give it a method to(device)" in told[0]
    assert "numpy.ndarray, which ctx.to leaves where it is: make it a tensor" in told[1]


def test_what_contains_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    knot: dict[str, Any] = {}
    knot["knot"] = knot
    for one in (endless, knot, (knot,)):
        with pytest.raises(ValueError, match="contains itself"):
            DeviceContext("cpu").to(one)


def test_modules_are_moved_in_place() -> None:
    model = torch.nn.Linear(1, 1)
    assert DeviceContext("cpu").to(model) is model


@pytest.mark.parametrize(
    ("key", "dtype", "expected"),
    [
        ("arc-a770", torch.float64, torch.float32),
        ("arc-a770", torch.complex128, torch.complex64),
        ("arc-a770", torch.bfloat16, torch.bfloat16),
        ("m2-macos14", torch.float64, torch.float32),
        ("m2-macos14", torch.complex128, torch.complex64),
        ("m2-macos14", torch.bfloat16, torch.bfloat16),
        ("m1-macos13", torch.bfloat16, torch.float32),
        ("a100", torch.float64, torch.float64),
        ("a100", torch.complex128, torch.complex128),
        ("rx6800", torch.bfloat16, torch.bfloat16),  # it cannot compute in it; it can store it
    ],
)
def test_dtypes_that_a_device_lacks_become_others_and_that_is_told_once(
    key: str, dtype: torch.dtype, expected: torch.dtype
) -> None:
    model = torch.nn.Linear(2, 2, dtype=dtype)
    tied = torch.nn.ModuleList([model, torch.nn.Linear(2, 2)])
    tied[1].weight = model.weight
    model.weight.grad = torch.ones(2, 2, dtype=dtype)
    model.register_buffer("scale", torch.ones(1, dtype=dtype))
    model.register_buffer("count", torch.tensor(1))
    with play(key, live=True), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ctx = DeviceContext(precision="fp32")
        if dtype is not expected:
            with pytest.raises((TypeError, RuntimeError)):  # as the real one does
                torch.ones(1, dtype=dtype).to(ctx.device)
            with pytest.raises((TypeError, RuntimeError)):
                torch.ones(1, dtype=dtype, device=ctx.device)
        batch = ctx.to([torch.ones(1, dtype=dtype), torch.ones(1, dtype=torch.int64)])
        moved = ctx.to([tied])[0][0]
        assert [one.dtype for one in batch] == [expected, torch.int64]
        assert {moved.weight.dtype, moved.bias.dtype, moved.scale.dtype} == {expected}
        assert moved.weight.grad.dtype is expected
        assert moved.count.dtype is torch.int64
        assert tied[1].weight is moved.weight
    told = [one for one in caught if issubclass(one.category, PrecisionFallbackWarning)]
    assert len(told) == (dtype is not expected)
    if told:
        names = (str(one).removeprefix("torch.") for one in (dtype, expected))
        assert all(name in str(told[0].message) for name in names)


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

    def order(seed: int | None) -> list[int]:
        options = ctx.loader_options(seed=seed)
        loader = DataLoader(range(20), shuffle=True, batch_size=None, **options)  # type: ignore[arg-type]
        return list(loader)

    torch.manual_seed(0)
    assert order(3) == order(3) != list(range(20))
    assert order(3) != order(4)
    assert order(None) != order(None)


class Ahead:
    """A loader that says it has processes, and notes what it is asked for, where, and how."""

    num_workers = 1

    def __init__(self, count: int = 3, *, damaged: bool = False) -> None:
        self.count, self.damaged = count, damaged
        self.asked: list[tuple[int, int]] = []
        self.second = threading.Event()

    def __iter__(self) -> Iterator[int]:
        for number in range(self.count):
            self.asked.append((number, threading.get_ident()))
            if number == 1:
                self.second.set()
            yield number
        if self.damaged:
            raise ValueError("damaged")


@pytest.mark.parametrize("name", ["a100", "arc-a770"])
def test_a_loader_with_processes_is_asked_one_batch_ahead(name: str) -> None:
    with play(name):
        there = DeviceContext(precision="fp32")
        assert list(there.prefetch(Ahead(), lambda number: -number)) == [0, -1, -2]
        assert list(there.prefetch(Ahead(0))) == []
        loader = Ahead(damaged=True)
        batches = there.prefetch(loader)
        assert next(batches) == 0
        assert loader.second.wait(10)  # is loaded while nobody asks for it
        assert [number for number, _ in loader.asked] == [0, 1]
        assert next(batches) == 1
        assert next(batches) == 2
        with pytest.raises(ValueError, match="damaged"):
            next(batches)
        before = threading.active_count()
        left = there.prefetch(Ahead(9))
        next(left)
        left.close()  # type: ignore[attr-defined]
        assert threading.active_count() == before


@pytest.mark.parametrize("name", ["cpu", "a100", "m2-macos14"])
def test_anything_else_is_asked_when_its_turn_comes_and_in_the_loops_own_thread(name: str) -> None:
    """A thread would draw from the global random state beside the loop."""
    asked = Ahead(damaged=True)
    with play(name):
        there = DeviceContext(precision="fp32")
        batches = there.prefetch(iter(asked))
        for number in range(3):
            assert next(batches) == number
            assert asked.asked[-1] == (number, threading.get_ident())
        with pytest.raises(ValueError, match="damaged"):
            next(batches)


def test_one_seed_gives_one_sequence_of_draws_of_loader_and_loop() -> None:
    def drawn() -> list[float]:
        torch.manual_seed(0)
        found = []
        with play("a100"):
            noisy = (torch.rand(1) for _ in range(50))
            for batch in DeviceContext(precision="fp32").prefetch(noisy):
                found += [float(batch), float(torch.rand(1))]
        return found

    found = drawn()
    torch.manual_seed(0)
    assert found == [float(torch.rand(1)) for _ in range(100)]
    assert drawn() == found


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", ["a100", "m2-macos14"])
def test_batches_are_moved_under_the_loops_own_modes(name: str, mode: Any) -> None:
    weight = torch.ones(1, requires_grad=True)
    with play(name), mode():
        expected = (weight * 2).requires_grad, (weight * 2).is_inference()
        moved = list(
            DeviceContext(precision="fp32").prefetch(Ahead(), lambda number: weight * number)
        )
    assert [(one.requires_grad, one.is_inference()) for one in moved] == [expected] * 3


@pytest.mark.parametrize("name", ["h100", "arc-a770", "m2-macos14"])
def test_prefetched_batches_are_waited_for_and_kept(name: str) -> None:
    data = TensorDataset(torch.arange(6.0), torch.arange(6))
    with play(name, live=True) as played:
        ctx = DeviceContext(precision="fp32")
        loader = DataLoader(data, **ctx.loader_options(2, batch_size=2))
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


class Eager(Graph):
    """Copies asynchronously by its own choice, as some libraries' objects do."""

    def to(self, device: Any) -> Any:
        self.x = self.x.to(device, non_blocking=True)
        return self


@pytest.mark.parametrize("name", ["arc-a770", "m1-macos13"])
@pytest.mark.filterwarnings("ignore::portable_amp.PrecisionFallbackWarning")
def test_tensors_of_what_moves_itself_are_moved_as_all_others(name: str) -> None:
    with play(name, live=True) as played:
        ctx = DeviceContext(precision="fp32")
        graph, model = ctx.to(
            [Eager(torch.ones(2, 3).double()), torch.nn.Linear(1, 1, dtype=torch.complex128)]
        )
        assert (graph.x.device, graph.x.dtype) == (ctx.device, torch.float32)
        assert (model.weight.device, model.weight.dtype) == (ctx.device, torch.complex64)
        assert not played.asked("copy", non_blocking=True)


def test_another_kind_of_to_is_left_alone_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    class Quantity:
        def to(self, unit: str) -> str:
            return unit.upper()

    quantity = Quantity()
    ctx = DeviceContext("cpu", precision="fp32")
    caplog.clear()
    assert [ctx.to([quantity]), ctx.to([quantity])] == [[quantity]] * 2
    (told,) = [record.getMessage() for record in caplog.records]
    assert "Quantity, which ctx.to leaves as it is" in told
    with play("h100", live=True, memory=8), pytest.raises(RuntimeError, match="out of memory"):
        DeviceContext(precision="fp32").to(Eager(torch.ones(9)))


@pytest.mark.parametrize("kind", ["tensor", "in a list", "moves itself", "module"])
def test_a_layout_reaches_all_images(kind: str) -> None:
    images = torch.ones(2, 3, 4, 4)
    whole: Any = {
        "tensor": images,
        "in a list": [images],
        "moves itself": Eager(images),
        "module": [torch.nn.Conv2d(3, 3, 2)],
    }[kind]
    cpu = DeviceContext("cpu", precision="fp32")
    moved = to_device(whole, cpu.device, cpu.backend, cpu.capabilities, torch.channels_last)
    (found,) = moved if isinstance(moved, list) else [moved]
    four = {"moves itself": "x", "module": "weight"}.get(kind)
    four_dimensional = getattr(found, four) if four else found
    assert four_dimensional.is_contiguous(memory_format=torch.channels_last)


def test_a_measurement_leaves_what_moves_itself_in_place_where_it_is() -> None:
    graph, seen = Eager(torch.ones(4, 3)), []

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        seen.append(batch)
        return model(batch.x).square().mean()

    DeviceContext("cpu").tuned(torch.nn.Linear(3, 1), graph, loss=loss, cache=False, budget_s=0.01)
    assert seen
    assert not any(one is graph for one in seen)


def test_what_processes_loaded_is_moved_in_the_loops_own_thread() -> None:
    seen: list[Any] = []
    with play("h100"):
        ctx = DeviceContext(precision="fp32")
        with torch.autocast("cpu", torch.bfloat16):
            list(
                ctx.prefetch(
                    Ahead(),
                    lambda _: seen.append(
                        (torch.is_autocast_enabled("cpu"), threading.get_ident())
                    ),
                )
            )
    assert seen == [(True, threading.get_ident())] * 3


def test_every_epoch_of_a_played_loader_is_pinned() -> None:
    with play("h100", live=True) as played:
        loader = DataLoader(TensorDataset(torch.ones(4)), batch_size=2, pin_memory=True)
        for epoch in (1, 2):
            assert all(batch.is_pinned() for (batch,) in loader)
            assert len(played.asked("pin_memory")) == 2 * epoch


def test_every_seed_of_a_worker_is_another_one_for_numpy_and_python() -> None:
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn: list[tuple[float, float]] = []
    seeds = (7, 7 + 1, 7 + 64, 7 + 2**31, 2**33 - 1, 2**63 - 1 - 2**31)
    try:
        for seed in seeds:
            random.seed(0)
            np.random.seed(0)
            torch.manual_seed(seed)
            seed_worker(0)
            drawn.append((random.random(), np.random.rand()))
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
    for column in zip(*drawn, strict=True):
        assert len(set(column)) == len(seeds)


def test_a_loader_has_as_many_processes_as_it_is_told() -> None:
    for count in (0, 1):
        options = DeviceContext("cpu").loader_options(num_workers=count)
        loader = DataLoader(TensorDataset(torch.ones(2)), **options)
        assert (loader.num_workers, loader.persistent_workers) == (count, count > 0)


class Rows:
    """As a batch of another library: tensors inside, and perhaps samples to be had."""

    def __init__(self, samples: int) -> None:
        self.x, self.samples = torch.arange(4), samples

    def __len__(self) -> int:
        return self.samples


class Sliced(Rows):
    def __getitem__(self, at: slice) -> torch.Tensor:
        return self.x[at]


class Output(tuple[Any, ...]):
    """As the outputs of transformers once were: with tensors in attributes, too."""


def test_what_has_a_sample_for_each_is_cut_and_all_else_refused() -> None:
    x = torch.arange(4)
    assert slice_of([x, Sliced(4)], 1, 3)[1].tolist() == [1, 2]
    for whole in (Sliced(5), Rows(4)):
        with pytest.raises(ValueError, match="cannot be cut"):
            slice_of([x, whole], 1, 3)
    output, row = Output((x, x)), Row()
    row.extend([x, x])
    output.loss = x  # type: ignore[attr-defined]
    for container in (output, row):
        made = slice_of(container, 1, 3)
        assert type(made) is type(container)
        assert [one.tolist() for one in made] == [[1, 2], [1, 2]]
    packed = [x, torch.nn.utils.rnn.pack_sequence([x, x])]
    assert slice_of([packed[0], Sliced(4)], 0, 5)[0] is x
    with pytest.raises(ValueError, match="a PackedSequence cannot be cut"):
        slice_of([torch.ones(8), packed[1]], 1, 3)


def test_a_whole_batch_is_itself_and_an_empty_one_none() -> None:
    batch = [torch.arange(4), "name"]
    assert slice_of(batch, 0, 4) is batch
    with pytest.raises(ValueError, match="first dimension"):
        slice_of(torch.empty(0, 2), 0, 1)


def test_numbers_in_an_array_are_told_of_and_words_are_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for kind, told in (("U", 0), ("f", 1)):
        forget_notices()
        caplog.clear()
        DeviceContext("cpu", precision="fp32").to([np.zeros(2, dtype=kind)])
        assert len(caplog.records) == told
