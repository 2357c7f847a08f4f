"""What a callable computes, as far as Python tells: its functions, and the objects they hold."""

from __future__ import annotations

import contextlib
import dis
import functools
import types
from typing import Any, NamedTuple

import torch


class Opened(NamedTuple):
    """What a callable is made of, in an order of its own that is always the same."""

    functions: list[types.FunctionType]
    owners: list[Any]
    """The objects whose methods they are, or that are called themselves."""
    held: list[Any]
    """What they are given, default to, and close over; and models that they name."""


def opened(call: Any) -> Opened:
    """Look into partials, methods, decorators, and the functions that these hold."""
    found = Opened([], [], [])
    todo = [call]
    while todo:
        one = todo.pop(0)
        if isinstance(one, functools.partial):
            todo += [one.func, *one.args, *one.keywords, *one.keywords.values()]
        elif isinstance(one, types.MethodType):
            found.owners.append(one.__self__)
            todo.append(one.__func__)
        elif isinstance(one, types.FunctionType):
            if one not in found.functions:  # it may call itself
                found.functions.append(one)
                todo += _closed_over(one)
        else:
            (found.held if found.functions or not callable(one) else found.owners).append(one)
    return found


def _closed_over(function: types.FunctionType) -> list[Any]:
    closed = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or ()):  # noqa: B905
        with contextlib.suppress(ValueError):  # not yet filled
            if name not in _written(code):
                closed.append(cell.cell_contents)
    # A global name may be given to another model, as in a notebook.
    named = (function.__globals__.get(name) for name in code.co_names)
    return [*closed, *(one for one in named if isinstance(one, torch.nn.Module))]


@functools.lru_cache
def _written(code: types.CodeType) -> set[str]:
    """The names of outer functions that it gives other values, such as a counter's."""
    return {one.argval for one in dis.get_instructions(code) if one.opname == "STORE_DEREF"}
