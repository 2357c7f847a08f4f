"""One contract that every back end keeps, on the devices that are here and on played ones.

PORTABLE_AMP_TEST_BACKENDS=cuda,cpu names what must be here: an absent one is red, not skipped.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import support
from portable_amp import (
    DeviceContext,
    PrecisionFallbackWarning,
    Support,
    clear_cache,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    seed_everything,
    set_rng_state,
    split_on_oom,
)
from portable_amp.backends import present
from portable_amp.doctor import training_step
from portable_amp.testing import machine, play

ASKED = os.environ.get("PORTABLE_AMP_TEST_BACKENDS", "")
KINDS = [kind.strip() for kind in ASKED.split(",") if kind.strip()] or [
    row.device_type for row in present()
]


# Machines whose live tensors keep it too.
PLAYED = ["t4", "mi250", "arc-a770", "m2-macos15", "m1-macos13"]


@pytest.fixture(params=[*KINDS, *([] if ASKED else PLAYED)])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param in PLAYED:
        if machine(request.param).hardware.device_type not in support.KINDS:
            pytest.skip(f"torch {torch.__version__} has no autocast for {request.param}")
        with play(request.param, live=True) as played:
            yield played.kind
        return
    assert request.param in [row.device_type for row in present()], (
        f"PORTABLE_AMP_TEST_BACKENDS asks for {request.param!r}, which is not here"
    )
    yield str(request.param)


@pytest.fixture
def ctx(kind: str) -> DeviceContext:
    return DeviceContext(kind, precision="fp32")


@pytest.mark.parametrize("precision", ["auto", "fp32", "fp16", "bf16"])
def test_a_training_step_runs_under_every_plan(kind: str, precision: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionFallbackWarning)
        ctx = DeviceContext(kind, precision=precision)
    assert training_step(ctx) == {"ok": True, "error": None}
    assert not torch.is_autocast_enabled(kind)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_the_plan_says_is_what_is_computed(kind: str, precision: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionFallbackWarning)
        ctx = DeviceContext(kind, precision=precision)
    x = ctx.to(torch.ones(4, 4))
    with ctx.autocast():
        assert x.mm(x).dtype is ctx.plan.dtype
    assert x.mm(x).dtype is torch.float32


def test_facts_are_stated(ctx: DeviceContext) -> None:
    can = ctx.capabilities
    assert can.device_type == ctx.device.type
    assert can.name
    assert can.evidence
    assert can.float16 in Support
    if can.float64:
        assert torch.ones(1, dtype=torch.float64, device=ctx.device).sum().item() == 1.0


def test_batches_arrive_whole(ctx: DeviceContext) -> None:
    batch = {"x": torch.arange(1000.0), "y": [torch.arange(5), torch.ones(2, dtype=torch.float64)]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionFallbackWarning)
        moved = ctx.to(batch)
    assert {t.device for t in (moved["x"], *moved["y"])} == {ctx.device}
    assert torch.equal(moved["x"].cpu(), batch["x"])
    assert torch.equal(moved["y"][0].cpu(), batch["y"][0])


def test_a_loader_feeds_it_in_order(ctx: DeviceContext) -> None:
    data = torch.utils.data.TensorDataset(torch.arange(64.0).reshape(16, 4))
    loader = torch.utils.data.DataLoader(data, batch_size=4, **ctx.loader_options(2))
    # Whatever is asynchronous must not let one batch overwrite another.
    got = torch.cat([ctx.to(batch)[0] for batch in loader])
    assert torch.equal(got.cpu(), data.tensors[0])


def test_clearing_and_statistics_never_raise(ctx: DeviceContext) -> None:
    held = ctx.to(torch.ones(1000))
    stats = ctx.memory()
    for value in (stats.allocated, stats.reserved, stats.total):
        assert value is None or value >= 0
    del held
    freed = clear_cache(ctx.device)
    assert freed is None or freed >= 0
    assert ctx.clear_cache(min_pressure=1.1) is None
    ctx.synchronize()


def test_random_state_comes_back(ctx: DeviceContext) -> None:
    seed_everything(1)
    state = rng_state()
    first = torch.rand(8, device=ctx.device).cpu()
    assert not torch.equal(torch.rand(8, device=ctx.device).cpu(), first)
    set_rng_state(state)
    assert torch.equal(torch.rand(8, device=ctx.device).cpu(), first)
    seed_everything(1)
    assert torch.equal(torch.rand(8, device=ctx.device).cpu(), first)


def test_a_checkpoint_goes_over_the_cpu_and_back(ctx: DeviceContext, tmp_path: Path) -> None:
    model = ctx.to(torch.nn.Linear(3, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(ctx.to(torch.ones(1, 3))).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "c.pt", {"m": model.state_dict(), "o": optimizer.state_dict()})
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert {tensor.device.type for tensor in loaded["m"].values()} == {"cpu"}
    other = ctx.to(torch.nn.Linear(3, 3))
    other.load_state_dict(loaded["m"])
    resumed = torch.optim.AdamW(other.parameters())
    resumed.load_state_dict(loaded["o"])
    assert torch.equal(other.weight, model.weight)
    assert resumed.state[other.weight]["exp_avg"].device == ctx.device


def test_a_split_batch_has_the_whole_batchs_gradient(ctx: DeviceContext) -> None:
    torch.manual_seed(0)
    model, x = ctx.to(torch.nn.Linear(4, 1)), ctx.to(torch.randn(8, 4))

    class Step:
        room = 8

        def __call__(self, part: torch.Tensor, weight: float) -> None:
            if len(part) > self.room:
                raise RuntimeError("CUDA out of memory.")
            (model(part).square().mean() * weight).backward()

    whole, halved = Step(), Step()
    halved.room = 3
    split_on_oom(whole, x, parameters=model.parameters())
    expected = model.weight.grad.clone()
    model.zero_grad()
    split_on_oom(halved, x, parameters=model.parameters())
    torch.testing.assert_close(model.weight.grad, expected)


def test_an_absent_backend_that_is_asked_for_is_red(tmp_path: Path) -> None:
    import subprocess
    import sys

    kinds = {row.device_type for row in present()}
    absent = next(kind for kind in ("mps", "xpu", "cuda") if kind not in kinds)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            "facts_are_stated",
        ],
        env={**os.environ, "PORTABLE_AMP_TEST_BACKENDS": f"cpu,{absent}"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"asks for '{absent}', which is not here" in done.stdout
    assert "1 passed" in done.stdout
