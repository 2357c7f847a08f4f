"""One worker: tries faults in a copy of the project, each in a process of its own, by fork.

torch, Hypothesis and the tests are loaded once. A fault inside functions goes into the functions
that are loaded already; one that shows at import is imported afresh, with the module's tests.
Reads one request a line from stdin, and answers with one line on stdout.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = ["src", "tests/unit", "tests/property", "tests/conformance", "tests/migrate"]
# They read the source, the documents or the package, or need what is not here.
IGNORED = [
    "tests/unit/test_docs.py",
    "tests/unit/test_floors.py",
    "tests/unit/test_mutation.py",
    "tests/unit/test_package.py",
    "tests/unit/test_torch_matrix.py",
    "tests/conformance/test_upstream.py",
    "tests/migrate/test_rule_pages.py",
    "tests/migrate/test_self.py",
]
OPTIONS = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp={}"]
OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # Hypothesis is loaded already
OPTIONS += [f"--ignore={name}" for name in IGNORED]

Say = Callable[[str], None]


def options() -> list[str]:
    """The arguments of pytest; each process has a temporary folder of its own."""
    return [option.format(scratch(os.getpid())) for option in OPTIONS]


def scratch(process: int) -> Path:
    """Outside of the project, whose settings would count there."""
    return Path(tempfile.gettempdir(), f"portable-amp-mutation-{process}")


def trial(run: Callable[[Say], str], patience: float) -> str:
    """What `run` answers in a fork of this process: "survived", or what killed the fault.

    It says a line for each test that begins; with none for `patience` seconds the last one hangs.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.close(reader)
        quiet = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(quiet, number)
        try:
            answer = run(lambda line: os.write(writer, f"{line}\n".encode()) and None)
        except BaseException as error:
            answer = f"crash {type(error).__name__}: {error}"
        os.write(writer, f"={answer}\n".encode())
        os._exit(0)
    os.close(writer)
    told = latest = b""
    answer = "crash"
    try:
        while True:
            if not select.select([reader], [], [], patience)[0]:
                answer = f"hangs {latest.decode()}"
                break
            more = os.read(reader, 65536)
            if not more:
                break
            told += more
            *lines, told = told.split(b"\n")
            latest = lines[-1] if lines else latest
            final = [line for line in lines if line.startswith(b"=")]
            if final:
                answer = final[0][1:].decode()
                break
    finally:
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(child, signal.SIGKILL)
        os.close(reader)
        os.waitpid(child, 0)
        shutil.rmtree(scratch(child), ignore_errors=True)
    return answer


class Watcher:
    """Notes the first test that fails, and says each that begins."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.failed = ""
        self.why = ""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        self.say(nodeid.replace("\n", " "))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of setup, call and teardown."""
        if report.failed and not self.failed:
            self.failed, self.why = report.nodeid, report.longreprtext

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A module of tests that cannot be imported is red, too."""
        if report.failed and not self.failed:
            self.failed = report.nodeid


def afresh(request: dict[str, Any]) -> Callable[[Say], str]:
    """Import everything with the fault in it, and run whole files."""

    def run(say: Say) -> str:
        sys.path[:0] = ["tests"]
        os.environ["PORTABLE_AMP_ACCELERATOR_TESTS"] = "1"  # of tests/accelerator, if it is run
        try:
            importlib.import_module(request["module"])
        except Exception:
            return "broken"
        watcher = Watcher(say)
        skipped = [f"--deselect={name}" for name in request["skipped"]]
        code = pytest.main([*options(), *skipped, *request["files"]], plugins=[watcher])
        if watcher.failed:
            return f"killed {watcher.failed}"
        nothing_ran = pytest.ExitCode.NO_TESTS_COLLECTED  # and so nothing was noticed
        return "survived" if code in (0, nothing_ran) else f"killed exit {code}"

    return run


def nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """The functions and classes right inside."""
    return (const for const in code.co_consts if isinstance(const, types.CodeType))


def shallow(code: types.CodeType) -> tuple[Any, ...]:
    """All that a block does itself, but for what stands inside its functions and classes."""
    consts = tuple(
        const.co_name if isinstance(const, types.CodeType) else repr(const)
        for const in code.co_consts
    )
    table = getattr(code, "co_exceptiontable", b"")  # 3.11
    return code.co_code, table, consts, code.co_names, code.co_freevars


def changed_functions(
    old: types.CodeType, new: types.CodeType
) -> list[tuple[types.CodeType, types.CodeType]] | None:
    """The outermost functions that differ; None where something differs outside functions."""
    if shallow(old) != shallow(new):
        return None
    pairs: list[tuple[types.CodeType, types.CodeType]] = []
    for before, after in zip(nested(old), nested(new), strict=True):
        if before == after:
            continue
        if before.co_flags & 0x1:  # CO_OPTIMIZED: a function, not the body of a class
            pairs.append((before, after))
        else:
            inner = changed_functions(before, after)
            if inner is None:
                return None
            pairs += inner
    return pairs


class Loaded:
    """A process in which all tests are collected: it serves requests in place of running them."""

    def __init__(self, requests: int, answers: int) -> None:
        self.requests = os.fdopen(requests)
        self.answers = os.fdopen(answers, "w")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Serve until there is no request any more."""
        items = {item.nodeid: item for item in session.items}
        gc.collect()
        functions: dict[tuple[str, str], list[types.FunctionType]] = {}
        for thing in gc.get_objects():
            if type(thing) is types.FunctionType:  # `isinstance` asks proxies, which warn
                code = thing.__code__
                functions.setdefault((code.co_filename, code.co_name), []).append(thing)
        gc.freeze()  # behind that nobody finds them
        for line in self.requests:
            request = json.loads(line)
            if request["what"] == "afresh":
                answer = "import"
            elif request["what"] == "cover":
                answer = cover(items, request)
            else:
                answer = self.swapped(request, functions, items)
            self.answers.write(json.dumps(answer) + "\n")
            self.answers.flush()
        return True

    def swapped(
        self,
        request: dict[str, Any],
        functions: dict[tuple[str, str], list[types.FunctionType]],
        items: dict[str, pytest.Item],
    ) -> str:
        """The fault in the functions that are loaded; "import" where that is not enough."""
        path = str(Path(request["path"]).resolve())
        flags = {"filename": path, "mode": "exec", "dont_inherit": True}
        pairs = changed_functions(
            compile(request["original"], **flags), compile(request["source"], **flags)
        )
        if pairs is None:
            return "import"
        swaps = []
        for old, new in pairs:
            found = [f for f in functions.get((path, old.co_name), []) if f.__code__ == old]
            if not found or len(old.co_freevars) != len(new.co_freevars):
                return "import"
            swaps += [(function, new) for function in found]
        chosen = [items[name] for name in request["tests"] if name in items]
        if not chosen:  # it may run while modules are imported, or in processes of their own
            return "import"

        def run(say: Say) -> str:
            for function, code in swaps:
                function.__code__ = code
            watcher = Watcher(say)
            chosen[0].config.pluginmanager.register(watcher)
            for item, following in itertools.pairwise([*chosen, None]):
                item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
                if watcher.failed:
                    return f"killed {watcher.failed}"
            return "survived"

        return trial(run, request["patience"])


def cover(items: dict[str, pytest.Item], request: dict[str, Any]) -> str:
    """How long each test takes, and which lines of the package it runs."""
    import coverage

    wanted = [item for name, item in items.items() if name.split("::")[0] in request["files"]]
    target = Path(request["target"])

    def run(say: Say) -> str:
        measured = coverage.Coverage(data_file=None, source=["src"], config_file=False)
        measured.set_option("run:disable_warnings", ["no-data-collected"])
        watcher = Watcher(say)
        if wanted:
            wanted[0].config.pluginmanager.register(watcher)
        seconds: dict[str, float] = {}
        failed = {}
        measured.start()
        for item, following in itertools.pairwise([*wanted, None]):
            measured.switch_context(item.nodeid)
            began = time.perf_counter()
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            seconds[item.nodeid] = time.perf_counter() - began
            if watcher.failed:
                failed[watcher.failed] = watcher.why
                watcher.failed = ""
        measured.stop()
        say("none any more")
        data = measured.get_data()
        lines: dict[str, dict[str, list[int]]] = {name: {} for name in seconds}
        for file in data.measured_files():
            short = str(Path(file).relative_to(Path.cwd()))
            for number, contexts in data.contexts_by_lineno(file).items():
                for context in contexts:
                    if context:
                        lines[context].setdefault(short, []).append(number)
        found = {name: [seconds[name], lines[name]] for name in seconds}
        target.write_text(json.dumps({"failed": failed, "tests": found}))
        return "done"

    return trial(run, 300.0)


def main() -> None:
    """Serve requests on stdin."""
    import hypothesis.stateful  # noqa: F401
    import numpy as np  # noqa: F401
    import torch
    import torch._dynamo  # takes two seconds, and some tests want it

    torch.set_num_threads(1)
    sys.path[:0] = [str(Path(name).resolve()) for name in ("src", "examples", "tests")]
    to_child, from_parent = os.pipe()[::-1], os.pipe()
    requests, send = to_child[1], to_child[0]
    receive, answers = from_parent
    if os.fork() == 0:
        os.close(send)
        os.close(receive)
        log = os.open("collected.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        quiet = os.open(os.devnull, os.O_RDONLY)
        for number, to in ((0, quiet), (1, log), (2, log)):
            os.dup2(to, number)
        arguments = [name for name in options() if name != "-x"]
        os._exit(pytest.main([*arguments, *TESTS], plugins=[Loaded(requests, answers)]))
    os.close(requests)
    os.close(answers)
    loaded = os.fdopen(send, "w")
    heard = os.fdopen(receive)
    for line in sys.stdin:
        request = json.loads(line)
        path = Path(request.get("path", os.devnull))
        original = request.get("original", "")
        if original:
            path.write_text(request["source"], "utf-8")
        loaded.write(line)
        loaded.flush()
        answer = heard.readline()
        if answer == '"import"\n':
            answer = json.dumps(trial(afresh(request), request["patience"])) + "\n"
        if original:
            path.write_text(original, "utf-8")
        sys.stdout.write(answer or '"gone"\n')
        sys.stdout.flush()


if __name__ == "__main__":
    main()
