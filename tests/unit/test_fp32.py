"""Settings are the whole process's: every test ends with them as they were, by every name."""

from __future__ import annotations

import pickle
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from portable_amp import (
    DeviceContext,
    PrecisionFallbackWarning,
    ScalerShim,
    UnsupportedPrecisionError,
    context,
    fp32,
    fp32_state,
)
from portable_amp.autocast import NoAutocast
from portable_amp.backends import BACKENDS, CPU, CUDA, MPS, XPU
from portable_amp.fp32 import Float32
from portable_amp.fp32_state import settings
from portable_amp.plan_cache import numeric_modes
from portable_amp.testing import play

NEW = hasattr(torch.backends, "fp32_precision")


def read(question: Callable[[], Any]) -> Any:
    """The answer, or that torch raises."""
    try:
        return question()
    except RuntimeError:
        return "raises"


OLD = {
    "float32_matmul_precision": torch.get_float32_matmul_precision,
    "cudnn.allow_tf32": lambda: torch.backends.cudnn.allow_tf32,
    "cuda.matmul.allow_tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
}


def everything() -> dict[str, Any]:
    """What each name reads as; and what the new ones say of their own, which only writing tells."""
    names = [".".join(one) for one in (*fp32_state._PARENTS, *fp32_state._NAMES)] if NEW else []
    found = {name: fp32_state._get((*name.split("."),)) for name in names}  # type: ignore[arg-type]
    return found | {name: read(question) for name, question in OLD.items()}


def own_values() -> dict[str, Any]:
    """How each leaf reads once what it inherits is gone; the settings end as they were."""
    state = fp32_state.take()
    fp32_state.give(state)
    return {".".join(name): value for name, value in state.names.items()}


def _set(where: str, name: str, value: Any) -> Callable[[], None]:
    def act() -> None:
        found: Any = torch.backends
        for part in filter(None, where.split(".")):
            found = getattr(found, part)
        setattr(found, name, value)

    act.__name__ = f"{where}.{name}={value}"
    return act


def _matmul(word: str) -> Callable[[], None]:
    def act() -> None:
        torch.set_float32_matmul_precision(word)

    act.__name__ = f"set_float32_matmul_precision({word})"
    return act


# Everything that a program may set.
CHANGES = [
    *(_matmul(word) for word in ("highest", "high", "medium")),
    *(_set(where, "allow_tf32", on) for where in ("cudnn", "cuda.matmul") for on in (True, False)),
]
if NEW:
    WHERE = ("", "cuda.matmul", "cudnn", "cudnn.conv", "cudnn.rnn", "mkldnn", "mkldnn.matmul",
             "mkldnn.conv", "mkldnn.rnn")  # fmt: skip
    CHANGES += [
        _set(where, "fp32_precision", value)
        for where in WHERE
        for value in ("none", "ieee", "tf32", "bf16")
        if value != "bf16" or not where.startswith("cu")
    ]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """The settings of the process, and no entry that is left."""
    state = fp32_state.take()
    fp32_state.give(state)
    yield
    left = [*fp32._entries]
    fp32._entries.clear()
    fp32_state.give(state)
    assert not left


def cuda(word: str) -> Float32:
    return Float32(word, "cuda", NoAutocast())


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", CHANGES, ids=lambda one: one.__name__)
def test_reading_never_raises_whatever_was_set(first: Callable[[], None]) -> None:
    raised = 0
    for second in CHANGES:
        first()
        second()
        for row in BACKENDS:
            said = settings(row)
            assert set(said) <= {"matmul", "conv", "rnn"}
            assert set(said.values()) <= {"ieee", "tf32", "bf16"}
        numeric_modes()
        assert "Float32: " in DeviceContext("cpu", precision="fp32").explain()
        raised += "raises" in everything().values()
    assert NEW or not raised  # the old names alone agree with themselves


@pytest.mark.skipif(not NEW, reason="only the old names here, which agree")
def test_torch_raises_where_the_reader_does_not() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="mix"):
        torch.get_float32_matmul_precision()
    assert settings(CUDA)["matmul"] == "tf32"


def test_the_reader_tells_what_is_set_by_each_name() -> None:
    assert settings(CUDA)["conv"] == "tf32"  # torch's default
    assert settings(MPS) == {}
    torch.backends.cudnn.allow_tf32 = False
    assert settings(CUDA)["conv"] == "ieee"
    torch.set_float32_matmul_precision("medium")
    assert settings(CUDA)["matmul"] == "tf32"
    assert settings(CPU)["matmul"] == "bf16"
    assert settings(XPU) == {"matmul": "ieee", "conv": "ieee"}
    if NEW:
        torch.backends.cudnn.rnn.fp32_precision = "tf32"
        torch.backends.mkldnn.conv.fp32_precision = "bf16"
        assert (settings(CUDA)["rnn"], settings(CPU)["conv"]) == ("tf32", "bf16")


def test_the_settings_of_xpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mkldnn:
        allow_tf32 = True

    monkeypatch.setattr(torch.backends, "mkldnn", Mkldnn())
    assert settings(XPU) == {"matmul": "tf32", "conv": "tf32"}
    with cuda("ieee"):
        assert settings(XPU)["matmul"] == "ieee"
    with Float32("tf32", "xpu", cuda("ieee")):
        assert settings(XPU)["conv"] == "ieee"  # the inner one's
    assert torch.backends.mkldnn.allow_tf32 is True
    torch.backends.mkldnn.allow_tf32 = False  # type: ignore[assignment]
    before = everything()
    with Float32("tf32", "xpu", cuda("ieee").inner):
        assert settings(XPU)["conv"] == "tf32"
        assert everything() == before
    assert torch.backends.mkldnn.allow_tf32 is False


# --- regions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["ieee", "tf32"])
def test_inside_it_is_so_and_every_name_can_be_read(word: str) -> None:
    rnd = random.Random(0)
    for _ in range(200):
        for change in rnd.choices(CHANGES, k=rnd.randrange(4)):
            change()
        before, own, here = everything(), own_values(), settings(CPU)
        with cuda(word):
            assert set(settings(CUDA).values()) == {word}
            assert "raises" not in everything().values()
            if word == "ieee":
                assert set(settings(CPU).values()) == {"ieee"}
            elif NEW:
                assert settings(CPU) == here  # which has none
        assert everything() == before
        assert own_values() == own


@pytest.mark.skipif(not NEW, reason="only old names here, which inherit nothing")
def test_what_was_inherited_is_inherited_again() -> None:
    torch.backends.fp32_precision = "tf32"  # type: ignore[assignment]
    with cuda("ieee"):
        pass
    assert settings(CUDA)["matmul"] == "tf32"
    torch.backends.fp32_precision = "ieee"  # type: ignore[assignment]
    assert settings(CUDA)["matmul"] == "ieee"


WORDS = st.sampled_from(["ieee", "tf32"])


def _programs() -> st.SearchStrategy[list[Any]]:
    change = st.sampled_from(CHANGES)
    inside = st.deferred(lambda: programs)
    region = st.tuples(WORDS, st.booleans(), inside)
    programs = st.lists(change | region, max_size=3)
    return programs


def _run(program: list[Any]) -> None:
    for step in program:
        if callable(step):
            step()
            continue
        word, raises, inside = step
        before, own = everything(), own_values()
        try:
            with cuda(word):
                assert set(settings(CUDA).values()) == {word}
                assert "raises" not in everything().values()
                _run(inside)
                if raises:
                    raise KeyError
        except KeyError:
            assert raises
        assert everything() == before
        assert own_values() == own


@given(_programs())
def test_a_region_ends_as_it_began_whatever_is_nested_raised_and_set(program: list[Any]) -> None:
    state = fp32_state.take()
    fp32_state.give(state)
    try:
        _run(program)
        assert not fp32._entries
    finally:
        fp32_state.give(state)


@given(st.lists(WORDS, max_size=4).flatmap(lambda words: st.permutations([*enumerate(words)])))
def test_regions_left_in_any_order_end_as_it_began(order: list[tuple[int, str]]) -> None:
    before = everything()
    regions = [cuda(word) for _, word in sorted(order)]
    for one in regions:
        one.__enter__()
    inside = [*regions]
    for at, _ in order:
        assert set(settings(CUDA).values()) == {inside[-1].word}
        inside.remove(regions[at])
        regions[at].__exit__(None, None, None)
    assert everything() == before


def in_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@given(st.lists(st.tuples(st.integers(0, 2), WORDS | st.none()), max_size=8))
def test_while_a_thread_was_promised_ieee_all_compute_so(
    program: list[tuple[int, str | None]],
) -> None:
    before = everything()
    inside: list[list[Float32]] = [[], [], []]
    with ThreadPoolExecutor(1) as a, ThreadPoolExecutor(1) as b, ThreadPoolExecutor(1) as c:
        # Each enters a word, or leaves; in the end all leave, the first thread first.
        for at, word in [*program, *((at, None) for at in (0, 1, 2) for _ in program)]:
            pool = (a, b, c)[at]
            if word:
                inside[at].append(cuda(word))
                pool.submit(inside[at][-1].__enter__).result()
            elif inside[at]:
                pool.submit(inside[at].pop().__exit__, None, None, None).result()
            words = {one[-1].word for one in inside if one}
            if words:
                expected = "ieee" if "ieee" in words else "tf32"
                assert set(settings(CUDA).values()) == {expected}
    assert everything() == before


def test_one_region_is_shared_by_threads_and_recursion() -> None:
    torch.set_float32_matmul_precision("high")
    before = everything()
    region = DeviceContext("cpu", precision="fp32", fp32="ieee").autocast()
    barrier = threading.Barrier(3)

    @region
    def work(depth: int) -> None:
        assert torch.get_float32_matmul_precision() == "highest"
        if depth:
            work(depth - 1)
            return
        barrier.wait()
        barrier.wait()

    with ThreadPoolExecutor(3) as pool:
        [one.result() for one in [pool.submit(work, 2) for _ in range(3)]]
    assert everything() == before


def test_a_generator_is_entered_at_each_resumption() -> None:
    torch.set_float32_matmul_precision("high")
    region = DeviceContext("cpu", precision="fp32", fp32="ieee").autocast()

    @region
    def decorated() -> Iterator[str]:
        for _ in range(2):
            yield torch.get_float32_matmul_precision()

    seen = []
    for word in decorated():
        seen += [word, torch.get_float32_matmul_precision()]
    assert seen == ["highest", "high"] * 2

    def plain() -> Iterator[None]:
        with cuda("ieee"):
            yield

    one, two = plain(), plain()
    next(one), next(two)
    one.close()
    assert torch.get_float32_matmul_precision() == "highest"
    in_thread(two.close)  # as the garbage collector may
    assert torch.get_float32_matmul_precision() == "high"

    async def coroutine() -> None: ...

    with pytest.raises(TypeError, match="coroutine"):
        region(coroutine)


def test_a_shared_region_is_left_by_the_thread_that_leaves() -> None:
    shared = cuda("ieee")
    with ThreadPoolExecutor(1) as other:
        shared.__enter__()
        other.submit(shared.__enter__).result()
        shared.__exit__(None, None, None)
        with cuda("tf32"):
            assert settings(CUDA)["matmul"] == "ieee"  # the other thread's
        other.submit(shared.__exit__, None, None, None).result()


def test_what_was_not_entered_is_not_left() -> None:
    with pytest.raises(RuntimeError, match="was not entered"):
        cuda("ieee").__exit__(None, None, None)


def test_a_region_that_fails_to_enter_leaves_nothing() -> None:
    class Refuses(torch.autocast):
        def __enter__(self) -> Any:
            raise KeyError

    torch.set_float32_matmul_precision("high")
    with pytest.raises(KeyError), Float32("ieee", "cpu", Refuses("cpu")):
        pass
    assert torch.get_float32_matmul_precision() == "high"


# --- contexts ---------------------------------------------------------------------------------


def test_as_is_touches_nothing_and_is_the_very_region_of_before() -> None:
    ctx = DeviceContext("cpu", precision="fp32")
    assert ctx.fp32 == "as_is"
    assert not isinstance(ctx.autocast(), Float32)
    assert not isinstance(ctx.autocast(enabled=False), Float32)
    torch.set_float32_matmul_precision("medium")
    with ctx.autocast():
        assert torch.get_float32_matmul_precision() == "medium"
        assert not fp32._entries


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_holds_in_every_form_of_the_region(precision: str) -> None:
    torch.set_float32_matmul_precision("medium")
    with play("cpu-avx512bf16"):
        ctx = DeviceContext("cpu", precision=precision, fp32="ieee")
    x = torch.ones(2, 2)
    wanted = ctx.plan.dtype
    assert ctx.autocast() is ctx.autocast()
    for region, dtype in (
        (ctx.autocast(), wanted),
        (ctx.autocast(enabled=False), torch.float32),
        (ctx.autocast(dtype=torch.float32), torch.float32),
        (ctx.autocast(cache_enabled=False), wanted),
    ):
        with region:
            assert torch.get_float32_matmul_precision() == "highest"
            assert (x @ x).dtype is dtype
        assert torch.get_float32_matmul_precision() == "medium"


class Sees(torch.autograd.Function):
    """Notes how float32 is computed in the backward pass."""

    seen: ClassVar[list[str]] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        Sees.seen.append(torch.get_float32_matmul_precision())
        return gradient


def test_backward_step_computes_backward_so_too() -> None:
    torch.set_float32_matmul_precision("high")
    Sees.seen = []
    weight = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    ctx = DeviceContext("cpu", fp32="ieee")
    scaler = ctx.scaler()
    again = pickle.loads(pickle.dumps(scaler))
    for one in (scaler, again, ScalerShim("cpu"), DeviceContext("cpu").scaler()):
        one.backward_step(Sees.apply(weight).sum(), optimizer)
    assert Sees.seen == ["highest", "highest", "high", "high"]
    with ctx.autocast():
        loss = Sees.apply(weight).sum()
    with ctx.autocast(enabled=False):  # as `explain` has it
        loss.backward()
    assert Sees.seen[-1] == "highest"
    assert torch.get_float32_matmul_precision() == "high"
    with pytest.raises(RuntimeError, match="grad"):
        scaler.backward_step(torch.ones(()), optimizer)
    assert torch.get_float32_matmul_precision() == "high"


def test_measuring_and_verifying_compute_so_forward_and_backward() -> None:
    torch.set_float32_matmul_precision("high")

    class Model(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            forward.append(torch.get_float32_matmul_precision())
            return Sees.apply(super().forward(x))

    forward: list[str] = []
    Sees.seen = []
    ctx = DeviceContext("cpu", precision="fp32", fp32="ieee")
    batch = torch.randn(4, 8)
    tuned = ctx.tuned(Model(8, 3), batch, budget_s=0, cache=False)
    ctx.verify(Model(8, 3), batch)
    assert {*forward} == {*Sees.seen} == {"highest"}
    assert tuned.fp32 == "ieee"
    assert torch.get_float32_matmul_precision() == "high"


def test_the_word_is_part_of_the_context() -> None:
    plain, strict = DeviceContext("cpu"), DeviceContext("cpu", fp32="ieee")
    assert plain != strict
    assert hash(plain) != hash(strict)
    assert strict == DeviceContext("cpu", fp32="ieee") == pickle.loads(pickle.dumps(strict))
    assert pickle.loads(pickle.dumps(strict)).fp32 == "ieee"
    assert "fp32='ieee'" in repr(strict)
    assert "ieee" not in repr(plain)
    with pytest.raises(AttributeError, match="immutable"):
        strict.fp32 = "as_is"


def test_ranks_that_agree_keep_the_word(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = DeviceContext("cpu", fp32="ieee")
    assert ctx.agreed() is ctx
    plan = replace(ctx.plan, reason="it is what all ranks can do")
    monkeypatch.setattr(context, "agree_on_plan", lambda *_: plan)
    assert (ctx.agreed().plan, ctx.agreed().fp32) == (plan, "ieee")


def test_plans_are_kept_apart_by_the_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PORTABLE_AMP_CACHE", str(tmp_path))
    keys = []
    monkeypatch.setattr(context, "recall", lambda key: keys.append(key) or plan)
    plan = DeviceContext("cpu").plan
    for word in ("as_is", "ieee", "as_is"):
        DeviceContext("cpu", fp32=word).tuned(torch.nn.Linear(8, 3), torch.randn(4, 8))
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("IEEE", "ieee"), ("highest", "ieee"), ("high", "tf32"), ("TF32", "tf32"),
        ("auto", "as_is"), ("as-is", ""), ("", ""), ("bf16", ""), (None, ""), (True, ""), (1, ""),
        (torch.float32, ""), (["ieee"], ""), (torch.ones(2), ""), (b"ieee", ""),
    ],
)  # fmt: skip
def test_another_word_is_refused(word: Any, meant: str) -> None:
    with pytest.raises(UnsupportedPrecisionError, match="'as_is', 'ieee' or 'tf32'") as caught:
        DeviceContext("cpu", fp32=word)
    assert ("Did you mean" in str(caught.value)) is bool(meant)
    assert meant in str(caught.value)


@pytest.mark.parametrize("machine", ["cpu", "m2-macos15", "v100", "t4", "mi250"])
def test_tf32_changes_nothing_where_there_is_none_and_says_so_once(machine: str) -> None:
    before = everything()
    with play(machine), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            ctx = DeviceContext(fp32="tf32")
        with ctx.autocast():
            assert everything() == before
        told = [str(one.message) for one in caught if "tf32" in str(one.message)]
        assert len(told) == 1
        assert issubclass(caught[-1].category, PrecisionFallbackWarning)
        assert "changes nothing" in told[0]
        assert "has no TF32" in ctx.explain()
        with pytest.raises(UnsupportedPrecisionError, match="has no TF32"):
            DeviceContext(fp32="tf32", unsupported="raise")


@pytest.mark.parametrize("machine", ["a100", "h100", "rtx4090"])
def test_tf32_is_set_where_there_is_one(machine: str) -> None:
    with play(machine):
        ctx = DeviceContext(fp32="tf32")
        with ctx.autocast():
            assert set(settings(CUDA).values()) == {"tf32"}
        assert settings(CUDA)["matmul"] != "tf32"
        assert "Float32: tf32 was asked for, for ctx.autocast()" in ctx.explain()
        assert "  Now: matmul ieee, conv tf32, rnn tf32, as torch is set" in ctx.explain()


def test_explain_tells_the_settings_of_a_played_machine() -> None:
    with play("a100"):
        assert "Float32: matmul ieee, conv tf32, rnn tf32, as torch" in DeviceContext().explain()
        torch.set_float32_matmul_precision("high")
        assert "Float32: matmul tf32, conv tf32, rnn tf32, as torch" in DeviceContext().explain()
    with play("m2-macos15"):
        assert "Float32: torch has no setting for it" in DeviceContext().explain()
        assert "\n  Now: torch has no setting" in DeviceContext(fp32="ieee").explain()
    assert "verify() measures" in DeviceContext("cpu").explain()


@pytest.mark.skipif(not NEW, reason="only the old names here, which agree")
def test_a_machine_is_played_live_whatever_was_set() -> None:
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    before = everything()
    with play("a100", live=True):
        assert torch.backends.cudnn.enabled is False
        assert settings(CUDA)["conv"] == "ieee"
    assert everything() == before
    assert torch.backends.cudnn.enabled is True


@pytest.mark.parametrize(
    ("machine", "word", "variable", "value"),
    [
        ("cpu", "ieee", "ONEDNN_DEFAULT_FPMATH_MODE", "BF16"),
        ("cpu", "ieee", "DNNL_DEFAULT_FPMATH_MODE", "any"),
        ("a100", "tf32", "NVIDIA_TF32_OVERRIDE", "0"),
        ("m2-macos15", "ieee", "PYTORCH_MPS_FAST_MATH", "1"),
    ],
)
def test_a_variable_that_rules_is_told(
    machine: str, word: str, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with play(machine):
        monkeypatch.setenv(variable, {"BF16": "STRICT", "any": "strict", "0": "1", "1": "0"}[value])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            DeviceContext(fp32=word)
        monkeypatch.setenv(variable, value)
        with pytest.warns(PrecisionFallbackWarning, match=rf"\${variable}={value} is set"):
            ctx = DeviceContext(fp32=word)
        assert f"${variable}={value}" in ctx.explain()
        assert f"${variable}={value}" in DeviceContext().explain()


# --- graphs -----------------------------------------------------------------------------------


def test_a_compiled_function_called_in_a_region_and_one_with_a_region_in_it() -> None:
    ctx = DeviceContext("cpu", precision="fp32", fp32="ieee")
    torch.set_float32_matmul_precision("high")
    seen: list[str] = []

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def note() -> None:
        seen.append(torch.get_float32_matmul_precision())

    def inside(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        with ctx.autocast():
            note()
            z = x @ y
        return z * 2

    x = torch.ones(2, 2)
    compiled = torch.compile(inside, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(x), inside(x))
    assert {*seen} == {"highest"}
    assert torch.get_float32_matmul_precision() == "high"
    assert not fp32._entries
    torch._dynamo.reset()  # which had learned to leave this function alone
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(inside, backend="eager", fullgraph=True)(x)
    around = torch.compile(lambda x: x @ x, backend="eager", fullgraph=True)
    with ctx.autocast():
        assert torch.equal(around(x), x @ x)
    torch._dynamo.reset()


def test_a_traced_graph_is_told_to_be_without() -> None:
    ctx = DeviceContext("cpu", precision="fp32", fp32="ieee")

    def inside(x: torch.Tensor) -> torch.Tensor:
        with ctx.autocast(cache_enabled=False):
            return x @ x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.warns(PrecisionFallbackWarning, match="not part of a graph"):
            torch.jit.trace(inside, (torch.ones(2, 2),))
    assert not fp32._entries


def test_the_row_of_a_context_may_be_any() -> None:
    """A device without settings, whatever its row says of TF32."""
    can = DeviceContext("cpu").capabilities
    inner = cuda("ieee").inner
    for word, row, tf32, idle in (
        ("as_is", CUDA, True, True), ("ieee", CUDA, False, False), ("ieee", MPS, None, True),
        ("tf32", CUDA, None, False), ("tf32", CUDA, False, True), ("tf32", MPS, None, True),
    ):  # fmt: skip
        made = fp32.region_of(word, row, replace(can, tf32=tf32), inner)
        assert (made is inner) is idle
