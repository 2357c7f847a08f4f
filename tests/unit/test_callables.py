"""What a callable is made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
import torch

from portable_amp.callables import opened

MODEL = torch.nn.Linear(1, 1)


class Thing:
    def method(self, part: Any) -> None: ...

    def __call__(self, part: Any) -> None: ...


def plain(part: Any) -> None: ...


def with_default(part: Any, one: object = MODEL) -> None: ...


def with_named_default(part: Any, *, one: object = MODEL) -> None: ...


def with_global(part: Any) -> Any:
    return MODEL(part)


def closing(held: Any) -> Callable[[Any], Any]:
    def inner(part: Any) -> Any:
        return held

    return inner


def decorated(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @wraps(call)
    def outer(part: Any) -> Any:
        return call(part)

    return outer


THING = Thing()
OVER_THING, OVER_PLAIN, AROUND = closing(THING), closing(plain), decorated(THING.method)

# The callable; its functions, the objects that these are of, and what they hold.
MADE_OF: dict[str, tuple[Any, list[Any], list[Any], list[Any]]] = {
    "a function": (plain, [plain], [], []),
    "a method": (THING.method, [Thing.method], [THING], []),
    "an object that is called": (THING, [], [THING], []),
    "a partial": (partial(plain, THING, by=2.5), [plain], [], [THING, "by", 2.5]),
    "a partial of a method": (partial(THING.method, 2.5), [Thing.method], [THING], [2.5]),
    "a partial of an object": (partial(THING, 2.5), [], [THING], [2.5]),
    "a partial that is given a function": (partial(plain, decorated), [plain, decorated], [], []),
    "a default": (with_default, [with_default], [], [MODEL]),
    "a default of a named argument": (with_named_default, [with_named_default], [], [MODEL]),
    "a model that it names": (with_global, [with_global], [], [MODEL]),
    "an object that it closes over": (OVER_THING, [OVER_THING], [], [THING]),
    "a function that it closes over": (OVER_PLAIN, [OVER_PLAIN, plain], [], []),
    "a decorated method": (AROUND, [AROUND, Thing.method], [THING], []),
    "what is no callable": (2.5, [], [], [2.5]),
}


@pytest.mark.parametrize("kind", MADE_OF)
def test_what_it_is_made_of(kind: str) -> None:
    call, functions, owners, held = MADE_OF[kind]
    found = opened(call)
    assert found.functions == functions
    assert [*map(id, found.owners)] == [*map(id, owners)]
    assert found.held == held


def test_what_it_counts_is_not_part_of_it_and_what_it_only_reads_is() -> None:
    calls, by = 0, 2.5

    def counting(part: Any) -> float:
        nonlocal calls
        calls += 1
        return by

    assert opened(counting).held == [2.5]
    counting(None)
    assert opened(counting).held == [2.5]


def test_functions_that_call_each_other_have_an_end() -> None:
    def one() -> Any:
        return other

    assert opened(one).functions == [one]  # `other` is not there yet

    def other() -> Any:
        return one

    assert opened(one).functions == [one, other]
    assert opened(other).functions == [other, one]
