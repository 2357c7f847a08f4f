"""Models of many families, small enough to be verified in a second or two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Made = tuple[nn.Module, Any]
"""A model and a batch, both made from the seed that is set."""


def images(name: str, size: int = 64, count: int = 4, **options: Any) -> Made:
    """A model of timm, and images."""
    import timm

    model = timm.create_model(name, num_classes=10, **options)
    return model, torch.randn(count, 3, size, size)


class RMSNorm(nn.Module):
    """In float32, as language models have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return wide.type_as(x) * self.weight


class Attention(nn.Module):
    """Causal, with rotated positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotated(q), rotated(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        made: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return made


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Each pair of features turned by its position."""
    pairs = x.float().unflatten(-1, (-1, 2))
    rate = 100.0 ** -torch.linspace(0, 1, pairs.shape[-2], device=x.device)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * rate
    a, b = pairs.unbind(-1)
    turned = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
    return turned.flatten(-2).type_as(x)


class Block(nn.Module):
    """Attention, and a gated layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attention = Attention(width, 4)
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))  # type: ignore[no-any-return]


class Language(nn.Module):
    """A small GPT; the embedding is the last layer, too."""

    def __init__(self, width: int = 48, depth: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(50, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.norm = RMSNorm(width)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.words(words)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.words.weight)


class Recurrent(nn.Module):
    """Reads both ways, as one that labels sentences."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32, padding_idx=0)
        self.lstm = nn.LSTM(32, 24, 2, batch_first=True, bidirectional=True, dropout=0.1)
        self.gru = nn.GRU(48, 32, batch_first=True)
        self.out = nn.Linear(32, 10)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        y, _ = self.lstm(self.words(words))
        _, last = self.gru(y)
        made: torch.Tensor = self.out(last[-1])
        return made


class Residual(nn.Module):
    """Two convolutions that are told the time."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, given), nn.GroupNorm(4, made)
        self.conv1 = nn.Conv2d(given, made, 3, padding=1)
        self.conv2 = nn.Conv2d(made, made, 3, padding=1)
        self.time = nn.Linear(32, made)
        self.skip = nn.Conv2d(given, made, 1) if given != made else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))  # type: ignore[no-any-return]


class Diffusion(nn.Module):
    """A small U-Net: down, attention over the image, and up with what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.down, self.middle = Residual(16, 32), Residual(32, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.up = Residual(48, 16)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, *, step: torch.Tensor) -> torch.Tensor:
        rate = torch.exp(-torch.arange(16, device=x.device) / 3)
        angle = step[:, None] * rate
        time = torch.cat([angle.sin(), angle.cos()], -1)
        first = self.first(x)
        y = self.middle(self.down(F.avg_pool2d(first, 2), time), time)
        flat = y.flatten(2).transpose(1, 2)
        flat = flat + self.attention(flat, flat, flat, need_weights=False)[0]
        y = F.interpolate(flat.transpose(1, 2).reshape(y.shape), scale_factor=2.0)
        return self.last(self.up(torch.cat([y, first], 1), time))  # type: ignore[no-any-return]


def discriminator() -> nn.Module:
    """Of a GAN: its weights are divided by their largest singular value."""
    normed = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(
        normed(nn.Conv2d(3, 16, 4, 2, 1)), nn.LeakyReLU(0.2), normed(nn.Conv2d(16, 32, 4, 2, 1)),
        nn.LeakyReLU(0.2), nn.Flatten(), normed(nn.Linear(32 * 16, 1)),
    )  # fmt: skip


def words() -> torch.Tensor:
    """(4, 20), int64 in [0, 50); sentences end in padding, 0."""
    return torch.randint(1, 50, (4, 20)) * (
        torch.arange(20) < torch.tensor([[20], [17], [9], [13]])
    )


ZOO: dict[str, Callable[[], Made]] = {
    "resnet10t": lambda: images("resnet10t"),
    "vit_tiny_patch16_224": lambda: images("vit_tiny_patch16_224", img_size=64),
    "convnext_atto": lambda: images("convnext_atto"),
    "mobilenetv3_small_050": lambda: images("mobilenetv3_small_050"),
    "efficientnet_lite0": lambda: images("efficientnet_lite0"),
    "regnetx_002": lambda: images("regnetx_002"),
    "ghostnet_050": lambda: images("ghostnet_050"),
    "mobilevit_xxs": lambda: images("mobilevit_xxs"),
    "edgenext_xx_small": lambda: images("edgenext_xx_small"),
    "repvgg_a0": lambda: images("repvgg_a0", 32),
    "test_nfnet": lambda: images("test_nfnet"),
    "test_vit": lambda: images("test_vit", 160),
    "language model": lambda: (Language(), words()),
    "LSTM and GRU": lambda: (Recurrent(), words()),
    "diffusion": lambda: (
        Diffusion(), ({"x": torch.randn(4, 3, 16, 16), "step": torch.rand(4) * 100}, None),
    ),
    "encoder and decoder": lambda: (
        nn.Transformer(32, 4, 2, 2, 64, batch_first=True),
        ({"src": torch.randn(4, 9, 32), "tgt": torch.randn(4, 7, 32)}, None),
    ),
    "discriminator": lambda: (discriminator(), torch.randn(4, 3, 16, 16)),
}  # fmt: skip
