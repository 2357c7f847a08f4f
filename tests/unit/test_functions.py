"""torch's own functions on a played machine: each answers as the machine's facts say."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from portable_amp.backends import Hardware
from portable_amp.capabilities import Support
from portable_amp.testing import MACHINES, Machine, Played, play
from portable_amp.testing.functions import replaced

LIKE_CUDA = [row for row in MACHINES if row.hardware.device_type not in ("cpu", "mps")]
# A machine for each module that torch, or a vendor, has for accelerators of several devices.
each_module = pytest.mark.parametrize("key", ["t4", "arc-a770", "ascend-910b"])
PLAIN = {"cpu", "cuda", "mps", "xpu"}


def functions_of(module: object) -> Callable[..., Any]:
    """Ask `module` for a function and call it; what it lacks in this torch is None."""

    def ask(name: str, *args: Any) -> Any:
        return getattr(module, name)(*args) if hasattr(module, name) else None

    return ask


def module_of(played: Played) -> Any:
    return getattr(torch, played.kind)


@contextlib.contextmanager
def two(key: str) -> Iterator[tuple[Played, list[Any]]]:
    """A machine with two devices, and the modules that tell of them."""
    with play(key, count=2) as played:
        accelerator = [torch.accelerator] if hasattr(torch, "accelerator") else []
        yield played, [module_of(played), *accelerator]


# --- which devices there are -------------------------------------------------------------------


@pytest.mark.parametrize("outer", ["t4", "arc-a770", "m2-macos15", "gaudi2", "ascend-910b"])
@pytest.mark.parametrize("inner", ["mi250", "max1550", "m2-macos14", "ascend-910b", "cpu-amx"])
def test_a_machine_has_its_own_devices_alone(outer: str, inner: str) -> None:
    """Also where it is played on a machine that has others."""
    with play(outer), play(inner) as played:
        here = {
            "cuda": (torch.cuda.is_available(), torch.cuda.device_count()),
            "xpu": (torch.xpu.is_available(), torch.xpu.device_count()),
            "mps": (torch.backends.mps.is_available(), torch.mps.device_count()),
        }
        for kind in ("hpu", "privateuseone"):
            module = getattr(torch, kind, None)
            if module is not None:
                here[kind] = (module.is_available(), module.device_count())
        present = {kind for kind, (available, _) in here.items() if available}
        assert present == {played.kind} - {"cpu"}
        counts = {kind: count for kind, (_, count) in here.items() if kind in PLAIN | present}
        assert counts == {kind: int(kind in present) for kind in counts}
        if hasattr(torch, "accelerator"):
            assert torch.accelerator.is_available() is bool(present)
            assert torch.accelerator.device_count() == len(present)
            kind = torch.accelerator.current_accelerator()
            assert {getattr(kind, "type", None)} == (present or {None})


@pytest.mark.parametrize("row", MACHINES, ids=lambda row: row.key)
def test_torch_was_built_for_the_machine(row: Machine) -> None:
    with play(row, count=1) as played:
        amd = torch.version.hip is not None
        assert amd is bool(row.hardware.arch)
        assert not amd or int(torch.version.hip.split(".")[0]) >= 5
        if played.kind == "mps":
            assert torch.backends.mps.is_built()


@pytest.mark.parametrize("macos", [None, (13, 6), (14, 0), (15, 5)])
def test_a_mac_tells_its_version(macos: tuple[int, int] | None) -> None:
    hardware = Hardware("mps", "Apple M3", (2, 8), True, macos=macos, system="Darwin")
    with play(Machine("made up", hardware, "a test")):
        newer = {
            version: torch.backends.mps.is_macos_or_newer(*version)
            for version in ((13, 0), (13, 6), (13, 7), (14, 0), (14, 1), (15, 4), (15, 6))
        }
    assert newer == {version: macos is not None and macos >= version for version in newer}


# --- what the hardware is ----------------------------------------------------------------------


@pytest.mark.parametrize("row", LIKE_CUDA, ids=lambda row: row.key)
def test_the_module_tells_the_facts(row: Machine) -> None:
    hardware, can = row.hardware, row.capabilities
    with play(row) as played:
        module, ask = module_of(played), functions_of(module_of(played))
        assert module.get_device_name() == module.get_device_name(0) == hardware.name
        module.init()
        module._lazy_init()
        assert module.is_initialized()
        properties = module.get_device_properties(0)
        assert (properties.name, properties.total_memory) == (hardware.name, hardware.total_memory)
        assert properties.multi_processor_count > 0
        capability = hardware.compute_capability
        if hardware.arch:
            assert properties.gcnArchName.split(":")[0] == hardware.arch
            # Source: the compiler's name is major, minor and stepping, the last two hexadecimal.
            capability = {
                "gfx90a": (9, 0), "gfx942": (9, 4), "gfx1030": (10, 3), "gfx1100": (11, 0)
            }[hardware.arch]  # fmt: skip
        if capability:
            if played.kind == "cuda":
                assert torch.cuda.get_device_capability() == capability
            assert (properties.major, properties.minor) == capability
        native = bool(hardware.arch) or can.bfloat16 is Support.NATIVE
        assert ask("is_bf16_supported") in (True, None)
        assert ask("is_bf16_supported", True) in (True, None)
        assert ask("is_bf16_supported", False) in (native, None)
        assert not module._is_in_bad_fork()  # or torch.manual_seed leaves it out


@pytest.mark.parametrize("float16", [True, False, None])
@pytest.mark.parametrize("bfloat16", [True, False, None])
def test_a_vendors_module_tells_what_autocast_may_use(
    float16: bool | None, bfloat16: bool | None
) -> None:
    hardware = Hardware("npu", "N", (2, 8), True, float16=float16, bfloat16=bfloat16)
    with play(Machine("made up", hardware, "a test")) as played:
        module = module_of(played)
        supported = set(module.get_amp_supported_dtype())
        assert module.is_bf16_supported(including_emulation=False) is bool(bfloat16)
        properties = module.get_device_properties()
        assert (properties.has_fp16, properties.has_bfloat16_conversions) == (float16, bfloat16)
    said = {torch.float16: float16, torch.bfloat16: bfloat16}
    assert supported == {dtype for dtype, there in said.items() if there}


# --- the current device, memory, random numbers --------------------------------------------------


def named(played: Played) -> list[tuple[Any, int]]:
    """Every way to name a device, and which one it is."""
    kind, current = played.kind, played.current
    first = torch.device(kind, 0)
    return [(None, current), (kind, current), (0, 0), (1, 1), (f"{kind}:1", 1), (first, 0)]


@each_module
def test_every_module_has_the_same_current_device(key: str) -> None:
    with two(key) as (played, modules):
        module = modules[0]

        def current() -> set[int]:
            told = [m.current_device_index() for m in modules[1:]]
            return {module.current_device(), *told}

        assert {m.device_count() for m in modules} == {2}
        assert current() == {0}
        for name, index in named(played)[2:]:
            module.set_device(name)
            assert current() == {index}
        with pytest.raises(ZeroDivisionError), module.device(1):
            assert current() == {1}
            raise ZeroDivisionError
        assert current() == {0}
        for m in modules[1:]:
            m.set_device_index(1)
            assert current() == {1}
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            module.set_device(2)


@each_module
def test_each_device_has_books_of_its_own(key: str) -> None:
    with two(key) as (played, modules):
        limit = played.machine.hardware.total_memory
        books = [
            {"memory_allocated": 100, "max_memory_allocated": 160, "memory_reserved": 160,
             "max_memory_reserved": 160, "get_memory_info": (limit - 160, limit)},
            {"memory_allocated": 7, "max_memory_allocated": 7, "memory_reserved": 7,
             "max_memory_reserved": 7, "get_memory_info": (limit - 7, limit)},
        ]  # fmt: skip
        kept = [torch.empty(100, dtype=torch.int8), torch.empty(7, dtype=torch.int8)]
        for place, tensor in zip(played.places, kept, strict=True):
            place.ledger.take(tensor)
        freed = torch.empty(60, dtype=torch.int8)
        played.places[0].ledger.take(freed)
        del freed

        def check() -> None:
            for module, current in itertools.product(modules, (0, 1)):
                with modules[0].device(current):
                    ask = functions_of(module)
                    for name, index in named(played):
                        for function, told in books[index].items():
                            assert ask(function, name) in (told, None)
                        # torch.cuda's name of it
                        assert ask("mem_get_info", name) in (books[index]["get_memory_info"], None)

        check()
        functions_of(modules[0])("reset_peak_memory_stats", 1)
        check()
        functions_of(modules[0])("reset_peak_memory_stats")
        if hasattr(modules[0], "reset_peak_memory_stats"):
            books[0]["max_memory_allocated"] = 100
        check()
        for module in modules:
            functions_of(module)("empty_cache")
            functions_of(module)("synchronize")
        books[0] |= {"memory_reserved": 100, "get_memory_info": (limit - 100, limit)}
        books[0]["max_memory_reserved"] = books[0]["max_memory_allocated"]
        check()
        cleared = [module for module in modules if hasattr(module, "empty_cache")]
        assert len(played.asked("empty_cache")) == len(cleared)
        assert len(played.asked("synchronize")) == len(modules)


def test_a_mac_has_books_too() -> None:
    with play("m2-macos15", live=True, memory=10_000) as played:
        ask = functions_of(torch.mps)
        assert torch.backends.mps.is_available()
        assert ask("is_available") in (True, None)
        if hasattr(torch.backends.mps, "get_name"):
            assert torch.backends.mps.get_name() == "Apple M2"
        kept = torch.ones(100, device="mps")
        other = kept + 1
        del other
        assert torch.mps.current_allocated_memory() == kept.nbytes == 400
        assert torch.mps.driver_allocated_memory() == 800
        assert ask("recommended_max_memory") in (10_000, None)
        torch.mps.empty_cache()
        assert torch.mps.driver_allocated_memory() == 400
        torch.mps.synchronize()
        assert [call.name for call in played.calls[-2:]] == ["empty_cache", "synchronize"]


@each_module
def test_each_device_has_random_numbers_of_its_own(key: str) -> None:
    with two(key) as (played, modules):
        module = modules[0]

        def states() -> list[list[int]]:
            return [module.get_rng_state(index).tolist() for index in (0, 1)]

        torch.manual_seed(1)
        first = states()
        assert first[0] == first[1] == torch.Generator().manual_seed(1).get_state().tolist()
        module.set_device(1)
        module.manual_seed(2)
        second = states()
        assert second[0] == first[0] != second[1]
        module.manual_seed_all(2)
        assert states() == [second[1]] * 2
        for current in (0, 1):
            module.set_device(current)
            for name, index in named(played):
                module.manual_seed_all(3)
                before = states()
                module.set_rng_state(torch.tensor(first[0], dtype=torch.uint8), name)
                assert module.get_rng_state(name).tolist() == first[0]
                assert states() == [first[0] if at == index else before[at] for at in (0, 1)]


# --- queues --------------------------------------------------------------------------------------


@each_module
def test_what_is_asked_of_queues_and_events(key: str) -> None:
    with play(key) as played:
        module = module_of(played)
        stream, other, event = module.Stream(), module.Stream(priority=-1), module.Event()

        def asked(call: Callable[[], Any]) -> list[str]:
            played.calls.clear()
            call()
            return [made.name for made in played.calls]

        record, wait = "record_event", "wait_event"
        assert asked(event.record) == asked(lambda: event.record(stream)) == [record]
        assert asked(event.wait) == asked(lambda: event.wait(stream)) == [wait]
        assert asked(event.synchronize) == [wait]
        assert asked(lambda: stream.record_event(event)) == asked(stream.record_event) == [record]
        assert asked(lambda: stream.wait_event(event)) == [wait]
        assert asked(lambda: stream.wait_stream(other)) == [record, wait]
        assert asked(stream.synchronize) == [record, wait]
        assert stream.record_event(event) is event
        assert isinstance(stream.record_event(), type(event))
        # Everything is computed at once.
        assert event.query()
        assert stream.query()
        # Optimizers and BatchNorm ask.
        assert not stream.is_capturing()
        assert not functions_of(module)("is_current_stream_capturing")


@each_module
def test_the_current_queue(key: str) -> None:
    with play(key) as played:
        module = module_of(played)
        default = module.current_stream()
        first, second = module.Stream(), module.Stream()
        if hasattr(module, "default_stream"):
            assert module.default_stream() is module.default_stream(0) is default
        with module.stream(first):
            assert module.current_stream() is module.current_stream(0) is first
            with module.stream(None):
                assert module.current_stream() is first
            with pytest.raises(ZeroDivisionError), module.stream(second):
                assert module.current_stream() is second
                raise ZeroDivisionError
            assert module.current_stream() is first
            elsewhere: list[Any] = []
            thread = threading.Thread(target=lambda: elsewhere.append(module.current_stream()))
            thread.start()
            thread.join()
            assert elsewhere == [default]
        assert module.current_stream() is default
        assert len(played.asked("stream")) == 3


@pytest.mark.parametrize(
    "wait",
    [
        lambda: torch.cuda.synchronize(),
        lambda: torch.cuda.Event().synchronize(),
        lambda: torch.cuda.current_stream().synchronize(),
    ],
)
def test_after_waiting_the_copies_have_arrived(wait: Callable[[], None]) -> None:
    with play("t4", live=True):
        source = torch.ones(3).pin_memory()
        late, waited = (source.to("cuda", non_blocking=True) for _ in range(2))
        wait()
        late = source.to("cuda", non_blocking=True)
        source.fill_(5)
        assert waited.tolist() == [1, 1, 1]
        assert late.tolist() == [5, 5, 5]


# --- loading -------------------------------------------------------------------------------------


class NoOrder(torch.utils.data.Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        raise ZeroDivisionError


def test_a_loader_keeps_its_setting() -> None:
    data = TensorDataset(torch.arange(4.0))
    with play("t4") as played:
        for pins in (True, False):
            loader = DataLoader(data, batch_size=2, pin_memory=pins)
            for _ in range(2):
                assert [batch.is_pinned() for (batch,) in loader] == [pins] * 2
                assert loader.pin_memory is pins
        assert len(played.asked("pin_memory")) == 4
        broken = DataLoader(data, batch_size=None, sampler=NoOrder(), pin_memory=True)
        with pytest.raises(ZeroDivisionError):
            iter(broken)
        assert broken.pin_memory


@pytest.mark.parametrize("key", ["m2-macos15", "gaudi2", "cpu"])
def test_a_loader_that_cannot_pin_says_so_where_it_is_used(key: str) -> None:
    loader = DataLoader(TensorDataset(torch.arange(4.0)), batch_size=2, pin_memory=True)
    with play(key) as played:
        with pytest.warns(UserWarning, match="pin_memory") as caught:
            batches = [batch for (batch,) in loader]
        assert [Path(warning.filename) for warning in caught] == [Path(__file__)]
        assert not any(batch.is_pinned() for batch in batches)
        assert not played.asked("pin_memory")
    assert torch.cat(batches).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("where", "device"),
    [
        ("cuda", "cuda:0"),
        ("cuda:1", "cuda:1"),
        (torch.device("cuda", 1), "cuda:1"),
        ("cpu", "cpu"),
        (torch.device("cpu"), "cpu"),
        (None, "cpu"),
        ({"cpu": "cpu"}, "cpu"),
        (lambda storage, location: storage, "cpu"),
    ],
)
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_checkpoint_is_loaded_to_where_it_is_asked_for(
    tmp_path: Path, where: Any, device: str, weights_only: bool
) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": [torch.ones(2)], "b": 3}, path)
    with play("t4", live=True, count=2):
        loaded = torch.load(path, where, weights_only=weights_only)
        assert loaded["a"][0].device == torch.device(device)
        assert (loaded["a"][0].tolist(), loaded["b"]) == ([1, 1], 3)
        again = torch.load(path, map_location=where, weights_only=weights_only)
        assert again["a"][0].device == torch.device(device)


def test_what_only_pickle_can_load_wants_to_be_asked(tmp_path: Path) -> None:
    torch.save({"a": Path("x")}, tmp_path / "x.pt")
    with play("t4"):
        for where in ("cuda", None):
            with pytest.raises(Exception, match="weights_only"):
                torch.load(tmp_path / "x.pt", where, weights_only=True)
            assert torch.load(tmp_path / "x.pt", where, weights_only=False) == {"a": Path("x")}


# --- generators, compiled code -------------------------------------------------------------------


@pytest.mark.parametrize("live", [False, True])
def test_a_generator_is_of_the_played_device(live: bool) -> None:
    real, before = torch.Generator, torch.Generator()
    with play("mi250"), play("t4", live=live):
        generator = torch.Generator(device="cuda").manual_seed(3)
        assert generator.device == torch.device("cuda", 0)
        assert isinstance(generator, torch.Generator)
        assert isinstance(before, torch.Generator)
        drawn = torch.zeros(4, device="cuda").uniform_(generator=generator).cpu()
        assert torch.Generator().device == torch.device("cpu")
        with pytest.raises(RuntimeError, match=r"(?i)mps"):
            torch.Generator("mps")
    assert torch.Generator is real
    assert torch.equal(drawn, torch.zeros(4).uniform_(generator=before.manual_seed(3)))


def test_compiled_code_runs_as_it_is_or_not_at_all() -> None:
    with play("a100") as played:
        assert torch.compile(torch.nn.Identity())(torch.ones(1)).item() == 1
        assert torch.compile(dynamic=True)(torch.neg)(torch.ones(1)).item() == -1
        assert len(played.asked("compile")) == 2
    with play("rtx4090-windows"), pytest.raises(RuntimeError, match="triton"):
        torch.compile(torch.nn.Identity())(torch.ones(1))


# --- putting back --------------------------------------------------------------------------------


def test_what_was_replaced_is_as_it_was_also_where_it_was_inherited() -> None:
    class Parent:
        inherited = "parent's"

    class Child(Parent):
        own = "child's"

    before = dict(vars(Child))
    made = [(Child, name, value) for value in (1, 2) for name in ("own", "inherited", "new")]
    with pytest.raises(ZeroDivisionError), replaced(made):
        assert (Child.own, Child.inherited, Child.new) == (2, 2, 2)  # type: ignore[attr-defined]
        raise ZeroDivisionError
    assert {k: v for k, v in vars(Child).items() if not k.startswith("__")} == {"own": "child's"}
    assert vars(Child).keys() == before.keys()
    assert Child.inherited == "parent's"
