"""The pytest plugin, as a user's project has it: in a pytest of its own."""

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


def test_the_setting_and_the_tests_own_choice(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\namp_machines = h100, arc-a770,h100\n")
    own = '\n\nimport pytest\n@pytest.mark.parametrize("amp_machine", ["v100"], indirect=True)\n'
    own += "def test_own(amp_machine):\n    assert amp_machine.machine.key == 'v100'\n"
    code, told = run(tmp_path, test=TEST + own)
    assert code == 0, told
    assert "test_training[h100] PASSED" in told
    assert "ran on h100 \n" in told
    assert "test_training[arc-a770] PASSED" in told
    assert "test_own[v100] PASSED" in told
    assert "4 passed" in told


def test_an_unknown_machine_is_one_line(tmp_path: Path) -> None:
    code, output = run(tmp_path, "--amp-machines", "t4, m1")
    assert code == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in output.splitlines() if line.strip()]
    assert line == ("ERROR: --amp-machines: no machine 'm1' in the catalogue; there is m1-macos13")


def test_a_project_that_does_not_use_it_pays_nothing(tmp_path: Path) -> None:
    test = "import sys\ndef test_it():\n    assert 'torch' not in sys.modules\n"
    code, told = run(tmp_path, test=test)
    assert code == 0, told
