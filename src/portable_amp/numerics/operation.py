"""What one operation is, which a device is tried with, and what it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Shape = tuple[int, ...]

SIZES: dict[str, dict[str, Shape]] = {
    "rows": {"small": (4, 16), "odd": (7, 13), "large": (331, 128), "one": (1, 1)},
    "signals": {"small": (2, 8, 16), "odd": (3, 5, 17), "large": (4, 16, 641), "one": (1, 1, 1)},
    "images": {
        "small": (2, 8, 8, 8),
        "odd": (3, 5, 9, 7),
        "large": (4, 16, 25, 27),
        "one": (1, 1, 1, 1),
    },
    "volumes": {
        "small": (1, 4, 4, 4, 4),
        "odd": (2, 3, 5, 4, 3),
        "large": (2, 8, 13, 14, 15),
        "one": (1, 1, 1, 1, 1),
    },
    "series": {"small": (2, 5, 16), "odd": (3, 7, 12), "large": (9, 31, 128), "one": (1, 1, 4)},
    "tokens": {"small": (2, 8), "odd": (3, 13), "large": (65, 601), "one": (1, 1)},
}
"""Of the first input, by what it is; large: more than 32,768 elements. "empty" has no samples.

Source: pytorch#177116: beyond 32,768 elements gradients on MPS were wrong.
"""
WORDS = 53


def normal(shape: Shape, random: torch.Generator) -> torch.Tensor:
    """Any numbers."""
    return torch.randn(shape, generator=random)


def positive(shape: Shape, random: torch.Generator) -> torch.Tensor:
    """Between 0.5 and 1.5: sums do not cancel, and there is no pole."""
    return torch.rand(shape, generator=random) + 0.5


def unit(shape: Shape, random: torch.Generator) -> torch.Tensor:
    """Between 0.05 and 0.95."""
    return torch.rand(shape, generator=random) * 0.9 + 0.05


def distinct(shape: Shape, random: torch.Generator) -> torch.Tensor:
    """No number twice: which is the largest is no matter of taste."""
    count = torch.Size(shape).numel()
    return (torch.randperm(count, generator=random) / max(count, 1) * 6 - 3).view(shape)


def words(shape: Shape, random: torch.Generator) -> torch.Tensor:
    """Whole numbers below `WORDS`."""
    return torch.randint(0, WORDS, shape, generator=random)


def classes(shape: Shape, random: torch.Generator) -> torch.Tensor:
    """For each sample the number of a column."""
    return torch.randint(0, shape[1], shape[:1], generator=random)


def places(shape: Shape, random: torch.Generator) -> torch.Tensor:
    """For each element the number of a column."""
    return torch.randint(0, shape[-1], shape, generator=random)


def mask(shape: Shape, random: torch.Generator) -> torch.Tensor:
    """True or False."""
    return torch.rand(shape, generator=random) < 0.4


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *given: Any) -> Any:
        """Call it."""
        return self.function(*given)


class Called(nn.Module):
    """A layer that is called in another way."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, *given: Any) -> Any:
        """Call it."""
        return self.call(self.layer, *given)


@dataclass(frozen=True)
class Operation:
    """One row."""

    name: str
    kind: str
    """Of `SIZES`."""
    make: Callable[[Shape], nn.Module]
    """From the shape of its first input."""
    draws: tuple[Callable[[Shape, torch.Generator], torch.Tensor], ...] = (normal,)
    """Its inputs, all drawn for the one shape."""
    narrow: bool = True
    """It is tried with weights and inputs of 16 bits, too, and not only in autocast."""
    sizes: dict[str, Shape] | None = None

    def shapes(self) -> dict[str, Shape]:
        """By the name of the size."""
        sizes = self.sizes or SIZES[self.kind]
        return {**sizes, "empty": (0, *sizes["odd"][1:])}
