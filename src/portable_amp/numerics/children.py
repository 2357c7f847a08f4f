"""Cases in a process of their own: where one crashes or hangs, the others come all the same."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from portable_amp.capabilities import probe
from portable_amp.numerics.cases import Case, Row, cases, row_of
from portable_amp.numerics.trial import compare

START_S = 180.0
"""To import torch, and for the first case on the device."""
PATIENCE_S = 30.0
"""For one case. The slowest on a CPU took two seconds."""
_MARK = "portable-amp: "
_CODE = "from portable_amp.numerics.children import work; work()"


def here(
    device: torch.device, todo: Sequence[Case], *, seed: int, only: str | None, until: float
) -> Iterator[Row]:
    """What comes of each case, in this process."""
    for case in todo:
        yield compare(case, device, seed)


def in_children(
    device: torch.device, todo: Sequence[Case], *, seed: int, only: str | None, until: float
) -> Iterator[Row]:
    """What comes of each case, in a process that is replaced when it ends; until that time.

    Args:
        device: where.
        todo: all of `cases` of this device and `only`.
        seed: of weights and inputs.
        only: the name of the one operation, if not all.
        until: of `time.monotonic`. The first case is waited for.
    """
    at, crash = 0, ""
    dead: list[tuple[str, str, str]] = []
    while at < len(todo):
        first = at
        with _Child(device=str(device), start=at, seed=seed, only=only, dead=dead) as child:
            for answer in child.answers(len(todo) - at, until, at > 0):
                if crash:  # the one that is in flight was run again, alone, and is right
                    yield row_of(todo[at], device, seed, status="crashes", says=f"{crash}, {_LATE}")
                    crash = ""
                yield answer
                at += 1
        status, says = child.ended
        if status == "late":
            return
        if status == "crashes" and at > first and at < len(todo):
            crash = says
        elif status in ("crashes", "hangs") and at < len(todo):
            case = todo[at]
            yield row_of(case, device, seed, status=status, says=says)
            dead.append(_form(case))
            at, crash = at + 1, ""


_LATE = "but not where it is run first: a case before it wrote where it should not"


def _form(case: Case) -> tuple[str, str, str]:
    return case.operation, case.precision, case.layout


class _Child:
    """The process, and what it answers."""

    def __init__(self, **task: Any) -> None:
        self.ended = ("", "")
        self.words = ""
        """The last that it said besides: of a crash, the reason."""
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CODE, json.dumps(task)],
            stdin=subprocess.PIPE,  # it ends when this does
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(),
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.put(line.decode(errors="replace"))
        self.lines.put(None)

    def answers(self, count: int, until: float, any_yet: bool) -> Iterator[Row]:
        """At most so many; `ended` says why there are no more."""
        patience = START_S
        while count:
            left = until - time.monotonic() if any_yet else START_S
            try:
                line = self.lines.get(timeout=max(min(patience, left), 0))
            except queue.Empty:
                late = left < patience
                self.ended = ("late", "") if late else ("hangs", f"no answer in {patience:.0f} s")
                return
            if line is None:
                self.ended = ("crashes", f"{self._how()}{': ' * bool(self.words)}{self.words}")
                return
            head, mark, text = line.partition(_MARK)
            self.words = head.strip() or self.words
            if not mark:
                continue
            told = json.loads(text)
            if told == "broken":
                self.ended = ("broken", "")
                return
            if told != "ready":
                count, any_yet, patience = count - 1, True, PATIENCE_S
                yield Row(**told)

    def _how(self) -> str:
        code = self.process.wait()
        if code >= 0:
            return f"exit code {code:#x}"
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
        return f"signal {-code}"


def _environment() -> dict[str, str]:
    """With this Python's path, and with glibc's check of what is freed.

    What is written beyond the end of an allocation of the CPU ends the process then, in the
    operation that did it.
    Source: glibc's manual, Heap Consistency Checking; from 2.34 in a library of its own.
    """
    path = os.pathsep.join(one or str(Path.cwd()) for one in sys.path)
    checks = {}
    if platform.libc_ver()[0] == "glibc" and not os.environ.get("LD_PRELOAD"):
        checks = {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}
    return {**os.environ, "PYTHONPATH": path, **checks}


def work() -> None:
    """Run the cases that the command line tells, and print what comes of each."""
    task = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(ImportError):  # on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(task["device"])
    dead = {tuple(one) for one in task["dead"]}
    todo = cases(probe(device), task["only"])[task["start"] :]
    _tell("ready")
    for case in todo:
        if _form(case) in dead:
            _tell(asdict(row_of(case, device, task["seed"], status="untried")))
            continue
        row = compare(case, device, task["seed"])
        _tell(asdict(row))
        if row.status == "fails" and not _works(device):
            _tell("broken")
            return


def _tell(what: Any) -> None:
    print(f"{_MARK}{json.dumps(what)}", flush=True)


def _works(device: torch.device) -> bool:
    """Some errors stay: all that comes after them fails in this process."""
    try:
        return float(torch.ones(2, device=device).add(1).sum()) == 4
    except RuntimeError:
        return False


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)
