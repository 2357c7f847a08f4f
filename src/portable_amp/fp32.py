"""How float32 is computed: one word for it, and the regions in which it holds."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from portable_amp.autocast import Region, decorate
from portable_amp.backends import Backend, backend_for
from portable_amp.capabilities import Capabilities
from portable_amp.errors import PrecisionFallbackWarning, UnsupportedPrecisionError, shown
from portable_amp.fp32_state import State, give, ieee, settings, take, tf32
from portable_amp.notices import tell_once

F = TypeVar("F", bound=Callable[..., Any])

WORDS = ("as_is", "ieee", "tf32")
_MEANT = {
    **dict.fromkeys(("highest", "strict", "fp32", "float32", "full"), "ieee"),
    **dict.fromkeys(("high", "medium", "tensorfloat32", "fast"), "tf32"),
    **dict.fromkeys(("auto", "none", "default"), "as_is"),
}


def parse_fp32(word: object) -> str:
    """The word itself.

    Raises:
        UnsupportedPrecisionError: it is none of `WORDS`.
    """
    if isinstance(word, str) and word in WORDS:
        return word
    near = word.strip().lower().replace("-", "") if isinstance(word, str) else ""
    meant = near if near in WORDS else _MEANT.get(near)
    raise UnsupportedPrecisionError(
        f"fp32={shown(word)}: 'as_is', 'ieee' or 'tf32' work here."
        + (f" Did you mean {meant!r}?" if meant else "")
    )


def explained(word: str, row: Backend, capabilities: Capabilities) -> list[str]:
    """How float32 is computed, and how to change it, for `DeviceContext.explain`."""
    found = settings(row).items()
    now = ", ".join(f"{name} {value}" for name, value in found)
    now = f"{now}, as torch is set" if now else "torch has no setting for it"
    for one in row.float32_variables:
        if os.environ.get(one.name):
            now += f", and ${one.name}={os.environ[one.name]} is"
    now += "; settings, not measured: ctx.verify() measures."
    if word == "as_is":
        return [f"Float32: {now}", '  To set it: DeviceContext(fp32="ieee" | "tf32").']
    why = obstacle(word, row, capabilities)
    return [
        f"Float32: {word} was asked for"
        + (f": {why}." if why else ", for ctx.autocast() and the scaler's backward_step."),
        f"  Now: {now}",
        "  A backward pass of your own: with ctx.autocast(enabled=False): loss.backward().",
    ]


class _Entry:
    """One entry of a region, and what to restore."""

    def __init__(self, owner: Float32, state: State, before: _Entry | None) -> None:
        self.owner, self.thread, self.state = owner, threading.get_ident(), state
        self.before = before
        """The one whose word ruled when `state` was taken."""

    def rule(self) -> None:
        word, row = self.owner.word, backend_for(self.owner.device_type)
        give(ieee(self.state) if word == "ieee" else tf32(self.state, row))


_lock = threading.RLock()
_entries: list[_Entry] = []


def _ruling() -> _Entry | None:
    """Whose word holds: the innermost of its thread; of several threads' IEEE, which is promised.

    TF32 is allowed, and no promise is broken where it is not used.
    """
    innermost = {one.thread: one for one in _entries}
    words = [*innermost.values()]
    promised = [one for one in words if one.owner.word == "ieee"]
    return next(reversed(promised or words), None)


class Float32(contextlib.ContextDecorator):
    """A region in which float32 is computed as `word` says: a context manager, and a decorator.

    It may be nested, re-entered, and entered in threads. The settings are of the whole process:
    while any thread is in a region of IEEE, all compute so. The last to leave restores what was
    before the first, and also what was changed inside of the region.
    """

    def __init__(self, word: str, device_type: str, inner: Region) -> None:
        self.word, self.device_type, self.inner = word, device_type, inner

    # torch.compile cannot have settings in a graph, and is not to try. Private to torch, 2.4 to
    # 2.15: the public function of that name imports Dynamo here and now.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __enter__(self) -> Float32:
        if torch.compiler.is_compiling() or torch._C._get_tracing_state():
            tell_once(
                ("fp32", "graph"),
                f"fp32={self.word!r} is not part of a graph that is exported or traced: enter a "
                "region of the context around its call.",
                PrecisionFallbackWarning,
            )
        with _lock:
            before = _ruling()
            entry = _Entry(self, take(), before)
            _entries.append(entry)
            now = _ruling()
            assert now is not None
            now.rule()
        try:
            self.inner.__enter__()
        except BaseException:
            self._leave()
            raise
        return self

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __exit__(self, *exc: Any) -> None:
        try:
            self.inner.__exit__(*exc)
        finally:
            self._leave()

    def __call__(self, func: F) -> F:
        return decorate(self, func, super().__call__)

    def _leave(self) -> None:
        with _lock:
            mine = [one for one in _entries if one.owner is self]
            if not mine:
                raise RuntimeError("this region was not entered; nothing to leave")
            here = threading.get_ident()
            # A generator may be closed in another thread.
            entry = ([one for one in mine if one.thread == here] or mine)[-1]
            ruled, at = _ruling(), _entries.index(entry)
            del _entries[at]
            if at < len(_entries):  # a later one is still inside, as of threads and generators
                later = _entries[at]
                later.state, later.before = entry.state, entry.before
            else:
                give(entry.state)
                ruled = entry.before
            now = _ruling()
            if now is not None and now is not ruled:
                now.rule()


def region_of(word: str, row: Backend, capabilities: Capabilities, inner: Region) -> Region:
    """`inner`, with float32 as this word says; the very same where that changes nothing."""
    return inner if _is_idle(word, row, capabilities) else Float32(word, row.device_type, inner)


def _is_idle(word: str, row: Backend, capabilities: Capabilities) -> bool:
    return word == "as_is" or not row.float32 or (word == "tf32" and capabilities.tf32 is False)


def obstacle(word: str, row: Backend, capabilities: Capabilities) -> str:
    """Why this word is not what float32 is computed in here; empty where it is."""
    for one in row.float32_variables:
        value = os.environ.get(one.name, "")
        if one.denies == word and re.fullmatch(one.values, value):
            return f"${one.name}={value} is set, and rules over torch's settings: unset it"
    if word == "tf32" and _is_idle(word, row, capabilities):
        return f"{capabilities.name} has no TF32, and computes in IEEE float32"
    return ""
