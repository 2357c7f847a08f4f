"""The rules say what is so: each is broken by a line, which runs on machines without CUDA."""

from __future__ import annotations

import io
import json
import types
import warnings
from typing import get_args

import pytest
import torch

from portable_amp.migrate import output
from portable_amp.migrate.findings import Applicability, Level
from portable_amp.migrate.rules import RULES
from portable_amp.migrate.scan import scan
from portable_amp.testing import play

HEAD = "import os, torch\nfrom torch.utils.data import DataLoader\n"
# A line that breaks the rule, and raises where there is no CUDA unless it goes as the rule says.
LINES = {
    "PAM101": "with torch.cuda.amp.autocast(): assert (x @ x).dtype is torch.float32",
    "PAM102": "with torch.autocast('cuda'): assert (x @ x).dtype is torch.float32",
    "PAM103": "assert not torch.cuda.amp.GradScaler().is_enabled()",
    "PAM104": "assert torch.cuda.amp.custom_fwd(lambda ctx, x: x)(ctx, x) is x",
    "PAM105": "import apex",
    "PAM201": "x.cuda()",
    "PAM202": "x.to('cuda')",
    "PAM203": "device = 'cuda'\nx.to(device)",
    "PAM204": "device = 'cuda' if torch.cuda.is_available() else 'cpu'\nassert device == 'cpu'",
    "PAM205": "torch.cuda.FloatTensor(2)",
    "PAM301": "torch.cuda.empty_cache()",
    "PAM302": "torch.cuda.synchronize()",
    "PAM303": "assert torch.cuda.memory_allocated() == 0",
    "PAM304": "torch.manual_seed(0)\ntorch.cuda.manual_seed(0)",
    "PAM305": "torch.cuda.Event().record()",
    "PAM306": "torch.cuda.set_device(0)",
    "PAM307": "torch.cuda.get_device_name()",
    "PAM401": "torch.distributed.init_process_group('nccl')",
    "PAM402": "assert torch.cuda.device_count() == 0",
    "PAM501": "torch.load(saved, map_location='cuda')",
    "PAM502": "torch.load(saved)",
    "PAM503": "DataLoader([x], pin_memory=True)",
    "PAM601": "assert torch.cuda.is_available()",
    "PAM602": "os.environ.get('CUDA_VISIBLE_DEVICES')",
    "PAM701": "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
    "try: torch.get_float32_matmul_precision()\n"
    "finally: torch.backends.cuda.matmul.fp32_precision = 'none'",
}
# What happens, as the rules say it -> what the line raises.
CALM = (
    *("works", "harmless", "a warning", "disabled", "disabled: fp16 unscaled", "silently fp32"),
    *("frees nothing", "nothing to free", "runs on the CPU", "runs, follows no autocast"),
    *("one device, or 0", "0, or crashes", "a warning, or crashes", "ignored, or not caught"),
)
EFFECTS: dict[str, tuple[type[Exception], ...]] = {
    **dict.fromkeys(CALM, ()),
    "crashes": (AssertionError, RuntimeError),
    "stops": (AssertionError,),
    "can raise, from torch 2.9 on": (RuntimeError, AttributeError),  # before, of the new name
    "cannot be imported": (ImportError,),
}
NOT_RUN = {"PAM401", "PAM502"}  # which need other processes, and a file from CUDA


def raised(code: str) -> tuple[type[Exception], ...]:
    """What the line of a rule raises."""
    saved = io.BytesIO()
    torch.save(torch.ones(2), saved)
    saved.seek(0)
    names = {"x": torch.ones(2, 2), "saved": saved, "ctx": types.SimpleNamespace()}
    try:
        exec(HEAD + LINES[code], names)
    except Exception as error:
        return (type(error),)
    return ()


@pytest.mark.parametrize(
    ("platform", "machine"), {"CPU": "cpu", "MPS": "m2-macos15", "XPU": "max1550"}.items()
)
def test_there_happens_what_is_said(platform: str, machine: str) -> None:
    with play(machine, live=machine != "cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for code in RULES.keys() - NOT_RUN:
            said = EFFECTS[RULES[code].platforms[platform]]
            found = raised(code)
            assert bool(found) is bool(said), code
            assert all(issubclass(one, said) for one in found), code


@pytest.mark.parametrize("code", RULES)
def test_every_platform_is_spoken_of(code: str) -> None:
    told = RULES[code].platforms
    assert tuple(told) == output.PLATFORMS
    assert (told["CUDA"] == "works") is (code < "PAM7")  # what is no matter of devices
    alike = "apex" not in LINES[code]  # it answers to torch.cuda
    assert (told["ROCm"] == told["CUDA"]) is alike


@pytest.mark.parametrize("code", RULES)
def test_its_line_breaks_the_rule(code: str) -> None:
    (found,) = (one for one in scan(HEAD + LINES[code]) if one.code == code)
    rule = RULES[code]
    assert rule.code == code
    assert (found.level, found.fix, found.platforms) == (rule.level, rule.fix, rule.platforms)
    assert found.message.startswith(rule.message)
    if " " not in rule.title:  # it is what somebody wrote
        assert rule.title in LINES[code]


def test_rules_are_rows_that_differ() -> None:
    assert len({*RULES.values()}) == len({one.title for one in RULES.values()}) == len(LINES)
    (run,) = json.loads(output.as_sarif([]))["runs"]
    told = {one["id"]: one for one in run["tool"]["driver"]["rules"]}
    assert [one["shortDescription"]["text"] for one in told.values()] == [
        one.title for one in RULES.values()
    ]
    assert {one.level for one in RULES.values()} == {*get_args(Level)}
    assert {one.fix for one in RULES.values()} == {*get_args(Applicability)}
    levels = {one["defaultConfiguration"]["level"] for one in told.values()}
    assert levels == {"error", "warning", "note"}
