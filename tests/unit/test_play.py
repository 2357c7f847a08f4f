"""Playing a machine: what the process says, what is recorded, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import platform
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from inspect import ismodule
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # it wraps some of torch's functions, once and for all
from torch.utils.data import DataLoader, TensorDataset

import portable_amp
from portable_amp import (
    DeviceContext,
    MachineError,
    ScalerShim,
    backends,
    clear_cache,
    maybe_autocast,
)
from portable_amp.autocast import Autocast
from portable_amp.backends import Hardware
from portable_amp.testing import MACHINES, Call, Machine, machine, play
from portable_amp.testing.play import is_playing
from support import KINDS

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


# Where torch keeps what a machine could change.
OWNERS = [
    torch, torch.cuda, torch.xpu, torch.mps, torch.backends.mps, torch.backends.cudnn,
    torch.version, torch.autograd, torch.autograd.Function, torch.nn.functional, torch._VF,
    torch.autocast, torch.amp.GradScaler, Autocast, DataLoader, threading.Thread, backends,
    *([torch.accelerator] if hasattr(torch, "accelerator") else []),
]  # fmt: skip


def outside() -> tuple[object, ...]:
    """What a program could notice of the machine."""
    return (
        [
            {name: id(value) for name, value in vars(owner).items() if not ismodule(value)}
            for owner in OWNERS
        ],
        [hasattr(torch, name) for name in ("hpu", "npu", "privateuseone")],
        torch.__future__.get_swap_module_params_on_conversion(),
        torch.backends.cudnn.enabled,
        [guard(kind) for kind in (1, 12, 13)],
        DeviceContext("cpu").capabilities,
        str(DeviceContext().device),
        len(torch.overrides._get_current_function_mode_stack()),
        torch.utils._python_dispatch._len_torch_dispatch_stack(),
        is_playing(),
    )


def guard(number: int) -> int | None:
    """What torch asks to switch to a device of the type with this number in c10."""
    for library in Path(torch.__file__).parent.glob("lib/libc10.*"):  # there is none on Windows
        registry = "_ZN3c104impl26device_guard_impl_registryE"
        first = ctypes.c_void_p.in_dll(ctypes.CDLL(str(library)), registry)
        return ctypes.pointer(first)[number]
    return None


@pytest.mark.parametrize("row", MACHINES, ids=lambda row: row.key)
def test_a_loop_runs_and_nothing_of_the_machine_stays(row: Machine) -> None:
    before = outside()
    with play(row) as played:
        ctx = DeviceContext()
        assert ctx.capabilities == played.machine.capabilities
        assert ctx.device.type in (row.hardware.device_type, "privateuseone")
        there = [backend.device_type for backend in backends.present()]
        assert there == [*dict.fromkeys([ctx.device.type, "cpu"])]
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


LIVE = {"cuda": "t4", "mps": "m2-macos15", "xpu": "max1550"}
LIVE_KINDS = [kind for kind in LIVE if kind in KINDS]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("kind", LIVE_KINDS)
def test_nothing_stays_after_an_error(kind: str, live: bool) -> None:
    before = outside()
    with pytest.raises(ZeroDivisionError), play(LIVE[kind], live=live), DeviceContext().autocast():
        assert outside() != before
        assert torch.backends.cudnn.enabled is not live  # its kernels are for a real device
        raise ZeroDivisionError
    assert outside() == before
    assert not torch.is_autocast_enabled(kind)


@pytest.mark.parametrize("outer", LIVE_KINDS)
def test_a_play_within_another_leaves_it_as_it_was(outer: str) -> None:
    with play(LIVE[outer], live=True) as first:
        before = outside()
        for inner in LIVE_KINDS:
            with play(LIVE[inner], live=True) as second:
                assert torch.zeros(1, device=inner).device.type == inner
                assert (first.active, second.active) == (True, True)
            assert (first.active, second.active) == (True, False)
            assert outside() == before
        assert torch.zeros(1, device=outer).device.type == outer


def test_a_play_that_is_refused_changes_nothing() -> None:
    before = outside()
    for refused in ({"live": True, "memroy": 1}, {"memory": 1}, {"count": 0}):
        with pytest.raises(MachineError):
            play("t4", **refused).__enter__()  # type: ignore[arg-type]
    with pytest.raises(portable_amp.DeviceError):
        play("gaudi2", live=True).__enter__()
    assert outside() == before


def test_where_torch_has_no_registry_of_guards_live_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    with pytest.raises(portable_amp.DeviceError, match="live=True needs Linux or macOS"):
        play("t4", live=True).__enter__()


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
        assert x.to("meta").is_meta
        assert ways[0].to("meta").is_meta


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("kind", LIVE_KINDS)
def test_a_number_is_a_device_of_the_machine(kind: str, live: bool) -> None:
    x = torch.ones(2)
    with play(LIVE[kind], live=live) as played:
        ways = [x.to(0), x.to(device=0), torch.zeros(2, device=0), torch.tensor([0], device=0)]
        for made in ways:
            assert made.device == torch.device(kind if live else "cpu", 0 if live else None)
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.zeros(2, device=1)
        assert len(played.asked("copy")) == 2


def test_every_pair_of_places_obeys_torchs_own_rules() -> None:
    """The oracle is the CPU: what `.to` gives there, but for the device."""
    there = torch.arange(8.0).reshape(1, 2, 2, 2)
    formats = (torch.preserve_format, torch.channels_last)
    places = ("cpu", "cuda:0", "cuda:1")
    with play("a100", live=True, count=2) as played:
        for source, target, dtype, copy, layout in itertools.product(
            places, places, (None, torch.float32, torch.float16), (False, True), formats
        ):
            given = there if source == "cpu" else there.to(source)
            played.calls.clear()
            got = given.to(target, dtype, copy=copy, memory_format=layout)
            moves = source != target
            twin = there.to(dtype or torch.float32, copy=copy or moves, memory_format=layout)
            assert (str(got.device), got.dtype, got.stride()) == (target, twin.dtype, twin.stride())
            assert got.tolist() == there.tolist()
            assert (got is given) is (twin is there)
            assert played.calls == [Call("copy", False, False, None)] * moves


def test_what_is_there_already_is_not_copied() -> None:
    nchw = torch.zeros(1, 2, 2, 2)
    with play("a100", live=True, count=2) as played:
        here = nchw.cuda()
        assert nchw.cpu() is nchw
        assert here.cuda() is here.cuda(0) is here.cuda(torch.device("cuda:0")) is here
        assert len(played.asked("copy")) == 1
        assert here.cuda(1).device.index == 1
        for moved in (
            nchw.cuda(memory_format=torch.channels_last),
            here.cpu(memory_format=torch.channels_last),
        ):
            assert moved.is_contiguous(memory_format=torch.channels_last)
        assert here.to(memory_format=torch.channels_last).device == here.device


@pytest.mark.parametrize("device", [True, False, 1.5, [], ...], ids=repr)
def test_what_names_no_device_is_refused_in_torchs_own_words(device: Any) -> None:
    with pytest.raises(TypeError) as real:
        torch.zeros(2, device=device)
    with play("a100", live=True, count=2), pytest.raises(TypeError) as caught:
        torch.zeros(2, device=device)
    assert str(caught.value) == str(real.value)


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


def test_what_is_on_the_device_is_not_pinned() -> None:
    with play("a100", live=True, count=2) as played:
        pinned = torch.zeros(2).pin_memory()
        there = pinned.to("cuda:0", non_blocking=True)
        assert pinned.is_pinned()
        assert not there.is_pinned()
        assert there.to("cuda:1", non_blocking=True).to("cpu", non_blocking=True).sum() == 0
    assert played.calls == [
        Call("pin_memory", False, False, None),
        Call("copy", True, True, None),
        Call("copy", True, False, None),
        Call("copy", True, False, None),
    ]


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

    with ThreadPoolExecutor(1) as pool:
        with play("a100"):
            outer = pool.submit(other).exception()
            with play("h100"):
                inner = pool.submit(other).exception()
        assert pool.submit(other).exception() is None
    assert isinstance(outer, MachineError)
    assert isinstance(inner, MachineError)
    assert "another thread plays a100" in str(outer)
    assert "another thread plays h100" in str(inner)


@pytest.mark.parametrize("region", [torch.autocast, maybe_autocast])
def test_regions_of_the_device_are_recorded_where_they_are_on(region: Any) -> None:
    def enter() -> None:
        for arguments in (
            ("cuda", torch.float16), ("cuda", torch.bfloat16, False), ("cpu", torch.bfloat16),
        ):  # fmt: skip
            with region(*arguments):
                pass

    with ThreadPoolExecutor(1) as older:
        older.submit(int).result()  # a thread that does not play the tensors
        for run in (lambda: enter(), lambda: older.submit(enter).result()):
            with play("t4") as played:
                run()
            assert played.calls == [Call("autocast", False, False, torch.float16)]


@pytest.mark.parametrize("scaler", [torch.amp.GradScaler, ScalerShim])
def test_a_scaler_is_recorded_where_it_is_on(scaler: Any) -> None:
    with play("t4") as played:
        for enabled in (False, True):
            scaler("cuda", enabled=enabled).scale(torch.ones(()))
    assert played.calls == [Call("scale", False, False, None)]


def test_nothing_is_recorded_after_the_block() -> None:
    with play("t4") as played:
        event = torch.cuda.Event()
        event.record()
    event.record()
    assert played.calls == [Call("record_event")]


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
        *(
            (lambda name=name: play("t4", **{name: 1}).__enter__(), f"play({name}=...) is about")
            for name in ("memory", "late_copies", "slow", "wrong")
        ),
        *(
            (lambda count=count: play("t4", count=count).__enter__(), "1 device or more")
            for count in (0, -1, True, 1.0, "2")
        ),
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


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("given", [None, True, False])
@pytest.mark.parametrize("kind", LIVE_KINDS)
def test_float64_is_the_machines_or_what_is_said(kind: str, given: bool | None, live: bool) -> None:
    has = machine(LIVE[kind]).hardware.float64 if given is None else given
    with play(LIVE[kind], live=live, **({} if given is None else {"float64": given})):
        assert DeviceContext().capabilities.float64 is has
        there = contextlib.nullcontext() if has else pytest.raises((TypeError, RuntimeError))
        with there:
            torch.zeros(1, dtype=torch.float64, device=kind)


@pytest.mark.parametrize("count", [1, 3])
def test_each_device_has_books_and_random_numbers_of_its_own(count: int) -> None:
    with play("t4", live=True, count=count) as played:
        assert torch.cuda.device_count() == count
        last = f"cuda:{count - 1}"
        before = [torch.cuda.get_rng_state(index) for index in range(count)]
        assert all(torch.equal(state, torch.Generator().get_state()) for state in before)
        torch.cuda.set_rng_state(torch.Generator().manual_seed(3).get_state(), last)
        changed = [
            not torch.equal(old, torch.cuda.get_rng_state(index))
            for index, old in enumerate(before)
        ]
        assert changed == [False] * (count - 1) + [True]
        kept = torch.zeros(25, device=last)
        assert [torch.cuda.memory_allocated(index) for index in range(count)] == [
            *[0] * (count - 1), kept.nbytes,
        ]  # fmt: skip
        assert played.memory.allocated == (kept.nbytes if count == 1 else 0)
        assert played.memory.limit == machine("t4").hardware.total_memory
    with play("t4") as played:
        assert torch.cuda.device_count() == 1


def test_a_machine_without_autocast_has_none() -> None:
    row = machine("t4")
    with play(replace(row, hardware=replace(row.hardware, autocast=False))) as played:
        assert not DeviceContext().capabilities.autocast
    assert not played.machine.capabilities.autocast
    # A device for which torch itself has none.
    with play(replace(row, hardware=replace(row.hardware, device_type="vulkan"))) as played:
        assert not played.machine.capabilities.autocast


def test_the_host_is_played_live_like_any_other_machine() -> None:
    before = outside()
    with play("cpu", live=True, memory=1) as played:
        assert DeviceContext().device.type == "cpu"
        assert torch.ones(2).sum() == 2
        assert not played.asked("copy")
        assert not torch.cuda.is_available()
    assert outside() == before
