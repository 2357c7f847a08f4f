"""The command that runs the tests over several versions of torch, without a network."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "torch_matrix.py"

_spec = importlib.util.spec_from_file_location("torch_matrix", SCRIPT)
assert _spec
assert _spec.loader
matrix = importlib.util.module_from_spec(_spec)
sys.modules["torch_matrix"] = matrix  # dataclasses look their module up there
_spec.loader.exec_module(matrix)

no_shell = pytest.mark.skipif(
    sys.platform == "win32", reason="the stand-in for an interpreter is a shell script"
)

FakePython = Callable[..., Path]


@pytest.fixture
def fake_python(tmp_path: Path) -> FakePython:
    """Makes a script that answers as a Python with torch, and ends as a run of pytest would."""

    def make(
        summary: str = "1 passed in 0.01s",
        status: int = 0,
        *,
        torch: str = "2.4.1+cpu",
        python: str = "3.10",
        lacking: str = "",
    ) -> Path:
        path = tmp_path / f"python-{len(list(tmp_path.glob('python-*')))}"
        path.write_text(
            "#!/bin/sh\n"
            'if [ "$1" = -c ]; then\n'
            f"    echo '{lacking}|{torch}|{python}'\n"
            "    exit\n"
            "fi\n"
            f'echo "$@" >> {tmp_path}/arguments\n'
            f'echo "PYTHONPATH=$PYTHONPATH, in $PWD"\n'
            f"echo '{summary}'\n"
            f"exit {status}\n"
        )
        path.chmod(0o755)
        return path

    return make


# --- what was asked for ----------------------------------------------------------------------


def test_pairs_and_versions() -> None:
    assert matrix.parse("3.10:2.4.1") == ("3.10", "2.4.1")
    assert matrix.parse("2.15.0") == ("", "2.15.0")


def test_an_interpreter_keeps_its_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The link is the environment: what it points to is the Python without torch.
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    assert matrix.parse(str(link)) == link
    monkeypatch.chdir(tmp_path)
    assert matrix.parse("python") == link
    assert matrix.parse("./python") == link


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("3.10:2.3.1", "no torch 2.3.1 is known here; nearest: 2.4.0"),
        ("3.10:2.4.7", "no torch 2.4.7 is known here; nearest: 2.4.0, 2.4.1"),
        ("2.9", "no torch 2.9 is known here; nearest: 2.9.0, 2.9.1"),
        ("2.9.5.1", "nearest: 2.9.0, 2.9.1"),
        ("3.11:3.0.0", "nearest: 2.15.0. Any other: give an interpreter that has it"),
        ("3.13:2.4.1", "have no Python 3.13 in common; they have 3.10, 3.11, 3.12"),
        ("3.9:2.4.1", "have no Python 3.9 in common"),
        ("3.10:2.15.0", "they have 3.11, 3.12, 3.13, 3.14"),
        ("newest", "is not PYTHON:TORCH such as 3.10:2.4.1"),
        ("3.10:", "is not PYTHON:TORCH"),
        ("2.4.1:3.10", "is not PYTHON:TORCH"),
        ("", "is not PYTHON:TORCH"),
        ("3.10:2.4.1:", "is not PYTHON:TORCH"),
        ("/no/python", "is not there; give the path of a python"),
        ("--bogus", "unrecognized arguments: --bogus"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(
    what: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert matrix.main([what]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert says in told.err
    assert len(told.err.splitlines()) == 1


def test_the_output_needs_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for output in (tmp_path, tmp_path / "none" / "table.md"):
        assert matrix.main(["2.4.1", "--output", str(output)]) == 2
        assert capsys.readouterr().err.endswith("name a file, in a folder that exists.\n")


def test_the_list_goes_from_the_floor_to_the_newest_on_every_python() -> None:
    asked = [matrix.parse(what) for what in matrix.DEFAULT]
    assert len(set(asked)) >= 6
    assert {python for python, _ in asked} >= {"3.10", "3.11", "3.12", "3.13"}
    floor = re.search(r'"torch>=(.+?)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert floor
    assert asked[0][1].startswith(floor[1] + ".")
    pinned = re.findall(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    assert asked[-1][1] == pinned[-1] == list(matrix.PYTHONS)[-1]
    # CI's own run of the floor, and the job over all of them.
    assert f"PORTABLE_AMP_FLOOR_PYTHON:-{asked[0][1]}" in (ROOT / ".ci" / "run").read_text("utf-8")
    jobs = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    assert "tools/torch_matrix.py --output" in jobs


def test_what_the_tests_need_is_what_is_installed() -> None:
    assert {re.split("==", pin)[0] for pin in matrix.pins()} == {"pytest", "hypothesis"}
    for name in ("pytest", "hypothesis"):
        assert f'"{name}>=' in matrix.testing_extra()
        assert name in matrix.NEEDED
    for path in (*matrix.PATHS, *matrix.LEFT_OUT):
        assert (ROOT / path).exists()


# --- environments ----------------------------------------------------------------------------


def test_a_python_that_does_not_start_is_none(tmp_path: Path) -> None:
    assert matrix.version_of(sys.executable) == f"3.{sys.version_info.minor}"
    assert matrix.version_of(tmp_path / "none") == ""
    assert matrix.version_of(tmp_path) == ""


@no_shell
def test_an_environment_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_python: FakePython
) -> None:
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    python = fake_python(python="")
    python.write_text("#!/bin/sh\necho 3.12\n")
    uv.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path}/uv-calls\n'
        'for last; do :; done; if [ "$1" = venv ]; then\n'
        f'    /bin/mkdir -p "$last/bin"; /bin/cp {python} "$last/bin/python"\n'
        "fi\n"
    )
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", str(uv.parent))
    monkeypatch.setattr(matrix, "ENVIRONMENTS", tmp_path / ".torch")
    monkeypatch.delenv("UV_TORCH_BACKEND", raising=False)
    calls = tmp_path / "uv-calls"

    made = matrix.make_environment("3.12", "2.6.0")
    assert made == tmp_path / ".torch" / "py312-torch2.6.0" / "bin" / "python"
    first, second = calls.read_text().splitlines()
    assert first.startswith("venv -q --python ")
    assert "torch==2.6.0 numpy" in second
    assert f"-e {ROOT}[testing]" in second

    matrix.make_environment("3.12", "2.6.0")
    assert len(calls.read_text().splitlines()) == 2
    # Another kind of build, and one that was left half-made.
    monkeypatch.setenv("UV_TORCH_BACKEND", "cpu")
    matrix.make_environment("3.12", "2.6.0")
    assert len(calls.read_text().splitlines()) == 4
    (made.parents[1] / ".complete").unlink()
    matrix.make_environment("3.12", "2.6.0")
    assert len(calls.read_text().splitlines()) == 6


@no_shell
def test_a_failed_installation_leaves_the_others_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_python: FakePython,
    capfd: pytest.CaptureFixture[str],
) -> None:
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text("#!/bin/sh\necho no such wheel >&2\nexit 1\n")
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", str(uv.parent))
    monkeypatch.setattr(matrix, "ENVIRONMENTS", tmp_path / ".torch")
    assert matrix.main(["3.12:2.6.0", str(fake_python())]) == 2
    out, err = capfd.readouterr()
    assert "no such wheel" in err
    assert "py312-torch2.6.0 could not be made: see above; " in err
    assert out.splitlines()[2:] == [
        "| 2.6.0 | 3.12 | could not run |  |  |  |",
        "| 2.4.1 | 3.10 | 1 | 0 | 0 | 0 |",
    ]


def test_neither_the_python_nor_uv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(matrix, "find_python", lambda version: None)
    assert matrix.main(["2.4.1"]) == 2
    told = capsys.readouterr()
    assert "'3.10:2.4.1': there is no Python 3.10 here, and no uv to fetch it" in told.err
    assert "could not run" in told.out


# --- runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "status", "passed", "failed", "skipped", "trouble"),
    [
        ("421 passed, 9 skipped in 60.72s (0:01:00)", 0, 421, 0, 9, ""),
        ("==== 3 passed in 0.52s ====", 0, 3, 0, 0, ""),
        ("3 failed, 425 passed, 2 skipped in 86.44s (0:01:26)", 1, 425, 3, 2, ""),
        ("1 failed, 2 passed, 1 warning, 1 error in 0.10s", 1, 2, 2, 0, ""),
        ("2 passed, 1 skipped, 4 deselected, 1 xfailed in 0.10s", 0, 2, 0, 1, ""),
        ("2 errors in 1.20s", 2, 0, 2, 0, ""),
        ("430 deselected in 1.02s", 5, 0, 0, 0, "no test ran"),
        ("no tests ran in 0.01s", 5, 0, 0, 0, "no test ran"),
        ("5 skipped in 0.01s", 0, 0, 0, 5, "no test ran"),
        ("5 passed in 0.01s", 3, 5, 0, 0, "pytest ended with status 3"),
        ("5 passed in 0.01s", -11, 5, 0, 0, "pytest ended with status -11"),
        ("Fatal Python error: Segmentation fault", -11, 0, 0, 0, "and no summary"),
        ("ERROR: usage: pytest [options]", 4, 0, 0, 0, "status 4 and no summary"),
    ],
)
def test_pytests_summary(
    line: str, status: int, passed: int, failed: int, skipped: int, trouble: str
) -> None:
    # A summary in the middle is another's: of a pytest that a test started.
    before = "....\nFAILED x.py::y - assert '9 passed in 1.0s'\n"
    found = matrix.read_summary([*before.splitlines(), line, ""], status)
    assert (found.passed, found.failed, found.skipped) == (passed, failed, skipped)
    assert found.trouble.endswith(trouble)
    assert bool(found.trouble) is bool(trouble)
    assert found.red is (status != 0 or bool(trouble))


@no_shell
def test_all_green(
    tmp_path: Path, fake_python: FakePython, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "table.md"
    old = fake_python("421 passed, 9 skipped in 60.72s (0:01:00)")
    new = fake_python("428 passed in 60.72s", torch="2.15.0", python="3.11")
    assert matrix.main([str(old), str(new), "--output", str(output)]) == 0
    told = capsys.readouterr()
    assert (
        told.out
        == output.read_text()
        == (
            "| torch | Python | passed | failed | skipped | seconds |\n"
            "| --- | --- | --- | --- | --- | --- |\n"
            "| 2.4.1 | 3.10 | 421 | 0 | 9 | 0 |\n"
            "| 2.15.0 | 3.11 | 428 | 0 | 0 | 0 |\n"
        )
    )
    # pytest's own words pass through, and it can import the package.
    assert "torch_matrix: torch 2.4.1+cpu, Python 3.10\n" in told.err
    assert f"PYTHONPATH={ROOT / 'src'}" in told.err
    assert f", in {ROOT}\n" in told.err


@no_shell
def test_one_red_is_red(fake_python: FakePython, capsys: pytest.CaptureFixture[str]) -> None:
    red = fake_python("1 failed, 420 passed in 1.00s", 1)
    crashed = fake_python("Segmentation fault", 139)
    green = fake_python()
    assert matrix.main([str(red), str(crashed), str(green)]) == 1
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| 2.4.1 | 3.10 | 420 | 1 | 0 | 0 |",
        "| 2.4.1 | 3.10 | 0 | 0 (pytest ended with status 139 and no summary) | 0 | 0 |",
        "| 2.4.1 | 3.10 | 1 | 0 | 0 | 0 |",
    ]


@no_shell
def test_an_interpreter_without_what_the_tests_need(
    tmp_path: Path, fake_python: FakePython, capsys: pytest.CaptureFixture[str]
) -> None:
    assert matrix.main([str(fake_python(lacking="numpy,pytest"))]) == 2
    assert " has no numpy, pytest; install torch numpy pytest " in capsys.readouterr().err
    text = tmp_path / "text"
    text.write_text("no program")
    assert matrix.main([str(text)]) == 2
    assert "does not start: Permission denied." in capsys.readouterr().err
    mute = fake_python()
    mute.write_text("#!/bin/sh\nexit 1\n")
    assert matrix.main([str(mute)]) == 2
    assert "is no Python from 3.10 on" in capsys.readouterr().err


def test_this_interpreter_has_what_the_tests_need() -> None:
    torch, python = matrix.describe(Path(sys.executable))
    assert torch.startswith("2.")
    assert python == f"3.{sys.version_info.minor}"


@no_shell
def test_arguments_for_pytest(tmp_path: Path, fake_python: FakePython) -> None:
    python = str(fake_python())
    for extra in ([], ["-k", "src"], ["-k", "a or b", "--", "-x"], ["--", "-q", "src", "--pdb"]):
        assert matrix.main([python, *extra]) == 0
    usual, k_only, both, named = (tmp_path / "arguments").read_text().splitlines()
    paths = " ".join(matrix.PATHS)
    assert paths in usual
    assert "--ignore=tests/unit/test_docs.py" in usual
    # A word that is also a folder's name is an expression still.
    assert paths in k_only
    assert k_only.endswith("-ksrc")
    assert both.endswith("-ka or b -x")
    # A path takes the place of the usual ones.
    assert "tests/conformance" not in named
    assert named.endswith("-q src --pdb")


@no_shell
def test_an_interruption_still_prints_what_ran(
    fake_python: FakePython, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_one, runs = matrix.run_one, iter((True, False))

    def interrupted(*args: object) -> object:
        if next(runs):
            return run_one(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(matrix, "run_one", interrupted)
    python = str(fake_python())
    assert matrix.main([python, python]) == 130
    told = capsys.readouterr()
    assert "stopped after 1 of 2" in told.err
    assert "| 2.4.1 | 3.10 | 1 | 0 | 0 | 0 |" in told.out


def test_it_needs_no_more_than_the_standard_library() -> None:
    code = "import sys, runpy; runpy.run_path(sys.argv[1])"
    # -I: without this environment's settings; -S: without its packages.
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, str(SCRIPT)], check=False)
    assert done.returncode == 0
