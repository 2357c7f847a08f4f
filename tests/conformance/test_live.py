"""Live machines: the backend's own rules on real numbers, and its ways to fail."""

from __future__ import annotations

import copy
import gc
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from portable_amp import (
    DeviceContext,
    ScalerShim,
    clear_cache,
    is_oom_error,
    load_checkpoint,
    maybe_autocast,
    memory,
    memory_stats,
    save_checkpoint,
    split_on_oom,
)
from portable_amp.backends import torch_version
from portable_amp.testing import play
from support import KINDS

# torch 2.4 uses its own deprecated spelling in checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")

# One machine for each of torch's own kinds of device.
LIVE = {"cuda": "h100", "xpu": "max1550", "mps": "m2-macos15"}
LIVE_KINDS = [kind for kind in LIVE if kind in KINDS]
each_kind = pytest.mark.parametrize("kind", LIVE_KINDS)


def mlp(width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x.view(-1, 4, 4))[0][:, -1])


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Own(nn.Module):
    """A custom autograd function, and activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.utils.checkpoint.checkpoint(self.one, x, use_reentrant=False)
        return self.two(Square.apply(hidden))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(),
        nn.Flatten(), nn.Linear(12, 4),
    ),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 8)), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
        nn.Flatten(), nn.Linear(16, 4),
    ),
    "recurrent": Recurrent,
    "functions of one's own": Own,
}  # fmt: skip


def losses(
    make: Callable[[], nn.Module], device: str, dtype: torch.dtype, *, steps: int = 3
) -> list[float]:
    """The losses of a few steps with autocast, scaler and clipping: to be compared exactly."""
    torch.manual_seed(0)
    model = make().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = ScalerShim(device, init_scale=2.0**8, enabled=dtype is torch.float16)
    x, y = torch.randn(8, 16).to(device), torch.randint(0, 4, (8,)).to(device)
    seen = []
    for _ in range(steps):
        with maybe_autocast(device, dtype, enabled=dtype is not torch.float32):
            out = model(x)
        # Outside: the CPU's autocast has cross_entropy on its list, and the others have not.
        loss = F.cross_entropy(out.float(), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


@each_kind
@pytest.mark.parametrize("model", MODELS)
def test_in_float32_each_kind_trains_as_the_cpu_to_the_last_digit(kind: str, model: str) -> None:
    expected = losses(MODELS[model], "cpu", torch.float32)
    assert expected[0] > expected[-1]
    with play(LIVE[kind], live=True):
        seen = losses(MODELS[model], kind, torch.float32)
    # The CPU may choose another kernel for attention where it sees the whole layer.
    assert seen == (pytest.approx(expected, rel=1e-6) if model == "attention" else expected)


@each_kind
def test_in_float16_an_mlp_trains_as_under_the_cpus_autocast_to_the_last_digit(kind: str) -> None:
    expected = losses(mlp, "cpu", torch.float16)
    assert expected != losses(mlp, "cpu", torch.float32)
    with play(LIVE[kind], live=True):
        assert losses(mlp, kind, torch.float16) == expected


@each_kind
@pytest.mark.parametrize("model", MODELS)
def test_in_float16_everything_trains(kind: str, model: str) -> None:
    with play(LIVE[kind], live=True):
        seen = losses(MODELS[model], kind, torch.float16)
    assert seen[0] > seen[-1]


@each_kind
def test_the_rules_are_the_backends_own(kind: str) -> None:
    def dtypes(device: str) -> list[torch.dtype]:
        x = torch.ones(4, 4, device=device)
        with torch.autocast(device, torch.bfloat16):
            hidden = F.linear(x, x)
            return [o.dtype for o in (hidden, F.layer_norm(hidden, (4,)), hidden.softmax(1))]

    assert dtypes("cpu") == [torch.bfloat16] * 3
    with play(LIVE[kind], live=True):
        assert dtypes(kind) == [torch.bfloat16, torch.float32, torch.float32]


@each_kind
def test_moving_a_model_keeps_its_parameters_identity(kind: str) -> None:
    model = mlp()
    before = list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with play(LIVE[kind], live=True):
        model.to(kind)
        assert all(old is new for old, new in zip(before, model.parameters(), strict=True))
        assert all(isinstance(p, nn.Parameter) and p.device.type == kind for p in before)
        weight = before[0].detach().cpu()
        model(torch.ones(2, 16, device=kind)).sum().backward()
        optimizer.step()
        assert not torch.equal(before[0].detach().cpu(), weight)
        model.to("cpu")
    assert type(before[0]) is nn.Parameter


@each_kind
def test_models_are_copied_saved_and_loaded(kind: str, tmp_path: Any) -> None:
    with play(LIVE[kind], live=True):
        ctx = DeviceContext(precision="fp32")
        model = ctx.to(mlp())
        twin = copy.deepcopy(model)
        twin[0].weight.data.zero_()
        assert model[0].weight.abs().sum().item() > 0
        save_checkpoint(tmp_path / "x.pt", {"model": model.state_dict()})
        twin.load_state_dict(load_checkpoint(tmp_path / "x.pt")["model"])
        assert torch.equal(twin[0].weight.cpu(), model[0].weight.cpu())
        assert next(model.half().parameters()).dtype is torch.float16
    there = load_checkpoint(tmp_path / "x.pt")["model"]["0.weight"]
    assert there.device.type == "cpu"


@each_kind
def test_tensors_of_two_devices_do_not_meet(kind: str) -> None:
    with play(LIVE[kind], live=True, count=1 if kind == "mps" else 2):
        x = torch.ones(2, 2, device=kind)
        second = [torch.ones(2, 2, device=f"{kind}:1")] if kind != "mps" else []
        for other in (torch.ones(2, 2), *second):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                x @ other
        assert (x * torch.tensor(2.0)).sum().item() == 8
        assert x[torch.tensor([0])].shape == (1, 2)
        with pytest.raises(TypeError, match=r"Use Tensor\.cpu"):
            x.numpy()


@each_kind
def test_gradients_by_every_road(kind: str) -> None:
    with play(LIVE[kind], live=True):
        w = torch.ones(3, device=kind, requires_grad=True)
        (by_grad,) = torch.autograd.grad((w * 2).sum(), w)
        assert (by_grad.tolist(), by_grad.device.type) == ([2, 2, 2], kind)
        torch.autograd.backward([(w * 3).sum()])
        assert w.grad is not None
        assert w.grad is w.grad
        w.grad += 1
        assert w.grad.tolist() == [4, 4, 4]
        w.grad = None
        handle = w.register_hook(lambda grad: grad * 10)
        (w * 2).sum().backward()
        assert w.grad.tolist() == [20, 20, 20]
        handle.remove()
        w.grad = None
        w.register_post_accumulate_grad_hook(lambda tensor: tensor.grad.mul_(5))
        (w * 2).sum().backward()
        assert w.grad.tolist() == [10, 10, 10]


def test_a_second_gradient_is_another_tensor() -> None:
    with play("t4", live=True):
        w = torch.ones(2, device="cuda", requires_grad=True)
        assert w.grad is None
        (w * 2).sum().backward()
        first = w.grad
        w.grad = None
        assert w.grad is None
        (w * 3).sum().backward()
        assert w.grad is w.grad is not first
        assert (first.tolist(), w.grad.tolist()) == ([2, 2], [3, 3])
        w.grad = first
        assert w.grad.tolist() == [2, 2]


BACKWARD: dict[str, dict[str, Any]] = {
    "plain": {},
    "a gradient": {"gradient": [1.0, 2.0]},
    "the graph is kept": {"retain_graph": True},
    "a graph is made": {"create_graph": True},
    "some inputs": {"inputs": "first"},
}


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("asked", BACKWARD)
def test_backward_takes_what_torchs_takes(asked: str) -> None:
    def seen(device: str) -> list[Any]:
        first, second = (torch.ones(2, device=device, requires_grad=True) for _ in range(2))
        out = first * second * first
        given = dict(BACKWARD[asked])
        if "gradient" in given:
            given["gradient"] = torch.tensor(given["gradient"], device=device)
        else:
            out = out.sum()
        if "inputs" in given:
            given["inputs"] = [first]
        out.backward(**given)
        facts: list[Any] = [
            w.grad if w.grad is None else (w.grad.tolist(), w.grad.requires_grad)
            for w in (first, second)
        ]
        for w in (first, second):
            w.grad = None
        try:
            out.backward(given.get("gradient"))
        except RuntimeError as error:
            facts.append(str(error).partition(".")[0])
        return facts

    expected = seen("cpu")
    with play("t4", live=True):
        assert seen("cuda") == expected


def test_gradients_of_what_is_between_are_kept_on_request() -> None:
    with play("t4", live=True):
        w = torch.ones(2, device="cuda", requires_grad=True)
        kept, other = w * 2, w * 3
        assert (w.is_leaf, kept.is_leaf, w.grad_fn) == (True, False, None)
        assert type(kept.grad_fn).__name__ == "MulBackward0"
        kept.retain_grad()
        (kept * other).sum().backward()
        assert kept.grad.tolist() == [3, 3]
        assert w.grad.tolist() == [12, 12]
        assert torch.ones(2, device="cuda").requires_grad_().requires_grad
        assert not w.requires_grad_(False).requires_grad
        assert not w.requires_grad


def test_the_data_of_a_weight_can_be_exchanged() -> None:
    with play("t4", live=True):
        layer = nn.Linear(2, 2).to("cuda")
        weight = layer.weight
        weight.data = torch.zeros(3, 2, device="cuda", dtype=torch.float16)
        assert layer.weight is weight
        assert isinstance(weight, nn.Parameter)
        assert (weight.tolist(), weight.dtype) == ([[0, 0]] * 3, torch.float16)
        assert weight.requires_grad
        weight.data.fill_(1)
        assert weight.tolist() == [[1, 1]] * 3


def test_what_is_not_played_says_so() -> None:
    with play("t4", live=True):
        for change in (lambda x: x.unsqueeze_(0), lambda x: x.t_(), lambda x: x.resize_(2)):
            with pytest.raises(NotImplementedError, match="changes the shape of a tensor in place"):
                change(torch.ones(2, 2, device="cuda"))


def test_pooling_to_one_pixel_in_channels_last() -> None:
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    with play("h100", live=True):
        there = x.to("cuda").requires_grad_()
        pooled = nn.functional.adaptive_avg_pool2d(there, 1)
        pooled.sum().backward()
        assert torch.equal(pooled.cpu(), x.mean((-1, -2), keepdim=True))
        assert there.grad is not None
        assert torch.equal(there.grad.cpu(), torch.full_like(x, 1 / 16))


# What may be of another device, and what may not: 2 x 2 there, and its like and an index on the
# CPU and on a second device.
Mix = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]
ALLOWED: dict[str, Mix] = {
    "copied from": lambda x, other, at: x.copy_(other),
    "copied to": lambda x, other, at: other.copy_(x),
}
ALLOWED_OF_THE_CPU: dict[str, Mix] = {
    "an index": lambda x, other, at: x[at],
    "an index of what is set": lambda x, other, at: x.index_put_((at,), x[0].clone()),
    "an index of what is replaced": lambda x, other, at: x.index_put((at,), x[0].clone()),
    "an assignment": lambda x, other, at: x.__setitem__(at, 1.0),
    "a number": lambda x, other, at: x + other[0, 0],
    "a number before it": lambda x, other, at: torch.where(x > 0, other[0, 0], x),
    "lengths": lambda x, other, at: pack_padded_sequence(x.view(1, 2, 2), at + 1, True).data,
}
REFUSED: dict[str, Mix] = {
    "the second of two": lambda x, other, at: x + other,
    "the first of two": lambda x, other, at: other + x,
    "one of many": lambda x, other, at: torch.cat([x, x, other]),
    "behind a number": lambda x, other, at: x.index_select(0, at),
    "a target": lambda x, other, at: torch.add(x, x, out=other),
    "what goes into a target": lambda x, other, at: torch.add(other, other, out=x),
    "what is indexed": lambda x, other, at: other[x[0].long()],
    "what is set by an index": lambda x, other, at: x.index_put_((x[0].long(),), other[0]),
}


@pytest.mark.parametrize("mix", [*ALLOWED, *ALLOWED_OF_THE_CPU, *REFUSED])
def test_what_may_mix_is_what_torch_lets_mix(mix: str) -> None:
    run = (ALLOWED | ALLOWED_OF_THE_CPU | REFUSED)[mix]
    with play("a100", live=True, count=2):

        def given(device: str) -> tuple[torch.Tensor, ...]:
            x, like, at = torch.ones(2, 2), torch.zeros(2, 2), torch.tensor([1])
            return x.to("cuda:0"), like.to(device), at.to(device)

        # On one device all of it works, and its twin on the CPU gives the same.
        if mix != "lengths":
            x, other, at = (tensor.cpu() for tensor in given("cpu"))
            expected, got = run(x, other, at), run(*given("cuda:0"))
            assert expected is None or torch.equal(got.cpu(), expected)
        for device in ("cpu", "cuda:1"):
            if mix in ALLOWED or (mix in ALLOWED_OF_THE_CPU and device == "cpu"):
                x, other, at = given(device)
                got = run(x, other, at)
                if mix != "copied to":
                    assert got is None or got.device == x.device
            else:
                words = f"same device, .*, cuda:0 and {device}!|should be a 1D CPU int64 tensor"
                # The first that is on a device is named first.
                first = mix in ("the first of two", "what goes into a target", "what is indexed")
                if first and device != "cpu":
                    words = f"same device, .*, {device} and cuda:0!"
                with pytest.raises(RuntimeError, match=words):
                    run(*given(device))


def test_a_target_there_is_filled() -> None:
    with play("t4", live=True):
        x = torch.ones(2, 2, device="cuda")
        for target in (torch.zeros_like(x), torch.zeros_like(x)):
            assert torch.full((2, 2), 3.0, out=target) is target
            assert torch.add(x, target, out=target) is target
            assert target.tolist() == [[4, 4], [4, 4]]


def test_like_a_tensor_there_on_any_device() -> None:
    with play("a100", live=True, count=2):
        x = torch.ones(2, 2, device="cuda:0")
        for device in ("cpu", "meta", "cuda:0", "cuda:1"):
            for make in (
                lambda **to: torch.zeros_like(x, **to), lambda **to: x.new_ones(2, 2, **to),
                lambda **to: x.new_tensor([1.0], **to), lambda **to: torch.as_tensor(x, **to),
            ):  # fmt: skip
                made = make(device=device)
                assert str(made.device) == device
                assert hasattr(made, "place") is device.startswith("cuda")
        assert torch.zeros_like(x, device="cpu", pin_memory=True).tolist() == [[0, 0], [0, 0]]
        w = torch.ones(2, device="cuda:0", requires_grad=True)
        torch.as_tensor(w, dtype=torch.float16, device="cuda:1").sum().backward()
        assert w.grad.tolist() == [1, 1]


@pytest.mark.parametrize("options", ["is_causal", "attn_mask", "scale"])
def test_attention_takes_its_options_there(options: str) -> None:
    q = torch.arange(8.0).reshape(1, 1, 4, 2) / 8
    mask = torch.eye(4, dtype=torch.bool)
    given: dict[str, Any] = {"is_causal": True, "attn_mask": mask, "scale": 2.0}
    expected = F.scaled_dot_product_attention(q, q, q, **{options: given[options]})
    with play("t4", live=True):
        there, given["attn_mask"] = q.to("cuda"), mask.to("cuda")
        got = F.scaled_dot_product_attention(there, there, there, **{options: given[options]})
        assert got.device == there.device
    assert got.tolist() == expected.tolist()


def test_sequences_are_packed_and_unpacked() -> None:
    x = torch.arange(12.0).reshape(2, 3, 2)
    with play("t4", live=True):
        packed = pack_padded_sequence(x.to("cuda"), torch.tensor([3, 1]), batch_first=True)
        assert (packed.data.device.type, packed.batch_sizes.device.type) == ("cuda", "cpu")
        padded, lengths = pad_packed_sequence(packed, batch_first=True)
        assert (padded.device.type, lengths.tolist()) == ("cuda", [3, 1])
        out, _ = nn.LSTM(2, 3, batch_first=True).to("cuda")(packed)
        assert out.data.shape == (4, 3)
        with pytest.raises(RuntimeError, match="should be a 1D CPU int64 tensor"):
            pack_padded_sequence(x.to("cuda"), lengths.to("cuda"), batch_first=True)
    expected, _ = pad_packed_sequence(
        pack_padded_sequence(x, torch.tensor([3, 1]), batch_first=True), batch_first=True
    )
    assert padded.tolist() == expected.tolist()


def test_copies_share_what_the_model_shares_and_are_parameters_where_it_has_them() -> None:
    with play("t4", live=True):
        model = mlp().to("cuda")
        model.register_buffer("table", torch.ones(2, device="cuda"))
        model.tied = model[0].weight
        model(torch.ones(1, 16, device="cuda")).sum().backward()
        twin = copy.deepcopy(model)
        assert twin.tied is twin[0].weight is not model[0].weight
        assert dict(twin.named_parameters()).keys() == dict(model.named_parameters()).keys()
        for old, new in zip(model.parameters(), twin.parameters(), strict=True):
            assert isinstance(new, nn.Parameter)
            assert new.requires_grad
            assert torch.equal(new.cpu(), old.cpu())
            assert torch.equal(new.grad.cpu(), old.grad.cpu())
            new.grad.zero_()
        assert any(p.grad.cpu().any() for p in model.parameters())
        assert not isinstance(twin.table, nn.Parameter)
        assert copy.deepcopy(torch.ones(1, device="cuda", requires_grad=True)).grad is None


def test_numbers_leave_the_device_on_request_only() -> None:
    with play("t4", live=True):
        w = torch.ones(2, device="cuda", requires_grad=True)
        for take in (w.numpy, w.detach().numpy, lambda: np.asarray(w.detach())):
            with pytest.raises(TypeError, match=r"can't convert cuda:0 .* Use Tensor\.cpu"):
                take()
        assert w.numpy(force=True).tolist() == w.tolist() == [1, 1]


def test_an_outline_has_no_memory_and_says_what_it_is() -> None:
    with play("t4", live=True) as played:
        x = torch.ones(2, 3, dtype=torch.float16, device="cuda").t()
        assert (x.shape, x.stride(), x.dtype) == ((3, 2), (1, 3), torch.float16)
        assert x.untyped_storage().device.type == "meta"
        assert torch.ops.prim.device(x) == x.device == torch.device("cuda:0")
        assert repr(x).endswith("on cuda:0")
        x.record_stream(torch.cuda.current_stream())
        assert played.asked("record_stream")


# --- memory ------------------------------------------------------------------------------------

WORDS = {
    "t4": (r"^CUDA out of memory\. Tried to allocate", True),
    "mi250": (r"^HIP out of memory\. Tried to allocate", True),
    "arc-a770": (r"^XPU out of memory\. Tried to allocate", True),
    "m2-macos15": (r"^MPS backend out of memory \(MPS allocated", False),
}


@pytest.mark.parametrize("key", WORDS)
def test_memory_runs_out_in_the_backends_own_words(key: str) -> None:
    words, own_type = WORDS[key]
    with play(key, live=True, memory=10_000) as played:
        ctx = DeviceContext(precision="fp32")
        kept = torch.ones(2000, device=ctx.device)
        with pytest.raises(RuntimeError, match=words) as caught:
            kept * 2
        assert is_oom_error(caught.value)
        assert isinstance(caught.value, torch.OutOfMemoryError) is own_type
        # Older torch has no statistics of XPU.
        assert memory_stats().allocated in (8000, None if ctx.device.type == "xpu" else 8000)
        played.memory.limit = 20_000
        assert (kept * 2).sum().item() == 4000


def test_the_books_are_kept_to_the_byte() -> None:
    with play("t4", live=True) as played:
        x = torch.zeros(100, device="cuda")
        view = x[10:].reshape(9, 10).t()
        assert played.memory.allocated == 400
        y = x + 1
        assert torch.cuda.memory_allocated() == 800
        del y
        assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == (400, 800)
        assert torch.cuda.max_memory_allocated() == 800
        del x
        assert torch.cuda.memory_allocated() == 400
        del view
        assert clear_cache() == 800
        assert torch.cuda.memory_reserved() == 0


def test_what_autograd_saves_is_held_until_backward() -> None:
    with play("t4", live=True) as played:
        x = torch.ones(1000, device="cuda", requires_grad=True)
        y = x.exp().exp().sum()
        assert played.memory.allocated >= 12_000
        y.backward()
        del y
        gc.collect()
        assert played.memory.allocated == 8000  # the tensor and its gradient


def test_backward_allocates_too() -> None:
    with play("t4", live=True) as played:
        x = torch.ones(1000, device="cuda", requires_grad=True)
        y = (x * x).sum()
        played.memory.limit = played.memory.allocated + 100
        with pytest.raises(RuntimeError, match="CUDA out of memory"):
            y.backward()


@each_kind
@pytest.mark.parametrize("fails_at", [0, 3, 9, 12])
def test_splitting_gives_the_unsplit_gradients(kind: str, fails_at: int) -> None:
    def gradients(trouble: bool) -> tuple[list[float], int]:
        torch.manual_seed(0)
        memory._fitted.clear()
        with play(LIVE[kind], live=True) as played:
            ctx = DeviceContext(precision="fp32")
            model = ctx.to(mlp())
            batch = ctx.to((torch.randn(8, 16), torch.randint(0, 4, (8,))))

            def step(part: Any, weight: float) -> None:
                x, y = part
                (F.cross_entropy(model(x), y) * weight).backward()

            if trouble:
                played.memory.fail_after(fails_at)
            parts = split_on_oom(step, batch, parameters=model.parameters())
            flat = [p.grad.flatten().tolist() for p in model.parameters()]
            return list(itertools.chain(*flat)), len(parts)

    whole, one = gradients(trouble=False)
    split, several = gradients(trouble=True)
    assert (one, several) == (1, 2)
    assert split == pytest.approx(whole, abs=1e-6)


# --- what machines do badly ----------------------------------------------------------------------


@each_kind
def test_without_float64_torchs_scaler_fails_and_ours_works(kind: str) -> None:
    with play(LIVE[kind], live=True, float64=False):
        for make, works in ((torch.amp.GradScaler, False), (ScalerShim, True)):
            w = torch.ones(2, device=kind, requires_grad=True)
            optimizer = torch.optim.SGD([w], lr=0.5)
            scaler = make(kind, init_scale=4.0, enabled=True)
            scaler.scale(w.sum()).backward()
            # From 2.8 on torch spares MPS, which never had float64.
            if works or (kind == "mps" and torch_version() >= (2, 8)):
                scaler.step(optimizer)
                assert w.tolist() == [0.5, 0.5]
            else:
                with pytest.raises((RuntimeError, TypeError), match=r"fp64|float64"):
                    scaler.step(optimizer)


def test_a_copy_to_mps_that_does_not_block_corrupts_data() -> None:
    with play("m2-macos15", live=True):
        source = torch.ones(3)
        reused = source.to("mps", non_blocking=True)
        source.fill_(7)  # the next batch
        assert reused.tolist() == [7, 7, 7]
        freed = torch.ones(3).to("mps", non_blocking=True)
        assert freed.isnan().all().item()
        waited = source.to("mps", non_blocking=True)
        torch.mps.synchronize()
        source.fill_(9)
        assert waited.tolist() == [7, 7, 7]
        kept = DeviceContext().to(source)
        source.fill_(1)
        assert kept.tolist() == [9, 9, 9]


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "all": lambda x: x,
    "the middle": lambda x: x[1:2],
    "turned": lambda x: x.t(),
    "every second": lambda x: x[:, ::2],
    "a number": lambda x: x[1, 1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("view", VIEWS)
def test_a_late_copy_reads_what_it_was_asked_for(view: str, dtype: torch.dtype) -> None:
    source = torch.arange(12).reshape(3, 4).to(dtype)
    with play("m2-macos15", live=True):
        late = VIEWS[view](source).to("mps", non_blocking=True)
        source.add_(1) if dtype is not torch.bool else source.logical_not_()
        assert late.tolist() == VIEWS[view](source).tolist()
        assert late.dtype is dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_what_was_freed_before_it_was_read_is_lost(dtype: torch.dtype) -> None:
    with play("m2-macos15", live=True):
        lost = torch.ones(2, dtype=dtype).to("mps", non_blocking=True)
        kept = torch.ones(2, dtype=dtype).to("mps")
        torch.ones(2, dtype=dtype).to("mps", non_blocking=True)  # nobody waits for it
        torch.mps.synchronize()
        assert kept.tolist() == [1, 1]
        assert lost.isnan().all() if dtype.is_floating_point else lost.tolist() == [0, 0]


def test_what_changes_dtype_or_has_a_gradient_is_copied_at_once() -> None:
    with play("m2-macos15", live=True):
        source = torch.ones(2)
        other = source.to("mps", torch.float16, non_blocking=True)
        weight = torch.ones(2, requires_grad=True)
        moved = weight.to("mps", non_blocking=True)
        with torch.no_grad():
            for tensor in (source, weight):
                tensor.zero_()
        assert other.tolist() == moved.tolist() == [1, 1]


@pytest.mark.parametrize(("key", "kind"), [("m2-macos15", "mps"), ("t4", "cuda")])
@pytest.mark.parametrize("late", [None, False, True])
def test_whether_copies_are_late_is_the_machines_or_what_is_said(
    key: str, kind: str, late: bool | None
) -> None:
    with play(key, live=True, **({} if late is None else {"late_copies": late})):
        source = torch.zeros(1)
        copied = source.to(kind, non_blocking=True)
        source.fill_(1)
        assert copied.item() == (kind == "mps" if late is None else late)


def test_a_pinned_source_on_cuda_is_read_late_but_kept() -> None:
    with play("t4", live=True):
        pinned = torch.ones(3).pin_memory()
        early = pinned.to("cuda", non_blocking=True)
        del pinned
        assert early.tolist() == [1, 1, 1]
        pinned = torch.ones(3).pin_memory()
        late = pinned.to("cuda", non_blocking=True)
        pinned.fill_(5)
        assert late.tolist() == [5, 5, 5]
        pageable = torch.ones(3)
        copied = pageable.to("cuda", non_blocking=True)
        pageable.fill_(5)
        assert copied.tolist() == [1, 1, 1]
    with play("t4", live=True, late_copies=True):
        late = torch.ones(3).to("cuda", non_blocking=True)
        assert late.isnan().all().item()


# What hardware computes in 16 bits.
PRODUCTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mm": lambda x: x @ x,
    "addmm": lambda x: torch.addmm(x, x, x),
    "linear": lambda x: F.linear(x, x, x[0]),
    "bmm": lambda x: x[None].bmm(x[None]),
    "baddbmm": lambda x: torch.baddbmm(x[None], x[None], x[None]),
    "mv": lambda x: x.mv(x[0]),
    "addmv": lambda x: torch.addmv(x[0], x, x[0]),
    "convolution": lambda x: F.conv2d(x[None, None], x[None, None]),
}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were slept, and are not."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_is_slow_or_wrong_where_its_dtype_is(product: str, waits: list[float]) -> None:
    with play("a100", live=True, slow=(torch.float16,), wrong=(torch.bfloat16,)):
        assert PRODUCTS[product](torch.ones(2, 2).cuda()).cpu().isfinite().all()
        assert waits == []
        assert PRODUCTS[product](torch.ones(2, 2).bfloat16().cuda()).cpu().isnan().all()
        assert waits == []
        assert PRODUCTS[product](torch.ones(2, 2).half().cuda()).cpu().isfinite().all()
        assert waits == [1e-3]


def test_only_products_are_slow_or_wrong(waits: list[float]) -> None:
    both = (torch.float16, torch.bfloat16)
    with play("a100", live=True, slow=both, wrong=both):
        for dtype in both:
            x = torch.ones(2, 2).to("cuda", dtype)
            assert ((x + x).exp() * x).cpu().isfinite().all()
    assert waits == []


@pytest.mark.parametrize("key", ["t4", "gtx1660", "a100"])
def test_what_is_slow_or_wrong_is_what_the_machine_is_known_for(
    key: str, waits: list[float]
) -> None:
    with play(key, live=True) as played:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            waits.clear()
            x = torch.ones(2, 2).to("cuda", dtype)
            assert (x @ x).cpu().isnan().all().item() is (dtype in played.machine.wrong)
            assert bool(waits) is (dtype in played.machine.slow)


def test_a_wrong_dtype_is_wrong_in_a_region() -> None:
    with (
        play("a100", live=True, wrong=(torch.bfloat16,)),
        maybe_autocast("cuda", torch.bfloat16),
    ):
        assert nn.Linear(2, 2).to("cuda")(torch.ones(1, 2, device="cuda")).isnan().all().item()


def test_a_live_device_that_cannot_be_played_is_refused() -> None:
    from portable_amp import DeviceError

    with pytest.raises(DeviceError, match="live=True plays cuda, mps, xpu, not hpu"):
        play("gaudi2", live=True).__enter__()
    assert DeviceContext().device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
@each_kind
def test_gradients_flow_through_softmax_in_16_bits(
    kind: str, function: Callable[..., torch.Tensor], dtype: torch.dtype
) -> None:
    values = torch.linspace(-1, 1, 6).reshape(2, 3)
    plain = values.clone().requires_grad_()
    function(plain, -1)[:, 0].sum().backward()
    with play(LIVE[kind], live=True):
        ctx = DeviceContext(precision="fp32")
        there = ctx.to(values.to(dtype)).requires_grad_()
        with torch.autocast(ctx.device.type, dtype):
            function(there, -1)[:, 0].sum().backward()
        assert there.grad is not None
        assert plain.grad is not None
        torch.testing.assert_close(there.grad.cpu().float(), plain.grad, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
@each_kind
def test_softmax_of_16_bits_in_32_is_one_kernel_there(
    kind: str, function: Callable[..., torch.Tensor], dim: int
) -> None:
    values = torch.arange(6.0).reshape(2, 3)
    with play(LIVE[kind], live=True):
        got = function(values.to(kind).half(), dim, dtype=torch.float32)
        assert got.dtype is torch.float32
    torch.testing.assert_close(got.cpu(), function(values, dim))
