"""A tensor in a few numbers that can be compared with those of another machine.

On the device only two things happen, neither of which waits for it: the smallest and the largest
element of all are found, and up to SAMPLE elements are copied. Which ones, and the directions that
they are projected on, follow from the shape alone: from no device, dtype, memory format, version of
torch or random state. The rest is computed on the CPU in float64, when a step is over.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from portable_amp.autocast import maybe_autocast
from portable_amp.numerics.tracefile import DIRECTIONS, Stats

SAMPLE = 2048
_AT_ONCE = 256
"""Rows that are in memory in float64."""


@dataclass
class Sample:
    """What is kept of a tensor until the step is over, on its device."""

    dtype: str
    shape: list[int]
    elements: torch.Tensor
    extremes: tuple[torch.Tensor, torch.Tensor]


def sample(tensor: torch.Tensor) -> Sample | None:
    """The extremes and some elements of a tensor, in its logical order; None where it has none.

    Nothing is taken of integers, of empty tensors and of those without numbers of their own.
    """
    one = tensor.detach()
    if not one.numel() or one.is_meta or one.dtype.itemsize < 2 or _wrapped(one):
        return None
    if one.layout is not torch.strided:
        if not one.is_sparse:
            return None
        one = one.to_dense()
    dtype, shape = str(one.dtype).removeprefix("torch."), [*one.shape]
    if one.is_complex():
        one = torch.view_as_real(one.resolve_conj())
    elif not one.is_floating_point():
        return None
    low, high = _as_it_lies(one).aminmax()
    return Sample(dtype, shape, _sampled(one), (low.float(), high.float()))


def _wrapped(one: torch.Tensor) -> bool:
    """It is of a transform such as torch.vmap, or of torch.export, and has no numbers of its own.

    Private to torch, the same from 2.4 to 2.15.
    """
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(one)
    return bool(wrapped) or type(one).__name__ == "FakeTensor"


def _as_it_lies(one: torch.Tensor) -> torch.Tensor:
    """The same elements in the order of the memory, where that is another one: ten times faster."""
    if one.is_contiguous():
        return one
    return one.permute(sorted(range(one.dim()), key=one.stride, reverse=True))


def _sampled(one: torch.Tensor) -> torch.Tensor:
    step = _step(one.numel())
    lies = _as_it_lies(one)
    if one.is_contiguous() or not lies.is_contiguous():
        return one.reshape(-1)[::step].to(torch.float32, copy=True)
    at = _places(tuple(one.shape), one.stride(), step).to(one.device)
    return lies.reshape(-1)[at].to(torch.float32)


@functools.lru_cache(4096)
def _step(count: int) -> int:
    """Each how manyth element is taken: no divisor of any dimension, or whole columns are left out.

    >>> _step(2048), _step(2049), _step(64 * 56 * 56)
    (1, 2, 99)
    """
    step = -(-count // SAMPLE)
    while math.gcd(step, count) != 1:
        step += 1
    return step


@functools.lru_cache(256)
def _places(shape: tuple[int, ...], strides: tuple[int, ...], step: int) -> torch.Tensor:
    """Where the sampled elements lie in the memory of a dense tensor."""
    at = torch.arange(0, math.prod(shape), step, device="cpu")
    places = torch.zeros_like(at)
    for size, stride in zip(reversed(shape), reversed(strides)):  # noqa: B905
        places += at % size * stride
        at = at // size
    return places


@functools.lru_cache(1)
def _directions() -> torch.Tensor:
    """(SAMPLE, DIRECTIONS) of 1, -1 and 0, float64: signs are the bits of a hash of a constant.

    Each element counts in one direction, so that a single one cannot move them all.
    """
    bits = hashlib.shake_256(b"portable-amp trace 1").digest(SAMPLE // 8)
    signs = [1.0 if byte >> bit & 1 else -1.0 for byte in bits for bit in range(8)]
    made = torch.zeros(SAMPLE, DIRECTIONS, dtype=torch.float64, device="cpu")
    at = torch.arange(SAMPLE, device="cpu")
    made[at, at % DIRECTIONS] = torch.tensor(signs, dtype=torch.float64, device="cpu")
    return made


def fp32_is_coarse(device: torch.device) -> torch.Tensor:
    """Whether convolutions or matrix products of fp32 drop digits here, as TF32 does: measured."""
    one = torch.tensor(1 + 2.0**-12, dtype=torch.float32, device=device)
    with torch.no_grad(), maybe_autocast(device, enabled=False):
        eye = torch.eye(64, dtype=torch.float32, device=device)
        kernel = torch.nn.functional.pad(eye[..., None, None], (1, 1, 1, 1))
        product = (one * eye) @ eye
        convolved = torch.nn.functional.conv2d(one.expand(1, 64, 16, 16), kernel)
        return (product.diagonal() != one).any() | (convolved != one).any()


def fetched(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Float32 tensors of one dimension on the CPU: one copy, and one wait, for each device."""
    given = [*tensors]
    found: dict[int, torch.Tensor] = {}
    for device in {one.device for one in given}:
        places = [at for at, one in enumerate(given) if one.device == device]
        whole = torch.cat([given[at] for at in places]).cpu()
        found.update(zip(places, whole.split([len(given[at]) for at in places]), strict=True))
    return [found[at] for at in range(len(given))]


def stats(samples: list[Sample]) -> list[Stats]:
    """The numbers of each; the only place that waits for the device."""
    elements = [one.elements for one in samples]
    extremes = [torch.stack(one.extremes) for one in samples]
    both = fetched([*elements, *extremes])
    rows: list[Stats] = []
    for at in range(0, len(samples), _AT_ONCE):
        some = samples[at : at + _AT_ONCE]
        ends = torch.stack(both[len(samples) + at :][: len(some)])
        rows += _stats(some, both[at : at + len(some)], ends)
    return rows


def _stats(samples: list[Sample], elements: list[torch.Tensor], ends: torch.Tensor) -> list[Stats]:
    wide = pad_sequence(elements, batch_first=True).double()
    count = torch.tensor([[len(one)] for one in elements], dtype=torch.float64, device="cpu")
    directions = _directions()[: wide.shape[1]]
    # Of how many elements each is: (count + 3) // 4, (count + 2) // 4, ...
    each = (count + torch.arange(DIRECTIONS - 1, -1, -1, device="cpu")) // DIRECTIONS
    projections = wide @ directions / each.clamp(min=1).sqrt()
    columns = [
        ends.abs().amax(1, keepdim=True).double(),
        wide.sum(1, keepdim=True) / count,
        (wide.square().sum(1, keepdim=True) / count).sqrt(),
        (~wide.isfinite()).sum(1, keepdim=True) / count,
        projections,
    ]
    made = []
    # In fp32, which the file has: what is beyond becomes infinite.
    for one, row in zip(samples, torch.cat(columns, 1).float().tolist(), strict=True):
        largest, mean, rms, nonfinite = row[:4]
        if not math.isfinite(largest) and not nonfinite:
            nonfinite = 1 / math.prod(one.shape)
        made.append(Stats(largest, mean, rms, nonfinite, tuple(row[4:])))
    return made
