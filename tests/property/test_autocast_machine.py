"""maybe_autocast beside torch.autocast: whatever is entered and left, and in which thread.

Ours are instances that are used again and again; the oracle takes a fresh one for each entry.
Autocast's state belongs to a thread, so that each side has its own.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    multiple,
    rule,
    run_state_machine_as_test,
)

from portable_amp import maybe_autocast
from portable_amp.autocast import _CACHE_LOSES_GRADIENTS, NoAutocast
from portable_amp.testing import machine
from support import KINDS, playing

PLAYED = [
    key for key in ("a100", "arc-a770", "m2-macos14") if machine(key).hardware.device_type in KINDS
]
ONES = torch.ones(2, 2)
WHO = st.sampled_from([0, 1])
ARGUMENTS = st.tuples(
    st.sampled_from(["cpu", "cpu", "played", "played", "absent"]),
    st.sampled_from([torch.bfloat16, torch.float16, None]),
    st.sampled_from([True, True, False]),
    st.sampled_from([None, True, False]),
)
SPELLINGS = st.sampled_from([str, torch.device, "{}:0".format])


class PlannedError(Exception):
    """Raised on purpose inside a region."""


def state() -> tuple[Any, ...]:
    """Everything autocast has set in this thread, and what becomes of two operations."""
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    product = ONES.mm(ONES)
    return (
        *(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in KINDS
        ),
        torch.is_autocast_cache_enabled(),
        nesting,
        product.dtype,
        F.layer_norm(product, (2,)).dtype,
    )


@dataclass(frozen=True, eq=False)
class Region:
    """One instance of ours, and the torch.autocast it stands for, which itself is never entered."""

    ours: Any
    template: Any

    def fresh(self) -> Any:
        return copy.copy(self.template)


class Thread:
    """One thread of a program, played by two."""

    def __init__(self) -> None:
        self.ours, self.theirs = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.inside: list[tuple[Region, Any]] = []  # with the oracle's instance, outermost first
        self.agrees = True
        self.before = self.both(state, state)

    def both(self, ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[Any, Any]:
        """Do each in its own thread; both must leave the same behind. What each returned."""
        one = self.ours.submit(lambda: (ours(), state()))
        other = self.theirs.submit(lambda: (theirs(), state()))
        self.agrees = False
        (result, left), (expected, should_be_left) = one.result(), other.result()
        assert left == should_be_left
        self.agrees = True
        return result, expected

    def enter(self, region: Region) -> None:
        fresh = region.fresh()
        entered, _ = self.both(region.ours.__enter__, fresh.__enter__)
        assert entered is region.ours
        self.inside.append((region, fresh))

    def leave(self, region: Region, fails: bool = False) -> None:
        """Of an instance entered several times, its innermost entry is left.

        Where others are inside of it, the oracle is a thread that never was in that region.
        """
        at = max(at for at, (other, _) in enumerate(self.inside) if other is region)
        later = self.inside[at:]
        again = [(other, other.fresh()) for other, _ in later[1:]]
        self.inside[at:] = again
        why = (PlannedError, PlannedError(), None) if fails else (None, None, None)

        def leave() -> bool:
            swallowed = [fresh.__exit__(*why) for _, fresh in reversed(later)]
            for _, fresh in again:
                fresh.__enter__()
            return any(swallowed)

        swallowed = self.both(lambda: region.ours.__exit__(*why), leave)
        assert not any(swallowed)

    def close(self) -> None:
        try:
            while self.agrees and self.inside:
                self.leave(self.inside[-1][0])
            assert not self.agrees or self.both(state, state) == self.before
        finally:
            self.ours.shutdown()
            self.theirs.shutdown()


def by_with(region: Any, func: Callable[[], None]) -> None:
    with region:
        func()


def by_decorator(region: Any, func: Callable[[], None]) -> None:
    region(func)()


def nest(regions: list[Any], run: Any = by_with, fails: bool = False) -> list[Any]:
    """What is seen on the way into these regions, and on the way out."""
    seen = []

    def descend(depth: int) -> None:
        seen.append(state())
        try:
            if depth < len(regions):
                run(regions[depth], lambda: descend(depth + 1))
            elif fails:
                raise PlannedError
        finally:
            seen.append(state())

    with contextlib.suppress(PlannedError):
        descend(0)
    return seen


@dataclass(frozen=True, eq=False)
class Generator:
    """A decorated generator that gives the state it finds itself in; it catches PlannedError."""

    region: Region
    running: Any
    at_the_end: list[Any]


class AutocastMachine(RuleBasedStateMachine):
    regions = Bundle("regions")
    generators = Bundle("generators")

    @initialize(
        target=regions,
        key=st.sampled_from(PLAYED),
        first=st.lists(ARGUMENTS, min_size=3, max_size=3),
    )
    def start(self, key: str, first: list[tuple[Any, ...]]) -> Any:
        self.threads = [Thread(), Thread()]  # outside `playing`, which slows threads started in it
        self.stack = contextlib.ExitStack()
        played = self.stack.enter_context(playing(key)).device_type
        absent = "xpu" if played == "cuda" else "cuda"
        self.kinds = {"cpu": "cpu", "played": played, "absent": absent}
        return multiple(*(self.make(0, arguments, str) for arguments in first))

    @rule(target=regions, who=WHO, arguments=ARGUMENTS, spell=SPELLINGS)
    def make(self, who: int, arguments: tuple[Any, ...], spell: Any) -> Region:
        """Made inside regions or outside: what is None is asked for now, not at the entry."""
        which, dtype, enabled, cached = arguments
        kind = self.kinds[which]
        theirs = torch.autocast if which != "absent" else lambda *_: contextlib.nullcontext()
        # Where torch's cache loses gradients, and there are gradients, ours is off.
        its_cache = False if cached is None and _CACHE_LOSES_GRADIENTS else cached
        return Region(
            *self.threads[who].both(
                lambda: maybe_autocast(spell(kind), dtype, enabled, cached),
                lambda: theirs(kind, dtype, enabled, its_cache),
            )
        )

    @rule(who=WHO, entered=st.lists(regions, min_size=1, max_size=3))
    def enter(self, who: int, entered: list[Region]) -> None:
        for region in entered:
            self.threads[who].enter(region)

    @rule(who=WHO, fails=st.booleans())
    def leave_the_innermost(self, who: int, fails: bool) -> None:
        thread = self.threads[who]
        if thread.inside:
            thread.leave(thread.inside[-1][0], fails)

    @rule(
        who=WHO,
        entered=st.lists(regions, min_size=2, max_size=4),
        order=st.permutations(range(4)),
    )
    def interleave(self, who: int, entered: list[Region], order: list[int]) -> None:
        """As generators do that are resumed in turn: left in any order."""
        self.enter(who, entered)
        for at in order:
            if at < len(entered):
                self.threads[who].leave(entered[at])

    @rule(who=WHO, region=regions)
    def leave_what_was_not_entered(self, who: int, region: Region) -> None:
        thread = self.threads[who]
        inside = any(region is entered for entered, _ in thread.inside)
        if inside or isinstance(region.ours, NoAutocast):
            return

        def leave() -> None:
            with pytest.raises(RuntimeError, match="not entered in this thread"):
                region.ours.__exit__(None, None, None)

        thread.both(leave, lambda: None)

    @rule(
        who=WHO,
        nested=st.lists(regions, min_size=1, max_size=4),
        run=st.sampled_from([by_with, by_decorator]),
        fails=st.booleans(),
    )
    def nest(self, who: int, nested: list[Region], run: Any, fails: bool) -> None:
        ours, theirs = self.threads[who].both(
            lambda: nest([region.ours for region in nested], run, fails),
            lambda: nest([region.fresh() for region in nested], by_with, fails),
        )
        assert ours == theirs

    @rule(target=generators, who=WHO, region=regions)
    def start_generator(self, who: int, region: Region) -> Generator:
        at_the_end: list[Any] = []

        def states() -> Iterator[Any]:
            try:
                while True:
                    with contextlib.suppress(PlannedError):
                        yield state()
            finally:
                at_the_end.append(state())

        generator = Generator(region, region.ours(states)(), at_the_end)
        self.resume(who, generator, False)
        return generator

    @rule(who=WHO, generator=generators, fails=st.booleans())
    def resume(self, who: int, generator: Generator, fails: bool) -> None:
        running, fresh = generator.running, generator.region.fresh()
        ours, theirs = self.threads[who].both(
            lambda: running.throw(PlannedError()) if fails else next(running), lambda: nest([fresh])
        )
        assert ours == theirs[1]

    @rule(who=WHO, generator=consumes(generators), fails=st.booleans())
    def end(self, who: int, generator: Generator, fails: bool) -> None:
        running, fresh = generator.running, generator.region.fresh()

        def end() -> None:
            with pytest.raises(KeyError) if fails else contextlib.nullcontext():
                running.throw(KeyError()) if fails else running.close()

        _, theirs = self.threads[who].both(end, lambda: nest([fresh]))
        assert generator.at_the_end == [theirs[1]]

    def teardown(self) -> None:
        with self.stack:
            for thread in self.threads:
                thread.close()


@pytest.mark.filterwarnings("ignore::portable_amp.PrecisionFallbackWarning")
def test_whatever_is_entered_and_left_in_whatever_thread_it_is_as_with_torchs() -> None:
    run_state_machine_as_test(
        AutocastMachine,
        settings=settings(
            # Of the 25 that tools/mutation asks for, three times as many.
            max_examples=max(75, settings().max_examples),
            stateful_step_count=20,
            report_multiple_bugs=False,
        ),
    )


def test_cache_enabled_is_restored_whichever_region_is_left_first() -> None:
    with playing("a100"):
        outer = maybe_autocast("cpu", torch.bfloat16, cache_enabled=False)
        inner = maybe_autocast("cuda", torch.float16, cache_enabled=True)
        outer.__enter__()
        inner.__enter__()
        outer.__exit__(None, None, None)
        inner.__exit__(None, None, None)
    left = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(True)  # for the tests to come
    assert left
