"""What the fixer writes, line by line; and that it runs here, where there is no CUDA."""

from __future__ import annotations

import ast
import inspect
import itertools
import os
import re
import stat
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import portable_amp
from portable_amp.migrate import fixer, regions, rules
from portable_amp.migrate.findings import Edit, Finding
from portable_amp.migrate.scan import scan

FIXTURES = Path(__file__).parent / "fixtures" / "fix"


class Case(NamedTuple):
    """A program, what its safe fixes make of it, and what all of them do."""

    name: str
    before: str
    safe: str
    unsafe: str


def cases() -> list[Case]:
    """All of them; a part that says nothing means that nothing changes."""
    found = []
    for path in sorted(FIXTURES.glob("*.txt")):
        for part in path.read_text("utf-8").split("=== ")[1:]:
            name, _, text = part.partition("\n")
            before, _, after = text.partition("--- safe\n")
            safe, _, unsafe = after.partition("--- unsafe\n")
            safe = safe or before
            found.append(Case(f"{path.stem}: {name}", before, safe, unsafe or safe))
    return found


each = pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)


def fix(text: str, *, unsafe: bool = False) -> str:
    """One run of the fixer."""
    return fixer.apply(text, scan(text), unsafe=unsafe)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Notes which names of the package are called."""
    names: set[str] = set()

    def noting(name: str, thing: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            names.add(name)
            return thing(*args, **options)

        return call

    for name in ("DeviceContext", "clear_cache"):
        monkeypatch.setattr(portable_amp, name, noting(name, getattr(portable_amp, name)))
    monkeypatch.setenv("PORTABLE_AMP_DEVICE", "cpu")
    return names


def test_there_are_cases() -> None:
    assert len(cases()) > 40


@each
def test_safe(case: Case) -> None:
    assert fix(case.before) == case.safe


@each
def test_unsafe(case: Case) -> None:
    assert fix(case.before, unsafe=True) == case.unsafe


@each
def test_unsafe_after_safe_is_the_same(case: Case) -> None:
    assert fix(fix(case.before), unsafe=True) == case.unsafe


@each
def test_a_second_fix_changes_nothing(case: Case) -> None:
    for unsafe in (False, True):
        once = fix(case.before, unsafe=unsafe)
        assert fix(once, unsafe=unsafe) == once


@each
def test_it_runs_here(case: Case, called: set[str]) -> None:
    for text in {case.safe, case.unsafe} - {case.before}:
        called.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # A CPU without bf16 says so, once.
            warnings.simplefilter("ignore", portable_amp.PrecisionFallbackWarning)
            if '"cuda"' not in text and ".cuda(" not in text:
                exec(compile(text, case.name, "exec"), {"__name__": "fixed"})
                assert called >= imported(text) - {"probe"}


def imported(text: str) -> set[str]:
    """What a program takes from the package."""
    return {
        alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module == "portable_amp"
        for alias in node.names
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("torch.autocast('cuda')", ""),
        ("torch.autocast('cuda', d)", "Left to you: the dtype is known only when it runs"),
        ("torch.autocast('cuda', **d)", "Left to you: its arguments are known only"),
        ("torch.autocast('cuda'), torch.autocast('cpu')", "Left to you: there is another region"),
        (
            "torch.autocast('cuda'), torch.autocast('cuda', torch.bfloat16)",
            "Left to you: both fp16 and bf16 are computed",
        ),
        (
            "torch.amp.GradScaler('cuda'), torch.autocast('cuda', torch.bfloat16)",
            "Unsafe to fix: bf16 is computed here, for which",
        ),
        ("ctx = DeviceContext()\ntorch.autocast('cuda')", "Unsafe to fix: .* asks for auto."),
        ("ctx = DeviceContext(precision=a)\ntorch.autocast('cuda')", "Unsafe .* asks for what is"),
        ("ctx = DeviceContext(**a)\ntorch.autocast('cuda')", "Unsafe to fix: .* asks for what is"),
        ("ctx = DeviceContext(precision='fp16')\ntorch.autocast('cuda')", ""),
    ],
)
def test_why_it_is_not_fixed_is_told(text: str, reason: str) -> None:
    first = scan("import torch\nfrom portable_amp import DeviceContext\n" + text)[0]
    added = first.message.removeprefix(rules.RULES[first.code].message)
    assert re.match(" " + reason if reason else "$", added), added


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        ("x.cuda(0)", True),
        ("x.cuda(0, True)", False),
        ("x.cuda(None, non_blocking=True)", False),
        ("x.to('cuda', torch.half)", True),
        ("x.to('cuda', torch.half, True)", False),
        ("torch.zeros(2, 3, 4, device='cuda')", True),
    ],
)
def test_a_copy_that_does_not_wait_becomes_none_that_does_not_either(
    call: str, waits: bool
) -> None:
    fixed = fix(f"import torch\n{call}\n", unsafe=True)
    assert fixed.endswith(f"\n{call}\n") is not waits


@pytest.mark.parametrize(
    "made",
    [
        *("xp.new_zeros(2", "xp.new_ones(2", "xp.new_full((2,), 1", "xp.new_empty(2"),
        *("xp.new_tensor(2", "xp.to_empty(", "xp.zeros(2", "xp.ones(2", "xp.empty(2"),
        *("xp.full((2,), 1", "xp.rand(2", "xp.randn(2", "xp.randint(2, (3,)", "xp.arange(2"),
        *("xp.tensor(2", "xp.to("),
    ],
)
def test_what_makes_a_tensor_under_another_name_takes_a_device(made: str) -> None:
    """Others may want text: xp is whatever it is."""
    comma = "" if made.endswith("(") else ", "
    fixed = fix(f"import torch\n{made}{comma}device='cuda')\nxp.other(device='cuda')\n")
    assert fixed.endswith(f"\n{made}{comma}device=ctx.device)\nxp.other(device=str(ctx.device))\n")


LINES = (
    "# -*- coding: latin-1 -*-\n# caf\u00e9\nimport torch\t \n\n"
    "x = torch.ones(1).cuda()\t# \u00fc  \n\n\n"
)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("final", [True, False])
def test_only_the_lines_concerned_change(end: str, final: bool) -> None:
    text = LINES.replace("\n", end) if final else LINES.rstrip("\n").replace("\n", end)
    after = fix(text)
    made = 'ctx = DeviceContext(precision="fp32")'
    new = f"from portable_amp import DeviceContext{end}{end}{made}{end}"
    wanted = text.replace(f"import torch\t {end}", f"import torch\t {end}{new}")
    assert after == wanted.replace(".cuda()", ".to(ctx.device)")


def test_not_ascii_before_it_on_the_line() -> None:
    assert fix('import torch\nd = {"\u00fc\U0001f600": torch.ones(1).cuda()}\n').endswith(
        '\nd = {"\u00fc\U0001f600": torch.ones(1).to(ctx.device)}\n'
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("import torch; x = torch.ones(1).cuda()\n", "\nx = torch.ones(1).to(ctx.device)\n"),
        ("import os; import torch; torch.ones(1).cuda()\n", "\ntorch.ones(1).to(ctx.device)\n"),
        ("import os; import torch  # both\nx = torch.ones(1).cuda()\n", None),
        ("if 1:\n    import torch\ntorch.ones(1).cuda()\n", None),
        ("import os; import sys; import torch\ntorch.ones(1).cuda()\n", None),
        ("\n\nx = 1\nimport torch\ntorch.ones(1).cuda()\n", None),
        ("# What it is.\n\nx = 1\nimport torch\ntorch.ones(1).cuda()\n", None),
        ("import torch\ntorch.ones(1).cuda(non_blocking=True)\n", "\nctx.to(torch.ones(1))\n"),
        ("#!/usr/bin/env python\nx.cuda()  # torch\nimport torch\n", None),
        ('"""Doc."""\nimport torch\nif 1:\n    torch.cuda.synchronize()\n', None),
        ("try:\n    import torch\nexcept ImportError:\n    pass\ntorch.ones(1).cuda()\n", None),
        ("from x import *\nimport torch\ntorch.ones(1).cuda()\n", None),
    ],
)  # fmt: skip
def test_where_the_import_goes(before: str, after: str | None) -> None:
    fixed = fix(before)
    tree = ast.parse(fixed)
    made = [at for at, one in enumerate(tree.body) if "DeviceContext(" in ast.unparse(one)]
    used = [
        at for at, one in enumerate(tree.body) if "ctx." in ast.unparse(one).replace("device_", "")
    ]
    imports = [at for at, one in enumerate(tree.body) if "import DeviceC" in ast.unparse(one)]
    assert imports[0] < made[0] < used[0]
    assert ast.get_docstring(tree) == ast.get_docstring(ast.parse(before))
    assert not before.startswith("#!") or fixed.startswith("#!")
    assert after is None or fixed.endswith(after)


@pytest.mark.parametrize("first", ["import torch", "from torch import nn", "import os"])
def test_the_import_goes_below_those_of_others(first: str) -> None:
    text = f"try:\n    {first}\nexcept ImportError:\n    pass\nimport os\nx.cuda()\n"
    fixed = fix(text)
    assert fixed.index("import os\n") < fixed.index("from portable_amp") < fixed.index("x.to(")


def test_what_was_imported_still_is() -> None:
    lines = "from portable_amp import clear_cache\nfrom portable_amp import ranks as here\n"
    tree = ast.parse(fix(lines + "import torch\nx.cuda()\n"))
    made = [alias for one in tree.body if isinstance(one, ast.ImportFrom) for alias in one.names]
    assert sorted(one.name for one in made) == ["DeviceContext", "clear_cache", "ranks"]
    assert {one.asname for one in made if one.name == "ranks"} == {"here"}


def test_a_context_has_a_name_that_nobody_has() -> None:
    taken: list[str] = []
    ways = ("{} = 1", "import {}", "import {}.inner", "import a.b as {}", "def {}(): pass")
    for _ in range(7):
        lines = [way.format(one) + "\n" for way, one in zip(itertools.cycle(ways), taken)]
        text = "import torch\n" + "".join(lines) + "x.cuda()\n"
        (name,) = re.findall(r"^(\w+) = DeviceContext\(", fix(text), re.M)
        assert fix(text).endswith(f"x.to({name}.device)\n")
        assert name not in taken
        taken.append(name)
    assert taken[0] == "ctx"


def finding(*edits: Edit, how: Any = "safe") -> Finding:
    """One with edits alone."""
    return Finding("", 1, 1, 1, "PAM000", "error", "", {}, how, edits)


@pytest.mark.parametrize("call", ["torch.amp.GradScaler({}'cuda:1')", "torch.autocast({}'cuda:1')"])
@pytest.mark.parametrize("name", ["", "device=", "device_type="])
def test_another_card_than_the_first_is_left_to_it(call: str, name: str) -> None:
    text = f"import torch\n{call.format(name)}\n"
    assert fix(text, unsafe=True) == text


@pytest.mark.parametrize("home", ["portable_amp", "portable_amp.context"])
def test_the_precision_of_a_context_that_is_there_counts(home: str) -> None:
    text = f"import torch\nfrom {home} import DeviceContext\nctx = DeviceContext()\n"
    found = scan(text + "torch.autocast('cuda')\n")[0]
    assert found.fix == "unsafe"
    assert "asks for auto" in found.message


@pytest.mark.parametrize("given", ["*a", "**a", "1", "device=1"])
def test_a_call_that_torch_does_not_have_is_left(given: str) -> None:
    text = f"import torch\ntorch.cuda.empty_cache({given})\n"
    assert fix(text, unsafe=True) == text


def test_of_two_that_overlap_the_outer_one_is_made() -> None:
    inner, outer = finding(Edit(2, 3, "I")), finding(Edit(0, 5, "OUTER"))
    for both in ((inner, outer), (outer, inner)):
        assert fixer.apply("a = b + c", both, unsafe=False) == "OUTER + c"


def test_two_that_touch_are_both_made() -> None:
    first, second = finding(Edit(0, 1, "x")), finding(Edit(1, 2, "y"))
    for both in ((first, second), (second, first)):
        assert fixer.apply("ab", both, unsafe=False) == "xy"


@pytest.mark.parametrize("line", ["x = 1; {}", "{}; x = 1", "{}  # here"])
def test_of_a_line_only_the_import_goes_that_nothing_needs(line: str) -> None:
    unused = line.format("from torch.cuda.amp import autocast")
    fixed = fix(f"import torch\n{unused}\nwith autocast(): pass\n")
    assert "with ctx.autocast()" in fixed
    assert ("x = 1" in fixed) is ("x = 1" in line)
    assert ("import autocast" in fixed) is line.startswith("x")


def test_a_finding_is_made_whole_or_not_at_all() -> None:
    two = finding(Edit(0, 1, "z"), Edit(4, 5, "y"))
    assert (
        fixer.apply("a = b + c", [two, finding(Edit(4, 9, "q + 1"))], unsafe=False) == "z = y + c"
    )


def test_unsafe_only_when_asked() -> None:
    one = finding(Edit(0, 1, "z"), how="unsafe")
    assert fixer.apply("a = 1", [one]) == "a = 1"
    assert fixer.apply("a = 1", [one], unsafe=True) == "z = 1"


def test_write_keeps_the_mode_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "run.py"
    path.write_bytes(b"old")
    path.chmod(0o751)
    fixer.write(path, b"new\r\n")
    assert path.read_bytes() == b"new\r\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o751
    assert [*tmp_path.iterdir()] == [path]


def test_write_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.py"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        fixer.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("name", regions.ARGUMENTS)
def test_arguments_come_in_the_order_of_torch(name: str) -> None:
    called: Any = torch
    for part in name.split(".")[1:]:
        called = getattr(called, part)
    assert regions.ARGUMENTS[name] == (*inspect.signature(called).parameters,)


def test_the_dtypes_of_torch_under_all_their_names() -> None:
    known = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
    for name, dtype in vars(torch).items():
        if isinstance(dtype, torch.dtype):
            assert regions.DTYPES.get(f"torch.{name}") == known.get(dtype), name


@pytest.mark.parametrize("home", ["portable_amp", "portable_amp.context"])
def test_a_context_that_is_there_is_used(home: str) -> None:
    head = f"import torch\nfrom {home} import DeviceContext\nit = DeviceContext(precision='fp16')\n"
    assert fix(head + "torch.autocast('cuda')\n") == head + "it.autocast()\n"


def test_an_annotation_changes_nothing() -> None:
    head, tail = "import torch\ndevice", ' = torch.device("cuda")\n'
    (plain,), (annotated,) = scan(head + tail), scan(head + ": torch.device" + tail)
    assert plain.fix == annotated.fix == "safe"


def test_a_device_on_the_line_of_main_is_not_there_for_who_imports() -> None:
    text = "import torch\ndef f(x): return x.cuda()\nif __name__ == '__main__': device = pick()\n"
    assert fix(text) == text
