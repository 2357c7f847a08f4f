from __future__ import annotations

import inspect
import logging
import pickle
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from portable_amp import (
    DeviceContext,
    PrecisionFallbackWarning,
    ScalerShim,
    UnsupportedPrecisionError,
    choose,
    context,
)
from portable_amp.testing import machine, play
from portable_amp.testing.machines import MACHINES
from support import playing, without_mps


@pytest.mark.parametrize(
    ("key", "lines"),
    [
        ("a100", ["Device: cuda:0", "Mixed precision: enabled", "Autocast device type: cuda"]),
        (
            "m2-macos14",
            ["Device: mps:0", "Mixed precision: disabled", "Autocast device type: None"],
        ),
        ("cpu", ["Device: cpu", "Mixed precision: disabled", "Autocast device type: None"]),
    ],
)
def test_the_three_lines(key: str, lines: list[str]) -> None:
    with playing(key):
        ctx = DeviceContext(precision=True)
        assert ctx.summary().splitlines() == lines
        assert ctx.explain().splitlines()[:4] == [*lines, ""]


def test_explain_tells_every_decision() -> None:
    with playing("t4"):
        text = DeviceContext().explain()
    for words in (
        "Precision: fp16, asked for 'auto': fp16 is native here and bf16 is not",
        "Seen: Tesla T4, compute capability 7.5",
        'DeviceContext(precision="fp32")',
        "Gradient scaler: on",
        "Cache: torch.cuda.empty_cache()",
        "Copies: asynchronous from pinned memory",
        "DeviceContext('cuda:0')",
        "Several processes: nccl",
        "$PORTABLE_AMP_DEVICE",
    ):
        assert words in text


@pytest.mark.parametrize("key", [row.key for row in MACHINES])
def test_explain_offers_what_would_be_honoured_there(key: str) -> None:
    with playing(key) as hardware, warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionFallbackWarning)
        for asked in ("auto", "fp16"):
            ctx = DeviceContext(hardware.device_type, precision=asked)
            others = {"fp32", "fp16", "bf16"} - {ctx.plan.name}
            honoured = {
                name
                for name in others
                if DeviceContext(ctx.device, precision=name).plan.name == name
            }
            (line,) = re.findall(r"To change it: (.*)", ctx.explain())
            assert set(re.findall(r'"(\w+)"', line)) == honoured
            assert ("DeviceContext(" in line) is bool(honoured)
            assert ctx.scaler().is_enabled() is ("Gradient scaler: on;" in ctx.explain())
            assert all(f"  Seen: {seen}." in ctx.explain() for seen in ctx.plan.evidence)


@without_mps
def test_automatic_precision_that_is_off_is_told_once_and_is_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with playing("m2-macos14"), caplog.at_level(logging.WARNING):
        DeviceContext()
        DeviceContext(precision=True)
    assert [record.getMessage() for record in caplog.records] == [
        "mps:0: mixed precision is off, computing in fp32: "
        "torch's autocast covers only part of its operations on MPS."
    ]


def test_where_mixed_precision_is_on_or_was_not_wanted_nothing_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with playing("a100"), caplog.at_level(logging.WARNING):
        DeviceContext()
        DeviceContext(precision="fp16")
        DeviceContext("cpu", precision="fp32")
    assert not caplog.records


def test_a_request_that_is_not_honoured_warns_once_per_device_and_request() -> None:
    with playing("t4", count=2), pytest.warns(PrecisionFallbackWarning) as caught:
        for _ in range(3):
            assert DeviceContext("cuda:0", precision="bf16").plan.name == "fp32"
            assert DeviceContext("cuda:1", precision="bf16-mixed").plan.name == "fp32"
    assert [str(warning.message) for warning in caught] == [
        f"precision='bf16' on cuda:{index} becomes fp32: "
        "bf16 is emulated on this device, slower than fp32; fp16 works here."
        for index in (0, 1)
    ]
    assert caught[0].filename == __file__


def test_another_request_or_reason_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    old = replace(machine("m1-macos13").hardware, torch_version=(2, 4))
    with playing(old), pytest.warns(PrecisionFallbackWarning) as caught:
        for precision in ("fp16", "bf16", "fp16"):
            DeviceContext("mps", precision=precision)
    assert len(caught) == 2  # for one reason
    poor = machine("gtx1660").capabilities
    monkeypatch.setattr(context, "agree_on_plan", lambda request, can: choose(request, poor))
    with playing("t4"), pytest.warns(PrecisionFallbackWarning) as caught:
        for _ in range(2):
            DeviceContext(precision="bf16").agreed()
    assert ["fp16 works here" in str(warning.message) for warning in caught] == [True, False]


def test_only_the_first_rank_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with playing("t4"):
        assert DeviceContext(precision="bf16").plan.fell_back  # warnings are errors in these tests


def test_a_refusal_instead_of_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    with playing("t4"):
        with pytest.raises(UnsupportedPrecisionError, match="fp16 works here"):
            DeviceContext(precision="bf16", unsupported="raise")
        DeviceContext(precision="fp16", unsupported="raise")
        DeviceContext(precision="auto", unsupported="raise")
    on = dict.fromkeys(("1", "true", "Yes", "on", "2"), True)
    off = dict.fromkeys(("0", "", " ", "false", "False", "no", "NO", " off "), False)
    for value, strict in {**on, **off}.items():
        monkeypatch.setenv("PORTABLE_AMP_STRICT", value)
        expected = UnsupportedPrecisionError if strict else PrecisionFallbackWarning
        with playing("t4"), pytest.raises(expected):
            DeviceContext(precision="bf16")


def test_a_third_way_does_not_exist() -> None:
    with pytest.raises(ValueError, match="'fallback' or 'raise'"):
        DeviceContext(unsupported="ignore")


def test_it_is_immutable() -> None:
    ctx = DeviceContext("cpu")
    with pytest.raises(AttributeError, match="immutable"):
        ctx.device = torch.device("meta")
    with pytest.raises(AttributeError, match="immutable"):
        del ctx.plan


@without_mps
def test_it_pickles_and_compares(caplog: pytest.LogCaptureFixture) -> None:
    with playing("m2-macos14"):
        ctx = DeviceContext(precision="fp16")
    with caplog.at_level(logging.WARNING):
        twin = pickle.loads(pickle.dumps(ctx))  # on a machine without MPS: nothing is decided anew
    assert not caplog.records
    assert twin == ctx
    assert hash(twin) == hash(ctx)
    assert twin != DeviceContext("cpu", precision="fp32")
    assert twin != "mps"
    assert repr(twin) == "DeviceContext('mps:0', precision='fp16')"


def test_contexts_differ_in_each_part() -> None:
    with playing("t4", count=2):
        ctx = DeviceContext("cuda:0", precision="fp16")
        same = DeviceContext(0, precision=torch.float16)
        others = [
            DeviceContext("cuda:1", precision="fp16"),
            DeviceContext("cuda:0", precision="fp32"),
            DeviceContext("cuda:0", precision="fp16", unsupported="raise"),
        ]
    with playing("v100"):
        others.append(DeviceContext("cuda:0", precision="fp16"))
    assert same == ctx
    assert len({ctx, same, *others}) == 5


def test_a_loader_without_arguments_loads_in_this_process() -> None:
    loader: Any = DataLoader([1, 2], **DeviceContext("cpu").loader_options())  # type: ignore[arg-type]
    assert loader.num_workers == 0
    assert [batch.tolist() for batch in loader] == [[1], [2]]


def test_the_cache_is_kept_below_the_pressure_that_is_named() -> None:
    with play("t4", live=True, memory=10_000) as played:
        ctx = DeviceContext()
        held = torch.empty(1000, device=ctx.device)
        for pressure, cleared in ((0.9, 0), (0.1, 1), (None, 2)):
            ctx.clear_cache(min_pressure=pressure)
            assert len(played.asked("empty_cache")) == cleared
        del held


def test_a_scaler_is_torchs_unless_told() -> None:
    theirs = inspect.signature(torch.amp.GradScaler).parameters
    for ours in (DeviceContext.scaler, ScalerShim):
        mine = inspect.signature(ours).parameters
        for name in ("init_scale", "growth_factor", "backoff_factor", "growth_interval"):
            assert mine[name].default == theirs[name].default, name


def test_synchronize_asks_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    with playing("m2-macos14"), monkeypatch.context() as patch:
        patch.setattr(torch.mps, "synchronize", lambda: asked.append("mps"))
        DeviceContext().synchronize()
    with playing("a100", count=2), monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", asked.append)
        DeviceContext("cuda:1").synchronize()
    DeviceContext("cpu").synchronize()
    assert asked == ["mps", torch.device("cuda:1")]


def test_ranks_that_agree_refuse_too(monkeypatch: pytest.MonkeyPatch) -> None:
    t4 = machine("t4").capabilities
    monkeypatch.setattr(context, "agree_on_plan", lambda request, can: choose(request, t4))
    with playing("a100"):
        strict = DeviceContext(precision="bf16", unsupported="raise")
        with pytest.raises(UnsupportedPrecisionError, match="emulated"):
            strict.agreed()
        with pytest.warns(PrecisionFallbackWarning):
            assert DeviceContext(precision="bf16").agreed().plan.name == "fp32"


def test_without_processes_a_context_agrees_with_itself() -> None:
    ctx = DeviceContext("cpu", precision="fp32")
    assert ctx.agreed() is ctx


def test_import_is_silent_and_decides_nothing() -> None:
    code = (
        "import sys, os, logging, torch\n"
        "def refuse(*a, **k): raise AssertionError('asked at import')\n"
        "torch.cuda.is_available = torch.backends.mps.is_available = refuse\n"
        "torch.xpu.is_available = torch.get_device_module = refuse\n"
        "before = dict(os.environ)\n"
        "type(os.environ).__getitem__ = refuse\n"
        "import portable_amp\n"
        "assert 'numpy' not in portable_amp.__dict__\n"
        "for heavy in ('hypothesis', 'portable_amp.testing', 'portable_amp.cli'):\n"
        "    assert heavy not in sys.modules, heavy\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
