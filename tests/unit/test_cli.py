from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from portable_amp import DeviceContext, cli, doctor
from portable_amp.testing import play


def test_the_doctor_finds_a_healthy_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"torch {torch.__version__}")
    assert "cpu: " in told
    assert "training step: ran" in told
    assert "cure: " in told


def test_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["devices"][-1]["device"] == "cpu"
    assert found["devices"][-1]["step"] == {"ok": True, "error": None}
    assert set(found["devices"][-1]["plans"]) == {"auto", "fp16", "bf16"}


def test_a_device_on_which_no_step_runs_is_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    with play("t4", live=True, wrong=(torch.float16,)):
        assert cli.main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "cuda:0: Tesla T4, 15 GiB  <- DeviceContext() takes it" in told
    assert "auto -> fp16 with a gradient scaler" in told
    assert "training step: FAILED: " in told
    assert "trap: torch.cuda.is_bf16_supported() says True" in told
    assert "training step: ran" in told  # the CPU is examined all the same


def test_a_step_that_changes_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    assert doctor.training_step(DeviceContext("cpu"))["error"] == "no step was taken in 24 attempts"


def test_a_step_that_ends_in_nan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda *a: real(*a) * float("nan"))
    assert "not finite" in doctor.training_step(DeviceContext("cpu"))["error"]


def test_a_setting_that_names_no_device_is_noted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PORTABLE_AMP_DEVICE", "cuda:5")
    assert cli.main(["doctor"]) == 0
    assert "Note: 'cuda:5' (from $PORTABLE_AMP_DEVICE) is not available" in capsys.readouterr().out


def test_a_gpu_that_this_build_cannot_use_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "built without CUDA" in doctor.diagnose()["notes"][0]


@pytest.mark.parametrize("arguments", [[], ["doctr"], ["doctor", "--xml"], ["doctor", "x"], [""]])
def test_wrong_words_are_one_line_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    streams = capsys.readouterr()
    assert caught.value.code == 2
    assert streams.out == ""
    assert streams.err.count("\n") == 1


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "portable_amp", "--version"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("portable-amp 0.")
