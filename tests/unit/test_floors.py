"""The architecture, read from the source: imports point down, devices are named in one place."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import portable_amp

PACKAGE = Path(portable_amp.__file__).parent

FLOORS = (
    {"callables", "errors", "launchers"},
    {"notices"},
    {"backends", "nested"},
    {"capabilities"},
    {"precision", "traps"},
    {"autocast", "memory", "transfer", "rng", "checkpoint", "distributed", "fp32_state"},
    {"fp32"},
    {"scaler", "copies"},
    {"numerics"},
    {"tuning"},
    {"plan_cache"},
    {"context"},
    {"api"},
    {"doctor", "migrate", "testing"},
    {"cli"},
    {"__init__", "__main__"},
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """The modules of this package that are imported anywhere in the tree, in functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [node.module or ""]
            if node.module == "portable_amp":
                names = [f"portable_amp.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("portable_amp.")}
    return found


def violations(path: Path, source: str) -> list[str]:
    mine = name_of(path)
    return [
        f"{mine} imports {other}"
        for other in imported(ast.parse(source))
        # The version lives in __init__; a name that is no module is one of its public names.
        if other in FLOOR and FLOOR[other] >= FLOOR[mine] and other != mine
    ]


def test_every_module_has_a_floor() -> None:
    assert {name_of(path) for path in MODULES} == set(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    assert violations(path, path.read_text(encoding="utf-8")) == []


def test_the_scanner_knows_nothing_of_the_runtime() -> None:
    for path in (PACKAGE / "migrate").glob("*.py"):
        text = path.read_text("utf-8")
        assert imported(ast.parse(text)) <= {"migrate"}
        assert not re.search(r"^\s*(import|from) torch\b", text, re.M)


def test_an_import_that_points_up_is_found() -> None:
    path = PACKAGE / "backends.py"
    for line in (
        "from portable_amp.context import DeviceContext",
        "import portable_amp.precision",
        "from portable_amp import scaler",
        "def f():\n    from portable_amp.cli import main",
    ):
        assert violations(path, line)
    assert not violations(path, "from portable_amp.errors import DeviceError")


def names_a_device_type(source: str) -> list[str]:
    """Comparisons with the name of a device type, and attributes like `is_cuda`."""
    kinds = {"cuda", "mps", "xpu", "cpu", "hpu", "npu", "mtia", "hip"}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            found += [f"line {node.lineno}" for word in words & kinds if word]
        if isinstance(node, ast.Attribute) and re.fullmatch(r"is_(cuda|mps|xpu|cpu)", node.attr):
            found.append(f"line {node.lineno}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_two_modules_branch_on_device_types(path: Path) -> None:
    if name_of(path) not in ("backends", "capabilities", "migrate"):  # whose subject they are
        assert names_a_device_type(path.read_text(encoding="utf-8")) == []


def test_a_branch_on_a_device_type_is_found() -> None:
    assert names_a_device_type("if device.type == 'mps': pass")
    assert names_a_device_type("if kind in ('cuda', 'xpu'): pass")
    assert names_a_device_type("x.is_cuda")
