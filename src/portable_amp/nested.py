"""Batches: tensors nested in dicts, lists, tuples and named tuples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

_DESCEND = object()


def map_tensors(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """`value` with every tensor in it replaced by `change(tensor)`; containers keep their type."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (tuple, list):  # what most batches are, in every step
        return type(value)([map_tensors(change, item) for item in value])
    return _map(lambda item: change(item) if isinstance(item, torch.Tensor) else _DESCEND, value)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in `value`, in order."""
    found: list[torch.Tensor] = []
    map_tensors(found.append, value)
    yield from found


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
    """Samples `start` to `stop` of a batch; lists that hold one thing per sample are cut too."""
    total = length_of(batch)

    def cut(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return item[start:stop] if item.dim() else item
        if (
            isinstance(item, (list, tuple))
            and not hasattr(item, "_fields")
            and len(item) == total
            and next(tensors_in(item), None) is None
        ):
            return item[start:stop]
        return _DESCEND

    return batch if stop - start >= total else _map(cut, batch)


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """`value` rebuilt from what `change` makes of each part, descending where it says so."""
    changed = change(value)
    if changed is not _DESCEND:
        return changed
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(change, item) for item in value))
    if isinstance(value, (list, tuple)):
        return _rebuilt(value, [_map(change, item) for item in value])
    if isinstance(value, Mapping):  # last: asking takes longer than all of the above
        return _rebuilt(value, {key: _map(change, item) for key, item in value.items()})
    return value


def _rebuilt(like: Any, content: dict[Any, Any] | list[Any]) -> Any:
    """A container of the type of `like`; a plain one where that type is made in another way."""
    if type(like) is type(content):
        return content
    try:
        return type(like)(content)
    except TypeError:
        return content
