"""Models from timm train on live devices: real autocast, scaler, clipping and update."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional as F

from portable_amp import DeviceContext
from portable_amp.testing import play

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("resnet10t", "t4"),
        ("vit_tiny_patch16_224", "t4"),
        ("convnext_atto", "t4"),
        ("mobilenetv3_small_050", "t4"),
        ("resnet10t", "m2-macos15"),
        ("vit_tiny_patch16_224", "max1550"),
    ],
)
def test_two_steps(model: str, key: str) -> None:
    torch.manual_seed(0)
    size = {"img_size": 32} if model.startswith("vit") else {}
    with play(key, live=True) as played:
        ctx = DeviceContext(precision="fp16")
        net = ctx.to(timm.create_model(model, num_classes=3, **size))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        scaler = ctx.scaler(init_scale=256.0)
        images, labels = ctx.to((torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])))
        before = [p.detach().cpu() for p in net.parameters()]
        for _ in range(2):
            with ctx.autocast():
                logits = net(images)
            result = scaler.backward_step(F.cross_entropy(logits.float(), labels), optimizer)
            assert result.stepped
        assert logits.dtype is torch.float16
        changed = sum(
            not torch.equal(old, new.detach().cpu())
            for old, new in zip(before, net.parameters(), strict=True)
        )
        assert changed > 0.9 * len(before)
        assert played.memory.peak > sum(p.numel() * 4 for p in net.parameters())
