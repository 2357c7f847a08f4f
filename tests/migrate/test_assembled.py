"""Programs put together from lines whose fate is known: what is found, fixed, and left alone."""

from __future__ import annotations

import ast
import difflib
import re

from hypothesis import given
from hypothesis import strategies as st

from portable_amp.migrate import fixer
from portable_amp.migrate.scan import scan

# A statement -> the rules it breaks.
FOUND = {
    "x = y.cuda()": ["PAM201"],
    "x, z = y.cuda(), z.cuda(non_blocking=True)": ["PAM201", "PAM201"],
    "torch.cuda.empty_cache()": ["PAM301"],
    "torch.cuda.synchronize()": ["PAM302"],
    "s = torch.cuda.amp.GradScaler()": ["PAM103"],
    "s = torch.cuda.amp.GradScaler(\n    init_scale=2.0,  # klein\n)": ["PAM103"],
    "m = m.to('cuda')": ["PAM202"],
    "e = torch.cuda.Event()": ["PAM305"],
    "torch.manual_seed(0)\ntorch.cuda.manual_seed_all(0)": ["PAM304"],
    "torch.load(p)": ["PAM502"],
    "d = 'cuda' if torch.cuda.is_available() else 'cpu'": ["PAM204"],
    "with torch.cuda.amp.autocast(): y = x": ["PAM101"],
    "with torch.autocast('cuda', enabled=f):\n    y = x": ["PAM102"],
    "'größe'; x = y.cuda()  # 写真": ["PAM201"],
}
SILENT = (
    "cuda = True",
    "print('cuda', \"cuda:0\")",
    "# x.cuda()",
    "'''torch.cuda.empty_cache()'''",
    "torch.backends.cudnn.benchmark = True",
    "x = y.to(x.device)",
    "scaler.scale(loss).backward()",
    "loader = DataLoader(d, pin_memory=False)",
    "with torch.autocast(x.device.type): pass",
    "if True:\n    x = 1",
    "naïve = '写真'",
    "",
)
ADDED = re.compile(
    r"|from portable_amp import [\w, ]+|\w+ = DeviceContext\(precision=\"fp(16|32)\"\)"
)
AROUND = (
    ([], ""),
    (["def f{n}(x, y, z, m, p, f):"], "    "),
    (["class C{n}:", "\tdef f(self, x, y, z, m, p, f):"], "\t\t"),
    (["for i in range(3):"], "  "),
    (["if a:", "    while b:"], "        "),
)


@st.composite
def programs(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A program, and its rules in order."""
    lines, codes = ["# ein Programm", "import torch"], []
    for number in range(draw(st.integers(1, 5))):
        head, indent = draw(st.sampled_from(AROUND))
        lines += [line.format(n=number) for line in head]
        for _ in range(draw(st.integers(1, 3))):
            statement = draw(st.sampled_from([*FOUND, *SILENT]))
            codes += FOUND.get(statement, [])
            lines += [indent + line if line else "" for line in statement.split("\n")]
        lines.append(indent + "pass")
    ending = draw(st.sampled_from(["\n", "\r\n"]))
    return ending.join(lines) + draw(st.sampled_from([ending, ""])), codes


def names(text: str) -> set[str]:
    return {one.id for one in ast.walk(ast.parse(text)) if isinstance(one, ast.Name)}


def apply(text: str, *, unsafe: bool) -> str:
    return fixer.apply(text, scan(text), unsafe=unsafe)


@given(programs())
def test_exactly_what_is_there_is_found(program: tuple[str, list[str]]) -> None:
    text, codes = program
    assert [one.code for one in scan(text)] == codes


@given(programs(), st.booleans())
def test_a_fix_parses_changes_nothing_twice_and_leaves_only_what_it_said(
    program: tuple[str, list[str]], unsafe: bool
) -> None:
    text, _ = program
    allowed = ("safe", "unsafe") if unsafe else ("safe",)
    left = [one.code for one in scan(text) if not one.edits or one.fix not in allowed]
    fixed = apply(text, unsafe=unsafe)
    new = names(fixed) - names(text)
    made = set(re.findall(r"^(\w+) = DeviceContext\(", fixed, re.M))
    assert new <= made | {"DeviceContext", "clear_cache", "str"}
    assert apply(fixed, unsafe=unsafe) == fixed
    assert [one.code for one in scan(fixed)] == left


@given(programs(), st.booleans())
def test_a_fix_touches_only_the_lines_it_found(
    program: tuple[str, list[str]], unsafe: bool
) -> None:
    text, _ = program
    concerned = {line for one in scan(text) for line in range(one.line - 1, one.end_line)}
    before = text.splitlines(keepends=True)
    after = apply(text, unsafe=unsafe).splitlines(keepends=True)
    for kind, start, end, low, high in difflib.SequenceMatcher(
        None, before, after, autojunk=False
    ).get_opcodes():
        if kind == "insert":
            added = [line.strip() for line in after[low:high]]
            assert all(ADDED.fullmatch(line) for line in added), added
        elif kind != "equal":
            assert set(range(start, end)) <= concerned
    if "\r\n" in text:
        assert all(line.endswith("\r\n") for line in after[:-1])
