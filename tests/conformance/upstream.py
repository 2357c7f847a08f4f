"""Run PyTorch's own tests of autocast and GradScaler: as they are, then with our drop-ins in place.

    python tests/conformance/upstream.py PYTORCH_SOURCE_DIR

The source is of the installed torch's version; nothing of it is kept in this repository. Exit 0:
the outcomes differ exactly as in EXPECTED. 1: otherwise. 2: these tests cannot be run here.
"""

from __future__ import annotations

import importlib
import multiprocessing
import re
import sys
import unittest
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from portable_amp import ScalerShim, maybe_autocast

TESTS = {"test_autocast": ".", "test_torch": "grad_?scal|grads_invalidated"}
# Passed by torch's own classes, failed by the drop-ins: how, and why that is meant.
EXPECTED = {
    "test_autocast.TestTorchAutocast.test_non_string_device": (
        "ValueError not raised",
        "maybe_autocast takes a torch.device",
    ),
    "test_autocast.TestTorchAutocast.test_invalid_device": (
        "does not match \"'not a real device' is not a device torch knows",
        "a RuntimeError as in torch, in the words portable-amp uses everywhere",
    ),
    "test_autocast.TestAutocastCPU.test_cpu_autocast_deprecated_warning": (
        "FutureWarning not triggered",
        "it wants torch.cpu.amp.autocast deprecated; maybe_autocast has no such spelling",
    ),
    "test_torch.TestTorchDeviceTypeCPU.test_grad_scaler_deprecated_warning_cpu": (
        "FutureWarning not triggered",
        "it wants torch.cpu.amp.GradScaler deprecated; ScalerShim has no such spelling",
    ),
}
made = Counter(Autocast=0, ScalerShim=0)
Outcome = tuple[str, str]  # passed, failed or skipped; and why


def autocast(*args: Any, **kwargs: Any) -> Any:
    region = maybe_autocast(*args, **kwargs)
    made[type(region).__name__] += 1
    return region


class Scaler(ScalerShim):
    """With `enabled` left out torch scales, while the shim decides, and never scales on a CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"enabled": True} if len(args) < 6 else {}) | kwargs)
        made["ScalerShim"] += 1


class Seen(ModuleType):
    """A module as the tests see it: some names are swapped, and torch itself keeps its classes."""

    def __init__(self, real: ModuleType, **swapped: Any) -> None:
        self.__dict__.update(swapped, __name__=real.__name__, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)


def legacy(kind: str) -> Seen:
    """torch.cuda or torch.cpu, whose `amp` has an order of arguments of its own."""

    def legacy_autocast(enabled: bool = True, dtype: Any = None, cache_enabled: Any = None) -> Any:
        return autocast(kind, dtype, enabled, cache_enabled)

    def legacy_scaler(*args: Any, **kwargs: Any) -> Scaler:
        return Scaler(kind, *args, **kwargs)

    real = getattr(torch, kind)
    return Seen(real, amp=Seen(real.amp, autocast=legacy_autocast, GradScaler=legacy_scaler))


def put_dropins(module: ModuleType) -> None:
    names: dict[str, Any] = {"autocast": autocast, "GradScaler": Scaler}
    amp = Seen(torch.amp, **names, autocast_mode=Seen(torch.amp.autocast_mode, autocast=autocast))
    whole = Seen(torch, **names, amp=amp, cuda=legacy("cuda"), cpu=legacy("cpu"))
    swaps = [(torch, whole), *((getattr(torch, n), getattr(whole, n)) for n in [*names, "amp"])]
    for name, value in list(vars(module).items()):  # `import torch`, `from torch.amp import ...`
        setattr(module, name, next((ours for its, ours in swaps if its is value), value))


class Outcomes(unittest.TestResult):
    def __init__(self) -> None:
        super().__init__()
        self.by_test: dict[str, Outcome] = {}
        self.users: list[str] = []  # the tests that constructed a drop-in
        self.made = 0

    def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        self.by_test[test.id()] = ("passed", "")

    def stopTest(self, test: unittest.TestCase) -> None:  # noqa: N802
        super().stopTest(test)
        if made.total() > self.made:
            self.users.append(test.id())
        self.made = made.total()


def run(source: Path, dropins: bool) -> tuple[dict[str, Outcome], Counter[str], list[str]]:
    sys.path.insert(0, str(source / "test"))
    sys.argv = sys.argv[:1]  # torch's test modules read it
    suite = unittest.TestSuite()
    for name, pattern in TESTS.items():
        module = importlib.import_module(name)
        for case in list(vars(module).values()):
            if isinstance(case, type) and issubclass(case, unittest.TestCase):
                named = unittest.defaultTestLoader.getTestCaseNames(case)
                suite.addTests(case(test) for test in named if re.search(pattern, test))
        if dropins:
            put_dropins(module)
    if dropins:
        put_dropins(importlib.import_module("torch.testing._internal.autocast_test_lists"))
    result = Outcomes()
    suite.run(result)
    by_test = result.by_test | {test.id(): ("skipped", why) for test, why in result.skipped}
    for test, trace in result.failures + result.errors:
        error = trace.partition("\n\nTo execute this test")[0]  # torch appends a hint
        by_test[test.id()] = ("failed", error.strip().splitlines()[-1])
    return by_test, made, result.users


def refusal(source: Path) -> str | None:
    wanted = ("version.txt", "test/test_autocast.py", "test/test_torch.py")
    if missing := [name for name in wanted if not (source / name).is_file()]:
        return f"{source} is not a PyTorch source: it has no {', '.join(missing)}"
    its = (source / "version.txt").read_text().strip()  # 2.6.0a0 in the source of 2.6.0
    same = re.split("[a-z+]", its)[0] == re.split("[a-z+]", torch.__version__)[0]
    return None if same else f"{source} is PyTorch {its}; installed is torch {torch.__version__}"


def main(source: Path) -> int:
    if why := refusal(source):
        print(why, file=sys.stderr)
        return 2
    sides: list[dict[str, Outcome]] = []
    for title, dropins in ((f"torch {torch.__version__} itself", False), ("drop-ins", True)):
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as fresh:
            by_test, constructed, users = fresh.submit(run, source, dropins).result()
        sides.append(by_test)
        counts = Counter(kind for kind, _ in by_test.values())
        print(f"{title}: {', '.join(f'{counts[k]} {k}' for k in ('passed', 'failed', 'skipped'))}")
    passed = [test for test in users if by_test[test][0] == "passed"]
    print(f"{len(users)} tests constructed {dict(constructed)}; {len(passed)} of them passed")
    good = bool(passed) and 0 not in constructed.values()
    if not good:
        print("NOTHING TESTED: no test that constructed a drop-in passed, or one was never made")
    for test in sorted(sides[0] | sides[1] | EXPECTED):
        (was, before), (now, after) = (side.get(test, ("absent", "")) for side in sides)
        error, reason = EXPECTED.get(test, ("", ""))
        if was == now and not reason:
            if was != "passed":
                print(f"{was} on both sides: {test}: {before}")
            continue
        meant = bool(reason) and (was, now) == ("passed", "failed") and error in after
        good &= meant
        print(
            f"{was} -> {now}: {test}: {f'as meant: {reason}' if meant else f'NOT MEANT: {after}'}"
        )
    return 0 if good else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: python upstream.py PYTORCH_SOURCE_DIR", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(Path(sys.argv[1])))
