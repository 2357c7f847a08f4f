"""Playing a machine: what the process says, what is recorded, and that nothing of it stays."""

from __future__ import annotations

import platform
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import portable_amp
from portable_amp import DeviceContext, MachineError, ScalerShim, backends, clear_cache
from portable_amp.backends import Hardware
from portable_amp.testing import MACHINES, Call, Machine, machine, play

KEYS = [row.key for row in MACHINES]


def train(ctx: DeviceContext, steps: int = 2) -> float:
    """A loop as users write it."""
    torch.manual_seed(0)
    model = ctx.to(torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = ctx.scaler(init_scale=2.0**8)
    data = TensorDataset(torch.randn(8, 4), torch.randint(0, 2, (8,)))
    for _ in range(steps):
        for batch in DataLoader(data, batch_size=4, **ctx.loader_options()):
            x, y = ctx.to(batch)
            with ctx.autocast():
                loss = torch.nn.functional.cross_entropy(model(x), y)
            assert scaler.backward_step(loss, optimizer, max_norm=1.0).stepped
    ctx.clear_cache()
    return loss.item()


def test_the_catalogue_is_large_and_names_its_sources() -> None:
    assert len(MACHINES) >= 20
    assert len(set(KEYS)) == len(KEYS)
    assert all(len(row.source) > 10 for row in MACHINES)


PAGE = Path(__file__).parents[2] / "docs" / "reference" / "support-matrix.md"
PRINTED = [
    [cell.strip(" `") for cell in line.strip("|").split("|")]
    for line in PAGE.read_text("utf-8").partition("\n## The machines\n")[2].splitlines()
    if line.startswith("| `")
]


@pytest.mark.parametrize("cells", PRINTED, ids=lambda cells: cells[0])
def test_the_documents_print_every_fact_of_a_machine(cells: list[str]) -> None:
    key, kind, name, readings, source = cells

    def numbers(pattern: str) -> Any:
        found = re.search(pattern.replace("N", r"(\d+)"), readings)
        return found and tuple(map(int, found.groups()))

    version, gib, macos = numbers("torch N.N"), numbers("N GiB"), numbers("macOS N.N")
    with_fp64 = None if kind in ("hpu", "npu") else "no float64" not in readings
    asked = True if kind in ("xpu", "hpu", "npu") else None  # the others have no such question
    other = "Windows" if "Windows" in readings else "Linux"
    row = machine(key)
    assert row.hardware == Hardware(
        kind, name, version, True, gib and gib[0] * 2**30, numbers(r"capability N.N"),
        "".join(re.findall(r"gfx\w+", readings)), macos, "Darwin" if macos else other,
        frozenset(readings.split("; ")[0].split(", ")) if kind == "cpu" else frozenset(),
        with_fp64, asked, asked,
    )  # fmt: skip
    assert (row.source, row.triton) == (source, "no Triton" not in readings)


def test_the_documents_print_every_machine() -> None:
    assert [key for key, *_ in PRINTED] == KEYS


def outside() -> tuple[object, ...]:
    """What a program could notice of the machine."""
    return (
        torch.cuda.is_available(),
        torch.cuda.device_count(),
        torch.xpu.is_available(),
        torch.backends.mps.is_available(),
        torch.version.hip,
        hasattr(torch, "hpu"),
        torch.compile,
        torch.load,
        torch.nn.functional.batch_norm,
        torch.autograd.backward,
        torch.autograd.Function.apply.__qualname__,
        threading.Thread.start,
        torch.__future__.get_swap_module_params_on_conversion(),
        backends.BACKENDS,
        DeviceContext("cpu").capabilities,
        str(DeviceContext().device),
        len(torch.overrides._get_current_function_mode_stack()),
    )


@pytest.mark.parametrize("row", MACHINES, ids=lambda row: row.key)
def test_a_loop_runs_and_nothing_of_the_machine_stays(row: Machine) -> None:
    before = outside()
    with play(row) as played:
        ctx = DeviceContext()
        assert ctx.capabilities == played.machine.capabilities
        assert ctx.device.type in (row.hardware.device_type, "privateuseone")
        train(ctx)
        if not played.pins:
            assert not played.asked("pin_memory")
            assert not played.asked("copy", non_blocking=True)
        else:
            assert played.asked("copy", non_blocking=True, pinned=True)
        assert bool(played.asked("scale")) is ctx.plan.scaler
        lowered = {call.dtype for call in played.asked("autocast")}
        # A CPU's own regions count too: that of fp32 lowers nothing.
        assert lowered == ({ctx.plan.dtype} if ctx.plan.autocast else set())
    assert outside() == before


@pytest.mark.parametrize("live", [False, True])
def test_nothing_stays_after_an_error(live: bool) -> None:
    before = outside()
    with pytest.raises(ZeroDivisionError), play("t4", live=live), DeviceContext().autocast():
        raise ZeroDivisionError
    assert outside() == before
    assert not torch.is_autocast_enabled("cuda")


def test_the_real_readers_read_the_played_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's functions answer so that the library's own reading finds the row again."""
    rows = {real.device_type: real for real in backends.BACKENDS}
    for row in MACHINES:
        hardware = row.hardware
        if hardware.device_type not in rows or hardware.device_type == "cpu":
            continue
        major, minor = hardware.macos or (0, 0)
        monkeypatch.setattr(platform, "mac_ver", lambda v=f"{major}.{minor}": (v, ("",) * 3, ""))
        monkeypatch.setattr(platform, "system", lambda system=hardware.system: system)
        with play(row):
            read = rows[hardware.device_type].read(torch.device(hardware.device_type, 0))
        running = backends.torch_version()
        known = torch.amp.is_autocast_available(hardware.device_type)
        expected = replace(hardware, torch_version=running, autocast=known)
        if read.total_memory is None:  # torch 2.4 does not tell it of MPS
            expected = replace(expected, total_memory=None)
        assert read == expected, row.key


def test_the_machine_has_its_devices_and_no_others() -> None:
    with play("m2-macos15"):
        assert torch.backends.mps.is_available()
        assert not torch.cuda.is_available()
        with pytest.raises(AssertionError, match="not compiled with CUDA"):
            torch.ones(2).to("cuda")
        with pytest.raises(AssertionError, match="not compiled with CUDA"):
            torch.nn.Linear(2, 2).cuda()
        with pytest.raises(AssertionError, match="not compiled with XPU"):
            torch.ones(2, device="xpu")
    with play("a100", count=2):
        assert torch.ones(2, device="cuda:1").sum() == 2
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.ones(2).to("cuda:2")


def test_every_way_to_the_device_is_seen() -> None:
    x = torch.ones(2)
    with play("a100", live=True) as played:
        ways = [
            x.to("cuda"), x.to(torch.device("cuda")), x.to("cuda", torch.float16), x.to(0),
            x.to(device="cuda"), x.cuda(), x.cuda(0), x.to(torch.zeros(1, device="cuda")),
        ]  # fmt: skip
        made = [
            torch.zeros(2, device="cuda"), torch.zeros_like(x, device="cuda"),
            torch.tensor([1.0], device="cuda"), torch.arange(2, device=0), ways[0].new_zeros(1),
            ways[0].new_tensor([1.0]), x.new_zeros(1, device="cuda"),
        ]  # fmt: skip
        with torch.device("cuda"):
            made.append(torch.nn.Linear(2, 2).weight)
        for tensor in (*ways, *made):
            assert tensor.device == torch.device("cuda:0")
        assert len(played.asked("copy")) == len(ways)
        assert x.to("cpu") is x
        assert ways[0].to("cuda") is ways[0]
        assert not ways[0].cpu().is_cuda
        assert ways[0].to("meta").is_meta


def test_the_current_device() -> None:
    with play("a100", count=2, live=True):
        with torch.cuda.device(1):
            assert torch.zeros(1, device="cuda").device.index == 1
            assert DeviceContext().device.index == 1
        assert torch.cuda.current_device() == 0
        kept = torch.zeros(25, device="cuda")
        if hasattr(torch, "accelerator") and hasattr(torch.accelerator, "memory_allocated"):
            assert torch.accelerator.memory_allocated() == kept.nbytes == 100


def test_a_copy_to_a_device_is_a_copy() -> None:
    x = torch.zeros(2)
    with play("t4"):
        y = x.to("cuda")
        y += 1
    assert x.tolist() == [0, 0]


def test_pinning_as_there() -> None:
    data = TensorDataset(torch.zeros(4, 2))
    with play("t4") as played:
        (batch,) = next(iter(DataLoader(data, pin_memory=True)))
        assert batch.is_pinned()
        assert batch[:1].is_pinned()
        assert not torch.zeros(2).is_pinned()
        assert played.asked("pin_memory")
    with play("m2-macos15"), pytest.warns(UserWarning, match="'pin_memory' argument is set"):
        (batch,) = next(iter(DataLoader(data, pin_memory=True)))
        assert not batch.is_pinned()
    with play("cpu"), pytest.raises(RuntimeError, match="Cannot access accelerator device"):
        torch.zeros(2).pin_memory()


def test_workers_of_a_data_loader_and_pinning() -> None:
    data = TensorDataset(torch.arange(8.0))
    with play("t4"):
        ctx = DeviceContext()
        loader = DataLoader(data, batch_size=4, **ctx.loader_options(num_workers=1))
        seen = [ctx.to(batch)[0].sum().item() for _ in range(2) for batch in loader]
    assert seen == [6, 22, 6, 22]


def test_threads_started_in_the_block_play_too() -> None:
    with play("t4", live=True) as played:
        ctx = DeviceContext()
        with ThreadPoolExecutor(2) as pool:
            devices = list(pool.map(lambda _: ctx.to(torch.ones(2)).device, range(4)))
        assert devices == [ctx.device] * 4
        assert len(played.asked("copy")) == 4


def test_a_thread_that_outlives_the_block_is_on_its_own_machine_again() -> None:
    leave, result = threading.Event(), []

    def work() -> None:
        leave.wait()
        try:
            torch.ones(2).to("xpu")
        except Exception as error:
            result.append(str(error))

    with play("arc-a770"):
        thread = threading.Thread(target=work)
        thread.start()
    leave.set()
    thread.join()
    assert result


def test_one_process_is_one_machine_at_a_time() -> None:
    def other() -> None:
        with play("t4"):
            pass

    with play("a100"), ThreadPoolExecutor(1) as pool:
        refused = pool.submit(other).exception()
    assert isinstance(refused, MachineError)
    assert "another thread plays a100" in str(refused)


def test_a_vendors_device_is_listed_once() -> None:
    with play("ascend-910b"), pytest.raises(portable_amp.DeviceError) as caught:
        DeviceContext("privateuseone:3")
    assert str(caught.value).count("privateuseone:0") == 1


def test_plays_nest_in_one_thread() -> None:
    with play("t4"):
        with play("m2-macos14"):
            assert DeviceContext().device.type == "mps"
        assert DeviceContext().device.type == "cuda"
        assert torch.cuda.get_device_name() == "Tesla T4"


def test_what_was_told_before_is_not_told_again_after() -> None:
    with pytest.warns(portable_amp.PrecisionFallbackWarning):
        DeviceContext("cpu", precision="fp16")
    with play("t4"), pytest.warns(portable_amp.PrecisionFallbackWarning):
        DeviceContext("cpu", precision="fp16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DeviceContext("cpu", precision="fp16")


def test_calls_are_recorded_with_what_matters() -> None:
    with play("v100") as played:
        ctx = DeviceContext()
        ctx.to(torch.ones(2).pin_memory())
        with ctx.autocast():
            pass
        ScalerShim().scale(torch.ones(()))
        ctx.synchronize()
        clear_cache()
    assert played.calls == [
        Call("pin_memory"),
        Call("copy", non_blocking=True, pinned=True),
        Call("autocast", dtype=torch.float16),
        Call("scale"),
        Call("synchronize"),
        Call("empty_cache"),
    ]
    assert played.asked("copy", pinned=False) == []


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda: machine("t5"), "no machine 't5' in the catalogue; there is t4"),
        (lambda: machine("m1"), "m1-macos13"),
        (lambda: machine("zzz"), "there is gtx1080, v100, t4"),
        (lambda: machine(3), "no machine 3 in the catalogue"),  # type: ignore[arg-type]
        (lambda: machine("t4", "2.3"), "no torch '2.3' for a machine to run; there is 2."),
        (lambda: machine("t4", "newest"), "there is 2.4, ..., 2.15"),
        (lambda: machine("t4", "2.77"), "there is 2.7"),
        (lambda: play("t4", flaot64=False).__enter__(), "no option 'flaot64'; did you mean 'float"),
        (lambda: play("t4", zzz=1).__enter__(), "no option 'zzz'; there is memory, float64"),
        (lambda: play("t4", memory=1).__enter__(), "it needs live=True"),
        (lambda: play("t4", count=0).__enter__(), "a machine has 1 device or more"),
        (lambda: play("t44").__enter__(), "no machine 't44' in the catalogue; there is t4"),
        (lambda: play("t4", torch_version="1.13").__enter__(), "no torch '1.13'"),
    ],
)
def test_what_is_unknown_is_refused_in_one_line_with_the_nearest(ask: object, told: str) -> None:
    with pytest.raises(MachineError) as caught:
        ask()  # type: ignore[operator]
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_torch_on_the_same_machine() -> None:
    with play("m2-macos15", torch_version="2.7.1"):
        ctx = DeviceContext(precision="fp32")
        assert not ctx.capabilities.grad_scaler
        assert ctx.capabilities.bfloat16 is portable_amp.Support.NATIVE


def test_a_live_batch_can_be_cut_in_inference_mode() -> None:
    with play("t4", live=True):
        batch = torch.arange(6.0).to("cuda")
        with torch.inference_mode():
            part = batch[2:4] + torch.ones(2, device="cuda")
        assert part.cpu().tolist() == [3.0, 4.0]
