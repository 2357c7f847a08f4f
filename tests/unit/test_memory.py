from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import weakref
from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from portable_amp import (
    DeviceContext,
    PortableAmpError,
    clear_cache,
    is_oom_error,
    memory,
    memory_stats,
    split_on_oom,
)
from portable_amp.backends import MemoryStats, backend_for
from portable_amp.testing import play


@pytest.mark.parametrize("key", ["t4", "mi250", "arc-a770", "m2-macos14"])
def test_each_backend_clears_its_own_cache(key: str) -> None:
    needs = {
        "arc-a770": (torch.xpu, "mem_get_info"),
        "m2-macos14": (torch.mps, "recommended_max_memory"),
    }
    if key in needs and not hasattr(*needs[key]):
        pytest.skip(f"torch {torch.__version__} has no {needs[key][0].__name__}.{needs[key][1]}")
    with play(key, live=True, memory=8000) as played:
        ctx = DeviceContext(precision="fp32")
        kept, freed = ctx.to(torch.zeros(1000)), ctx.to(torch.zeros(500))
        del freed
        assert ctx.memory() == MemoryStats(4000, 6000, 8000)
        assert ctx.clear_cache() == 2000
        assert len(played.asked("empty_cache")) == 1
        assert clear_cache() == 0
        assert ctx.memory() == MemoryStats(4000, 4000, 8000)
        assert kept.device == ctx.device


def test_pressure_decides() -> None:
    with play("t4", live=True, memory=5000) as played:
        _ = torch.zeros(1000, device="cuda")
        assert clear_cache(min_pressure=0.9) is None
        assert not played.asked("empty_cache")
        assert clear_cache(min_pressure=0.8) == 0
        assert played.asked("empty_cache")


def test_a_cache_that_grows_meanwhile_gives_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = iter((1000, 1500))
    with play("t4"), monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "memory_reserved", lambda *_: next(reserved))
        assert clear_cache() == 0


@pytest.mark.parametrize("unknown", [0, 1])
def test_what_cannot_be_told_before_or_after_is_not(
    monkeypatch: pytest.MonkeyPatch, unknown: int
) -> None:
    reads: list[MemoryStats] = []

    def read(device: torch.device) -> MemoryStats:
        reads.append(MemoryStats(reserved=None if len(reads) == unknown else 1000))
        return reads[-1]

    with play("t4") as played:
        object.__setattr__(backend_for("cuda"), "memory", read)
        assert clear_cache() is None
        assert len(reads) == 2
        assert played.asked("empty_cache")


def test_without_statistics_pressure_never_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    with play("t4") as played, monkeypatch.context() as patch:
        patch.delattr(torch.cuda, "memory_reserved")
        assert clear_cache(min_pressure=0.0) is None
        assert not played.asked("empty_cache")


def test_the_cpu_has_nothing_to_clear() -> None:
    assert clear_cache("cpu") is None
    assert memory_stats("cpu") == MemoryStats()


def test_an_old_torch_without_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    with play("m2-macos14"), monkeypatch.context() as patch:
        patch.delattr(torch.mps, "empty_cache")
        assert clear_cache() is None


@pytest.mark.parametrize("device", ["cuda:9", "nonsense", "", 3, object()])
def test_clearing_never_raises(device: Any) -> None:
    assert clear_cache(device) is None


def test_a_failing_torch_never_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("INTERNAL ASSERT FAILED")

    with play("m2-macos14"), monkeypatch.context() as patch:
        patch.setattr(torch.mps, "empty_cache", fail)
        patch.setattr(torch.mps, "current_allocated_memory", fail)
        assert clear_cache() is None
        assert memory_stats() == MemoryStats()


OOM_TEXTS = [
    "CUDA out of memory. Tried to allocate 20.00 MiB",
    "HIP out of memory. Tried to allocate 2 GiB",
    "XPU out of memory. Tried to allocate 1 GiB",
    "NPU out of memory. Tried to allocate",
    "MPS backend out of memory (MPS allocated: 18.13 GB)",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA ran out of memory outside PyTorch's allocator",
    "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
    "Native API failed. UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "Unable to find a valid cuDNN algorithm to run convolution",
    "GET was unable to find an engine to execute this computation",
]


@pytest.mark.parametrize("text", OOM_TEXTS)
def test_out_of_memory_is_recognised(text: str) -> None:
    assert is_oom_error(RuntimeError(text))
    assert not is_oom_error(ValueError(text))


def test_out_of_memory_by_type() -> None:
    assert is_oom_error(torch.OutOfMemoryError("anything"))
    assert is_oom_error(torch.cuda.OutOfMemoryError("anything"))
    assert is_oom_error(MemoryError())


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), KeyboardInterrupt(), OSError("disk")]
)
def test_other_errors_are_not(error: BaseException) -> None:
    assert not is_oom_error(error)


def test_a_real_out_of_memory_error_of_the_cpu() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_oom_error(caught.value)


class Device:
    """A model on a device on which only `room` samples fit, forward or backward."""

    def __init__(self, room: int, fails_in: str = "forward") -> None:
        self.room, self.fails_in, self.sizes = room, fails_in, list[int]()
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 1)

    def step(self, batch: Any, weight: float) -> float:
        x, y = batch["x"], batch["y"]
        self.sizes.append(len(x))
        full = len(x) > self.room
        if full and self.fails_in == "forward":
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        loss = torch.nn.functional.mse_loss(self.model(x), y)
        if full:
            # After some gradients have been added already, as in a real backward pass.
            self.model.weight.grad = torch.full_like(self.model.weight, 1e9)
            loss = Breaks.apply(loss)
        (loss * weight).backward()
        return float(loss.detach())

    def grads(self) -> list[torch.Tensor | None]:
        return [p.grad for p in self.model.parameters()]


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")


def batch(n: int) -> dict[str, Any]:
    torch.manual_seed(1)
    return {"x": torch.randn(n, 3), "y": torch.randn(n, 1), "names": [str(i) for i in range(n)]}


@pytest.mark.parametrize("fails_in", ["forward", "backward"])
@pytest.mark.parametrize(("n", "room"), [(8, 8), (8, 3), (7, 2), (5, 4), (3, 1)])
def test_split_gradients_add_up_to_the_whole(n: int, room: int, fails_in: str) -> None:
    whole, split = Device(n), Device(room, fails_in)
    whole.step(batch(n), 1.0)
    values = split_on_oom(split.step, batch(n), parameters=split.model.parameters())
    for expected, got in zip(whole.grads(), split.grads(), strict=True):
        torch.testing.assert_close(got, expected)
    assert len(values) == sum(size <= room for size in split.sizes)


def test_gradients_of_earlier_batches_are_kept() -> None:
    whole, split = Device(6), Device(2, "backward")
    for n in (6, 4):
        whole.step(batch(n), 1.0)
        split_on_oom(split.step, batch(n), parameters=split.model.parameters())
    for expected, got in zip(whole.grads(), split.grads(), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_size_that_fitted_is_remembered() -> None:
    device = Device(2)

    def train(part: Any, weight: float) -> float:
        return device.step(part, weight)

    split_on_oom(train, batch(8), parameters=device.model.parameters())
    device.sizes.clear()
    split_on_oom(train, batch(8), parameters=device.model.parameters())
    assert device.sizes == [2, 2, 2, 2]


def test_another_object_of_the_same_class_starts_afresh() -> None:
    small, large = Device(2), Device(8)
    for device in (small, large):
        split_on_oom(device.step, batch(8), parameters=device.model.parameters())
    assert large.sizes == [8]


def test_one_sample_that_does_not_fit_raises_the_devices_own_error() -> None:
    device = Device(0)
    with pytest.raises(RuntimeError, match="Tried to allocate 1 GiB"):
        split_on_oom(device.step, batch(4), parameters=device.model.parameters())
    assert device.grads() == [None, None]


def test_other_errors_pass_and_gradients_are_as_before() -> None:
    model = torch.nn.Linear(1, 1)
    model.weight.grad = torch.ones(1, 1)

    def step(part: torch.Tensor, weight: float) -> None:
        model(part).sum().backward()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        split_on_oom(step, torch.ones(2, 1), parameters=model.parameters())
    assert model.weight.grad.item() == 1.0
    assert model.bias.grad is None


def test_half_added_gradients_are_never_kept_silently() -> None:
    device = Device(2, "backward")
    with pytest.raises(PortableAmpError, match="parameters="):
        split_on_oom(device.step, batch(4))


def test_several_processes_do_not_split_and_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="out of memory"):
        split_on_oom(Device(2).step, batch(4))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert len(split_on_oom(Device(2).step, batch(4))) == 2


def backward(part: torch.Tensor, weight: float) -> int:
    """Of that name, and of no autograd."""
    if len(part) > 1:
        raise MemoryError
    return len(part)


def test_what_only_looks_like_a_backward_pass_needs_no_parameters() -> None:
    class Runs(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            backward(x, 1.0)
            return x.clone()

    assert split_on_oom(backward, torch.ones(2)) == [1, 1]
    split_on_oom(lambda part, weight: Runs.apply(part), torch.ones(2))


def test_the_failed_step_is_gone_before_the_next_attempt() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    seen: list[bool] = []
    gc.disable()
    try:

        def step(part: torch.Tensor, weight: float) -> None:
            seen.extend(ref() is not None for ref in alive)
            activation = part * 2
            alive.append(weakref.ref(activation))
            if len(part) > 1:
                raise MemoryError

        split_on_oom(step, torch.ones(2))
    finally:
        gc.enable()
    assert seen
    assert not any(seen)


Pair = namedtuple("Pair", "image name")


def test_nested_batches_are_cut_sample_by_sample() -> None:
    parts: list[Any] = []

    def step(part: Any, weight: float) -> None:
        if len(part["pair"].image) > 2:
            raise MemoryError
        parts.append(part)

    image, label = torch.arange(3), torch.arange(3) * 10
    whole = {"pair": Pair(image, ("a", "b", "c")), "rest": [label, {"scale": torch.tensor(2.0)}]}
    split_on_oom(step, whole)
    assert [part["pair"].name for part in parts] == [("a", "b"), ("c",)]
    assert [part["rest"][0].tolist() for part in parts] == [[0, 10], [20]]
    assert all(part["rest"][1]["scale"] == 2.0 for part in parts)
    assert isinstance(parts[0]["pair"], Pair)


@pytest.mark.parametrize(
    "wrong", [(), {}, "text", torch.tensor(1.0), (torch.ones(2), torch.ones(3))]
)
def test_what_is_no_batch_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="first dimension"):
        split_on_oom(lambda part, weight: None, wrong)


def test_a_first_size_bounds_the_parts_and_is_not_remembered() -> None:
    sizes: list[int] = []

    def step(part: torch.Tensor, weight: float) -> None:
        sizes.append(len(part))

    split_on_oom(step, torch.zeros(5), size=2)
    split_on_oom(step, torch.zeros(5))
    split_on_oom(step, torch.zeros(2), size=1)
    assert split_on_oom(lambda part, weight: weight, torch.zeros(2), size=9) == [1.0]
    assert sizes == [2, 2, 1, 5, 1, 1]
    with pytest.raises(ValueError, match="size=0"):
        split_on_oom(step, torch.zeros(2), size=0)


@pytest.mark.parametrize("hashable", [True, False])
def test_steps_of_one_code_over_other_models_are_others(hashable: bool) -> None:
    def step_of(model: Device) -> Any:
        return lambda part, weight: model.step(part, weight)

    def partly(model: Device, part: Any, weight: float) -> float:
        return model.step(part, weight)

    def with_default(model: Device) -> Any:
        def step(part: Any, weight: float, model: Device = model) -> float:
            return model.step(part, weight)

        return step

    kind = Device if hashable else type("Unhashable", (Device,), {"__hash__": None})
    for make in (step_of, with_default, lambda model: functools.partial(partly, model)):
        small, large = kind(2), kind(8)
        for device in (small, large, small):
            split_on_oom(make(device), batch(8), parameters=device.model)
        assert large.sizes == [8]
        assert small.sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]  # remembered, though made anew


def test_a_global_model_that_is_replaced_is_another() -> None:
    sizes: list[int] = []
    names: dict[str, Any] = {"room": 2, "sizes": sizes, "model": torch.nn.Linear(1, 1)}
    exec(
        "def step(part, weight):\n"
        "    sizes.append(len(part))\n"
        "    if len(part) > room: raise MemoryError\n"
        "    return model(part)\n",
        names,
    )
    split_on_oom(names["step"], torch.ones(4, 1))
    names.update(room=4, model=torch.nn.Linear(1, 1))
    split_on_oom(names["step"], torch.ones(4, 1))
    assert sizes == [4, 2, 2, 4]


def test_what_fitted_bounds_larger_samples_and_not_smaller_ones() -> None:
    sizes: list[tuple[int, int]] = []

    def step(part: torch.Tensor, weight: float) -> None:
        sizes.append((len(part), part.shape[1]))
        if part.numel() > 40:
            raise MemoryError

    for width in (10, 5, 20):
        split_on_oom(step, torch.zeros(8, width))
    split_on_oom(step, torch.zeros(16, 5))  # not larger, though there is more of it
    assert sizes == [
        *((8, 10), (4, 10), (4, 10)), (8, 5), *((4, 20), (2, 20), (2, 20), (2, 20), (2, 20)),
        *((16, 5), (8, 5), (8, 5)),
    ]  # fmt: skip


def test_training_bounds_not_what_needs_no_gradients() -> None:
    sizes: list[int] = []

    def step(part: torch.Tensor, weight: float) -> None:
        sizes.append(len(part))
        if torch.is_grad_enabled() and len(part) > 1:
            raise MemoryError

    split_on_oom(step, torch.zeros(2))
    with torch.no_grad():
        split_on_oom(step, torch.zeros(2))
    assert sizes == [2, 1, 1, 2]


def tries(step: Any) -> int:
    """How many parts it is given until all of them fit."""
    step.tried = 0
    split_on_oom(step, torch.arange(4))
    return step.tried


def test_the_steps_used_last_are_remembered_and_the_others_are_not() -> None:
    first, second, third, *rest = (Step(2) for _ in range(257))  # one more than are kept
    for step in (first, second, third, *rest[:-1]):
        assert tries(step) == 3
    assert tries(first) == 2  # known, and used again: the second is the oldest now
    assert tries(rest[-1]) == 3
    assert [tries(step) for step in (first, third, *rest)] == [2] * 256
    assert tries(second) == 3


@pytest.mark.parametrize("training", [True, False])
def test_statistics_of_a_pass_that_failed_are_undone(training: bool) -> None:
    torch.manual_seed(0)
    norm, data = torch.nn.BatchNorm1d(3).train(training), torch.randn(8, 3)
    expected = copy.deepcopy(norm)
    for part in data.split(4):
        expected(part)

    def step(part: torch.Tensor, weight: float) -> None:
        norm(part).sum().backward()
        if len(part) > 4:
            raise MemoryError

    split_on_oom(step, data, parameters=norm)
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, expected.get_buffer(name)), name
    state = copy.deepcopy(norm.state_dict())

    def broken(part: torch.Tensor, weight: float) -> None:
        norm(part)
        raise KeyError("mine")

    with pytest.raises(KeyError):
        split_on_oom(broken, data, parameters=norm)
    assert all(torch.equal(value, state[name]) for name, value in norm.state_dict().items())


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.lazy = torch.nn.LazyBatchNorm1d()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + len(x)
        made: torch.Tensor = self.lazy(x)
        return made


def test_a_buffer_that_is_replaced_is_undone_and_a_lazy_one_is_no_error() -> None:
    model = Counting()

    def step(part: torch.Tensor, weight: float) -> None:
        (weight * model(part).sum()).backward()
        if len(part) > 4:
            raise MemoryError

    split_on_oom(step, torch.randn(8, 3), parameters=model)
    assert model.seen.item() == 8


def test_the_cache_is_cleared_before_each_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(memory, "clear_cache", done.append)

    def step(part: torch.Tensor, weight: float) -> None:
        done.append(len(part))
        if len(part) > 1:
            raise MemoryError

    split_on_oom(step, torch.zeros(4))
    assert done == [4, "cpu", 2, "cpu", 1, 1, 1, 1]


@dataclasses.dataclass
class Sequence:
    tokens: torch.Tensor
    names: list[str]


class Table:
    """Rows in columns, as TensorDict and its like have them."""

    def __init__(self, **columns: torch.Tensor) -> None:
        self.columns = columns

    def to(self, device: Any) -> Table:
        return Table(**{name: one.to(device) for name, one in self.columns.items()})

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows: slice) -> Table:
        return Table(**{name: one[rows] for name, one in self.columns.items()})


class Closed:
    def __init__(self) -> None:
        self.held = {"x": torch.arange(4)}


def test_data_classes_and_what_can_be_sliced_are_cut() -> None:
    seen: list[Any] = []

    def step(part: Any, weight: float) -> None:
        if len(part[0].tokens) > 2:
            raise MemoryError
        seen.append((part[0].tokens.tolist(), part[0].names, part[1].columns["x"].tolist()))

    split_on_oom(step, (Sequence(torch.arange(4), list("abcd")), Table(x=torch.arange(4))))
    assert seen == [([0, 1], ["a", "b"], [0, 1]), ([2, 3], ["c", "d"], [2, 3])]


def test_what_cannot_be_cut_is_refused_and_not_repeated() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(1)])

    def step(part: Any, weight: float) -> None:
        raise MemoryError

    for part, why in ((packed, "PackedSequence"), (Closed(), "Closed")):
        with pytest.raises(ValueError, match=f"a {why} cannot be cut"):
            split_on_oom(step, (torch.arange(4), part))


class Step:
    def __init__(self, most: int) -> None:
        self.most, self.tried = most, 0

    def __call__(self, part: torch.Tensor, weight: float) -> int:
        self.tried += 1
        if len(part) > self.most:
            raise MemoryError
        return len(part)

    run = __call__


@dataclasses.dataclass
class Options:
    """A step that is data, too."""

    most: int

    def run(self, part: torch.Tensor, weight: float) -> int:
        return Step(self.most)(part, weight)

    __call__ = run


class Row(NamedTuple):
    """A step to which there are no weak references."""

    most: int

    def run(self, part: torch.Tensor, weight: float) -> int:
        return Step(self.most)(part, weight)


def sizes(step: Any) -> list[int]:
    return split_on_oom(step, torch.arange(8))


def test_each_step_has_a_size_of_its_own() -> None:
    def of(most: Step) -> Any:
        @functools.wraps(most.run)
        def decorated(part: torch.Tensor, weight: float) -> int:
            return most(part, weight)

        return decorated

    def of_a_function(function: Any) -> Any:
        return lambda part, weight: function(part, weight)

    two, four = Step(2), Step(4)
    for make in (
        lambda one: one, lambda one: one.run, functools.partial, of,
        lambda one: functools.partial(one.run), lambda one: of_a_function(of(one)),
        lambda one: of_a_function(functools.partial(lambda s, p, w: s(p, w), one)),
    ):  # fmt: skip
        each_has_its_own(two, four, make)
    options, row = (Options(2), Options(4)), (Row(2), Row(4))
    each_has_its_own(*options, lambda one: one)
    each_has_its_own(*options, lambda one: one.run)
    each_has_its_own(*row, lambda one: one.run)


def each_has_its_own(two: Any, four: Any, make: Callable[[Any], Any]) -> None:
    for step in (two, four, two):
        first = sizes(make(step))
        assert first == [step.most] * (8 // step.most)
        # Known, though it is made anew: no larger part is tried.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "is_oom_error", lambda error: pytest.fail("tried again"))
            assert sizes(make(step)) == first


class Masked(Step):
    def __call__(self, mask: Any, part: torch.Tensor, weight: float) -> int:  # type: ignore[override]
        return super().__call__(part, weight)


def test_what_is_made_anew_for_each_batch_is_no_other_step() -> None:
    one = Masked(2)

    def default(mask: Any) -> Any:
        def step(part: torch.Tensor, weight: float, mask: Any = mask) -> int:
            return one(mask, part, weight)

        return step

    for make in (
        lambda mask: functools.partial(one, mask),
        lambda mask: functools.partial(one.__call__, mask),
        lambda mask: lambda part, weight: one(mask, part, weight),
        default,
    ):
        one.tried = 0
        for mask in (torch.ones(2), Sequence(torch.ones(2), []), [torch.ones(2)], 2.5, "a name"):
            split_on_oom(make(mask), torch.arange(8))
        assert one.tried == 2 + 5 * 4  # 8 and 4 are tried once


def test_the_next_object_at_the_same_place_is_another() -> None:
    numbers = set()
    for _ in range(50):  # each is gone before the next is made, mostly at the same address
        numbers.add(memory._number(Closed()))
    assert len(numbers) == 50
    assert memory._number(memory) == memory._number(memory)


class Normed(torch.nn.Module):
    """With statistics that a pass changes in place, and one that it puts another for."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + len(x)
        out: torch.Tensor = self.norm(x)
        if len(x) > 4:
            raise MemoryError
        return out


class Holds:
    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def step(self, part: torch.Tensor, weight: float) -> None:
        (self.model(part).sum() * weight).backward()


@pytest.mark.parametrize("way", ["closure", "partial", "object", "given"])
def test_statistics_of_a_pass_that_failed_are_undone_without_being_told_of(way: str) -> None:
    model, plain, data = Normed(), Normed(), torch.randn(8, 3)
    hidden = {"holds": [Holds(model)]}

    def run(one: torch.nn.Module, part: torch.Tensor, weight: float) -> None:
        one(part)

    step: Any = {
        "closure": lambda part, weight: run(model, part, weight),
        "partial": functools.partial(run, model),
        "object": Holds(model).step,
        "given": lambda part, weight: hidden["holds"][0].step(part, weight),
    }[way]
    split_on_oom(step, data, parameters=model if way == "given" else model.parameters())
    plain(data[:4]), plain(data[4:])
    assert int(model.norm.num_batches_tracked) == 2
    for expected, got in zip(plain.buffers(), model.buffers(), strict=True):
        assert torch.equal(expected, got)
    assert vars(model).keys() == vars(plain).keys()


def test_statistics_are_undone_in_inference_mode() -> None:
    with torch.inference_mode():
        model = Normed()
        split_on_oom(lambda part, weight: model(part), torch.randn(8, 3))
    assert model.seen.item() == 8


def test_the_devices_cache_is_cleared_though_the_batch_is_on_the_cpu() -> None:
    with play("h100", live=True) as played:
        cleared: list[int] = []

        def step(part: torch.Tensor, weight: float) -> None:  # it would move its part
            cleared.append(len(played.asked("empty_cache")))
            if len(part) > 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")

        split_on_oom(step, torch.ones(8))
    assert cleared[:3] == [0, 1, 2]


def test_arrays_are_cut_along() -> None:
    parts: list[list[int]] = []

    def step(part: Any, weight: float) -> None:
        if len(part[0]) > 2:
            raise MemoryError
        parts.append(part[1].tolist())

    split_on_oom(step, (torch.arange(3), np.arange(3) * 10))
    assert parts == [[0, 10], [20]]
