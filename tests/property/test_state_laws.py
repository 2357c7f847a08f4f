from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portable_amp import DeviceContext, load_checkpoint, save_checkpoint, split_on_oom
from portable_amp.nested import length_of, slice_of, tensors_in

TENSORS = st.lists(st.floats(width=32, allow_nan=False), max_size=4).map(torch.tensor)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False), st.text()
)
STATES = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        LEAVES | TENSORS,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
            | st.tuples(inner, inner)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@given(STATES)
@settings(max_examples=50)
def test_what_can_be_saved_comes_back(state: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.pt"
        save_checkpoint(path, state)
        assert same(load_checkpoint(path), state)


@given(STATES)
def test_moving_to_where_it_is_changes_nothing(state: dict[str, Any]) -> None:
    moved = DeviceContext("cpu", precision="fp32").to(state)
    assert same(moved, state)
    assert [id(t) for t in tensors_in(moved)] == [id(t) for t in tensors_in(state)]


def batches(n: int) -> st.SearchStrategy[Any]:
    tensor = st.sampled_from([(n,), (n, 2), ()]).map(
        lambda shape: torch.arange(float(n * 2))[: max(1, torch.Size(shape).numel())].reshape(shape)
    )
    return st.recursive(
        tensor | st.just([str(i) for i in range(n)]) | st.just("constant"),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text(max_size=2), inner, max_size=3)
            | st.tuples(inner, inner)
        ),
        max_leaves=6,
    ).map(lambda value: [torch.arange(n), value])


@given(st.data(), st.integers(1, 9), st.integers(1, 9))
def test_parts_are_the_whole(data: st.DataObject, n: int, size: int) -> None:
    batch = data.draw(batches(n))
    parts = [slice_of(batch, at, at + size) for at in range(0, n, size)]
    assert sum(length_of(part) for part in parts) == n
    for index, whole in enumerate(tensors_in(batch)):
        cut = [list(tensors_in(part))[index] for part in parts]
        assert torch.equal(torch.cat(cut) if whole.dim() else cut[0], whole)


@given(st.integers(1, 40), st.integers(1, 40))
def test_a_split_batch_covers_every_sample_once_with_weights_that_sum_to_one(
    n: int, room: int
) -> None:
    done: list[tuple[list[int], float]] = []

    def step(part: torch.Tensor, weight: float) -> None:
        if len(part) > room:
            done.clear()
            raise MemoryError
        done.append((part.tolist(), weight))

    class Step:  # an object of its own, so that nothing is remembered from the last example
        def __call__(self, part: torch.Tensor, weight: float) -> None:
            step(part, weight)

    split_on_oom(Step(), torch.arange(n))
    assert [index for part, _ in done for index in part] == list(range(n))
    assert abs(sum(weight for _, weight in done) - 1) < 1e-9
    assert all(abs(weight - len(part) / n) < 1e-9 for part, weight in done)
