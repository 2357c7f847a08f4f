"""Three programs for CUDA alone: found, fixed, and then really trained, here and elsewhere."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from portable_amp import cli
from portable_amp.migrate import scan
from portable_amp.testing import Played, play

SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).parents[2]
CUDA = ("h100", "t4", "mi300x")
OTHERS = ("m2-macos15", "max1550", "cpu")


class Script(NamedTuple):
    """What is to be found in one script."""

    name: str
    found: str
    """Codes with how often."""
    left: str
    """The same, behind the fix."""
    unsafe: bool
    """Whether it runs elsewhere only with --unsafe-fixes."""


PROGRAMS = [
    Script("plain", "PAM101x2 PAM103 PAM201x5 PAM301 PAM302 PAM304 PAM501", "", unsafe=False),
    Script("classes", "PAM102 PAM103 PAM202 PAM203 PAM301 PAM302 PAM304 PAM501", "", unsafe=True),
    Script(
        "notebookish",
        "PAM101 PAM102 PAM103 PAM201 PAM202x2 PAM203 PAM301 PAM302 PAM303 PAM304 PAM503",
        "PAM303 PAM503",
        unsafe=True,
    ),
]
each = pytest.mark.parametrize("script", PROGRAMS, ids=lambda script: script.name)


def codes(path: Path) -> str:
    """`PAM101 PAM201x3`: the codes that are found in a file, and how often."""
    found = sorted(one.code for one in scan.scan(path.read_text("utf-8"), str(path)))
    counts = {code: found.count(code) for code in found}
    return " ".join(code if n == 1 else f"{code}x{n}" for code, n in counts.items())


def fixed(script: Script, folder: Path, *options: str) -> Path:
    """A copy of the script, after `portable-amp fix`."""
    path = folder / f"{script.name}.py"
    path.write_bytes((SCRIPTS / path.name).read_bytes())
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert cli.main(["fix", *options, str(path)]) in (0, 1)
    return path


@pytest.fixture
def original(script: Script, tmp_path: Path) -> Path:
    """The script as it was, in a folder of its own."""
    path = tmp_path / "original.py"
    path.write_bytes((SCRIPTS / f"{script.name}.py").read_bytes())
    return path


@pytest.fixture
def program(script: Script, tmp_path: Path) -> Path:
    """The script as it is to run everywhere."""
    return fixed(script, tmp_path, *["--unsafe-fixes"] * script.unsafe)


def losses(printed: str) -> list[float]:
    """What a script says in its last line."""
    last = printed.strip().splitlines()[-1].split()
    assert last[0] == "losses"
    return [float(loss) for loss in last[1:]]


def learns(printed: str) -> bool:
    """Whether the last loss is less than half of the first."""
    first, *_, last = losses(printed)
    return last < first / 2


def here(path: Path) -> subprocess.CompletedProcess[str]:
    """Run a program on this machine's CPU, in a process of its own."""
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PORTABLE_AMP_DEVICE": "cpu",
        "PYTHONPATH": str(ROOT / "src"),
    }
    return subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=path.parent,
        timeout=120,
    )


def on(machine: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Played]:
    """Run a program on a live machine of the catalogue: what it prints, and what it asks for."""
    cudnn = torch.backends.cudnn  # which a program sets, and tests after this one read
    monkeypatch.setattr(cudnn, "benchmark", cudnn.benchmark)
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.chdir(path.parent)
    printed = io.StringIO()
    with play(machine, live=machine != "cpu") as played, warnings.catch_warnings():
        # torch's own spellings are deprecated, and memory may be pinned in vain.
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(path), run_name="__main__")
    return printed.getvalue(), played


@each
def test_it_is_found(script: Script) -> None:
    assert codes(SCRIPTS / f"{script.name}.py") == script.found


@each
def test_as_it_was_it_does_not_run_here(script: Script, original: Path) -> None:
    ran = here(original)
    assert ran.returncode == 1
    assert re.search("NVIDIA|CUDA", ran.stderr)


@each
def test_fixed_it_learns_here(script: Script, program: Path) -> None:
    ran = here(program)
    assert ran.returncode == 0, ran.stderr
    assert learns(ran.stdout)


@each
def test_what_is_left_is_told(script: Script, program: Path) -> None:
    assert codes(program) == script.left


@each
def test_a_second_fix_changes_nothing(script: Script, program: Path) -> None:
    before = program.read_bytes()
    cli.main(["fix", "--unsafe-fixes", str(program)])
    assert program.read_bytes() == before


@pytest.mark.parametrize("script", [one for one in PROGRAMS if one.unsafe], ids=str)
def test_the_unsafe_fixes_are_needed(script: Script, tmp_path: Path) -> None:
    assert here(fixed(script, tmp_path)).returncode == 1


@each
@pytest.mark.parametrize("machine", OTHERS)
def test_fixed_it_learns_there(
    script: Script, original: Path, program: Path, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        on(machine, original, monkeypatch)
    printed, played = on(machine, program, monkeypatch)
    assert learns(printed)
    assert bool(played.asked("empty_cache")) is (machine != "cpu")


@each
@pytest.mark.parametrize("machine", CUDA)
def test_on_cuda_it_does_what_it_did(
    script: Script, original: Path, program: Path, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_it_was, played = on(machine, original, monkeypatch)
    fixed, replayed = on(machine, program, monkeypatch)
    assert learns(as_it_was)
    assert losses(fixed) == losses(as_it_was)
    for what in ("autocast", "scale", "empty_cache", "synchronize"):
        assert len(replayed.asked(what)) == len(played.asked(what)) > 0, what
    assert replayed.asked("autocast", dtype=torch.float16) == replayed.asked("autocast")
