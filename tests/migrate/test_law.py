"""A fixed program computes in what its context tells, and scales gradients exactly where it must.

Run on every machine of the catalogue: each spelling of a region, at each place that it is found at.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from portable_amp import DeviceContext, PrecisionFallbackWarning, ScalerShim, maybe_autocast
from portable_amp.migrate import fixer
from portable_amp.migrate.scan import scan
from portable_amp.testing import MACHINES, Played, machine, play

HEAD = """import contextlib, functools, torch
import torch.cuda.amp as camp
from torch import amp, autocast as fast, cuda
from torch.cuda.amp import GradScaler as GS, autocast
"""
REGIONS = {
    "fp16": (
        "torch.cuda.amp.autocast(flag)",
        "autocast(enabled=flag)",
        "camp.autocast(flag, torch.float16)",
        "cuda.amp.autocast(dtype=torch.half, enabled=flag)",
        "torch.autocast('cuda', enabled=flag)",
        "torch.autocast('cuda', torch.float16, flag, False)",
        "amp.autocast(device_type='cuda', enabled=flag, dtype=torch.float16)",
        "fast('cuda:0', dtype=None, enabled=flag)",
        "functools.partial(torch.autocast, 'cuda', enabled=flag)()",
        "functools.partial(autocast, flag)()",
        "(autocast() if flag else contextlib.nullcontext())",
    ),
    "bf16": (
        "autocast(flag, torch.bfloat16)",
        "torch.cuda.amp.autocast(dtype=torch.bfloat16, enabled=flag, cache_enabled=True)",
        "torch.autocast('cuda', torch.bfloat16, flag)",
        "torch.autocast(dtype=torch.bfloat16, device_type='cuda', enabled=flag)",
        "functools.partial(amp.autocast, 'cuda', torch.bfloat16)(enabled=flag)",
    ),
    "fp32": (
        "torch.autocast('cuda', enabled=False)",
        "autocast(False, torch.bfloat16)",
        "torch.autocast('cuda', torch.float32, flag)",
    ),
}
SCALERS = (
    "torch.cuda.amp.GradScaler(enabled=flag)",
    "GS(1024.0, enabled=flag)",
    "GS(8.0, 2.0, 0.5, 5, flag)",
    "torch.amp.GradScaler(enabled=flag)",
    "torch.amp.GradScaler('cuda', 8.0, enabled=flag)",
    "torch.GradScaler(device='cuda', growth_interval=5, enabled=flag)",
    "amp.GradScaler('cuda:0', 8.0, 2.0, 0.5, 5, flag)",
    "(GS() if flag else GS(enabled=False))",
    "functools.partial(camp.GradScaler, 8.0)(enabled=flag)",
)
PLACES = {
    "flat": """x, scaler = torch.ones(2, 2).cuda(), {scaler}
with {region}:
    computed = observe(x)
""",
    "beside another": """x, scaler = torch.ones(2, 2).cuda(), {scaler}
with torch.no_grad(), {region}, torch.no_grad():
    computed = observe(x)
""",
    "kept in a name": """region, x, scaler = {region}, torch.ones(2, 2).cuda(), {scaler}
with region:
    computed = observe(x)
""",
    "in functions": """def build():
    return torch.ones(2, 2).cuda(), {scaler}
def step(x):
    with {region}:
        return observe(x)
x, scaler = build()
computed = step(x)
""",
    "with a device handed on": """def step(x, device):
    scaler = {scaler}
    with {region}:
        return observe(x), scaler
computed, scaler = step(torch.ones(2, 2).to(here), here)
""",
    "with a device chosen": """device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
x, scaler = torch.ones(2, 2).to(device), {scaler}
with {region}:
    computed = observe(x)
""",
    "in a class": """class Trainer:
    def __init__(self):
        self.scaler, self.x = {scaler}, torch.ones(2, 2).cuda()
    def step(self):
        with {region}:
            return observe(self.x)
trainer = Trainer()
computed, scaler = trainer.step(), trainer.scaler
""",
    "on a function": """scaler = {scaler}
@{region}
def step(x):
    return observe(x)
computed = step(torch.ones(2, 2).cuda())
""",
}


class Program(NamedTuple):
    """One for CUDA alone, and what its fixes make of it."""

    precision: str
    text: str
    fixed: tuple[str, ...]


def programs() -> Iterator[Program]:
    """All of them; each scaler comes along with many a region."""
    count = 0
    for precision, regions in REGIONS.items():
        for region in regions:
            for place, text in PLACES.items():
                if place == "on a function" and "nullcontext" in region:
                    continue  # which torch does not let decorate
                scaler = (
                    SCALERS[count % len(SCALERS)] if precision != "fp32" else "GS(enabled=False)"
                )
                count += 1
                text = HEAD + text.format(region=region, scaler=scaler)
                found = scan(text)
                both = {fixer.apply(text, found, unsafe=unsafe) for unsafe in (False, True)}
                # A safe fix may leave torch's own to --unsafe-fixes.
                whole = [one for one in both if not any(f.code < "PAM2" for f in scan(one))]
                assert whole, text
                yield Program(precision, text, tuple(whole))


PROGRAMS = [*programs()]


class Ran(NamedTuple):
    """What a program did."""

    told: set[torch.dtype]
    """What its contexts say that is computed."""
    computed: torch.dtype
    scaled: bool


def run(text: str, played: Played, *, flag: bool) -> Ran:
    """Run a program on the machine that is being played."""
    plans = []
    make = DeviceContext.__init__

    def noting(ctx: DeviceContext, *args: Any, **options: Any) -> None:
        make(ctx, *args, **options)
        plans.append(ctx.plan)

    def observe(x: torch.Tensor) -> torch.dtype:
        if played.live or played.kind == "cpu":
            return (x @ x).dtype
        on = torch.is_autocast_enabled(played.kind)
        return torch.get_autocast_dtype(played.kind) if on else torch.float32

    names: dict[str, Any] = {
        "__name__": "program",
        "flag": flag,
        "here": played.kind,
        "observe": observe,
    }
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what becomes fp32, and of torch's old spellings
        patch.setattr(DeviceContext, "__init__", noting)
        exec(compile(text, "program", "exec"), names)
    return Ran({plan.dtype for plan in plans}, names["computed"], names["scaler"].is_enabled())


def keeps(ran: Ran, *, flag: bool) -> bool:
    """The law."""
    if not flag:
        return ran.computed is torch.float32 and not ran.scaled
    return ran.told == {ran.computed} and ran.scaled is (ran.computed is torch.float16)


def playing(key: str) -> contextlib.AbstractContextManager[Played]:
    return play(key, live=machine(key).hardware.device_type in ("cuda", "mps", "xpu"))


@pytest.mark.parametrize("key", [one.key for one in MACHINES])
def test_what_is_told_is_what_is_computed(key: str) -> None:
    with playing(key) as played:
        for program in PROGRAMS:
            for text in program.fixed:
                for flag in (True, False):
                    ran = run(text, played, flag=flag)
                    assert keeps(ran, flag=flag), f"{key}, flag={flag}: {ran}\n{text}"


@pytest.mark.parametrize("key", ["v100", "t4", "a100", "mi300x"])
def test_on_cuda_it_computes_what_it_did(key: str) -> None:
    with playing(key) as played:
        for program in PROGRAMS:
            if program.precision == "bf16":  # for which a context scales no gradients
                continue
            for text in program.fixed:
                for flag in (True, False):
                    before, after = (run(one, played, flag=flag) for one in (program.text, text))
                    assert before._replace(told=after.told) == after, f"{key}, {flag}\n{text}"


@pytest.mark.parametrize("key", [one.key for one in MACHINES])
def test_two_drop_ins_of_one_device_agree(key: str) -> None:
    """As the README says who keeps the lines of a program and swaps two names."""
    with playing(key) as played, warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionFallbackWarning)
        for kind in (None, played.kind, "cuda", "cpu"):
            where = kind or played.kind
            with maybe_autocast(kind):
                on = torch.is_autocast_enabled(where)
                fp16 = on and torch.get_autocast_dtype(where) is torch.float16
            assert ScalerShim(kind).is_enabled() is fp16


WRONG = """import torch
from portable_amp import DeviceContext, ScalerShim, maybe_autocast

ctx = DeviceContext({precision})
x, scaler = torch.ones(2, 2).to(ctx.device), {scaler}
with {region}:
    computed = observe(x)
"""


@pytest.mark.parametrize(
    ("key", "flag", "precision", "scaler", "region"),
    [
        # What fix wrote before.
        *(
            (key, True, "", "ScalerShim(ctx.device)", "maybe_autocast(ctx.device)")
            for key in ("cpu", "gtx1080", "m2-macos14")
        ),
        (
            "m2-macos14",
            True,
            "precision='fp16'",
            "torch.amp.GradScaler('mps')",
            "ctx.autocast(False)",
        ),
        ("t4", True, "precision='fp16'", "ctx.scaler(enabled=False)", "ctx.autocast()"),
        ("t4", False, "precision='fp16'", "ctx.scaler(enabled=flag)", "ctx.autocast()"),
        ("t4", False, "precision='fp16'", "ctx.scaler()", "ctx.autocast(flag)"),
        ("a100", True, "precision='bf16'", "ScalerShim('cuda', enabled=flag)", "ctx.autocast()"),
    ],
)
def test_the_law_can_fail(key: str, flag: bool, precision: str, scaler: str, region: str) -> None:
    text = WRONG.format(precision=precision, scaler=scaler, region=region)
    with playing(key) as played:
        assert not keeps(run(text, played, flag=flag), flag=flag)
