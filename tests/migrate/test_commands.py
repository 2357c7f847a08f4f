"""The two commands: files, notebooks, comments, settings, formats and exit codes."""

from __future__ import annotations

import ast
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from portable_amp.cli import main
from portable_amp.migrate import fixer, output
from portable_amp.migrate.findings import Finding
from portable_amp.migrate.flake8 import Plugin
from portable_amp.migrate.scan import scan

BAD = "import torch\nx = torch.ones(2).cuda()\n"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_exit_codes(capsys: Capture) -> None:
    Path("good.py").write_text("import torch\n")
    Path("bad.py").write_text(BAD)
    Path("broken.py").write_text("import torch\nx = .cuda(\n")
    assert main(["check", "good.py"]) == 0
    assert main(["check", "bad.py"]) == 1
    assert capsys.readouterr().out.startswith("bad.py:2:5: PAM201 ")
    assert main(["check", "."]) == 2  # what is broken is named, and the rest goes on
    out, err = capsys.readouterr()
    assert "bad.py:2:5" in out
    assert err.startswith("portable-amp: broken.py: is no Python, line 2")
    assert main(["check", "missing.py"]) == 2
    assert capsys.readouterr().err == "portable-amp: there is no 'missing.py'\n"


def test_comments_wave_through(capsys: Capture) -> None:
    comments = ["# noqa", "# noqa: PAM201", "# noqa: E501, PAM201", "# noqa: PAM202", "# why"]
    for end in ("\n", "\r\n", "\r"):
        lines = ["import torch", *(f"x.cuda()  {one}" for one in comments), ""]
        Path("a.py").write_bytes(end.join(lines).encode())
        assert main(["check", "a.py"]) == 1
        assert [line.split(":")[1] for line in capsys.readouterr().out.splitlines()] == ["5", "6"]


def test_settings(capsys: Capture) -> None:
    Path("pkg").mkdir()
    for name in ("a.py", "pkg/b.py", "pkg/c.py"):
        Path(name).write_text(BAD + "torch.load(x)\n")
    Path("pyproject.toml").write_text(
        '[tool.portable-amp]\nignore = ["PAM5"]\nexclude = ["c.py"]\n'
        '[tool.portable-amp.per-file-ignores]\n"pkg/*" = ["PAM201"]\n'
    )
    assert main(["check", "."]) == 1
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == ["a.py:2:5"]
    assert main(["check", ".", "--select", "PAM502", "--ignore", "PAM1"]) == 1
    assert capsys.readouterr().out.count("PAM502") == 2
    assert main(["check", ".", "--select", "PAM9"]) == 2
    assert "'PAM9' is no rule" in capsys.readouterr().err
    for wrong in ("selct = []", "select = 1", 'ignore = ["X"]', "per-file-ignores = []", "x ="):
        Path("pyproject.toml").write_text(f"[tool.portable-amp]\n{wrong}\n")
        assert main(["check", "a.py"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_formats(capsys: Capture) -> None:
    Path("a,b.py").write_text(BAD)
    found = {}
    for layout in ("json", "sarif", "github", "markdown"):
        assert main(["check", "--format", layout, "a,b.py"]) == 1
        found[layout] = capsys.readouterr().out
    (one,) = json.loads(found["json"])
    keys = "path line column end_line code level message platforms fix"
    assert list(one) == keys.split()
    assert (one["code"], one["level"], one["fix"]) == ("PAM201", "error", "safe")
    (run,) = json.loads(found["sarif"])["runs"]
    (result,) = run["results"]
    rule = run["tool"]["driver"]["rules"][result["ruleIndex"]]
    assert rule["id"] == result["ruleId"] == "PAM201"
    place = result["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "a%2Cb.py"
    assert place["region"] == {"startLine": 2, "startColumn": 5, "endLine": 2}
    assert found["github"].startswith("::error file=a%2Cb.py,line=2,endLine=2,col=5,title=PAM201::")
    assert "| 2 | PAM201 | error | works | works | crashes | crashes |" in found["markdown"]


def test_what_is_no_part_of_a_project_is_left_out(capsys: Capture) -> None:
    tools = ("__pycache__", "node_modules", "build", "dist", "site-packages", "venv")
    for folder in (".hidden", "env", *tools):
        Path(folder).mkdir()
        Path(folder, "a.py").write_text(BAD)
    Path("env/pyvenv.cfg").touch()
    Path("link.py").symlink_to(".hidden/a.py")
    Path("a.txt").write_text(BAD)
    assert main(["check", "."]) == 0
    for name in tools:  # that is how the folder is named, and not how it begins or ends
        Path(f"my{name}s").mkdir()
        Path(f"my{name}s", "a.py").write_text(BAD)
    assert main(["check", "."]) == 1
    assert capsys.readouterr().out.count("PAM201") == len(tools)
    assert main(["check", "build/a.py"]) == 1  # who names it means it
    assert main(["fix", "link.py"]) == 2
    assert "symbolic link" in capsys.readouterr().err
    assert Path(".hidden/a.py").read_text() == BAD


def test_fix_and_its_diff(capsys: Capture) -> None:
    Path("a.py").write_text(BAD)
    Path("a.py").chmod(0o751)
    assert main(["fix", "--diff", "a.py"]) == 1
    assert "+x = torch.ones(2).to(ctx.device)\n" in capsys.readouterr().out
    assert Path("a.py").read_text() == BAD
    assert main(["fix", "a.py"]) == 0
    fixed = Path("a.py").read_text()
    assert fixed == (
        "import torch\nfrom portable_amp import DeviceContext\n\n"
        'ctx = DeviceContext(precision="fp32")\n'
        "x = torch.ones(2).to(ctx.device)\n"
    )
    assert Path("a.py").stat().st_mode & 0o777 == 0o751
    assert main(["fix", "--diff", "--unsafe-fixes", "a.py"]) == 0
    assert [path.name for path in Path().iterdir()] == ["a.py"]


@pytest.mark.parametrize(
    "data",
    [
        BAD.replace("\n", "\r\n").encode(),
        ("\ufeff" + BAD).encode(),
        b"# -*- coding: latin-1 -*-\nimport torch\nx = '\xe4'; y.cuda()\t# \xf6  \n\t",
        "import torch\nif x:\n\ty.cuda( )  # 写真\n\ts = 'a'".encode(),
    ],
    ids=["crlf", "mark", "latin", "tabs"],
)
def test_all_other_bytes_stay(data: bytes) -> None:
    Path("a.py").write_bytes(data)
    assert main(["fix", "a.py"]) == 0
    fixed = Path("a.py").read_bytes()
    assert fixed != data
    end = b"\r\n" if b"\r\n" in data else b"\n"
    context = end + b'ctx = DeviceContext(precision="fp32")' + end
    for new in (b"from portable_amp import DeviceContext" + end, context):
        assert fixed.count(new) == 1
        fixed = fixed.replace(new, b"")
    for new, old in ((b".to(ctx.device)", b".cuda()"), (b".to(ctx.device )", b".cuda( )")):
        fixed = fixed.replace(new, old)
    assert fixed == data


def given(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """What stands on stdin."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    given(monkeypatch, BAD)
    assert main(["check", "-", "--stdin-filename", "cell.py"]) == 1
    assert capsys.readouterr().out.startswith("cell.py:2:5: PAM201")
    given(monkeypatch, BAD)
    assert main(["check", "-"]) == 1
    assert capsys.readouterr().out.startswith("<stdin>:2:5: PAM201")
    assert scan(BAD)[0].path == "<stdin>"
    given(monkeypatch, "x = .")
    assert main(["check", "-"]) == 0  # nothing in it could be tied to CUDA
    given(monkeypatch, "cuda = .")
    assert main(["check", "-"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("portable-amp: <stdin>: is no Python, line 1")


def test_standard_input_is_fixed(monkeypatch: pytest.MonkeyPatch, capsysbinary: Any) -> None:
    given(monkeypatch, BAD)
    assert main(["fix", "-"]) == 0
    fixed = fixer.apply(BAD, scan(BAD))
    assert capsysbinary.readouterr().out == fixed.encode()
    for text, code in ((BAD, 1), (fixed, 0)):
        given(monkeypatch, text)
        assert main(["fix", "-", "--diff", "--stdin-filename", "cell.py"]) == code
        diff = capsysbinary.readouterr().out.decode()
        assert diff.startswith("--- cell.py\n+++ cell.py\n") is bool(code)
    given(monkeypatch, "import torch\ntorch.load(x)\n")
    assert main(["fix", "-", "--unsafe-fixes"]) == 0
    assert b"torch.load(x, map_location=ctx.device)" in capsysbinary.readouterr().out


def test_settings_are_those_of_the_first_path(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for folder, rule in (("one", "PAM201"), ("two", "PAM502")):
        Path(folder).mkdir()
        Path(folder, "a.py").write_text(BAD + "torch.load(x)\n")
        Path(folder, "pyproject.toml").write_text(f'[tool.portable-amp]\nselect = ["{rule}"]\n')
    for paths, wanted in (
        (["one", "two"], ["PAM201"] * 2),
        (["two/a.py", "one/a.py"], ["PAM502"] * 2),
    ):
        assert main(["check", *paths]) == 1
        assert re.findall(r"PAM\d+", capsys.readouterr().out) == wanted
    monkeypatch.chdir("two")
    given(monkeypatch, BAD + "torch.load(x)\n")
    assert main(["check", "-"]) == 1
    assert re.findall(r"PAM\d+", capsys.readouterr().out) == ["PAM502"]


def test_each_file_once_and_a_folder_in_order(capsys: Capture) -> None:
    for name in ("c.py", "b.py", "a.py"):
        Path(name).write_text(BAD)
    assert main(["check", "b.py", ".", "b.py"]) == 1
    assert re.findall(r"^\w+", capsys.readouterr().out, re.M) == ["b", "a", "c"]


def test_fix_counts_the_files_and_what_is_left(capsys: Capture) -> None:
    Path("a.py").write_text("import torch\n")
    Path("b.py").write_text(BAD + "torch.load(x)\n")
    Path("c.py").write_text("cuda = .")
    Path("d.py").write_text(BAD)
    assert main(["fix", "."]) == 2  # what is broken is named, and the rest goes on
    out, err = capsys.readouterr()
    assert out == "2 of 4 files changed; 1 places are left for you\n"
    assert err.startswith("portable-amp: c.py: is no Python")
    assert all(".to(ctx.device)" in Path(name).read_text() for name in ("b.py", "d.py"))
    assert main(["fix", ".", "--ignore", "PAM5"]) == 2
    assert capsys.readouterr().out == "0 of 4 files changed; 0 places are left for you\n"


def side(diff: str, sign: str) -> str:
    """The text before ("-") or after ("+"), of a diff that shows all lines."""
    lines = diff.replace("\n\\ No newline at end of file\n", "\0\n").split("\n")
    shown = [line[1:] + "\n" for line in lines[3:-1] if line[0] in (" ", sign)]
    return "".join(shown).replace("\0\n", "")


@pytest.mark.parametrize("text", [BAD, BAD[:-1], BAD.replace("x", "\f\n# \v\x1c\u2028\nx", 1)])
def test_a_diff_says_all_that_changes(text: str, capsys: Capture) -> None:
    Path("a.py").write_text(text, "utf-8", newline="")
    assert main(["fix", "--diff", "a.py"]) == 1
    diff = capsys.readouterr().out
    assert diff.startswith("--- a.py\n+++ a.py\n@@ ")
    assert diff.count("\n\\ No newline") == (0 if text.endswith("\n") else 2)
    assert side(diff, "-") == text
    assert main(["fix", "a.py"]) == 0
    assert side(diff, "+") == Path("a.py").read_text("utf-8")


class Terminal(io.StringIO):
    """One that shows what is flushed."""

    shown = ""

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        self.shown = self.getvalue()


def test_a_bar_on_a_terminal_where_there_is_much_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for number in range(45):
        Path(f"a{number}.py").write_text("import torch\n")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert main(["check", ".", "--jobs", "1"]) == 0
    bars = re.findall(r"\r\[(#*) *\] (\d+)/45", screen.shown)
    assert [int(done) for _, done in bars] == [10, 20, 30, 40, 45]
    assert [len(filled) for filled, _ in bars] == [30 * done // 45 for done in (10, 20, 30, 40, 45)]
    assert {len(line) for line in screen.shown.split("\r")[1:]} == {len("[] 45/45") + 30}
    assert screen.getvalue() == screen.shown + "\n"
    monkeypatch.setattr(sys, "stderr", few := Terminal())
    assert main(["check", *(f"a{number}.py" for number in range(40))]) == 0
    assert few.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    assert main(["check", "."]) == 0
    assert file.getvalue() == ""
    assert capsys.readouterr().out == ""


def test_many_processes_tell_what_one_tells(capsys: Capture) -> None:
    for number in range(45):
        Path(f"a{number}.py").write_text(BAD if number % 9 == 0 else "import torch\n")
    Path("z.py").write_text("cuda = .")
    told = []
    for jobs in ("1", "2", "0"):
        assert main(["check", ".", "--jobs", jobs]) == 2
        told.append(capsys.readouterr())
    assert told[0].out.count("PAM201") == 5
    assert told[0] == told[1] == told[2]


def test_flake8_tells_what_check_tells(capsys: Capture) -> None:
    text = "import torch\nif x:\n    y = 'äö', x.cuda(\n)\nx.to('cuda')\n"
    Path("a.py").write_text(text, "utf-8")
    assert main(["check", "a.py"]) == 1
    plugin = Plugin(ast.parse(text), text.splitlines(keepends=True))
    told = [f"a.py:{line}:{at + 1}: {what}\n" for line, at, what, _ in plugin.run()]
    assert "".join(told) == capsys.readouterr().out
    assert [kind for *_, kind in plugin.run()] == [Plugin, Plugin]


@pytest.mark.parametrize("indent", [1, 2, 4, None, "\t"])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("end", ["\n", ""])
def test_notebooks(indent: int | str | None, plain: bool, end: str, capsys: Capture) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["x.cuda()"]},
        {"cell_type": "code", "source": ["%pip install torch\n", "import torch"]},
        {"cell_type": "code", "source": ["%%bash\n", "echo cuda"]},
        {"cell_type": "code", "source": "x = torch.ones(2).cuda()\n!nvidia-smi\nx.mean?"},
    ]
    text = json.dumps({"cells": cells, "ä": 1}, indent=indent, ensure_ascii=plain) + end
    Path("a.ipynb").write_text(text, "utf-8")
    assert main(["check", "."]) == 1
    assert capsys.readouterr().out.startswith("a.ipynb:cell 4:1:5: PAM201")
    assert main(["fix", "a.ipynb"]) == 0
    fixed = Path("a.ipynb").read_text("utf-8")
    after = json.loads(fixed)["cells"]
    assert after[3]["source"] == "x = torch.ones(2).to(ctx.device)\n!nvidia-smi\nx.mean?"
    first = "".join(after[1]["source"])
    assert first.startswith("%pip install torch\nimport torch\nfrom portable_amp")
    assert [after[0], after[2]] == [cells[0], cells[2]]
    layout = json.dumps(json.loads(fixed), indent=indent, ensure_ascii=plain) + end
    assert fixed == layout


def test_an_interrupted_write_leaves_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.py").write_text(BAD)

    def stop(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    assert main(["fix", "a.py"]) == 130
    assert Path("a.py").read_text() == BAD
    assert [path.name for path in Path().iterdir()] == ["a.py"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "with autocast(False, torch.float16): pass",
            "with ctx.autocast(False): pass",
        ),
        (
            "with autocast( (True), (torch.float16) ): pass",
            "with ctx.autocast( (True) ): pass",
        ),
        ("s = GradScaler(2.0, enabled=a)", "s = ctx.scaler(2.0, enabled=a)"),
        (
            "with torch.autocast('cuda', enabled=a): pass",
            "with ctx.autocast(enabled=a): pass",
        ),
        ("x = x.cuda(non_blocking=True)", "x = ctx.to(x)"),
        ("x = x.to('cuda', non_blocking=True)", "x = ctx.to(x)"),
        ("x = x.cuda(1)", "x = x.cuda(1)"),
        ("x = x.to('cuda:1')", "x = x.to('cuda:1')"),
        ("torch.cuda.manual_seed(1)", "torch.cuda.manual_seed(1)"),
        ("torch.manual_seed(1)\ntorch.cuda.manual_seed(1)", "torch.manual_seed(1)"),
        ("def f(x, device):\n    return x.cuda()", "def f(x, device):\n    return x.to(device)"),
    ],
)
def test_what_fix_writes(before: str, after: str) -> None:
    head = (
        "import torch\nfrom torch.cuda.amp import GradScaler, autocast\nuse = GradScaler, autocast"
    )
    text = f"{head}\n{before}\n"
    fixed = fixer.apply(text, scan(text))
    assert fixed.endswith("\n" + after + "\n")
    assert fixer.apply(fixed, scan(fixed)) == fixed


def test_what_github_would_take_for_its_own_is_escaped() -> None:
    path, message = "50%,a:b\r\n.py", "100% of\r\nit: %0A, all"
    one = Finding(path, 3, 5, 4, "PAM201", "info", message, {}, "advice")
    line = (
        "::notice file=50%25%2Ca%3Ab%0D%0A.py,line=3,endLine=4,col=5,title=PAM201::"
        "100%25 of%0D%0Ait: %250A, all\n"
    )
    assert output.as_github([one, one]) == line * 2


def test_first_and_last_lines_of_cells(tmp_path: Path, capsys: Capture) -> None:
    cells = [
        "x = y.cuda()\nimport torch",
        "",
        "%%bash\necho cuda",
        "%matplotlib inline\nx = x.cuda(\n)",
        "torch.cuda.synchronize()\n",
        "z = x.cuda()",
    ]
    code = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    page = {"cells": [{**code, "source": one} for one in cells], "nbformat": 4}
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps(page), "utf-8")
    assert main(["check", "--format", "json", str(path)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(one["path"][-6:], one["line"], one["end_line"]) for one in found] == [
        *(("cell 1", 1, 1), ("cell 4", 2, 3), ("cell 5", 1, 1), ("cell 6", 1, 1)),
    ]
    assert main(["fix", str(path)]) == 0
    fixed = [cell["source"] for cell in json.loads(path.read_text("utf-8"))["cells"]]
    made = 'from portable_amp import DeviceContext\n\nctx = DeviceContext(precision="fp32")\n'
    assert fixed == [
        made + "x = y.to(ctx.device)\nimport torch",
        *cells[1:3],
        "%matplotlib inline\nx = x.to(ctx.device\n)",
        "ctx.synchronize()\n",
        "z = x.to(ctx.device)",
    ]
    page["cells"][0]["source"] = "import torch"
    page["cells"][5]["source"] = "cuda = ."
    path.write_text(json.dumps(page), "utf-8")
    assert main(["check", str(path)]) == 2
    assert f"{path}: cell 6 is no Python, line 1: " in capsys.readouterr().err


def test_imports_go_into_the_first_cell_that_is_python(tmp_path: Path) -> None:
    cells = ["%%bash\necho cuda", "%%time\nx = y.cuda()"]
    code = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    page = {"cells": [{**code, "source": one} for one in cells], "nbformat": 4}
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps(page), "utf-8")
    assert main(["fix", str(path)]) == 0
    fixed = [cell["source"] for cell in json.loads(path.read_text("utf-8"))["cells"]]
    assert fixed[0] == cells[0]
    assert fixed[1].splitlines() == [
        "%%time",
        "from portable_amp import DeviceContext",
        "",
        'ctx = DeviceContext(precision="fp32")',
        "x = y.to(ctx.device)",
    ]


MAGICS = (
    "%pip install x", "%%time", "!ls", "! ls", "?x", "x.mean?", "x.mean??", "files = !ls",
    "a, b = %who",
)  # fmt: skip
PYTHON = (
    "for one in x:  # why?\n    one.cuda()",
    "s = 'why?'; x.cuda(\n)",
    "x = (7\n% 3)",
    "x != y",
)


@pytest.mark.parametrize("indent", ["", "    ", "\t"])
def test_what_is_no_python_in_a_cell_stays_as_it_is(indent: str) -> None:
    for magic in MAGICS:
        if magic.startswith("%%") and indent:
            continue
        source = f"if x:\n{indent}{magic}\n{indent}x.cuda()" if indent else f"{magic}\nx.cuda()"
        page = {"cells": [{"cell_type": "code", "source": ["import torch\n", "x = 3"]}]}
        page["cells"].append({"cell_type": "code", "source": source})
        Path("a.ipynb").write_text(json.dumps(page))
        assert main(["fix", "a.ipynb"]) == 0
        fixed = json.loads(Path("a.ipynb").read_text())["cells"][1]["source"]
        assert fixed == source.replace(".cuda()", ".to(ctx.device)")


def test_what_is_python_in_a_cell_is_read() -> None:
    cells = [{"cell_type": "code", "source": f"import torch\n{one}"} for one in PYTHON]
    Path("a.ipynb").write_text(json.dumps({"cells": cells}))
    assert main(["fix", "a.ipynb"]) == 0
    fixed = [one["source"] for one in json.loads(Path("a.ipynb").read_text())["cells"]]
    for before, after in zip(PYTHON, fixed, strict=True):
        assert after.endswith(before.replace(".cuda(", ".to(ctx.device"))


def assert_refused(name: str, data: bytes, capsys: Capture, why: str = "") -> None:
    """Each command says so in one line, and the file stays."""
    Path(name).write_bytes(data)
    for command in ("check", "fix"):
        assert main([command, name]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"portable-amp: {name}: {why}")
    assert Path(name).read_bytes() == data


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"{}", b"[]", b"3", b'"cells"', b"\xff", b'{"cells": 3}', b'{"cells": [3]}'),
        *(b'{"cells": [{}]}', b'{"cells": [{"cell_type": "code"}]}', b"[" * 100_000),
        *(b'{"cells": [{"cell_type": "code", "source": %s}]}' % one for one in (b"3", b"[3]")),
    ],
    ids=lambda data: data[:60].decode("ascii", "replace"),
)
def test_what_is_no_notebook_is_told_in_one_line(data: bytes, capsys: Capture) -> None:
    assert_refused("a.ipynb", data, capsys, "is no notebook: ")


def test_a_notebook_that_is_laid_out_by_hand_is_left_alone(capsys: Capture) -> None:
    page = {"cells": [{"cell_type": "code", "source": BAD}]}
    text = json.dumps(page, indent=3)
    Path("a.ipynb").write_text(text)
    assert main(["check", "a.ipynb"]) == 1
    assert main(["fix", "a.ipynb"]) == 2
    assert "cannot be written back" in capsys.readouterr().err
    assert Path("a.ipynb").read_text() == text


@pytest.mark.parametrize(
    "data",
    [b"cuda = '\xff'", b"# coding: none-such\ncuda", b"# coding: ascii\ncuda = '\xe4'", b"cuda\0"],
)
def test_what_cannot_be_read_is_told_in_one_line(data: bytes, capsys: Capture) -> None:
    assert_refused("a.py", data, capsys)
