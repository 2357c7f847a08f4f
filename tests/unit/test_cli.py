from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import portable_amp
from portable_amp import DeviceContext, DeviceError, choose, cli, doctor
from portable_amp.testing import play
from portable_amp.traps import traps_for


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
    told = {"ok": False, "error": "no step was taken in 24 attempts"}
    real = torch.nn.functional.cross_entropy
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", lambda *a: real(*a) * 0)
        assert doctor.training_step(DeviceContext("cpu")) == told
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, closure=None: None)
    assert doctor.training_step(DeviceContext("cpu")) == told


def test_a_step_that_ends_in_nan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda *a: real(*a) * float("nan"))
    assert "not finite" in doctor.training_step(DeviceContext("cpu"))["error"]


def test_the_doctor_leaves_every_random_state_alone() -> None:
    with play("t4", live=True):
        torch.manual_seed(7)
        expected = torch.rand(3), torch.rand(3, device="cuda").cpu()
        torch.manual_seed(7)
        first = torch.rand(3)
        assert doctor.training_step(DeviceContext("cpu"))["ok"]
        assert doctor.training_step(DeviceContext("cuda"))["ok"]
        assert torch.equal(torch.rand(3, device="cuda").cpu(), expected[1])
        assert torch.equal(first, expected[0])
        torch.manual_seed(7)
        state = torch.get_rng_state()
        doctor.diagnose()
        assert torch.equal(torch.get_rng_state(), state)


def test_the_doctor_asks_no_device_for_its_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    with play("a100", count=2), monkeypatch.context() as patch:
        for name in ("manual_seed_all", "get_rng_state", "set_rng_state"):
            patch.setattr(torch.cuda, name, lambda *given: asked.append(given))
        assert doctor.training_step(DeviceContext("cpu"))["ok"]
        assert doctor.training_step(DeviceContext("cuda:1"))["ok"]
    assert not asked


def test_the_doctor_examines_the_same_network_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = torch.nn.functional.cross_entropy, []

    def loss(out: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(out.tolist())
        return real(out, targets)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", loss)
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert doctor.training_step(DeviceContext("cpu"))["ok"]
    assert seen[0] == seen[1]


def test_the_doctor_leaves_logging_and_warnings_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    level, filters = doctor.logger.level, list(warnings.filters)
    doctor.diagnose()
    assert not caplog.records
    monkeypatch.setattr(doctor, "examine", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        doctor.diagnose()
    assert (doctor.logger.level, warnings.filters) == (level, filters)


def test_what_is_warned_of_meanwhile_is_a_note_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.examine

    def warns(name: str) -> dict[str, object]:
        warnings.warn("the driver is old", stacklevel=2)
        return real(name)

    monkeypatch.setattr(doctor, "examine", warns)
    with play("a100", count=2):
        found = doctor.diagnose()
    assert found["notes"].count("the driver is old") == 1
    assert [device["device"] for device in found["devices"]] == ["cuda:0", "cuda:1", "cpu"]


@pytest.mark.parametrize("key", ["t4", "m2-macos15", "arc-a770", "gaudi2", "cpu-avx512bf16"])
def test_the_findings_are_those_of_the_machine(key: str) -> None:
    with play(key) as played:
        found = doctor.diagnose()
        can = played.machine.capabilities
        hardware = played.machine.hardware
    device = found["devices"][0]
    words = {None: "unknown", True: "yes", False: "absent"}
    assert {name: device[name] for name in ("name", "total_memory", "dtypes", "autocast")} == {
        "name": can.name,
        "total_memory": can.total_memory,
        "dtypes": {
            "float32": "native",
            "float16": can.float16.value,
            "bfloat16": can.bfloat16.value,
            "float64": words[can.float64],
        },
        "autocast": can.autocast,
    }
    assert device["grad_scaler"] == can.grad_scaler
    assert device["evidence"] == list(can.evidence)
    for request in ("auto", "fp16", "bf16"):
        plan = choose(request, can)
        told = {"precision": plan.name, "scaler": plan.scaler, "reason": plan.reason}
        assert device["plans"][request] == told
    assert [(trap["what"], trap["cure"], trap["source"]) for trap in device["traps"]] == [
        (trap.what, trap.cure, trap.source) for trap in traps_for(hardware, can)
    ]
    assert found["chosen"] == device["device"]
    assert found["python"] == platform.python_version()
    assert found["system"] == f"{platform.system()} {platform.machine()}"
    assert found["torch"] == torch.__version__
    assert found["ok"] is all(device["step"]["ok"] for device in found["devices"])


@pytest.mark.parametrize("key", ["t4", "m1-macos13", "gaudi2", "cpu"])
def test_the_report_tells_every_finding(key: str) -> None:
    with play(key):
        found = doctor.diagnose()
    head, *blocks = doctor.report(found).split("\n\n")
    assert head.splitlines() == [
        f"torch {torch.__version__}, Python {found['python']}, {found['system']}",
        *(f"Note: {note}" for note in found["notes"]),
    ]
    for device, block in zip(found["devices"], blocks, strict=True):
        told = block.splitlines()
        memory, step = device["total_memory"], device["step"]
        size = f", {memory / 2**30:.0f} GiB" if memory else ""
        chosen = "  <- DeviceContext() takes it" if device["device"] == found["chosen"] else ""
        assert told[0] == f"{device['device']}: {device['name']}{size}{chosen}"
        assert [line for line in told if line.startswith("  seen: ")] == [
            f"  seen: {seen}" for seen in device["evidence"]
        ]
        dtypes = re.findall(r"(float\d+|bfloat16) (\w+)", told[1])
        assert dict(dtypes) == device["dtypes"]
        scaled = " with a gradient scaler"
        assert re.findall(rf"^  (\w+) -> (\w+)({scaled})?: (.+)$", block, re.MULTILINE) == [
            (request, plan["precision"], scaled if plan["scaler"] else "", plan["reason"])
            for request, plan in device["plans"].items()
        ]
        (line,) = [line for line in told if line.startswith("  training step: ")]
        assert line.endswith("ran" if step["ok"] else f"FAILED: {step['error']}")
        for trap in device["traps"]:
            at = told.index(f"  trap: {trap['what']}")
            assert told[at + 1] == f"    cure: {trap['cure']} ({trap['source']})"
    assert doctor.report(found).count("DeviceContext() takes it") == 1


def test_a_setting_that_names_no_device_is_noted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PORTABLE_AMP_DEVICE", "cuda:5")
    assert cli.main(["doctor"]) == 0
    assert "Note: 'cuda:5' (from $PORTABLE_AMP_DEVICE) is not available" in capsys.readouterr().out
    assert doctor.diagnose()["chosen"] == "none"


@pytest.mark.parametrize("there", ["nvidia-smi", "rocm-smi"])
@pytest.mark.parametrize("cuda", [None, "12.8"])
@pytest.mark.parametrize("hip", [None, "6.2"])
def test_a_gpu_that_this_build_cannot_use_is_noted(
    there: str, cuda: str | None, hip: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name if name == there else None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(doctor, "examine", lambda name: {"step": {"ok": True}})
    monkeypatch.setenv("PORTABLE_AMP_DEVICE", "cuda:5")  # of this there is a note, too
    *notes, last = doctor.diagnose()["notes"]
    assert ["built without CUDA" in note for note in notes] == [True] * (
        (there, cuda, hip) == ("nvidia-smi", None, None)
    )
    assert "'cuda:5'" in last


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


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"portable-amp {portable_amp.__version__}\n"


def test_help_says_what_each_command_and_option_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    for words, subjects in (([], ("doctor", "check", "fix")), (["doctor"], ("--json",))):
        with pytest.raises(SystemExit) as caught:
            cli.main([*words, "--help"])
        told = capsys.readouterr().out
        assert caught.value.code == 0
        assert told.startswith(" ".join(["usage: portable-amp", *words]))
        for subject in subjects:
            assert re.search(rf"^ +{subject} +\w+ \w+", told, re.MULTILINE)


def test_json_is_for_eyes_too(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor", "--json"])
    assert '\n  "torch": ' in capsys.readouterr().out


def test_an_error_of_ours_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(name: str) -> dict[str, object]:
        raise DeviceError(f"{name} is lost")

    monkeypatch.setattr(doctor, "examine", lost)
    assert cli.main(["doctor"]) == 2
    streams = capsys.readouterr()
    assert (streams.out, streams.err) == ("", "portable-amp: cpu:0 is lost\n")


@pytest.mark.parametrize("words", [["doctor"], ["check", "."]], ids=" ".join)
def test_a_reader_that_has_seen_enough_ends_it_in_silence(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.py").write_text("import torch\nx = torch.ones(2).cuda()\n")
    assert cli.main(words) == (words[0] == "check")
    read, write = os.pipe()
    os.close(read)
    capsys.readouterr()
    with monkeypatch.context() as patch, os.fdopen(write, "w") as left:
        patch.setattr(sys, "stdout", left)
        assert cli.main(words) == 1
    assert capsys.readouterr().err == ""


def test_it_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> dict[str, object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    assert cli.main(["doctor"]) == 130


@pytest.mark.parametrize(("factor", "first", "last"), [(1.0, 1, 1), (2.0**6, 2, 23)])
def test_it_trains_until_a_step_is_taken(
    factor: float, first: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda *a, **k: real(*a, **k) * factor
    )
    with play("t4", live=True) as played:
        assert doctor.training_step(DeviceContext("cuda")) == {"ok": True, "error": None}
    assert first <= len(played.asked("scale")) <= last


def test_a_step_that_raises_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("no kernel image\nfor this card")

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", fails)
    told = {"ok": False, "error": "RuntimeError: no kernel image"}
    assert doctor.training_step(DeviceContext("cpu")) == told
