"""The file of a trace: what a training run computed, step by step; read and written without torch.

A first line names the format. Records follow: one letter, the length and the CRC-32 of what comes,
and that, compressed by zlib. "H" is a header in JSON; "L" says in JSON which modules were called
and what belongs to the numbers of the steps that follow; "S" is a step, its JSON and its numbers;
"W" are weights and buffers after a step; "E" says in JSON why it ends. A record is appended when it
is known, so that a run that is killed leaves all steps that were complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from portable_amp.errors import TraceError

MAGIC, VERSION = b"portable-amp trace ", 1
DIRECTIONS = 4
LARGEST = 1 << 28
"""Bytes that one record may have when it is unpacked."""
_HEAD = struct.Struct("<cII")
_ABOUT = struct.Struct("<I")


class Stats(NamedTuple):
    """One tensor in a few numbers."""

    largest: float
    """Magnitude of all elements; not finite where one of them is not."""
    mean: float
    """Of the sampled elements, as all that follows."""
    rms: float
    nonfinite: float
    """The share of them that is infinite or NaN."""
    projections: tuple[float, ...]
    """Sums with fixed random signs, each over every fourth sampled element, and over the square
    root of their number."""


_NUMBERS = 4 + DIRECTIONS


@dataclass
class Call:
    """One call of a module in a step; its values are places in `Step.values`."""

    name: str
    number: int
    """The how manyth call of this module in the step."""
    type: str
    parent: int | None
    """The place in `Step.calls` of the call that this one is part of."""
    inputs: list[int]
    outputs: list[int]
    training: bool


@dataclass
class Step:
    """What one step of the optimizer was made of."""

    number: int
    loss: float | None
    """The sum of what backward() was called on, without the loss scale."""
    scale: float
    rates: list[float]
    """The learning rates of the groups of all optimizers that stepped."""
    skipped: bool
    """A gradient scaler took no step."""
    coarse: bool = False
    """Products of fp32 dropped digits there, as TF32 does."""
    calls: list[Call] = field(default_factory=list)
    values: list[tuple[str, list[int], Stats]] = field(default_factory=list)
    """Dtype, shape and numbers of each tensor that went into or came out of a module, as first
    seen."""
    gradients: dict[int, tuple[str, Stats]] = field(default_factory=dict)
    """At a value, in the order of the backward pass, with the dtype."""
    parameters: dict[str, tuple[str, list[int], Stats]] = field(default_factory=dict)
    """Dtype, shape and gradient of each parameter, when its optimizer stepped."""


@dataclass
class Trace:
    """All of a file."""

    header: dict[str, Any]
    steps: list[Step] = field(default_factory=list)
    states: dict[int, dict[str, Stats]] = field(default_factory=dict)
    """Parameters and buffers after so many steps; 0 is before the first."""
    notes: list[str] = field(default_factory=list)
    """What is amiss with the file."""


def pack(rows: list[Stats], width: int = 3) -> bytes:
    """Column by column, the high bytes of all numbers first; 3 bytes keep 15 bits of mantissa."""
    columns = [[row[at] for row in rows] for at in range(4)]
    columns += [[row.projections[at] for row in rows] for at in range(DIRECTIONS)]
    flat = [number for column in columns for number in column]
    raw = struct.pack(f">{len(flat)}f", *flat)
    return b"".join(raw[at::4] for at in range(width))


def unpack(data: bytes, width: int = 3) -> list[Stats]:
    """What was packed."""
    count, left = divmod(len(data), width)
    if left or count % _NUMBERS:
        raise ValueError("not a whole number of rows")
    raw = bytearray(4 * count)
    for at in range(width):
        raw[at::4] = data[at * count : (at + 1) * count]
    flat = struct.unpack(f">{count}f", raw)
    rows = count // _NUMBERS
    columns = [flat[at * rows : (at + 1) * rows] for at in range(_NUMBERS)]
    made = []
    for largest, mean, rms, nonfinite, *projections in zip(*columns, strict=True):
        made.append(Stats(largest, mean, rms, nonfinite, tuple(projections)))
    return made


class Writer:
    """Appends records to a file beside `path`, which becomes `path` when all is written.

    Raises:
        TraceError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], header: dict[str, Any]) -> None:
        self.path = Path(os.path.abspath(path))  # noqa: PTH100  # the program may go elsewhere
        self.partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        self._layout = b""
        try:
            if self.path.is_dir():
                raise IsADirectoryError("it is a folder")
            self._file: BinaryIO = self.partial.open("wb", buffering=0)
            self._put(MAGIC + b"%d\n" % VERSION)
        except (OSError, ValueError) as error:
            raise TraceError(f"cannot write the trace {str(path)!r}: {error}") from error
        self._record(b"H", _json(header))

    def step(self, step: Step) -> None:
        """Append a step; what is alike in most of them is written where it changes."""
        layout = _json(
            {
                "calls": [list(vars(call).values()) for call in step.calls],
                "values": [[dtype, shape] for dtype, shape, _ in step.values],
                "gradients": [[at, dtype] for at, (dtype, _) in step.gradients.items()],
                "parameters": [[n, *one[:2]] for n, one in step.parameters.items()],
            }
        )
        if layout != self._layout:
            self._record(b"L", layout)
            self._layout = layout
        rows = [row for *_, row in step.values] + [row for _, row in step.gradients.values()]
        rows += [row for *_, row in step.parameters.values()]
        about = {
            "number": step.number,
            "loss": step.loss,
            "scale": step.scale,
            "rates": step.rates,
            "skipped": step.skipped,
            "coarse": step.coarse,
        }
        self._record(b"S", _with_numbers(about, pack(rows)))

    def state(self, after: int, rows: dict[str, Stats]) -> None:
        """Append parameters and buffers; they are compared by how they change: all bytes."""
        about = {"after": after, "names": [*rows]}
        self._record(b"W", _with_numbers(about, pack([*rows.values()], 4)))

    def close(self, why: str) -> None:
        """End it, and give it its name."""
        self._record(b"E", _json({"why": why}))
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            self.partial.replace(self.path)
        except OSError as error:
            raise TraceError(f"cannot write the trace {str(self.path)!r}: {error}") from error

    def abandon(self) -> None:
        """Close what could not be written to its end; it stays, and can be read."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _record(self, kind: bytes, content: bytes) -> None:
        packed = zlib.compress(content, 9)
        try:
            self._put(_HEAD.pack(kind, len(packed), zlib.crc32(kind + packed)) + packed)
        except OSError as error:
            raise TraceError(f"cannot write the trace {str(self.partial)!r}: {error}") from error

    def _put(self, data: bytes) -> None:
        while data:  # a disk that fills takes a part
            data = data[self._file.write(data) or 0 :]


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _with_numbers(about: dict[str, Any], numbers: bytes) -> bytes:
    first = _json(about)
    return _ABOUT.pack(len(first)) + first + numbers


def read(path: str | os.PathLike[str]) -> Trace:
    """All steps that are whole.

    Raises:
        TraceError: there is no such file; or it is empty, foreign, damaged, or of a newer version.
    """
    target, shown = Path(path), repr(str(path))
    try:
        data = target.read_bytes()
    except (OSError, ValueError) as error:
        left = sorted(target.parent.glob(f"{target.name}.*.partial")) if target.name else []
        hint = f"; a run that was killed left {str(left[-1])!r}" if left else ""
        why = error.strerror if isinstance(error, OSError) else error
        raise TraceError(f"cannot read the trace {shown}: {why}{hint}") from None
    line, _, rest = data.partition(b"\n")
    if not data:
        raise TraceError(f"{shown} is empty: the run ended before it began")
    version = line[len(MAGIC) :]
    if not line.startswith(MAGIC) or not version.isdigit() or len(version) > 9:
        raise TraceError(f"{shown} is no trace: `portable-amp trace record` makes one")
    if int(version) != VERSION:
        raise TraceError(
            f"{shown} is of version {int(version)}, made by another portable-amp: this one reads "
            f"version {VERSION}"
        )
    try:
        return _read(rest, shown)
    except TraceError:
        raise
    except Exception as error:  # of junk with the right checksums, zlib, struct and json say no
        raise TraceError(f"{shown} is damaged, or no trace: {type(error).__name__}") from error


def _read(data: bytes, shown: str) -> Trace:
    trace: Trace | None = None
    layout: dict[str, Any] = {}
    at, ended = 0, False
    while at < len(data) and not ended:
        begins, at = at, at + _HEAD.size
        kind, length, checksum = _HEAD.unpack(data[begins:at]) if at <= len(data) else (b"", 1, 0)
        packed = data[at : at + length]
        if len(packed) < length:
            break
        if zlib.crc32(kind + packed) != checksum:
            raise TraceError(f"{shown} is damaged at byte {begins} after the first line")
        at += length
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(packed, LARGEST)
        if unpacker.unconsumed_tail:
            raise ValueError("a record is too large")
        if kind == b"H":
            trace = Trace(json.loads(content))
        elif trace is None:
            raise ValueError("no header")
        elif kind == b"L":
            layout = json.loads(content)
        elif kind in b"SW":
            size = _ABOUT.size + _ABOUT.unpack_from(content)[0]
            about = json.loads(content[_ABOUT.size : size])
            if kind == b"S":
                trace.steps.append(_step(about, layout, unpack(content[size:])))
            else:
                numbers = unpack(content[size:], 4)
                trace.states[about["after"]] = dict(zip(about["names"], numbers, strict=True))
        else:
            why, ended = json.loads(content)["why"], True
            if why:
                trace.notes.append(f"{shown} ends with {why}")
    if trace is None:
        raise TraceError(f"{shown} ends before its first step: the run was killed")
    if not ended:
        trace.notes.append(f"{shown} is cut off after step {len(trace.steps)}: the run was killed")
    return trace


def _step(about: dict[str, Any], layout: dict[str, Any], rows: list[Stats]) -> Step:
    step = Step(**about, calls=[Call(*one) for one in layout["calls"]])
    rest = iter(rows)
    step.values = [(dtype, shape, next(rest)) for dtype, shape in layout["values"]]
    step.gradients = {at: (dtype, next(rest)) for at, dtype in layout["gradients"]}
    step.parameters = {
        name: (dtype, shape, next(rest)) for name, dtype, shape in layout["parameters"]
    }
    return step
