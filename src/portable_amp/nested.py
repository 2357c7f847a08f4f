"""Batches: tensors nested in containers, data classes, and objects that know how to move."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    Set,
)
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from portable_amp.notices import tell_once

_DESCEND = object()
_PLAIN = (str, bytes, int, float, complex, type(None), type)


def map_tensors(
    change: Callable[[torch.Tensor], Any],
    value: Any,
    whole: Callable[[Any], Any] | None = None,
    other: Callable[[Any], None] | None = None,
) -> Any:
    """`value` with every tensor in it replaced by `change(tensor)`; containers keep their type.

    Containers are dicts, lists, tuples, sets and their kin, data classes and attrs classes. With
    `whole`, what has a method `to` of its own, such as a module, becomes `whole(thing)`. What is
    none of these stays, and `other` sees it.

    Raises:
        ValueError: it contains itself.
    """
    try:
        return _mapped(change, value, whole, other)
    except RecursionError:
        raise ValueError("a batch that contains itself has no end") from None


def _mapped(
    change: Callable[[torch.Tensor], Any],
    value: Any,
    whole: Callable[[Any], Any] | None,
    other: Callable[[Any], None] | None,
) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (tuple, list):  # what most batches are, in every step
        return type(value)([_mapped(change, item, whole, other) for item in value])
    if type(value) is dict:
        return {key: _mapped(change, item, whole, other) for key, item in value.items()}
    if type(value) in (str, int, float, bool):
        return value

    def each(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return change(item)
        if whole and moves_itself(item):
            return whole(item)
        if other and not is_container(item) and not isinstance(item, _PLAIN):
            other(item)
        return _DESCEND

    return _map(each, value)


def moves_itself(value: Any) -> bool:
    """Whether it has a method `to` of its own, as modules have."""
    return callable(getattr(type(value), "to", None)) and not isinstance(value, PackedSequence)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in the containers of `value`, in order."""
    found: list[torch.Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, value)  # type: ignore[func-returns-value]
    yield from found


def held_by(thing: Any) -> Iterator[torch.Tensor]:
    """Every tensor in the attributes of an object that is no container."""
    for attribute in [*getattr(thing, "__dict__", {}).values()]:
        yield from tensors_in(attribute)


def length_of(batch: Any) -> int:
    """The number of samples N in a batch whose tensors are all (N, ...).

    Raises:
        ValueError: it has no tensors with samples, or they disagree.
    """
    sizes = {len(tensor) for tensor in tensors_in(batch) if tensor.dim()}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"a batch needs tensors of one common first dimension; this one has {sorted(sizes)}"
        )
    return sizes.pop()


def slice_of(batch: Any, start: int, stop: int) -> Any:
    """Samples `start` to `stop` of a batch; lists and arrays with one thing per sample are cut too.

    Raises:
        ValueError: something in it holds tensors and cannot be cut.
    """
    total = length_of(batch)

    def cut(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return item[start:stop] if item.dim() else item
        if isinstance(item, PackedSequence):
            raise ValueError("a PackedSequence cannot be cut: pack the sequences in the step")
        if (
            isinstance(item, (list, tuple))
            and not hasattr(item, "_fields")
            and len(item) == total
            and next(tensors_in(item), None) is None
        ):
            return item[start:stop]
        shape = getattr(item, "shape", ())  # of a NumPy array, or a TensorDict
        if isinstance(shape, tuple) and shape[:1] == (total,):
            return item[start:stop]
        if (
            is_container(item)
            or isinstance(item, torch.nn.Module)
            or not any(tensor.dim() for tensor in held_by(item))
        ):
            return _DESCEND
        if hasattr(item, "__getitem__") and hasattr(item, "__len__") and len(item) == total:
            return item[start:stop]
        raise ValueError(
            f"a {type(item).__qualname__} cannot be cut into samples: take its tensors out of it"
        )

    return batch if stop - start >= total else _map(cut, batch)


def _fields(value: Any) -> tuple[str, ...]:
    """The names of the fields of a data class or attrs class; none of anything else."""
    if isinstance(value, type):
        return ()
    if dataclasses.is_dataclass(value):
        return tuple(field.name for field in dataclasses.fields(value))
    return tuple(field.name for field in getattr(type(value), "__attrs_attrs__", ()))


def is_container(value: Any) -> bool:
    """Whether tensors are looked for in it."""
    # A list is a MutableSequence, a PackedSequence a tuple.
    kinds = (tuple, Mapping, MutableSequence, Set)
    return isinstance(value, kinds) or bool(_fields(value))


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """`value` rebuilt from what `change` makes of each part, descending where it says so."""
    changed = change(value)
    if changed is not _DESCEND:
        return changed
    if isinstance(value, _PLAIN):
        return value
    return _rebuilt(change, value)


def _rebuilt(change: Callable[[Any], Any], value: Any) -> Any:
    """A container of the type of `value`, with all it has besides its content."""
    if isinstance(value, PackedSequence):  # the sizes stay on the CPU, always
        data, sizes, *indices = value
        return PackedSequence(
            change(data), sizes, *(None if one is None else change(one) for one in indices)
        )
    if isinstance(value, tuple):
        items = [_map(change, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else _made(value, items)
    if isinstance(value, Mapping):
        content = {key: _map(change, item) for key, item in value.items()}
        if type(value) is dict:
            return content
        if not isinstance(value, MutableMapping):
            return _made(value, content)
        return _filled(value, content, content.items())
    if isinstance(value, MutableSequence):
        items = [_map(change, item) for item in value]
        if type(value) is list:
            return items
        return _filled(value, items, enumerate(items))
    if isinstance(value, Set):
        if not any(isinstance(item, torch.Tensor) for item in value):
            return value
        return _made(value, [_map(change, item) for item in value])
    if fields := _fields(value):
        made = copy.copy(value)
        for name in fields:
            if hasattr(value, name):
                object.__setattr__(made, name, _map(change, getattr(value, name)))
        return made
    return value


def _filled(value: Any, content: Any, items: Iterable[tuple[Any, Any]]) -> Any:
    """A copy with other items: it keeps a default factory, and what else it is made with."""
    made = _copied(value)
    try:
        for at, item in items:
            made[at] = item
    except (TypeError, AttributeError, NotImplementedError):  # it is frozen
        return _made(value, content)
    return made


def _copied(value: Any) -> Any:
    """A copy to write into. What it keeps its content in is copied, too, or both would change."""
    made = copy.copy(value)
    if isinstance(value, (dict, list)):  # its content is its own
        return made
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    for name in (*getattr(made, "__dict__", ()), *slots):
        held = getattr(made, name, None)
        if isinstance(held, (MutableMapping, MutableSequence)):
            object.__setattr__(made, name, copy.copy(held))
    return made


def _made(like: Any, content: Any) -> Any:
    try:
        return type(like)(content)
    except TypeError:
        name, plain = type(like).__qualname__, type(content).__name__
        tell_once(
            ("nested", type(like)),
            f"a batch has a {name}, which cannot be made of its content: it becomes a {plain}.",
        )
        return content
