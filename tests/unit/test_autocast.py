from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import pytest
import torch

from portable_amp import (
    DeviceContext,
    DeviceError,
    PrecisionFallbackWarning,
    UnsupportedPrecisionError,
    autocast,
    maybe_autocast,
)
from portable_amp.autocast import Autocast, NoAutocast
from portable_amp.backends import torch_version
from portable_amp.testing import machine
from support import asleep, playing, without_mps

BF16 = torch.bfloat16


def product() -> torch.dtype:
    return torch.ones(2, 2).mm(torch.ones(2, 2)).dtype


def bf16_context() -> DeviceContext:
    with playing("cpu-avx512bf16"):
        return DeviceContext("cpu", precision="bf16")


def on(kind: str = "cpu") -> bool:
    return torch.is_autocast_enabled(kind)


@pytest.mark.parametrize(
    "arguments",
    [
        ("cpu", BF16),
        (torch.device("cpu"), BF16),
        ("cpu:0", BF16),
        ("cpu",),
        ("cpu", None, True, True),
    ],
    ids=str,
)
def test_it_is_torchs_autocast_by_position(arguments: tuple[object, ...]) -> None:
    with maybe_autocast(*arguments) as entered:  # type: ignore[arg-type]
        assert product() is BF16
    assert isinstance(entered, torch.autocast)
    assert product() is torch.float32


def test_the_default_dtype_inside_a_region_is_that_regions() -> None:
    for dtype in (torch.float16, BF16):
        for make in (torch.autocast, maybe_autocast):
            with torch.autocast("cpu", dtype), make("cpu"):
                assert product() is dtype


def test_the_dtype_of_each_region_is_restored() -> None:
    half, brain = maybe_autocast("cpu", torch.float16), maybe_autocast("cpu", BF16)
    before = torch.get_autocast_dtype("cpu")
    with half:
        assert product() is torch.float16
        with brain, half, brain:
            assert product() is BF16
        assert product() is torch.float16
    assert torch.get_autocast_dtype("cpu") is before


def test_cache_enabled_is_passed_on() -> None:
    with maybe_autocast("cpu", BF16, cache_enabled=False):
        assert not torch.is_autocast_cache_enabled()
    assert torch.is_autocast_cache_enabled()


def test_disabled_means_float32_inside_an_enabled_region() -> None:
    with maybe_autocast("cpu", BF16):
        with maybe_autocast("cpu", enabled=False):
            assert product() is torch.float32
        with maybe_autocast("cpu", dtype=torch.float32):
            assert product() is torch.float32
        assert product() is BF16


def test_one_instance_nested_in_itself_does_not_leak() -> None:
    region = maybe_autocast("cpu", BF16)
    with region:
        with region, region:
            assert on()
        assert on()
    assert not on()


def test_torchs_own_instance_does_leak() -> None:
    """The reason for the test above; the day this fails, the workaround can go."""
    region = torch.autocast("cpu", BF16)
    with region, region:
        pass
    leaked = on()
    torch.set_autocast_enabled("cpu", False)
    assert leaked


def test_recursion_through_the_decorator() -> None:
    @maybe_autocast("cpu", BF16)
    def descend(depth: int) -> torch.dtype:
        return descend(depth - 1) if depth else product()

    assert descend(3) is BF16
    assert not on()


def test_state_is_restored_after_exceptions() -> None:
    region = maybe_autocast("cpu", BF16)
    with pytest.raises(ZeroDivisionError), region, region:
        raise ZeroDivisionError
    assert not on()


def test_threads_share_an_instance() -> None:
    region = maybe_autocast("cpu", BF16)
    barrier = threading.Barrier(4, timeout=10)

    def work() -> None:
        for _ in range(50):
            barrier.wait()
            with region:
                barrier.wait()
                assert product() is BF16
            assert not on()

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(work) for _ in range(4)]
        for one in as_completed(running):  # the first that fails is the one to tell of
            one.result()


def test_leaving_in_another_thread_is_an_error() -> None:
    region = maybe_autocast("cpu", BF16)
    failed = []

    def leave() -> None:
        with pytest.raises(RuntimeError, match="not entered in this thread"):
            region.__exit__(None, None, None)
        failed.append(True)

    with region:
        thread = threading.Thread(target=leave)
        thread.start()
        thread.join()
    assert failed


@pytest.mark.parametrize("made", ["fp32", "cpu"])
def test_leaving_what_was_never_entered_is_an_error(made: str) -> None:
    region: Any = DeviceContext("cpu", precision="fp32").autocast()
    if made == "cpu":
        region = maybe_autocast("cpu", BF16)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not entered in this thread"):
            region.__exit__(None, None, None)
        with region:
            pass


class Seen(torch.overrides.TorchFunctionMode):
    """A mode as torch.export has: regions tell it of themselves."""


def test_an_exception_leaves_each_region_however_it_is_left() -> None:
    half, plain = maybe_autocast("cpu", BF16), DeviceContext("cpu", precision="fp32").autocast()
    other = maybe_autocast("cpu", torch.float16, cache_enabled=False)
    why = (KeyError, KeyError(), None)
    for pair in ((half, half), (half, plain), (plain, half), (plain, plain), (half, other)):
        for order in (pair, pair[::-1]):
            for mode in (contextlib.nullcontext(), Seen()):
                with mode:
                    for region in pair:
                        region.__enter__()
                    for region in order:
                        assert not region.__exit__(*why)
                assert not on()
                assert torch.is_autocast_cache_enabled()


def test_a_region_that_is_off_anyway_is_left_before_what_was_entered_in_it() -> None:
    with playing("a100"):
        idle = DeviceContext(precision="fp32").autocast()
        uncached = maybe_autocast("cpu", BF16, cache_enabled=False)
        for first, second in ((idle, uncached), (uncached, idle)):
            first.__enter__()
            second.__enter__()
            first.__exit__(None, None, None)
            assert (on("cpu"), on("cuda")) == (second is uncached, False)
            assert torch.is_autocast_cache_enabled() is not on("cpu")
            second.__exit__(None, None, None)
            assert torch.is_autocast_cache_enabled()
        with uncached, uncached, idle:
            assert product() is BF16
        assert not on()


def test_interleaved_generators_leave_nothing_behind() -> None:
    def region() -> Iterator[bool]:
        with maybe_autocast("cpu", BF16):
            yield on()

    first, second = region(), region()
    assert next(first)
    assert next(second)
    assert not list(first)
    assert on()  # the second is still inside
    assert not list(second)
    assert not on()
    with torch.autocast("cpu", BF16):  # nesting is balanced: the weight cache is cleared at the end
        assert torch.autocast_increment_nesting() == 2
        torch.autocast_decrement_nesting()


def test_interleaved_regions_of_two_device_types() -> None:
    with playing("a100"):
        cpu, cuda = maybe_autocast("cpu", BF16), maybe_autocast("cuda", torch.float16)
        cpu.__enter__()
        cuda.__enter__()
        cpu.__exit__(None, None, None)
        assert (on("cpu"), on("cuda")) == (False, True)
        cuda.__exit__(None, None, None)
        assert (on("cpu"), on("cuda")) == (False, False)


def test_a_decorated_generator_computes_under_autocast_and_its_consumer_does_not() -> None:
    @maybe_autocast("cpu", BF16)
    def batches() -> Iterator[torch.dtype]:
        sent = yield product()
        assert sent == "more"
        try:
            yield product()
        except KeyError:
            yield product()

    running = batches()
    assert next(running) is BF16
    assert not on()
    assert running.send("more") is BF16  # type: ignore[attr-defined]
    assert running.throw(KeyError()) is BF16  # type: ignore[attr-defined]
    assert list(running) == []
    assert batches.__name__ == "batches"


def test_a_decorated_generator_that_is_closed_cleans_up_under_autocast() -> None:
    seen: list[torch.dtype] = []

    @maybe_autocast("cpu", BF16)
    def count(first: int, *, by: int) -> Iterator[int]:
        try:
            while True:
                yield first
                first += by
        finally:
            seen.append(product())

    early: Any = count(3, by=2)
    assert [next(early), next(early)] == [3, 5]
    early.close()
    assert seen == [BF16]
    assert not on()
    with pytest.raises(StopIteration):
        next(early)

    @maybe_autocast("cpu", BF16)
    def stubborn() -> Iterator[int]:
        try:
            yield 1
        except GeneratorExit:
            yield 2

    running: Any = stubborn()
    next(running)
    with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
        running.close()
    assert not on()


def test_a_generators_return_value_survives() -> None:
    @maybe_autocast("cpu", BF16)
    def work() -> Iterator[int]:
        yield 1
        return 7

    def outer() -> Iterator[int]:
        assert (yield from work()) == 7

    assert list(outer()) == [1]


def test_coroutines_are_refused() -> None:
    with pytest.raises(TypeError, match="coroutine 'work'"):

        @maybe_autocast("cpu", BF16)
        async def work() -> None: ...


def test_no_device_no_autocast_and_one_word_about_it() -> None:
    with pytest.warns(PrecisionFallbackWarning, match="no cuda device") as caught:
        region = maybe_autocast("cuda")
        again = maybe_autocast("cuda")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert isinstance(region, NoAutocast)
    with region as entered, again:
        assert not on("cuda")
    assert entered is region
    assert region(product)() is torch.float32


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu", "hpu", "mtia", "meta", "vulkan", "cuda:0"])
def test_never_a_crash_and_never_a_false_on(kind: str) -> None:
    with pytest.warns(PrecisionFallbackWarning), maybe_autocast(kind):
        assert not torch.is_autocast_enabled()


def test_asking_for_nothing_where_there_is_nothing_is_silent() -> None:
    with maybe_autocast("cuda", enabled=False):
        pass


def test_a_dtype_that_autocast_lacks() -> None:
    with (
        pytest.warns(PrecisionFallbackWarning, match="computes in float32"),
        maybe_autocast("cpu", torch.float64),
    ):
        assert not on()


def test_a_dtype_that_is_wrong_on_this_device() -> None:
    with (
        playing("gtx1660"),
        pytest.warns(PrecisionFallbackWarning, match="NaN on Turing"),
        maybe_autocast("cuda", torch.float16),
    ):
        assert not on("cuda")


def test_float32_is_a_dtype_of_cuda_autocast() -> None:
    with playing("a100"), maybe_autocast("cuda", torch.float32):
        assert on("cuda")
        assert torch.get_autocast_dtype("cuda") is torch.float32


def test_each_device_and_dtype_is_told() -> None:
    asked = [("cpu", torch.float64), ("cpu", torch.int32), ("cuda", torch.float64)]
    with playing("a100"), pytest.warns(PrecisionFallbackWarning) as caught:
        for kind, dtype in 2 * asked:
            with maybe_autocast(kind, dtype):
                assert not on(kind)
    assert len(caught) == len(asked)


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        ("cpu", torch.float64),
        ("gtx1660", torch.float16),
        pytest.param("m1-macos13", BF16, marks=without_mps),
    ],
)
def test_a_dtype_that_does_not_matter_is_no_matter(key: str, dtype: torch.dtype) -> None:
    with playing(key) as hardware:
        kind = hardware.device_type
        before = torch.get_autocast_dtype(kind)
        with maybe_autocast(kind, dtype, enabled=False):
            assert not on(kind)
            assert torch.get_autocast_dtype(kind) is before


def test_a_region_that_is_off_has_the_dtype_that_torchs_has() -> None:
    for dtype in (BF16, torch.float16):
        with torch.autocast("cpu", dtype):
            for region in (
                torch.autocast("cpu", enabled=False),
                maybe_autocast("cpu", enabled=False),
                maybe_autocast("cpu", torch.float32),
            ):
                with region:
                    assert not on()
                    assert torch.get_autocast_dtype("cpu") is dtype


def test_unknown_devices_are_errors() -> None:
    with pytest.raises(DeviceError, match="Did you mean 'cuda'"):
        maybe_autocast("cudda")


@pytest.mark.parametrize(
    ("key", "kind", "dtype"),
    [("t4", "cuda", torch.float16), ("a100", "cuda", BF16), ("cpu", "cpu", None)],
)
def test_without_arguments_it_follows_the_automatic_plan(
    key: str, kind: str, dtype: torch.dtype | None
) -> None:
    with playing(key), maybe_autocast():
        assert on(kind) is (dtype is not None)
        if dtype:
            assert torch.get_autocast_dtype(kind) is dtype


def test_a_context_in_fp32_computes_in_fp32_inside_an_enabled_region() -> None:
    ctx = DeviceContext("cpu", precision="fp32")
    with torch.autocast("cpu", BF16), ctx.autocast():
        assert product() is torch.float32


def test_a_context_gives_one_region_that_can_be_nested() -> None:
    ctx = bf16_context()
    assert ctx.autocast() is ctx.autocast()
    with ctx.autocast(), ctx.autocast():
        assert product() is BF16
    assert not on()


def test_a_block_of_a_context_stays_in_float32() -> None:
    ctx = bf16_context()
    for float32 in (ctx.autocast(enabled=False), ctx.autocast(dtype=torch.float32)):
        with ctx.autocast():
            with float32, float32:
                assert product() is torch.float32
            assert product() is BF16
        assert float32(product)() is torch.float32
    with ctx.autocast(False, BF16):
        assert product() is torch.float32
    assert not on()


def test_a_dtype_that_is_named_is_the_dtype_or_told() -> None:
    with playing("cpu-avx512bf16"):
        ctx = DeviceContext("cpu", precision="fp32")
        with ctx.autocast(dtype=BF16):
            assert product() is BF16
        with pytest.warns(PrecisionFallbackWarning, match="becomes fp32") as caught:
            for region in [ctx.autocast(dtype=torch.float16) for _ in range(2)]:
                with torch.autocast("cpu", BF16), region:
                    assert product() is torch.float32
        assert len(caught) == 1
        strict = DeviceContext("cpu", precision="fp32", unsupported="raise")
        for dtype in (torch.float16, torch.float64):
            with pytest.raises(UnsupportedPrecisionError):
                strict.autocast(dtype=dtype)
        strict.autocast(enabled=False, dtype=torch.float16)


def test_a_context_without_autocast_tells_of_a_dtype_too() -> None:
    with playing(replace(machine("m1-macos13").hardware, torch_version=(2, 4))):
        ctx = DeviceContext("mps", precision="fp32")
        with pytest.warns(PrecisionFallbackWarning, match="no working autocast for mps"):
            assert isinstance(ctx.autocast(dtype=torch.float16), NoAutocast)


def test_a_context_caches_as_is_done_around_it_unless_told() -> None:
    ctx = bf16_context()
    with torch.autocast("cpu", enabled=False, cache_enabled=False):
        with ctx.autocast():  # the first time, which must not be what it stays with
            assert not torch.is_autocast_cache_enabled()
        with ctx.autocast(cache_enabled=True):
            assert torch.is_autocast_cache_enabled()
    with torch.no_grad(), ctx.autocast():
        assert torch.is_autocast_cache_enabled()
    with ctx.autocast(cache_enabled=True):
        with ctx.autocast():
            assert torch.is_autocast_cache_enabled() is not autocast._CACHE_LOSES_GRADIENTS
        with ctx.autocast(cache_enabled=False):
            assert product() is BF16
            assert not torch.is_autocast_cache_enabled()
            with ctx.autocast():
                assert not torch.is_autocast_cache_enabled()
    assert torch.is_autocast_cache_enabled()


def test_a_block_can_be_traced() -> None:
    ctx = bf16_context()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with ctx.autocast(cache_enabled=False):
                x = self.second(self.first(x))
                with ctx.autocast(dtype=torch.float32):
                    return x, self.first(x.float())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace(Model(), torch.ones(1, 2))  # type: ignore[no-untyped-call]
    assert [y.dtype for y in traced(torch.ones(1, 2))] == [BF16, torch.float32]


class Learner:
    """A linear model that learns: by what, and inside which region, is up to the test."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(8, 8)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.x, self.y = torch.randn(16, 8), torch.randn(16, 8)

    def loss(self) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.model(self.x).float(), self.y)

    def plain(self) -> float:
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def test_a_loop_inside_one_region_learns(caplog: pytest.LogCaptureFixture) -> None:
    region = maybe_autocast("cpu", BF16)
    expected, inside, decorated, nested = (Learner() for _ in range(4))

    def apart() -> float:
        with region:
            loss = expected.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        expected.optimizer.step()
        expected.optimizer.zero_grad()
        return loss.item()

    losses = [apart() for _ in range(20)]
    assert losses[-1] < losses[0] / 2
    assert not caplog.messages
    with region:
        assert [inside.plain() for _ in range(20)] == losses
    assert region(lambda: [decorated.plain() for _ in range(20)])() == losses
    with region:

        def step() -> float:
            with region:
                return nested.plain()

        assert [step() for _ in range(20)] == losses
    told = [message for message in caplog.messages if "clear_autocast_cache" in message]
    assert len(told) == (0 if autocast._CACHE_LOSES_GRADIENTS else 1)  # which caches nothing here


def test_nothing_is_told_of_a_step_where_no_weights_are_cached(
    caplog: pytest.LogCaptureFixture,
) -> None:
    learner = Learner()
    for region in (
        maybe_autocast("cpu", enabled=False),
        DeviceContext("cpu", precision="fp32").autocast(),
        maybe_autocast("cpu", BF16, cache_enabled=False),
    ):
        with region:
            learner.plain()
    learner.plain()
    assert not caplog.messages


def test_weights_that_change_between_two_regions_are_seen() -> None:
    region = maybe_autocast("cpu", BF16, cache_enabled=True)
    learner = Learner()
    seen = []
    for _ in range(3):
        with region:
            with region:
                seen.append(learner.loss().item())
            assert learner.loss().item() == seen[-1]
        with torch.no_grad():
            for weight in learner.model.parameters():
                weight.mul_(0.5)
    assert len(set(seen)) == 3


def test_optimizers_are_watched_once() -> None:
    def hooks() -> int:
        return len(sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks)

    maybe_autocast("cpu", BF16)
    before = hooks()
    for cached in (True, False):
        Autocast("cpu", BF16, True, cached)
    assert hooks() == before


@pytest.mark.skipif(autocast._CACHE_LOSES_GRADIENTS, reason="there it is off, see below")
@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("made_inside", [True, False])
def test_weights_are_cached_where_torch_caches_them(asked: bool | None, made_inside: bool) -> None:
    seen = []
    for make in (torch.autocast, maybe_autocast):
        early = make("cpu", BF16, cache_enabled=asked)
        with torch.autocast("cpu", enabled=False, cache_enabled=False):
            late = make("cpu", BF16, cache_enabled=asked)
            with late if made_inside else early:
                seen.append(torch.is_autocast_cache_enabled())
    assert seen[0] is seen[1]


@pytest.mark.parametrize(
    ("version", "loses"),
    [("2.4.1", True), ("2.10.0+cu128", True), ("2.11.0", False), ("2.15.0", False), ("3.0", False)],
)
def test_the_cache_that_loses_gradients_is_off_with_each_torch_that_has_it(
    monkeypatch: pytest.MonkeyPatch, version: str, loses: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    spec = importlib.util.spec_from_file_location("another_autocast", str(autocast.__file__))
    assert spec
    assert spec.loader
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    with another.maybe_autocast("cpu", BF16):
        assert torch.is_autocast_cache_enabled() is not loses


def test_an_average_that_is_copied_inside_the_region_is_seen() -> None:
    learner, average = Learner(), Learner()
    with maybe_autocast("cpu", BF16):
        seen = []
        for _ in range(3):
            learner.plain()
            with torch.no_grad():
                for mine, its in zip(
                    average.model.parameters(), learner.model.parameters(), strict=True
                ):
                    mine.copy_(its)
                seen.append(average.loss().item())
    assert len(set(seen)) == 3


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_pass_without_gradients_leaves_them_to_the_next(without: Any) -> None:
    for region in (maybe_autocast("cpu", BF16), bf16_context().autocast()):
        for again in (contextlib.nullcontext(), region):
            learner = Learner()
            with region:
                with without(), again:
                    learner.loss()
                learner.loss().backward()  # type: ignore[no-untyped-call]
            assert all(weight.grad is not None for weight in learner.model.parameters())


def test_where_the_cache_loses_gradients_it_is_off_while_there_are_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(autocast, "_CACHE_LOSES_GRADIENTS", True)
    monkeypatch.setattr(autocast, "_known", {})
    cached = torch.is_autocast_cache_enabled
    ctx = bf16_context()
    for region in (maybe_autocast("cpu", BF16), maybe_autocast("cpu", BF16), ctx.autocast()):
        with region:
            assert not cached()
            with torch.no_grad(), region:
                assert not cached()
        with torch.no_grad(), region:
            assert cached()
            with torch.enable_grad(), region:
                assert not cached()
        assert cached()
    with maybe_autocast("cpu", BF16, cache_enabled=True):
        assert cached()


def compiled_dtype(function: object, fullgraph: bool = True) -> torch.dtype:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # Dynamo's own imports may warn on some versions; what is tested is fullgraph and the dtype.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "Guards may run slower", RuntimeWarning)  # Python 3.13.0
        compiled = torch.compile(function, fullgraph=fullgraph, backend="eager")  # type: ignore[call-overload]
        return compiled(torch.ones(2, 2)).dtype  # type: ignore[no-any-return]


def test_inside_a_compiled_graph() -> None:
    outside = maybe_autocast("cpu", BF16)
    absent = maybe_autocast("cuda", enabled=False)
    ctx = bf16_context()

    def made_inside(x: torch.Tensor) -> torch.Tensor:
        with maybe_autocast("cpu", BF16):
            return x.mm(x)

    def made_outside(x: torch.Tensor) -> torch.Tensor:
        with outside:
            return x.mm(x)

    @outside
    def decorated(x: torch.Tensor) -> torch.Tensor:
        return x.mm(x)

    def of_a_context(x: torch.Tensor) -> torch.Tensor:
        with ctx.autocast():
            return x.mm(x)

    def in_float32(x: torch.Tensor) -> torch.Tensor:
        with ctx.autocast(), ctx.autocast(dtype=torch.float32), ctx.autocast(enabled=False):
            return x.mm(x)

    def named(x: torch.Tensor) -> torch.Tensor:
        with ctx.autocast(dtype=torch.float32), ctx.autocast(dtype=BF16, cache_enabled=False):
            return x.mm(x)

    def refused(x: torch.Tensor) -> torch.Tensor:
        with ctx.autocast(dtype=torch.float16):
            return x.mm(x)

    def automatic(x: torch.Tensor) -> torch.Tensor:
        with maybe_autocast():
            return x.mm(x)

    def nothing(x: torch.Tensor) -> torch.Tensor:
        with absent:
            return x.mm(x)

    for function in (made_inside, made_outside, decorated, of_a_context, named):
        assert compiled_dtype(function) is BF16, function.__name__
        assert not on()
    # Dynamo before 2.15 refuses a context manager of a class it does not know, if made outside.
    of_the_newest = (nothing,) if torch_version() >= (2, 15) else ()
    for function in (automatic, in_float32, *of_the_newest):
        assert compiled_dtype(function) is torch.float32, function.__name__
    with pytest.warns(PrecisionFallbackWarning, match="becomes fp32"):
        assert compiled_dtype(refused) is torch.float32


def test_where_a_graph_breaks_beside_a_region() -> None:
    region = maybe_autocast("cpu", BF16)

    def entered_by_hand(x: torch.Tensor) -> torch.Tensor:
        with contextlib.ExitStack() as stack:
            stack.enter_context(region)
            return x.mm(x)

    @region
    def products(x: torch.Tensor) -> Iterator[torch.Tensor]:
        for _ in range(2):
            yield x.mm(x)

    def generated(x: torch.Tensor) -> torch.Tensor:
        return sum(products(x), torch.zeros(2, 2, dtype=BF16))

    def raised(x: torch.Tensor) -> torch.Tensor:
        try:
            with region:
                x = x.mm(x)
                raise ValueError
        except ValueError:
            return x

    for function in (entered_by_hand, generated, raised):
        assert compiled_dtype(function, fullgraph=False) is BF16, function.__name__
        assert not on()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_region_that_was_exported_holds_wherever_the_graph_runs(precision: str) -> None:
    with playing("cpu-avx512bf16"):
        ctx = DeviceContext("cpu", precision=precision)
    region = ctx.autocast()

    class Product(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with region, region:
                return x.mm(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export's own imports
        exported = torch.export.export(Product(), (torch.ones(2, 2),), strict=False).module()
    assert not on()
    if torch_version() >= (2, 6):  # before, torch's own autocast is lost when it exports this way
        with torch.autocast("cpu", BF16):
            assert exported(torch.ones(2, 2)).dtype is ctx.plan.dtype
        assert exported(torch.ones(2, 2)).dtype is ctx.plan.dtype
        assert not on()


def test_regions_are_their_own_class() -> None:
    assert type(maybe_autocast("cpu", BF16)) is Autocast


@pytest.mark.parametrize("spelling", ["bf16", "bfloat16", "BF16-mixed"])
def test_a_dtype_may_be_spelled_as_a_precision(spelling: str) -> None:
    for _ in range(2):
        with maybe_autocast("cpu", spelling):
            assert product() is BF16
        with maybe_autocast(dtype=spelling):
            assert product() is BF16
    with torch.autocast("cpu", BF16), maybe_autocast("cpu", "fp32"):
        assert product() is torch.float32
    with pytest.raises(UnsupportedPrecisionError, match="did you mean 'bf16'"):
        maybe_autocast("cpu", "bf61")

    def inside(x: torch.Tensor) -> torch.Tensor:
        with maybe_autocast("cpu", "bf16"):
            return x.mm(x)

    assert compiled_dtype(inside) is BF16


def test_auto_is_the_automatic_plan_of_the_device_that_is_named() -> None:
    with playing("a100"):
        with maybe_autocast("cuda", "auto"):
            assert torch.get_autocast_dtype("cuda") is BF16
        with maybe_autocast("cpu", "auto"):
            assert product() is torch.float32


def test_a_script_is_told_in_words() -> None:
    def scripted(x: torch.Tensor) -> torch.Tensor:
        with maybe_autocast("cpu", torch.bfloat16):
            return x.mm(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        with pytest.raises(RuntimeError, match="decides on this machine, which a script cannot"):
            torch.jit.script(scripted)


@pytest.mark.parametrize("key", ["a100", "t4", "cpu-avx512bf16"])
def test_disabled_turns_nothing_on(key: str) -> None:
    with playing(key) as hardware, maybe_autocast(enabled=False):
        assert not on(hardware.device_type)


def test_what_is_remembered_is_what_was_asked_for() -> None:
    """Twice each, for the second comes from the memo."""
    with playing("a100"):
        for _ in range(2):
            for kind, dtype in [("cuda", BF16), ("cuda", torch.float16), ("cpu", BF16)]:
                for enabled, cache in [(True, True), (True, False), (False, True), (False, False)]:
                    with maybe_autocast(kind, dtype, enabled, cache) as region:
                        assert (on("cuda"), on("cpu")) == (
                            kind == "cuda" and enabled,
                            kind == "cpu" and enabled,
                        )
                        assert torch.get_autocast_dtype(kind) is dtype
                        assert torch.is_autocast_cache_enabled() is cache
                    again = maybe_autocast(kind, dtype, enabled, cache)
                    assert again is not region
        for cache in (True, False, True):
            with (
                torch.autocast("cpu", enabled=False, cache_enabled=cache),
                torch.no_grad(),
                maybe_autocast("cuda", BF16),
            ):
                assert torch.is_autocast_cache_enabled() is cache
    with playing("gtx1660"), pytest.warns(PrecisionFallbackWarning, match="NaN"):
        maybe_autocast("cuda", torch.float16)  # another device than the one remembered


@pytest.mark.parametrize(
    ("key", "arguments", "dtype"),
    [
        ("t4", ("cuda",), torch.float16),
        ("t4", (), torch.float16),
        ("a100", ("cuda:0", BF16), BF16),
        ("a100", ("cuda", "bf16"), BF16),
        ("a100", (), BF16),
        ("a100", ("cuda", None, False), None),
        ("gtx1660", ("cuda",), None),
    ],
)
def test_cuda_is_left_alone_until_a_region_is_entered(
    key: str, arguments: tuple[Any, ...], dtype: torch.dtype | None
) -> None:
    with asleep(key) as awake:
        region = maybe_autocast(*arguments)
        decorated = region(lambda: on("cuda"))
        assert not awake
        told = pytest.warns(PrecisionFallbackWarning, match="NaN")
        with told if key == "gtx1660" else contextlib.nullcontext():
            assert decorated() is (dtype is not None)
        assert awake
        for entered in (region, maybe_autocast(*arguments)):
            with entered, entered:
                assert on("cuda") is (dtype is not None)
                assert dtype in (None, torch.get_autocast_dtype("cuda"))
            assert not on("cuda")


def test_a_region_made_asleep_takes_the_dtype_of_the_one_around() -> None:
    with asleep("a100") as awake, torch.autocast("cuda", torch.float16):
        torch.set_autocast_dtype("cuda", BF16)
        region = maybe_autocast("cuda")
        assert not awake
    torch.set_autocast_dtype("cuda", torch.float16)
    with playing("a100"), region:
        assert torch.get_autocast_dtype("cuda") is BF16


def test_a_region_made_asleep_is_off_where_the_device_is_gone() -> None:
    with asleep("a100"):
        region = maybe_autocast("cuda", BF16)
    with pytest.warns(PrecisionFallbackWarning, match="no cuda device"), region:
        assert not on("cuda")
    assert torch.get_autocast_dtype("cuda") is torch.float16


def test_asleep_it_knows_how_a_dtype_is_spelled_and_what_it_has() -> None:
    with asleep("a100") as awake:
        with pytest.raises(UnsupportedPrecisionError, match="did you mean 'bf16'"):
            maybe_autocast("cuda", "bf61")
        assert not hasattr(maybe_autocast("cuda"), "autocast")
        assert not awake


def test_the_plan_and_a_named_device_are_told_apart() -> None:
    with playing("a100"):
        for _ in range(2):
            for arguments, dtype in ((("cuda",), torch.float16), ((), BF16)):
                with maybe_autocast(*arguments):
                    assert torch.get_autocast_dtype("cuda") is dtype
