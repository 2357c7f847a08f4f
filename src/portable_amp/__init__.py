"""One training loop for every accelerator PyTorch knows: decided per machine, and explained."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portable_amp.api import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """The public names come with the first of them: torch takes seconds, and `check` needs none."""
    if not name.startswith("__") or name == "__all__":
        api = importlib.import_module("portable_amp.api")
        globals().update({public: getattr(api, public) for public in api.__all__})
        globals()["__all__"] = api.__all__
    try:
        return globals()[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    __getattr__("__all__")
    return sorted(globals())
