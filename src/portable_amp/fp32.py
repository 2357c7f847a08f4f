"""How float32 is computed: what torch's settings say, and regions that set them.

The settings are of the whole process, by new names (torch 2.9+) and old ones. Of the two torch
raises where they contradict each other, even when one is only read (pytorch#189955).
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from portable_amp.autocast import Region, decorate
from portable_amp.backends import BACKENDS, Backend, backend_for
from portable_amp.capabilities import Capabilities
from portable_amp.errors import PrecisionFallbackWarning, UnsupportedPrecisionError, shown
from portable_amp.notices import tell_once

F = TypeVar("F", bound=Callable[..., Any])

WORDS = ("as_is", "ieee", "tf32")
_MEANT = {
    **dict.fromkeys(("highest", "strict", "fp32", "float32", "full"), "ieee"),
    **dict.fromkeys(("high", "medium", "tensorfloat32", "fast"), "tf32"),
    **dict.fromkeys(("auto", "none", "default"), "as_is"),
}

_Name = tuple[str, str]
"""Library and operation, as torch has the new names."""
_NAMES: tuple[_Name, ...] = tuple(
    (one.library, one.operation) for row in BACKENDS for one in row.float32 if one.library
)
_PARENTS: tuple[_Name, ...] = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
"""What those inherit that have no value of their own, from the top."""


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


def settings(row: Backend) -> dict[str, str]:
    """Operation -> what torch's setting says that it is computed in: "ieee", "tf32" or "bf16".

    It never raises. What has no setting in this torch is left out.

    >>> from portable_amp.backends import CPU
    >>> settings(CPU)["matmul"]
    'ieee'
    """
    found = {}
    for one in row.float32:
        if one.library and _has_names():
            found[one.operation] = _get((one.library, one.operation)).replace("none", "ieee")
        elif one.old:
            found[one.operation] = _OLD[one.old]()
    return found


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


# --- torch's names, new and old --------------------------------------------------------------


# Not by the public attributes of torch.backends: that of mkldnn sets another than it reads, and in
# all of them Python takes longer than torch. Tried on 2.9 to 2.15, and absent before.


def _has_names() -> bool:
    return hasattr(torch._C, "_get_fp32_precision_getter")


def _get(name: _Name) -> str:
    return str(torch._C._get_fp32_precision_getter(*name))


def _put(name: _Name, value: str) -> None:
    torch._C._set_fp32_precision_setter(*name, value)


def _flag(dotted: str) -> Callable[[], str]:
    def read() -> str:
        flag: Any = torch.backends
        for part in dotted.split("."):
            flag = getattr(flag, part, None)
        return "tf32" if flag else "ieee"

    return read


def _old_matmul() -> str:
    word = torch.get_float32_matmul_precision()
    return {"highest": "ieee", "high": "tf32", "medium": "bf16"}[word]


_OLD: dict[str, Callable[[], str]] = {
    "float32_matmul_precision": _old_matmul,
    "cuda.matmul.allow_tf32": _flag("cuda.matmul.allow_tf32"),
    "cudnn.allow_tf32": _flag("cudnn.allow_tf32"),
    "mkldnn.allow_tf32": _flag("mkldnn.allow_tf32"),
}


class _State(NamedTuple):
    """All that a region may change."""

    names: dict[_Name, str]
    """The new names, each with its own value: "none" where it inherits."""
    matmul: str
    cudnn: bool
    onednn: bool | None
    """XPU's; None where torch is built without."""


def _take() -> _State:
    """The state as it is; float32 is left as IEEE has it, and is to be set or put back."""
    names = _own_values() if _has_names() else {}
    for name in _NAMES if names else ():
        _put(name, "ieee")
    # Now only cuDNN's old name can contradict: where it says that TF32 is allowed.
    try:
        cudnn = bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        cudnn = True
    onednn = getattr(torch.backends.mkldnn, "allow_tf32", None)
    return _State(names, torch.get_float32_matmul_precision(), cudnn, onednn)


def _own_values() -> dict[_Name, str]:
    """What was set by each new name: reading one tells what it inherits, if it has none."""
    found = {}
    for name in _PARENTS:
        found[name] = _get(name)
        if found[name] != "none":
            _put(name, "none")
    return found | {name: _get(name) for name in _NAMES}


def _give(state: _State) -> None:
    torch.set_float32_matmul_precision(state.matmul)
    torch.backends.cudnn.allow_tf32 = state.cudnn
    if state.onednn is not None:
        torch.backends.mkldnn.allow_tf32 = state.onednn  # type: ignore[assignment]
    for name, value in state.names.items():  # last: the old names set these, too
        _put(name, value)


def _ieee(state: _State) -> _State:
    """For every kind of device: one of the old names is of all of them."""
    names = state.names | dict.fromkeys(_NAMES if state.names else (), "ieee")
    return _State(names, "highest", False, None if state.onednn is None else False)


def _tf32(state: _State, row: Backend) -> _State:
    """For this kind of device; by both names, so that none contradicts."""
    mine = {(one.library, one.operation) for one in row.float32}
    old = {one.old for one in row.float32}
    matmul = state.matmul
    if "cuda.matmul.allow_tf32" in old:
        _give(state)
        bf16 = bool(state.names) and _get(("mkldnn", "matmul")) == "bf16"
        matmul = "medium" if bf16 else "high"
    return _State(
        {name: "tf32" if name in mine else value for name, value in state.names.items()},
        matmul,
        state.cudnn or "cudnn.allow_tf32" in old,
        None if state.onednn is None else state.onednn or "mkldnn.allow_tf32" in old,
    )


# --- regions ---------------------------------------------------------------------------------


class _Entry:
    """One entry of a region, and what to restore."""

    def __init__(self, owner: Float32, state: _State, before: _Entry | None) -> None:
        self.owner, self.thread, self.state = owner, threading.get_ident(), state
        self.before = before
        """The one whose word ruled when `state` was taken."""

    def rule(self) -> None:
        word, row = self.owner.word, backend_for(self.owner.device_type)
        _give(_ieee(self.state) if word == "ieee" else _tf32(self.state, row))


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
            entry = _Entry(self, _take(), before)
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
                _give(entry.state)
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
