from __future__ import annotations

import enum
import math
import struct
import tempfile
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from portable_amp import (
    CheckpointError,
    DeviceContext,
    load_checkpoint,
    save_checkpoint,
    split_on_oom,
)
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


class Colour(str, enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = -1


class Plain(enum.Enum):
    ONE = 1


class Tagged(torch.Tensor):
    """A subclass that only has another name."""


class Pair(NamedTuple):
    a: int
    b: Any


def of_itself() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


def deep(levels: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(levels):
        made = [made]
    return made


def with_an_attribute() -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.owner = object()  # type: ignore[attr-defined]
    return tensor


def masked() -> Any:
    return np.ma.masked_array([1.0, 2.0], [True, False])


class Apart(str):
    """Two of one text are two keys."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other


class Numbers(float):
    def __float__(self) -> float:
        return 0.0


# Made anew in each example, some by calls that one torch or another lacks.
HOSTILE: tuple[Callable[[], Any], ...] = (
    *(lambda v=v: v for v in (Colour.RED, Level.LOW, Plain.ONE, np.str_("x"), np.bytes_(b"x"))),
    *(lambda v=v: v for v in (np.bool_(True), np.int8(-3), np.uint64(2**64 - 1), np.float16(0.1))),
    *(lambda v=v: v for v in (np.complex64(1j), np.longdouble(1), np.clongdouble(1j))),
    *(lambda v=v: v for v in (np.datetime64("2024-01-01", "ns"), np.timedelta64(3, "s"))),
    *(lambda v=v: v for v in (1 + 2j, -0.0, math.nan, math.inf, "\ud800", "\0", Numbers(2.5))),
    *(lambda v=v: v for v in (10**600, -(10**700), {1, 2}, frozenset([1]), range(3), slice(1))),
    *(lambda v=v: v for v in (b"x", bytearray(b"x"), memoryview(b"x"), Path("x"), Ellipsis)),
    *(lambda v=v: v for v in (NotImplemented, object(), len, int, Fraction(1), deque([1]))),
    *(lambda v=v: v for v in (torch.Size([1]), torch.device("cuda:1"), torch.float8_e5m2)),
    *(lambda v=v: v for v in (torch.strided, torch.channels_last, torch.per_tensor_affine)),
    *(lambda v=v: v for v in (Pair(1, [2]), OrderedDict(a=1), Counter("aab"))),
    *(lambda v=v: v for v in (defaultdict(list, a=[1]), MappingProxyType({"a": 1}))),
    *(lambda k=k: {k: 1} for k in (Colour.RED, Level.LOW, np.str_("x"), np.int64(2), True, 1.5)),
    *(lambda k=k: {k: 1} for k in (None, math.nan, (1, ("a",)), (Colour.RED,), frozenset(), b"x")),
    *(lambda k=k: {k: 1} for k in ((object(),), Plain.ONE, torch.float32, 1j, Pair(1, 2))),
    lambda: {Apart("a"): 1, Apart("a"): 2},
    lambda: {torch.ones(1): 1},
    of_itself,
    *(lambda n=n: deep(n) for n in (50, 150, 5000)),
    # arrays
    *(lambda t=t: np.array([1, 0], t) for t in ("?", "i1", ">i4", "<u2", ">f8", "f2", "c8", "g")),
    *(lambda t=t: np.array([1, 0], t) for t in ("U3", "S3", "O", "M8[s]", "m8[s]", "V4", "G")),
    lambda: np.zeros(2, [("a", "i4"), ("b", "f4")]),
    lambda: np.arange(6.0)[::-2],
    lambda: np.broadcast_to(np.float32(1), (3, 2)),
    lambda: np.array(3.5),
    lambda: np.array("x"),
    lambda: np.array(None),
    lambda: np.zeros((0, 2)),
    lambda: np.dtype("f4"),
    lambda: np.random.default_rng(0),
    masked,
    lambda: np.zeros((2, 2)).view(np.recarray),
    # tensors
    lambda: torch.nn.Parameter(torch.ones(2)),
    lambda: torch.ones(2).as_subclass(Tagged),
    with_an_attribute,
    lambda: torch.nn.UninitializedParameter(),
    lambda: torch.ones(2, device="meta"),
    lambda: torch.tensor([1 + 2j]).conj(),
    lambda: torch.tensor([1 + 2j]).conj().imag,
    lambda: torch.ones(1).expand(3, 2),
    lambda: torch.arange(12.0).reshape(3, 4).t()[1:, ::2],
    lambda: torch.ones(1, 3, 2, 2).contiguous(memory_format=torch.channels_last),
    lambda: torch.tensor([math.nan, -0.0, math.inf]),
    lambda: torch.ones(2, requires_grad=True) * 2,
    lambda: torch.eye(2).to_sparse(),
    lambda: torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,), check_invariants=True),
    lambda: torch.eye(2).to_sparse_csr(),
    lambda: torch.eye(2).to_sparse_csc(),
    lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    lambda: torch.eye(2).to_mkldnn(),
    lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    lambda: torch.ones(2, 2, names=("a", "b")),
    lambda: torch._efficientzerotensor((2,)),
    lambda: FakeTensorMode().from_tensor(torch.ones(2)),
    lambda: torch.ones(2).untyped_storage(),
    *(
        lambda name=name: torch.zeros(2, dtype=torch.uint8).view(getattr(torch, name))
        for name in ("float8_e4m3fn", "float8_e8m0fnu", "uint4", "bits8", "bool", "float16")
    ),
    *(
        lambda name=name: torch.ones(2, dtype=getattr(torch, name))
        for name in ("bfloat16", "complex32", "complex128", "uint16", "uint64", "int8")
    ),
)


def value_of(made: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of prototypes, betas and what is going away
        try:
            return made()
        except (AttributeError, RuntimeError, TypeError):
            return "this torch has none of it"


LEFT = st.sampled_from(HOSTILE).map(value_of)
HOSTILE_STATES = st.dictionaries(
    st.text(max_size=3),
    st.recursive(
        LEAVES | TENSORS | LEFT,
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.tuples(inner, inner)
            | st.dictionaries(LEAVES, inner, max_size=2)
        ),
        max_leaves=4,
    ),
    min_size=1,
    max_size=3,
)


def bits(tensor: torch.Tensor) -> list[Any]:
    """What a strided tensor holds, bit by bit."""
    dense = tensor.resolve_conj().resolve_neg().contiguous()
    row = dense.as_strided((dense.numel(),), (1,), dense.storage_offset())
    return row.view(torch.uint8).tolist() if dense.numel() else []


def equal_tensors(before: torch.Tensor, after: torch.Tensor) -> bool:
    if before.is_nested:  # its parts, whatever the type: a jagged one loads as such, or not at all
        return after.is_nested and all(map(equal_tensors, before.unbind(), after.unbind()))
    like = (type(after), before.dtype, before.layout, before.shape)
    if like != (torch.Tensor, after.dtype, after.layout, after.shape):
        return False
    if before.layout is not torch.strided:
        before, after = before.to_dense(), after.to_dense()
    if before.is_quantized:
        before, after = before.dequantize(), after.dequantize()
    return before.stride() == after.stride() and bits(before) == bits(after)


def equal(before: Any, after: Any) -> bool:
    """`after` is what `before` should be when it comes back."""
    if isinstance(before, np.ndarray) and before.ndim:
        native = np.ascontiguousarray(before.astype(before.dtype.newbyteorder("=")))
        return isinstance(after, torch.Tensor) and equal(torch.from_numpy(native), after)
    if isinstance(before, torch.Tensor):
        return isinstance(after, torch.Tensor) and equal_tensors(before.detach(), after)
    if isinstance(before, Mapping):
        return isinstance(after, dict) and all(
            equal(a[0], b[0]) and equal(a[1], b[1])
            for a, b in zip(before.items(), after.items(), strict=True)
        )
    if isinstance(before, (list, tuple)):
        return isinstance(after, list if isinstance(before, list) else tuple) and all(
            equal(a, b) for a, b in zip(before, after, strict=True)
        )
    if isinstance(before, (float, np.floating)):
        return type(after) is float and struct.pack("d", before) == struct.pack("d", after)
    return bool(before == after) or str.__eq__(before, after)


OLD = {"epoch": 1}


def saved_or_refused(folder: Path, state: Any) -> str:
    """Save over an old checkpoint, and it loads back equal, or nothing has changed."""
    path = folder / "c.pt"
    save_checkpoint(path, OLD)
    old = path.read_bytes()
    try:
        save_checkpoint(path, state)
    except CheckpointError as error:
        refusal = error
        outcome = "refused"
    else:
        assert equal(state, load_checkpoint(path))
        outcome = "saved"
    if outcome == "refused":
        assert path.read_bytes() == old
        assert len(str(refusal).splitlines()) == 1
    assert [*folder.iterdir()] == [path]
    return outcome


@given(HOSTILE_STATES)
@settings(max_examples=100)
def test_what_is_saved_comes_back_equal_or_the_old_file_is_untouched(state: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        saved_or_refused(Path(folder), state)


def test_each_kind_of_value_is_saved_or_refused(tmp_path: Path) -> None:
    outcomes = [saved_or_refused(tmp_path, {"x": value_of(made)}) for made in HOSTILE]
    outcomes += [saved_or_refused(tmp_path, value_of(made)) for made in HOSTILE]
    assert outcomes.count("saved") > 60
    assert outcomes.count("refused") > 100


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
