"""YAML to plain values: words, numbers, lists and sections, and nothing else."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Hashable
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML as version 1.2 reads it: `1e-6` is a number, 010 ten, and `no` or a date a word."""

    yaml_implicit_resolvers: Any = {}  # noqa: RUF012  # the class's, filled below

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a key that is there twice, of which yaml would keep the last."""
        found = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in found:
                line = key.start_mark.line + 1
                raise ValueError(f"line {line}: {brief(key.value)} is there twice")
            found.add(key.value)
        return super().construct_mapping(node, deep)


def _construct_int(loader: Any, node: Any) -> int:
    return int(node.value)


for _tag, _pattern, _first in (
    ("null", "~|null|", ["~", "n", "N", ""]),
    ("bool", "true|false", list("tTfF")),
    ("int", r"[-+]?\d+", list("-+0123456789")),
    ("float", r"[-+]?(\.\d+|\d+(\.\d*)?)(e[-+]?\d+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
    ("merge", "<<", ["<"]),
):
    _whole = re.compile(rf"(?:{_pattern})\Z", re.ASCII | re.IGNORECASE)
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse(text: str) -> Any:
    """What YAML says.

    Raises:
        ValueError: it is none, or has a key twice.
    """
    try:
        return yaml.load(text, _Loader)
    # What is built of words, numbers and dates raises whatever it stumbles over.
    except Exception as error:
        why = "nested too deep" if isinstance(error, RecursionError) else error
        raise ValueError(why) from error


def fault_of(settings: Any) -> str:
    """What no setting can be: of a tag yaml makes dates and sets, of an alias cycles; or "".

    >>> fault_of({"train": {"lr": float("nan")}})
    'train.lr is not finite'
    """
    waiting = [("", settings)]
    for name, value in waiting:  # which grows meanwhile
        fault = ""
        if isinstance(value, dict):
            waiting += [(f"{name[:99]}{key}.", item) for key, item in value.items()]
            if other := [key for key in value if type(key) is not str]:
                fault = f"has the key {brief(other[0])}, which is no word"
        elif isinstance(value, list | tuple):
            waiting += [(f"{name[:99]}{index}.", item) for index, item in enumerate(value)]
        elif isinstance(value, str):
            try:
                fault = "has a NUL in it" if b"\0" in os.fsencode(value) else ""
            except UnicodeEncodeError:
                fault = f"is no text: {brief(value)}"
        elif isinstance(value, int):
            fault = "is beyond 64 bits" if value.bit_length() > 63 else ""
        elif isinstance(value, float):
            fault = "" if math.isfinite(value) else "is not finite"
        elif value is not None:
            fault = f"is a {type(value).__name__}, not a word, number, list or section"
        if len(waiting) > 10_000:
            return "the settings hold too much, or themselves"
        if fault:
            return f"{name[:-1] or 'the file'} {fault}"
    return ""


def brief(value: object) -> str:
    """Its repr, but one that fits a line.

    >>> brief("x" * 5000)
    "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx ..."
    """
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:39]} ..."
