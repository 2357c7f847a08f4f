"""Whether the devices here compute right, operation by operation: what the doctor certifies."""

from __future__ import annotations

import collections
import contextlib
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from portable_amp.capabilities import probe
from portable_amp.numerics.cases import FAULTS, STATUSES, Row, cases
from portable_amp.numerics.children import in_children
from portable_amp.numerics.progress import Progress

SHOWN = 3
"""Faults of one operation in one precision; the rest is counted."""
_BUILD = ("Intel(R) MKL-DNN", "CUDA Runtime", "CuDNN", "HIP Runtime", "MIOpen", "CPU capability")


def certify(
    devices: Sequence[torch.device],
    *,
    seconds: float,
    only: str | None = None,
    seed: int = 0,
    run: Callable[..., Iterator[Row]] = in_children,
) -> dict[str, Any]:
    """Try each device, one after the other, for its share of the time; plain data.

    Args:
        devices: which are tried; each for at least one case.
        seconds: in all.
        only: the name of the one operation, if not all.
        seed: of weights and inputs.
        run: `in_children` or `here`.
    """
    end = time.monotonic() + seconds
    began = time.monotonic()
    found = []
    for at, device in enumerate(devices):
        now = time.monotonic()
        until = now + max(end - now, 0) / (len(devices) - at)
        found.append(_certify(device, until, only, seed, run))
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "build": _build(),
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "ok": not any(row["status"] in FAULTS for one in found for row in one["rows"]),
        "devices": found,
    }


def _certify(
    device: torch.device,
    until: float,
    only: str | None,
    seed: int,
    run: Callable[..., Iterator[Row]],
) -> dict[str, Any]:
    can = probe(device)
    todo = cases(can, only)
    rows: list[Row] = []
    faults = 0
    with (
        contextlib.closing(run(device, todo, seed=seed, only=only, until=until)) as stream,  # type: ignore[type-var]
        Progress(str(device), len(todo)) as progress,
    ):
        for row in stream:
            rows.append(row)
            faults += row.status in FAULTS
            left = until - time.monotonic()
            progress.step(f"{faults} faults, {max(left, 0):.0f} s left")
            if left <= 0:
                break
    counts = {name: dict.fromkeys(STATUSES, 0) for name in dict.fromkeys(c.precision for c in todo)}
    for row in rows:
        counts[row.precision][row.status] += 1
    for case in todo[len(rows) :]:
        counts[case.precision]["not reached"] = counts[case.precision].get("not reached", 0) + 1
    return {
        "device": str(device),
        "name": can.name,
        "cases": len(todo),
        "counts": {
            name: {status: count for status, count in row.items() if count}
            for name, row in counts.items()
        },
        "rows": [asdict(row) for row in rows],
    }


def _build() -> list[str]:
    """The libraries that this torch computes with."""
    lines = (line.strip(" -") for line in torch.__config__.show().splitlines())
    return [line for line in lines if line.startswith(_BUILD)]


def text(found: dict[str, Any]) -> str:
    """For a person to read; the verdict first."""
    lines = [_verdict(found), ", ".join([*_versions(found)])]
    for device in found["devices"]:
        lines += ["", f"{device['device']}: {device['name']}"]
        for precision, counts in device["counts"].items():
            told = ", ".join(f"{count} {status}" for status, count in counts.items())
            lines.append(f"  {precision}: {told}")
        lines += [f"  not implemented: {one}" for one in _missing(device)]
        faults = [*_faults(device)]
        lines += [f"  {line}" for line in faults]
    seen = {row["status"] for one in found["devices"] for row in one["rows"]} - {"right"}
    lines += ["", *(f"{status}: {STATUSES[status]}" for status in STATUSES if status in seen)]
    return "\n".join(lines).rstrip()


def markdown(found: dict[str, Any]) -> str:
    """A block to paste into a report."""
    lines = [f"**{_verdict(found)}**", ""]
    lines += [f"- {one}" for one in _versions(found)]
    for device in found["devices"]:
        statuses = list(dict.fromkeys(s for row in device["counts"].values() for s in row))
        lines += ["", f"`{device['device']}`: {device['name']}", ""]
        lines += [
            f"| | {' | '.join(statuses)} |",
            f"| --- |{' ---: |' * len(statuses)}",
        ]
        for precision, counts in device["counts"].items():
            lines.append(f"| {precision} | {' | '.join(str(counts.get(s, 0)) for s in statuses)} |")
        told = [*_faults(device), *(f"not implemented: {one}" for one in _missing(device))]
        if told:
            lines += ["", "```text", *told, "```"]
    return "\n".join(lines)


def _verdict(found: dict[str, Any]) -> str:
    rows = [row for one in found["devices"] for row in one["rows"]]
    compared = sum(row["status"] not in ("raises", "missing", "memory", "untried") for row in rows)
    total = sum(one["cases"] for one in found["devices"])
    wrong = {(row["device"], row["operation"]) for row in rows if row["status"] in FAULTS}
    names = ", ".join(one["device"] for one in found["devices"])
    reached = f"{compared} cases compared of {total}, in {found['seconds']:.0f} s"
    if not wrong:
        return f"{names}: no fault found; {reached}."
    which = ", ".join(f"{name} on {device}" for device, name in sorted(wrong)[:3])
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"{names}: NOT right: {which}{more}; {reached}."


def _versions(found: dict[str, Any]) -> Iterator[str]:
    yield f"torch {found['torch']}"
    yield f"Python {found['python']}"
    yield found["system"]
    yield from found["build"]


def _missing(device: dict[str, Any]) -> Iterator[str]:
    by_words: dict[tuple[str, str], list[str]] = {}
    for row in device["rows"]:
        if row["status"] == "missing":
            by_words.setdefault((row["operation"], row["says"]), []).append(row["precision"])
    for (operation, says), where in by_words.items():
        yield f"{operation} in {', '.join(dict.fromkeys(where))}: {says}"


def _faults(device: dict[str, Any]) -> Iterator[str]:
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = collections.defaultdict(list)
    for row in device["rows"]:
        if row["status"] in FAULTS:
            groups[row["operation"], row["precision"], row["status"]].append(row)
    for (operation, _, _), rows in groups.items():
        yield from (fault(row) for row in rows[:SHOWN])
        if len(rows) > SHOWN:
            yield f"and {len(rows) - SHOWN} more cases of {operation}: --json has them"
        yield f"  {command(rows[0])}"


def fault(row: dict[str, Any]) -> str:
    """One row that is a fault, in a line."""
    size = f"{row['size']} ({', '.join(map(str, row['shape']))})"
    where = f"{row['operation']}, {row['precision']}, {row['layout']}, {size}, seed {row['seed']}"
    if row["status"] != "wrong":
        return f"{row['status'].upper()} {where}: {row['says']}"
    far = "is not finite, or of another shape or dtype"
    if row["error"] is not None:
        far = f"is {row['error']:.1e} {row['how']}, allowed are {row['allowed']:.1e}"
    second = ", in the second run alone" if row["repeat"] > 1 else ""
    also = f"; also {', '.join(row['also'])}" if row["also"] else ""
    return f"WRONG {where}: {row['direction']}, {row['what']} {far}{second}{also}"


def command(row: dict[str, Any]) -> str:
    """What runs that operation again."""
    only = f"--only {row['operation']!r} --seed {row['seed']}"
    return f"portable-amp doctor --thorough --device {row['device']} {only}"
