"""Put deliberate faults into the library, one at a time, and see which ones no test notices.

    sh tools/mutation.sh                           # every module; hours
    sh tools/mutation.sh scaler migrate/names      # these
    sh tools/mutation.sh --most 100                # a hundred faults of each module, by chance
    sh tools/mutation.sh --jobs 2 --table          # ... and write down the counts for the docs

What was tried is kept under build/mutation: a second run tries only what may have changed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import os
import platform
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from faults import Fault, faults

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "mutation"
EVIDENCE = ROOT / "docs" / "explanation" / "evidence"
COUNTS = EVIDENCE / "mutation.json"
EXPLAINED = EVIDENCE / "mutation-explained.json"
SOURCES = ROOT / "src"

NEVER = 1e9
"""Seconds of a test that fails without any fault."""
PATIENCE = 20.0
"""Seconds in which no test ends: the fault hangs, which is noticed."""

# Test files of a module beside those that bear its name; run whole where a fault shows at import.
OWN = {
    "api": ["tests/unit/test_context.py"],
    "backends": [f"tests/unit/test_{name}.py" for name in ("rng", "memory", "transfer")],
    "launchers": ["tests/unit/test_distributed.py"],
    "nested": ["tests/unit/test_transfer.py"],
    "doctor": ["tests/unit/test_cli.py"],
    "numerics": ["tests/unit/test_numerics.py"],
    "plan_cache": ["tests/unit/test_tuning.py"],
    "portable_amp_pytest": ["tests/unit/test_pytest_plugin.py"],
    "testing/plugin": ["tests/accelerator"],
    "testing/accelerator": ["tests/accelerator"],
    "testing/machines": ["tests/unit/test_precision.py", "tests/unit/test_play.py"],
    "testing/dtypes": ["tests/unit/test_dtype_flow.py"],
    "testing/strategies": [],
    "testing": ["tests/unit/test_play.py", "tests/conformance"],
    "migrate/findings": ["tests/migrate/test_rules.py", "tests/migrate/test_output.py"],
    "migrate": [f"tests/migrate/test_{name}.py" for name in ("detect", "fix", "commands")],
}
AFRESH = {"testing/strategies"}
"""Their functions run while tests are collected, so that a fault shows at import alone."""
RECORDS = "tests/unit/test_records.py"
"""Of records in all modules."""


def modules() -> dict[str, Path]:
    """Every module of the package that does anything, by its short name."""
    package = SOURCES / "portable_amp"
    found = {
        path.relative_to(package).with_suffix("").as_posix(): path
        for path in sorted(package.rglob("*.py"))
        if not path.name.startswith("__")
    }
    return found | {"portable_amp_pytest": SOURCES / "portable_amp_pytest.py"}


def own_files(module: str, path: Path) -> list[str]:
    """The test files of one module, and its own docstrings."""
    parts = module.split("/")
    named = [
        file.relative_to(ROOT).as_posix()
        for folder in ("unit", "property", "migrate")
        for file in sorted((ROOT / "tests" / folder).glob(f"test_{parts[-1]}*.py"))
    ]
    others = OWN.get(module, OWN.get(parts[0], []))
    return [*dict.fromkeys([path.relative_to(ROOT).as_posix(), *named, *others, RECORDS])]


def digest(*paths: Path) -> str:
    """Of the text of files and of all Python files in folders."""
    total = hashlib.sha1()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            total.update(file.read_bytes())
    return total.hexdigest()


def key_of(fault: Fault) -> str:
    """The same for the same fault in the same source."""
    return hashlib.sha1((fault.operator + fault.source).encode()).hexdigest()


@functools.cache
def shuffled(path: Path) -> list[Fault]:
    """The faults of a module by chance, though the same each time: the first are a fair sample."""
    return sorted(faults(path.read_text("utf-8")), key=key_of)


def statement_lines(source: str) -> dict[int, range]:
    """Line -> the lines of the smallest statement around it; of a compound one its head."""
    spans: dict[int, range] = {}
    for node in ast.walk(ast.parse(source)):  # outer ones come first
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            last = max(body[0].lineno - 1, first) if body else node.end_lineno or first
            for line in range(first, last + 1):
                spans[line] = range(first, last + 1)
    return spans


class Worker:
    """A process that tries faults in its own copy of the project."""

    def __init__(self, number: int) -> None:
        self.tree = BUILD / f"tree-{number}"
        shutil.rmtree(self.tree, ignore_errors=True)
        command = ["git", "ls-files", "-co", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)
        path = os.pathsep.join(str(self.tree / name) for name in ("src", "examples", "tests"))
        environment = os.environ | {
            "PYTHONPATH": path,
            "PYTHONDONTWRITEBYTECODE": "1",
            "HYPOTHESIS_PROFILE": "mutation",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("trials.py"))],
            cwd=self.tree,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> Any:
        """What it answers to one request."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a worker died; see {self.tree}/collected.log")
        return json.loads(answer)

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def covered(worker: Worker) -> dict[str, Any]:
    """Every test: its seconds, and the lines that it runs. Measured again where files changed."""
    kept = BUILD / "covered.json"
    state = {"src": digest(SOURCES), "python": sys.version}
    known = json.loads(kept.read_text()) if kept.exists() else {}
    if known.get("state") != state:
        known = {"state": state, "files": {}}
    support = digest(ROOT / "tests" / "support.py", ROOT / "tests" / "conftest.py")
    stamps = {
        path.relative_to(ROOT).as_posix(): digest(path) + support
        for folder in (SOURCES, ROOT / "tests")
        for path in sorted(folder.rglob("*.py"))
    }
    stale = [name for name, stamp in stamps.items() if known["files"].get(name, [""])[0] != stamp]
    if stale:
        print(f"measuring what the tests of {len(stale)} files cover", flush=True)
        target = BUILD / "cover-new.json"
        answer = worker.ask(what="cover", files=stale, target=str(target))
        if answer != "done":
            raise SystemExit(f"the tests could not be measured: {answer}")
        new = json.loads(target.read_text())
        for test, why in new["failed"].items():
            print(f"fails without any fault, and is left out: {test}\n{why}", flush=True)
            new["tests"][test] = [NEVER, {}]
        for name in stale:
            tests = {t: v for t, v in new["tests"].items() if t.split("::")[0] == name}
            known["files"][name] = [stamps[name], tests]
        kept.write_text(json.dumps(known))
    return {
        test: found
        for name, (_, tests) in known["files"].items()
        if name in stamps
        for test, found in tests.items()
    }


class Module:
    """The faults of one module, the tests for each, and what came of them."""

    def __init__(self, name: str, path: Path, tests: dict[str, Any], asked: Any) -> None:
        self.name, self.path = name, path
        self.short = path.relative_to(ROOT).as_posix()
        self.source = path.read_text("utf-8")
        self.spans = statement_lines(self.source)
        self.own = own_files(name, path)
        self.tests = tests
        self.seconds = asked.seconds
        self.skipped = self.slow()
        self.faults = shuffled(path)
        self.kills: Counter[str] = Counter()
        self.file = BUILD / "results" / f"{name.replace('/', '.')}.json"
        self.stamp = digest(SOURCES, ROOT / "tests")
        self.known: dict[str, Any] = {}
        if self.file.exists() and not asked.fresh:
            self.known = json.loads(self.file.read_text())
        self.results: dict[str, Any] = {}
        self.lock = threading.Lock()

    def is_own(self, test: str) -> bool:
        """It stands in one of the module's own test files."""
        return any(test.startswith(name) for name in self.own)

    def slow(self) -> list[str]:
        """The tests of its own files that twice the time for a fault is too short for."""
        skipped, budget = [], 2 * self.seconds
        own = [(took, test) for test, (took, _) in self.tests.items() if self.is_own(test)]
        for took, test in sorted(own):
            budget -= took
            if budget < 0:
                skipped.append(test)
        return skipped

    def pending(self, most: int | None) -> list[Fault]:
        """The faults to try, among the first `most`; of the others the answer is known."""
        left = []
        for number, fault in enumerate(self.faults):
            old = self.known.get(key_of(fault))
            if old and self.holds(old):
                self.results[key_of(fault)] = old
            elif most is None or number < most:
                left.append(fault)
        self.save()
        return left

    def holds(self, old: dict[str, Any]) -> bool:
        """Killed by a test that is as it was; or survived tests that all are."""
        word, _, test = old["answer"].partition(" ")
        if word == "killed" and "::" in test:
            file = ROOT / test.split("::")[0]
            return test in self.tests and digest(file) == old["stamp"]
        return old["stamp"] == self.stamp and old["seconds"] >= self.seconds

    def request(self, fault: Fault) -> dict[str, Any]:
        """What a worker needs to know."""
        lines = set(self.spans.get(fault.line, range(fault.line, fault.line + 1)))
        running = [t for t, (_, ran) in self.tests.items() if lines & set(ran.get(self.short, ()))]
        # One that starts processes covers nothing here.
        started = [t for t, (took, _) in self.tests.items() if took > 1 and self.is_own(t)]
        order = sorted(
            running,
            key=lambda test: (-self.kills[test], not self.is_own(test), self.tests[test][0]),
        )
        chosen: list[str] = []
        budget = self.seconds
        for test in [*order, *(test for test in started if test not in running)]:
            if self.tests[test][0] <= budget:
                budget -= self.tests[test][0]
                chosen.append(test)
        return {
            "what": "afresh" if self.name in AFRESH else "try",
            "skipped": self.skipped,
            "module": ".".join(self.path.relative_to(SOURCES).with_suffix("").parts),
            "path": self.short,
            "original": self.source,
            "source": fault.source,
            "tests": chosen,
            "files": self.own,
            "patience": PATIENCE,
        }

    def check(self, worker: Worker) -> None:
        """The files that are run whole pass without a fault, or every fault would be noticed."""
        kept = BUILD / "checked" / self.file.name
        if kept.exists() and kept.read_text() == self.stamp:
            return
        nothing = Fault("", 1, "", "", self.source)
        answer = worker.ask(**self.request(nothing) | {"what": "afresh"})
        if answer != "survived":
            raise SystemExit(f"{self.name}: without any fault: {answer}")
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(self.stamp)

    def note(self, fault: Fault, answer: str) -> None:
        """Keep the answer."""
        word, _, test = answer.partition(" ")
        stamp = self.stamp
        if word == "killed" and "::" in test:
            # As it was copied: the one in the project may have changed since.
            stamp = digest(BUILD / "tree-0" / test.split("::")[0])
            self.kills[test] += 1
        with self.lock:
            self.results[key_of(fault)] = {
                "operator": fault.operator,
                "line": fault.line,
                "was": fault.was,
                "becomes": fault.becomes,
                "answer": answer,
                "seconds": self.seconds,
                "module": digest(self.path),
                "stamp": stamp,
            }
            self.save()

    def save(self) -> None:
        """What is known so far."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.results, indent=1))
        part.replace(self.file)


def explained() -> dict[tuple[str, str, str], dict[str, str]]:
    """The survivors that somebody looked at, by module and change."""
    rows = json.loads(EXPLAINED.read_text("utf-8")) if EXPLAINED.exists() else []
    return {(row["module"], row["was"], row["becomes"]): row for row in rows}


def counts(name: str, results: dict[str, Any]) -> dict[str, int]:
    """Of one module: faults that start, noticed, and explained as no change of behaviour."""
    started = [row for row in results.values() if row["answer"] != "broken"]
    left = [row for row in started if row["answer"] == "survived"]
    reasons = explained()
    found = [reasons.get((name, row["was"], row["becomes"])) for row in left]
    equivalent = sum(row is not None and row["kind"] == "equivalent" for row in found)
    return {
        "faults": len(started),
        "equivalent": equivalent,
        "killed": len(started) - len(left),
        "missed": len(left) - equivalent,
        "explained": sum(row is not None and row["kind"] != "equivalent" for row in found),
    }


def drawn(path: Path, rows: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """How many faults there are, and the answers to the first of them.

    Of later ones only those may be known that were noticed once, which would be no fair sample.
    """
    order = [*map(key_of, shuffled(path))]
    return len(order), {key: rows[key] for key in itertools.takewhile(rows.__contains__, order)}


def write_table() -> None:
    """Counts of all modules that were tried, for the documents."""
    found = {}
    for name, path in modules().items():
        file = BUILD / "results" / f"{name.replace('/', '.')}.json"
        rows = json.loads(file.read_text()) if file.exists() else {}
        # Of a module that is as it was.
        rows = {key: row for key, row in rows.items() if row["module"] == digest(path)}
        if not rows:
            continue
        total, first = drawn(path, rows)
        if first:
            found[name] = {"all": total, **counts(name, first)}
    told = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "cosmic-ray": metadata.version("cosmic-ray"),
        "modules": found,
    }
    COUNTS.write_text(json.dumps(told, indent=1) + "\n", "utf-8")


def survivors(name: str, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that nobody explained yet."""
    known = explained()
    return [
        row
        for row in sorted(results.values(), key=lambda row: row["line"])
        if row["answer"] == "survived" and (name, row["was"], row["becomes"]) not in known
    ]


def main() -> int:
    """Try the faults of the modules that are named; 1 where some survived and are not explained."""
    parser = argparse.ArgumentParser(prog="mutation", description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE")
    parser.add_argument("--jobs", type=int, default=1, help="processes (1)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=30.0,
        help="of tests on a fault, the fastest first; what a later one notices survives (30)",
    )
    parser.add_argument(
        "--most", type=int, metavar="N", help="faults of a module, drawn by chance (all)"
    )
    parser.add_argument("--fresh", action="store_true", help="forget earlier answers")
    parser.add_argument("--table", action="store_true", help="write the counts for the docs")
    asked = parser.parse_args()
    there = modules()
    for name in asked.modules:
        if name not in there:
            parser.error(f"no module {name!r}; there are {', '.join(there)}")
    BUILD.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    workers = [Worker(number) for number in range(asked.jobs)]
    tests = covered(workers[0])
    work: queue.Queue[tuple[Module, Fault]] = queue.Queue()
    unchecked: queue.Queue[Module] = queue.Queue()
    chosen = []
    found = []
    for name in asked.modules or there:
        module = Module(name, there[name], tests, asked)
        chosen.append(module)
        pending = module.pending(asked.most)
        if pending:
            unchecked.put(module)
        found += [(number, module, fault) for number, fault in enumerate(pending)]
    for _, module, fault in sorted(found, key=lambda row: row[0]):  # some of each in turn
        work.put((module, fault))
    print(f"{work.qsize()} faults in {len(chosen)} modules to try", flush=True)

    def check(worker: Worker) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                unchecked.get_nowait().check(worker)

    def serve(worker: Worker) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                module, fault = work.get_nowait()
                module.note(fault, worker.ask(**module.request(fault)))
                if work.qsize() % 100 == 0:
                    print(f"{work.qsize()} left after {time.monotonic() - began:.0f} s", flush=True)

    with ThreadPoolExecutor(len(workers)) as pool:
        for each in (check, serve):
            list(pool.map(each, workers))
    for worker in workers:
        worker.close()
    missed = 0
    for module in chosen:
        module.save()
        left = survivors(module.name, module.results)
        missed += len(left)
        for row in left:
            print(f"{module.short}:{row['line']}: {row['was']}\n    -> {row['becomes']}")
        found = counts(module.name, drawn(module.path, module.results)[1])
        real = found["faults"] - found["equivalent"]
        share = found["killed"] / real if real else 1.0
        print(f"{module.name}: {found['killed']} of {real} noticed, {share:.1%}", flush=True)
    if asked.table:
        write_table()
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
