"""What a program computes in: what its autocast regions and scalers say, put together."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from portable_amp.migrate.findings import Edit
from portable_amp.migrate.guards import is_device
from portable_amp.migrate.names import Scope
from portable_amp.migrate.source import Source

# In the order that each takes them.
ARGUMENTS = {
    "torch.cuda.amp.autocast": ("enabled", "dtype", "cache_enabled"),
    "torch.amp.autocast": ("device_type", "dtype", "enabled", "cache_enabled"),
    "torch.cuda.amp.GradScaler": (
        *("init_scale", "growth_factor", "backoff_factor", "growth_interval", "enabled"),
    ),
    "torch.amp.GradScaler": (
        *("device", "init_scale", "growth_factor", "backoff_factor", "growth_interval", "enabled"),
    ),
}
DEFAULTS = ("torch.set_autocast_dtype", "torch.set_autocast_gpu_dtype")
"""What sets the dtype of a region that names none."""
CONTEXTS = ("portable_amp.DeviceContext", "portable_amp.context.DeviceContext")
DTYPES = {
    "torch.float16": "fp16",
    "torch.half": "fp16",
    "torch.bfloat16": "bf16",
    "torch.float32": "fp32",
    "torch.float": "fp32",
}


class Place(NamedTuple):
    """Something that says what is computed in: a call of what `name` stands for, or that alone."""

    name: str
    node: ast.expr
    scope: Scope

    def given(self) -> dict[str, ast.expr]:
        """Argument -> value; "*" and "**" are those that nobody can know."""
        if not isinstance(self.node, ast.Call):
            return {}
        order = ARGUMENTS.get(self.name, ("device",))
        positional = self.node.args
        stars = any(isinstance(one, ast.Starred) for one in positional)
        named = {one.arg or "**": one.value for one in self.node.keywords}
        if stars or len(positional) > len(order):
            return {"*": self.node}
        return {**dict(zip(order, positional, strict=False)), **named}


class Decision(NamedTuple):
    """The precision that a context of a program has to have, or why none has it."""

    precision: str
    doubt: str = ""


def decide(places: Sequence[Place]) -> Decision:
    """What all the regions and scalers of a text have in common.

    A region on CUDA that names no dtype computes in fp16, a scaler is there for fp16, and fp32 is
    what a program without any computes in.
    """
    named: set[str] = set()
    contexts: set[str] = set()
    scales = False
    for one in places:
        if one.name in CONTEXTS:
            contexts.add(precision_of(one))
            continue
        given = one.given()
        scaler = one.name.endswith("GradScaler")
        off = getattr(given.get("enabled"), "value", None) is False
        plain = scaler and ("device" in given or "cuda" in one.name)  # takes what a context's does
        if one.name in DEFAULTS or "*" in given or ("**" in given and not plain):
            return Decision("fp32", "Left to you: its arguments are known only when it runs.")
        device = given.get("device_type", given.get("device"))
        if not (device is None or is_device(device)):
            return Decision(
                "fp32", "Left to you: there is another region or scaler, not of CUDA alone."
            )
        scales |= scaler and not off
        if not (scaler or off):
            named.add(dtype_of(given.get("dtype"), one.scope))
    named -= {"fp32"}
    if "" in named:
        return Decision(
            "fp32",
            "Left to you: the dtype is known only when it runs; it can be given to "
            "DeviceContext(precision=...).",
        )
    if len(named) > 1:
        return Decision(
            "fp32", "Left to you: both fp16 and bf16 are computed here, and a context has one."
        )
    said = named or contexts & {"fp16", "bf16"}
    return Decision(said.pop() if len(said) == 1 else "fp16" if scales else "fp32")


def dtype_of(node: ast.expr | None, scope: Scope, depth: int = 5) -> str:
    """What a region with this dtype computes in; "" where that is known only when it runs."""
    if node is None or (isinstance(node, ast.Constant) and node.value is None):
        return "fp16"
    home = scope.home(node.id) if isinstance(node, ast.Name) else None
    if home and isinstance(node, ast.Name) and (len(home.bound[node.id]) != 1 or not depth):
        return ""
    value = scope.value(node)
    if home and value is not None:
        return dtype_of(value, home, depth - 1)
    return DTYPES.get(scope.resolve(node) or "", "")


def precision_of(context: Place) -> str:
    """What a call of DeviceContext asks for; "" where that is known only when it runs."""
    given = context.given()
    asked = given.get("precision", given.get("**", ast.Constant("auto")))
    text = asked.value if isinstance(asked, ast.Constant) else None
    return text if isinstance(text, str) else dtype_of(asked, context.scope)


def rearranged(
    source: Source, call: ast.Call, name: str, dropped: set[str], begin: int
) -> Iterator[Edit]:
    """Edits that drop arguments of a call, and name those that stood behind them.

    `begin` is where the function ends in the text: a bracket follows, or the comma of a partial.
    """
    text = source.text
    nodes: list[ast.expr | ast.keyword] = [*call.args, *call.keywords]
    spans = [source.span(one) for one in nodes]
    names = [
        one.arg if isinstance(one, ast.keyword) else ARGUMENTS[name][at]
        for at, one in enumerate(nodes)
    ]
    plain = text[:begin]  # and on without what the arguments and comments say
    close = source.span(call)[1] - 1
    for start, end in (*spans, (close, close)):
        plain += re.sub(r"#[^\r\n]*", lambda one: " " * len(one[0]), text[len(plain) : start])
        plain += "x" * (end - start)
    last = max((at for at, argument in enumerate(names) if argument not in dropped), default=-1)
    mark = re.compile("[(,]").search(plain, begin)
    for at, argument in enumerate(names):
        assert mark
        start = _skip(" \t\r\n\\", plain, mark.end())  # with brackets of its own
        comma = re.compile(",").search(plain, spans[at][1])
        stop = _skip(" \t", text, comma.end()) if comma else len(plain.rstrip())
        if argument in dropped:
            if at == last + 1 and mark[0] == "," and "#" not in text[mark.end() : start]:
                start = mark.start()
            yield Edit(start, stop, "")
        elif dropped & {*names[:at]} and not isinstance(nodes[at], ast.keyword):
            yield Edit(start, start, f"{argument}=")
        mark = comma


def _skip(characters: str, text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip(characters))
