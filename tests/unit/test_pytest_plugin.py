"""The pytest plugin, as a user's project has it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"

TEST = """
import torch
from portable_amp import DeviceContext

def test_training(amp_machine):
    ctx = DeviceContext()
    model = ctx.to(torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = ctx.scaler(init_scale=256.0)
    with ctx.autocast():
        loss = model(ctx.to(torch.ones(2, 4))).float().pow(2).mean()
    assert scaler.backward_step(loss, optimizer).stepped
    assert bool(amp_machine.asked("scale")) is ctx.plan.scaler
    print("ran on", amp_machine.machine.key, "live" if amp_machine.live else "")

def test_without():
    assert DeviceContext().device.type == "cpu"
"""

# Tells what it plays, and nothing else: such a test takes no time.
TELL = """
def test_tell(amp_machine, record_property):
    record_property("plays", (amp_machine.machine.key, amp_machine.live))
"""


class Seen:
    """What a run of pytest in this process did, by test."""

    def __init__(self) -> None:
        self.plays: dict[str, tuple[str, bool]] = {}
        self.outcomes: dict[str, str] = {}
        self.why: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.split("::")[-1]
        if report.when == "call" or not report.passed:
            self.outcomes[name] = report.outcome
            self.why[name] = str(report.longrepr)
            for _, told in report.user_properties:
                self.plays[name] = told


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project for pytest in this process: no start of torch, and none of our own settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    return tmp_path


def run_here(folder: Path, *options: str, test: str = TELL) -> tuple[int, Seen]:
    (folder / "test_here.py").write_text(test)
    seen, fixed = Seen(), ["-p", "portable_amp_pytest", "--import-mode=importlib"]
    for name in ("cacheprovider", "faulthandler", "unraisableexception"):  # the last is slow
        fixed += ["-p", f"no:{name}"]
    fixed += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # it may be imported already
    try:
        return pytest.main([*fixed, *options, str(folder)], plugins=[seen]), seen
    finally:
        sys.modules.pop("test_here", None)


def run(folder: Path, *options: str, test: str = TEST) -> tuple[int, str]:
    (folder / "test_it.py").write_text(test)
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    # The installed entry point loads it, where there is one.
    plugin = [] if _is_installed() else ["-p", "portable_amp_pytest"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-rA", "-p", "no:cacheprovider", *plugin, *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def _is_installed() -> bool:
    from importlib.metadata import entry_points

    return any(entry.value == "portable_amp_pytest" for entry in entry_points(group="pytest11"))


def test_all_of_them_live(tmp_path: Path) -> None:
    from portable_amp.testing import MACHINES

    code, told = run(tmp_path, "--amp-machines=all", "--amp-live")
    assert code == 0, told
    assert "ran on t4 live" in told
    assert f"{len(MACHINES) - 1} passed, 2 skipped" in told  # test_without is one
    assert "gaudi2: live=True plays cuda, mps, xpu, not hpu" in told


def test_what_is_not_asked_otherwise_is_what_the_help_says(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, seen = run_here(here)
    played = [key for key, _ in seen.plays.values()]
    assert code == 0
    assert len(played) > 3
    assert seen.outcomes == {f"test_tell[{key}]": "passed" for key in played}
    assert not any(live for _, live in seen.plays.values())
    capsys.readouterr()
    assert run_here(here, "--help")[0] == 0
    _, _, options = capsys.readouterr().out.partition("\nportable-amp:\n")
    told = "".join(options.partition("\n\n")[0].split())
    assert "--amp-machines=NAMES" in told
    assert f"default:thesettingamp_machines,or{','.join(played)})" in told
    assert "--amp-liveplay" in told


@pytest.mark.parametrize(
    ("setting", "options", "played"),
    [
        ("h100, arc-a770,h100", [], ["h100", "arc-a770"]),
        ("h100", ["--amp-machines=t4 ,, v100"], ["t4", "v100"]),
        ("m1", ["--amp-machines=cpu"], ["cpu"]),
    ],
)
def test_the_option_wins_over_the_setting(
    here: Path, setting: str, options: list[str], played: list[str]
) -> None:
    (here / "pytest.ini").write_text(f"[pytest]\namp_machines = {setting}\n")
    code, seen = run_here(here, *options)
    assert code == 0
    assert list(seen.plays.values()) == [(key, False) for key in played]


def test_all_is_the_whole_catalogue(here: Path) -> None:
    from portable_amp.testing import MACHINES

    _, seen = run_here(here, "--amp-machines=t4,all")
    assert [key for key, _ in seen.plays.values()] == [row.key for row in MACHINES]


def test_live_machines_are_live_and_those_that_cannot_be_are_skipped(here: Path) -> None:
    code, seen = run_here(here, "--amp-machines=gaudi2,t4", "--amp-live")
    assert code == 0
    assert seen.plays == {"test_tell[t4]": ("t4", True)}
    assert seen.outcomes == {"test_tell[gaudi2]": "skipped", "test_tell[t4]": "passed"}
    assert "gaudi2: live=True plays cuda, mps, xpu, not hpu" in seen.why["test_tell[gaudi2]"]


@pytest.mark.parametrize(
    "marks",
    [
        ['"amp_machine", ["v100"], indirect=True'],
        ['argnames="amp_machine", argvalues=["v100"], indirect=True'],
        ['["x", "amp_machine"], [(1, "v100")], indirect=["amp_machine"]'],
        ['"x, amp_machine", [(1, "v100")], indirect=["amp_machine"]'],
        ['"x", [1]', '"amp_machine", ["v100"], indirect=True'],
    ],
)
def test_a_test_may_choose_its_machines_itself(here: Path, marks: list[str]) -> None:
    text = "import pytest\n" + "".join(f"@pytest.mark.parametrize({mark})\n" for mark in marks)
    x = "x, " if "x" in "".join(marks).replace("indirect", "") else ""
    test = TELL.replace("\ndef test_tell(", f"{text}def test_tell({x}")
    code, seen = run_here(here, "--amp-machines=t4,h100", test=test)
    assert code == 0, seen.why
    assert list(seen.plays.values()) == [("v100", False)]


def test_what_else_a_test_is_parametrized_with_is_no_choice(here: Path) -> None:
    test = 'import pytest\n@pytest.mark.parametrize("amp_machine_count", [1, 2])'
    test += TELL.replace("test_tell(", "test_tell(amp_machine_count, ")
    code, seen = run_here(here, "--amp-machines=t4,h100", test=test)
    assert code == 0, seen.why
    assert sorted(seen.plays.values()) == [("h100", False)] * 2 + [("t4", False)] * 2


@pytest.mark.parametrize("test", [TELL, "def test_it():\n    pass\n"])
def test_an_unknown_machine_is_refused_before_anything_runs(
    here: Path, capsys: pytest.CaptureFixture[str], test: str
) -> None:
    code, seen = run_here(here, "--amp-machines", "t4, m1", test=test)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert not seen.outcomes
    (line,) = [line for line in "".join(capsys.readouterr()).splitlines() if line.strip()]
    assert line == "ERROR: --amp-machines: no machine 'm1' in the catalogue; there is m1-macos13"


def test_a_project_that_does_not_use_it_pays_nothing(tmp_path: Path) -> None:
    test = "import sys\ndef test_it():\n    assert 'torch' not in sys.modules\n"
    code, told = run(tmp_path, test=test)
    assert code == 0, told
