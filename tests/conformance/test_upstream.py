"""PyTorch's own tests of autocast and GradScaler hold for the drop-ins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import portable_amp

SCRIPT = Path(__file__).with_name("upstream.py")
VARIABLE = "PORTABLE_AMP_PYTORCH_SOURCE"
needs_source = pytest.mark.skipif(
    not os.environ.get(VARIABLE),
    reason=f"${VARIABLE} is not set; it is to name PyTorch's source folder (the one with "
    f"version.txt and test/), of the installed version {torch.__version__}",
)


def run(source: str | Path, *first_on_path: Path) -> subprocess.CompletedProcess[str]:
    path = [*map(str, first_on_path), str(Path(portable_amp.__file__).parents[1])]
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(source)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=900,
    )


@needs_source
def test_torchs_own_tests_pass_with_the_drop_ins_but_for_the_listed_ones() -> None:
    done = run(os.environ[VARIABLE])
    assert done.returncode == 0, done.stdout + done.stderr


@needs_source
def test_a_scaler_that_never_skips_a_step_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import portable_amp\n"
        "def step(self, optimizer, *args, **kwargs):\n"
        "    return optimizer.step(*args, **kwargs)\n"
        "portable_amp.ScalerShim.step = step\n"
    )
    done = run(os.environ[VARIABLE], tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "NOT MEANT" in done.stdout
    assert "test_grad_scaling_clipping_cpu" in done.stdout


def test_a_folder_that_is_no_pytorch_source_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.splitlines() == [
        f"{tmp_path} is not a PyTorch source: it has no version.txt, test/test_autocast.py, "
        "test/test_torch.py"
    ]


def test_the_source_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    for name, text in (
        ("version.txt", "1.13.1\n"),
        ("test/test_autocast.py", ""),
        ("test/test_torch.py", ""),
    ):
        (tmp_path / name).write_text(text)
    done = run(tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.splitlines() == [
        f"{tmp_path} is PyTorch 1.13.1; installed is torch {torch.__version__}"
    ]
