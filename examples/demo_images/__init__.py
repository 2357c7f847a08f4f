"""Labelled pictures that are made here, for want of a download: what `demo` trains on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

Picture = tuple[str, int, bytes]
"""A file's name, its class, and its content."""


class Pictures(NamedTuple):
    """Class `i` is called `names[i]`; `test` is never trained on."""

    names: list[str]
    train: Iterable[Picture]
    test: Iterable[Picture]
