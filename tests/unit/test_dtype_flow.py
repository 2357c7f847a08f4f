from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from portable_amp import DeviceError, MachineError
from portable_amp.testing import LayerDtype, dtype_flow, play
from support import KINDS

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


class Pair(nn.Module):
    """Two inputs by name, attention inside."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.steps = torch.nn.Buffer(torch.zeros(1)) if hasattr(nn, "Buffer") else None
        self.norm = nn.LayerNorm(4)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = self.left(a), self.right(b)
        return self.norm(F.scaled_dot_product_attention(a, b, a))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [bf16, fp16])
def test_each_layer_is_told_in_order(kind: str, dtype: torch.dtype) -> None:
    flow = dtype_flow(Pair(), {"a": torch.ones(2, 3, 4), "b": torch.ones(2, 3, 4)}, kind, dtype)
    norm = dtype if kind == "cpu" else fp32
    assert flow == [
        LayerDtype("left", "Linear", (fp32,), (dtype,)),
        LayerDtype("right", "Linear", (fp32,), (dtype,)),
        LayerDtype("norm", "LayerNorm", (dtype,), (norm,)),
    ]


class Attend(nn.Module):
    """Attention as a layer: torch chooses its kernel by the device."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.options = options

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask, **self.options)


HAS_GQA = "enable_gqa" in (F.scaled_dot_product_attention.__doc__ or "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [bf16, fp16, fp32])
@pytest.mark.parametrize("mask", [None, fp32, torch.bool])
def test_attention_lowers_its_floating_inputs(
    kind: str, dtype: torch.dtype, mask: torch.dtype | None
) -> None:
    masks = {} if mask is None else {"mask": torch.ones(3, 3, dtype=mask)}
    takes = (fp32, fp32) if mask is not fp32 else (fp32, fp32, fp32)
    heads = torch.ones(1, 4, 3, 2)
    flow = dtype_flow(Attend(), {"q": heads, "k": heads, **masks}, kind, dtype)
    assert flow == [LayerDtype("", "Attend", takes, (dtype,))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(not HAS_GQA, reason="torch 2.4 has no enable_gqa")
def test_heads_of_attention_may_share_keys(kind: str) -> None:
    batch = [torch.ones(1, 4, 3, 2), torch.ones(1, 2, 3, 2)]
    (layer,) = dtype_flow(Attend(enable_gqa=True), batch, kind, bf16)
    assert layer.gives == (bf16,)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_model_is_made_of_is_kept(kind: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)).to(bf16)
    assert dtype_flow(model, torch.tensor([1, 2]), kind, fp32) == [
        LayerDtype("0", "Embedding", (), (bf16,)),  # takes indices
        LayerDtype("1", "Linear", (bf16,), (bf16,)),
    ]


def test_a_layer_is_a_value() -> None:
    flow = dtype_flow(nn.Sequential(nn.ReLU(), nn.ReLU()), torch.ones(1), "cpu")
    assert len({*flow, *flow}) == 2
    with pytest.raises(FrozenInstanceError):
        flow[0].name = "other"  # type: ignore[misc]


def test_a_cpu_flow_is_what_really_happens() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    seen = []
    for layer in model:
        layer.register_forward_hook(lambda layer, args, out: seen.append(out.dtype))
    batch = torch.ones(2, 1, 4, 4)
    with torch.autocast("cpu", bf16):
        model(batch)
    really = [(dtype,) for dtype in seen]
    assert [layer.gives for layer in dtype_flow(model, batch, "cpu", bf16)] == really


def test_nothing_of_the_model_is_changed() -> None:
    model = Pair().train()
    before = copy.deepcopy(model.state_dict())
    for kind in KINDS:
        dtype_flow(model, (torch.ones(1, 2, 4), torch.ones(1, 2, 4)), kind, fp16)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.left._forward_hooks
    assert model.left.weight.grad is None
    assert model.training
    assert not torch.cuda.is_initialized()
    assert model(torch.ones(1, 2, 4), torch.ones(1, 2, 4)).dtype is fp32


def test_the_hooks_are_gone_after_an_error() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(RuntimeError):
        dtype_flow(model, torch.ones(2, 3), "cuda", fp16)
    assert not model._forward_hooks


def test_without_autocast_everything_is_float32() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    flow = dtype_flow(model, torch.ones(2, 4), "cuda", fp32)
    assert [layer.gives for layer in flow] == [(fp32,), (fp32,)]


def test_the_default_is_torchs() -> None:
    assert dtype_flow(nn.Linear(4, 4), torch.ones(2, 4), "cuda")[0].gives == (fp16,)
    assert dtype_flow(nn.Linear(4, 4), torch.ones(2, 4), "cpu")[0].gives == (bf16,)


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(DeviceError, match="is not a device torch knows"):
        dtype_flow(nn.Linear(1, 1), torch.ones(1, 1), "cuad")
    with play("t4"), pytest.raises(MachineError, match="outside of play"):
        dtype_flow(nn.Linear(1, 1), torch.ones(1, 1), "cuda")
    with pytest.raises(DeviceError, match="knows the rules of cpu, cuda, mps, xpu, not of hpu"):
        dtype_flow(nn.Linear(1, 1), torch.ones(1, 1), "hpu")
