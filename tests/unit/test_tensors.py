"""Tensors on a played machine: every way to the device, and what computes there, as on the CPU."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from portable_amp.testing import Call, play
from support import KINDS

# torch 2.4 uses its own deprecated spelling in checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")

LIVE = {"cuda": "h100", "xpu": "max1550", "mps": "m2-macos15"}
each_kind = pytest.mark.parametrize("kind", [kind for kind in LIVE if kind in KINDS])
HALF, SINGLE = torch.float16, torch.float32
CPU = torch.device("cpu")
FORMATS = (torch.preserve_format, torch.contiguous_format, torch.channels_last)


def source() -> torch.Tensor:
    return torch.arange(24.0).reshape(1, 2, 3, 4)


def said(to: Any, dtype: torch.dtype, non_blocking: bool, copy: bool) -> list[tuple[Any, Any]]:
    """Every way to say one thing to `Tensor.to`: arguments and keywords."""
    flags = {"non_blocking": non_blocking, "copy": copy}
    if to is None:
        return [
            ((dtype, non_blocking, copy), {}),
            ((dtype,), flags),
            ((), {"dtype": dtype, **flags}),
        ]
    other = torch.zeros(1, dtype=dtype, device=to)
    return [
        ((to, dtype, non_blocking, copy), {}),
        ((to, dtype, non_blocking), {"copy": copy}),
        ((to, dtype), flags),
        ((to,), {"dtype": dtype, **flags}),
        ((), {"device": to, "dtype": dtype, **flags}),
        ((other, non_blocking, copy), {}),
        ((other,), flags),
        *([] if non_blocking or copy else [((to, dtype), {}), ((to,), {"dtype": dtype})]),
    ]


@each_kind
@pytest.mark.parametrize("there", [False, True])
def test_every_way_to_say_to_means_what_it_means_on_the_cpu(kind: str, there: bool) -> None:
    with play(LIVE[kind], live=True) as played:
        x = source().to(kind) if there else source()
        device = torch.device(kind, 0)
        for to, dtype, late, copy, form in itertools.product(
            (None, kind, device, 0, "cpu"), (SINGLE, HALF), (False, True), (False, True), FORMATS
        ):
            target = {None: x.device, "cpu": CPU}.get(to, device)
            expected = source().to(dtype, copy=copy, memory_format=form)
            for args, keywords in said(to, dtype, late, copy):
                played.calls.clear()
                got = x.to(*args, **keywords, memory_format=form)
                calls = list(played.calls)
                moves = target != x.device
                assert calls == ([Call("copy", non_blocking=late)] if moves else [])
                assert (got.device, got.dtype) == (target, dtype)
                assert got.stride() == expected.stride()
                assert torch.equal(got.cpu(), expected)
                asked = moves or copy or dtype is not SINGLE or form is torch.channels_last
                assert (got is x) is not asked


def test_the_method_named_after_a_device_goes_there() -> None:
    for name in {"cuda", "xpu"} & set(KINDS):
        first, second = torch.device(name, 0), torch.device(name, 1)
        with play(LIVE[name], live=True, count=2) as played:
            module = getattr(torch, name)
            for current, x in itertools.product((0, 1), (source(), source().to(second))):
                with module.device(current):
                    go = getattr(x, name)
                    for args, there in (
                        ((), module.current_device()), ((0,), 0), ((1,), 1), ((name,), current),
                        ((first,), 0), ((f"{name}:1",), 1),
                    ):  # fmt: skip
                        assert go(*args).device == torch.device(name, there)
                        if args:
                            assert go(device=args[0]).device == torch.device(name, there)
            played.calls.clear()
            source().to(second)
            x = source()
            getattr(x, name)(0)
            getattr(x, name)(0, True)
            getattr(x, name)(non_blocking=True)
            assert [call.non_blocking for call in played.asked("copy")] == [
                False,
                False,
                True,
                True,
            ]
            moved = getattr(x, name)(memory_format=torch.channels_last)
            assert moved.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(moved.cpu(), source())


@each_kind
def test_there_and_back(kind: str) -> None:
    with play(LIVE[kind], live=True) as played:
        x = source().requires_grad_()
        assert x.cpu() is x
        there = x.to(kind)
        back = there.cpu()
        assert (back.device, type(back)) == (CPU, torch.Tensor)
        assert played.calls == [Call("copy"), Call("copy")]
        back.sum().backward()
        assert x.grad is not None
        assert x.grad.unique().tolist() == [1]
        assert [t.is_pinned() for t in (x, there)] == [False, False]


@each_kind
def test_what_is_made_there_is_as_it_is_made_on_the_cpu(kind: str) -> None:
    """Every function of torch that makes a tensor: same dtype, numbers and gradient."""
    x = source()

    def made(device: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        like = torch.zeros(2, dtype=HALF, device=device)
        options = {"dtype": torch.float16, "device": device, "requires_grad": True}
        inherited = [
            like.new_tensor([1.5, 2]),
            like.new_tensor([1, 2], dtype=SINGLE),
            like.new_tensor(3, requires_grad=True),
            like.new_tensor([1.0], dtype=torch.int64),
            like.new_zeros(3),
            like.new_full((2,), 2.0, dtype=SINGLE, requires_grad=True),
            torch.ones_like(like),
            torch.ones_like(like, device=device, requires_grad=True),
        ]
        return [
            *inherited,
            x.new_tensor([1, 2], device=device),
            torch.zeros(1).to(device).new_tensor([1.0], device=device),
            x.new_ones(2, device=device, dtype=HALF),
            torch.zeros(2, **options),
            torch.full((2, 3), 5, **options),
            torch.rand(3, **options),
            torch.linspace(0, 1, steps=3, **options),
            torch.arange(1, 9, 2, device=device),
            torch.eye(2, 3, device=device, dtype=torch.int32),
            torch.randperm(5, device=device),
            torch.tensor([[1, 2]], device=device, dtype=HALF),
            torch.as_tensor([3.0], device=device),
            torch.zeros_like(x, device=device, memory_format=torch.channels_last),
        ]

    expected = made("cpu")
    with play(LIVE[kind], live=True):
        for device in (kind, torch.device(kind, 0), 0):
            for got, wanted in zip(made(device), expected, strict=True):
                assert got.device == torch.device(kind, 0)
                assert (got.dtype, got.requires_grad) == (wanted.dtype, wanted.requires_grad)
                assert got.stride() == wanted.stride()
                assert torch.equal(got.detach().cpu(), wanted.detach())
        there = torch.zeros(2, dtype=HALF, device=kind)
        back = there.new_tensor([1], device="cpu")
        assert (back.device, back.dtype) == (CPU, HALF)
        assert torch.zeros(1).new_tensor([1]).device == CPU
        assert torch.ones_like(there, device="cpu", requires_grad=True).device == CPU


@each_kind
def test_what_torch_itself_makes_there_is_there(kind: str) -> None:
    """Where no function of Python names the device."""
    with play(LIVE[kind], live=True):
        half = torch.zeros(1, dtype=HALF, device=kind)
        got = torch.arange(3.0).type_as(half)
        assert (got.device, got.dtype, got.tolist()) == (half.device, HALF, [0, 1, 2])
        with torch._C.DisableTorchFunction():
            made = torch.full((2,), 3.0, dtype=HALF, device=kind)
        assert (made.device, made.dtype, made.tolist()) == (half.device, HALF, [3, 3])
        weight = torch.ones(2, requires_grad=True)
        with torch.no_grad():
            assert weight.type_as(half).device == half.device
        assert weight.type_as(torch.zeros(1, dtype=HALF)).dtype is HALF
        with pytest.raises(NotImplementedError, match=r"call \.to\(\) from Python"):
            weight.type_as(half)
        assert half.type_as(torch.zeros(1)).device == CPU


# --- what computes there -------------------------------------------------------------------------


def gradients(device: str) -> list[Any]:
    """What torch.autograd.grad and backward give, by each of their options."""
    w = torch.tensor([1.0, 2.0], device=device, requires_grad=True)
    v = torch.tensor([3.0, 4.0], device=device, requires_grad=True)
    unused = torch.ones(1, device=device, requires_grad=True)
    there = torch.tensor([1.0, 10.0], device=device)
    host = torch.tensor(2.0, requires_grad=True)
    out = w * w * v
    kept = {"retain_graph": True}
    found = [
        *torch.autograd.grad(out.sum(), w, **kept),
        *torch.autograd.grad(out.sum(), [w, v], **kept),
        *torch.autograd.grad(out, (v, w), there, **kept),
        *torch.autograd.grad([out], [w], grad_outputs=[there], **kept),
        *torch.autograd.grad(out.sum(), (w, unused), allow_unused=True, **kept),
        *torch.autograd.grad((w * host).sum(), (w, host)),
    ]
    (first,) = torch.autograd.grad(out.sum(), w, create_graph=True)
    found += torch.autograd.grad(first.sum(), w)
    for call in (
        lambda: torch.autograd.backward(out, there, True),
        lambda: torch.autograd.backward([out, out * 2], [there, there], retain_graph=True),
        lambda: torch.autograd.backward(out.sum(), inputs=[w], retain_graph=True),
        lambda: torch.autograd.backward((out.sum(),), None, True, False),
        lambda: out.backward(there, inputs=(v,)),
    ):
        w.grad = v.grad = None
        call()
        found += [w.grad, v.grad]
    assert type(torch.autograd.grad((w * 2).sum(), w)) is tuple
    return found


@each_kind
def test_gradients_are_where_their_tensors_are(kind: str) -> None:
    expected = gradients("cpu")
    host = [n for n, grad in enumerate(expected) if grad is not None and grad.dim() == 0]
    with play(LIVE[kind], live=True):
        for n, (got, wanted) in enumerate(zip(gradients(kind), expected, strict=True)):
            assert (got is None) is (wanted is None)
            if got is not None:
                assert got.device == (CPU if n in host else torch.device(kind, 0))
                assert torch.equal(got.cpu(), wanted)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, by: float = 2.0) -> torch.Tensor:
        return x * by

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.by = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.by, None


def of_ones_own(device: Any) -> list[Any]:
    """What it computes, in each way to call it; older torch refuses names."""
    found: list[Any] = []
    for call in (
        lambda x: Scaled.apply(x),
        lambda x: Scaled.apply(x, 3.0),
        lambda x: Scaled.apply(x, by=4.0),
        lambda x: Scaled.apply(x=x, by=5.0),
    ):
        x = torch.ones(2, device=device, requires_grad=True)
        try:
            out = call(x)
        except TypeError:
            found.append(None)
        else:
            out.sum().backward()
            found += [out.detach(), x.grad]
    return found


@each_kind
def test_a_function_of_ones_own_computes_the_same(kind: str) -> None:
    expected = of_ones_own("cpu")
    with play(LIVE[kind], live=True):
        for device in (torch.device(kind, 0), CPU):
            for got, wanted in zip(of_ones_own(device), expected, strict=True):
                assert (got is None) is (wanted is None)
                assert got is None or got.device == device
                assert got is None or torch.equal(got.cpu(), wanted)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * 2, None


@pytest.mark.skipif("cuda" not in KINDS, reason="torch knows no CUDA")
def test_two_devices_meet_in_a_function_of_ones_own_alone() -> None:
    with play("h100", live=True, count=2):
        first, second = (torch.ones(1, 1, 2, 2, device=f"cuda:{index}") for index in (0, 1))
        assert Twice.apply(first, second).device == first.device
        for other in (second, torch.ones(1, 1, 2, 2)):
            for tensors in ((first, first, other), (first, other, first), (other, first, first)):
                with pytest.raises(RuntimeError, match="to be on the same device"):
                    F.scaled_dot_product_attention(*tensors)
                by_name = dict(zip(("query", "key", "value"), tensors, strict=True))
                with pytest.raises(RuntimeError, match="to be on the same device"):
                    F.scaled_dot_product_attention(**by_name)


@each_kind
def test_checkpointing_calls_the_model_with_tensors_of_the_device(kind: str) -> None:
    seen = []

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.device)
        return (x * x).sum()

    with play(LIVE[kind], live=True):
        for device, reentrant in ((torch.device(kind, 0), False), (CPU, False), (CPU, True)):
            seen.clear()
            x = torch.tensor([1.0, 2.0], device=device, requires_grad=True)
            checkpoint(model, x, use_reentrant=reentrant).backward()
            assert seen == [device, device]
            assert x.grad is not None
            assert (x.grad.device, x.grad.tolist()) == (device, [2, 4])
        x = torch.ones(2, device=kind, requires_grad=True)
        with pytest.raises(NotImplementedError, match="use_reentrant=False"):
            checkpoint(model, x, use_reentrant=True)


Q = torch.linspace(-1, 1, 24).reshape(1, 2, 3, 4)
MASK = torch.tensor([[True, False, True], [True, True, False], [True, True, True]])


def attend(*args: Any, **keywords: Any) -> Callable[[Any], torch.Tensor]:
    return lambda device: F.scaled_dot_product_attention(
        *(tensor.to(device) for tensor in args),
        **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()},
    )


def recur(make: Callable[..., Any], **options: Any) -> Callable[[Any], torch.Tensor]:
    def run(device: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return make(4, 3, batch_first=True, **options).to(device)(Q[0].to(device))[0]

    return run


COMPOSITES: dict[str, Callable[[Any], torch.Tensor]] = {
    "attention": attend(Q, Q + 1, Q * 2),
    "attention by name": attend(query=Q, key=Q + 1, value=Q * 2),
    "attention with a mask": attend(Q, Q + 1, Q * 2, attn_mask=MASK),
    "causal attention": attend(Q, Q + 1, Q * 2, is_causal=True, scale=0.3),
    "LSTM": recur(nn.LSTM),
    "GRU": recur(nn.GRU),
    "RNN": recur(nn.RNN),
    "RNN, relu": recur(nn.RNN, nonlinearity="relu"),
}


@each_kind
@pytest.mark.parametrize("name", COMPOSITES)
def test_whole_layers_compute_as_on_the_cpu_and_are_lowered(kind: str, name: str) -> None:
    run = COMPOSITES[name]
    expected = run("cpu").detach()
    with play(LIVE[kind], live=True):
        got = run(kind).detach()
        assert (got.device, got.dtype) == (torch.device(kind, 0), SINGLE)
        assert torch.allclose(got.cpu(), expected, rtol=1e-6)
        assert torch.equal(run("cpu").detach(), expected)
        with torch.autocast(kind, HALF):
            lowered = run(kind).detach()
            assert (lowered.device, lowered.dtype) == (torch.device(kind, 0), HALF)
            assert torch.allclose(lowered.cpu().float(), expected, atol=2e-2)
            # One on the CPU is none of this region's.
            assert torch.equal(run("cpu").detach(), expected)


@each_kind
def test_a_thread_that_outlives_the_block_computes_on_the_cpu(kind: str) -> None:
    leave, result = threading.Event(), []

    def work() -> None:
        leave.wait()
        x = torch.ones(2, dtype=SINGLE).to("cpu", torch.float64)
        result.append(torch.add(x, torch.full((2,), 3), alpha=2))
        result.append(torch.empty(2, device="meta"))

    with play(LIVE[kind], live=True):
        thread = threading.Thread(target=work)
        thread.start()
    leave.set()
    thread.join()
    assert [tensor.device.type for tensor in result] == ["cpu", "meta"]
    assert (result[0].dtype, result[0].tolist()) == (torch.float64, [7, 7])
