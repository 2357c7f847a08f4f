"""What a device is tried with: operations and layers, a row each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from portable_amp.numerics.operation import (
    WORDS,
    Called,
    Function,
    Operation,
    Shape,
    classes,
    distinct,
    mask,
    normal,
    places,
    positive,
    unit,
    words,
)


def _of(function: Callable[..., Any]) -> Callable[[Shape], nn.Module]:
    return lambda shape: Function(function)


def _conv2d(out: int, kernel: Any, **options: Any) -> Callable[[Shape], nn.Module]:
    return lambda shape: nn.Conv2d(shape[1], out, kernel, **options)


def _recurrent(kind: Any, **options: Any) -> Callable[[Shape], nn.Module]:
    return lambda shape: kind(shape[-1], 12, batch_first=True, **options)


def _self_attention(shape: Shape) -> nn.Module:
    layer = nn.MultiheadAttention(shape[-1], 4, batch_first=True)
    return Called(layer, lambda layer, x: layer(x, x, x, need_weights=False)[0])


def _encoder(shape: Shape) -> nn.Module:
    return nn.TransformerEncoderLayer(shape[-1], 4, 24, 0.0, F.gelu, batch_first=True)


def _heads(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(*x.shape[:-1], 4, x.shape[-1] // 4).transpose(1, 2)


def _attend(causal: bool) -> Callable[[Shape], nn.Module]:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = _heads(q), _heads(k), _heads(v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)

    return _of(attend)


def _sampled(x: torch.Tensor) -> torch.Tensor:
    angle = torch.tensor([[0.8, -0.5, 0.07], [0.4, 0.9, -0.03]], dtype=x.dtype, device=x.device)
    grid = F.affine_grid(angle.expand(len(x), 2, 3), [*x.shape], align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _transformed(x: torch.Tensor) -> torch.Tensor:
    back: torch.Tensor = torch.fft.irfft(torch.fft.rfft(x) * 2, x.shape[-1])
    return back


def _spread(x: torch.Tensor) -> torch.Tensor:
    """Positive definite, and well conditioned."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return x.mT @ x / len(x) + eye


def _up(mode: str) -> Callable[[Shape], nn.Module]:
    return lambda shape: nn.Upsample(scale_factor=2.5, mode=mode)


_TWO, _THREE = (normal, normal), (normal, normal, normal)
_PICKED = (distinct,)
_FEW: dict[str, Shape] = {
    "small": (4, 4, 16, 16),
    "odd": (3, 5, 13, 11),
    "large": (8, 4, 36, 36),
    "one": (1, 1, 1, 1),
}

OPERATIONS: tuple[Operation, ...] = (
    Operation("linear", "rows", lambda s: nn.Linear(s[-1], 24)),
    Operation("conv2d 3x3", "images", _conv2d(8, 3, padding=1)),
    Operation("batch_norm 2d", "images", lambda s: nn.BatchNorm2d(s[1])),
    # Source: uxlfoundation/oneDNN#6035: the gradient of its weight is computed beyond the end of
    # a workspace, from 4 of these images on, and with fewer than 8 (AVX2) or 16 (AVX-512) channels.
    Operation("conv2d 1x1 stride 2", "images", _conv2d(16, 1, stride=2), sizes=_FEW),
    Operation("conv2d 1x1", "images", _conv2d(8, 1)),
    Operation("conv2d 3x3 stride 2", "images", _conv2d(8, 3, stride=2, padding=1)),
    Operation("conv2d 1x5 stride 1x2", "images", _conv2d(4, (1, 5), stride=(1, 2), padding=2)),
    Operation("conv2d dilated", "images", _conv2d(4, 3, dilation=2, padding=2)),
    Operation(
        "conv2d depthwise",
        "images",
        lambda s: nn.Conv2d(s[1], s[1], 3, padding=1, groups=s[1], bias=False),
    ),
    Operation("layer_norm", "rows", lambda s: nn.LayerNorm(s[-1])),
    Operation("group_norm", "images", lambda s: nn.GroupNorm(1 + (s[1] % 2 == 0), s[1])),
    Operation("attention", "series", _attend(False), _THREE),
    Operation("attention, causal", "series", _attend(True), _THREE),
    Operation("lstm", "series", _recurrent(nn.LSTM)),
    Operation("embedding", "tokens", lambda s: nn.Embedding(WORDS, 12), (words,)),
    Operation("cross_entropy", "rows", _of(F.cross_entropy), (normal, classes)),
    Operation("softmax", "rows", lambda s: nn.Softmax(-1)),
    Operation("max_pool2d", "images", lambda s: nn.MaxPool2d(2, ceil_mode=True), _PICKED, False),
    Operation("matmul", "rows", _of(lambda a, b: a @ b.mT), _TWO),
    Operation("sum", "rows", _of(lambda x: x.sum(0)), (positive,)),
    Operation("bilinear", "rows", lambda s: nn.Bilinear(s[-1], s[-1], 3), _TWO),
    Operation("conv1d", "signals", lambda s: nn.Conv1d(s[1], 6, 3, padding=1)),
    Operation("conv1d stride 3", "signals", lambda s: nn.Conv1d(s[1], 6, 5, stride=3, padding=2)),
    Operation("conv3d", "volumes", lambda s: nn.Conv3d(s[1], 4, 3, padding=1)),
    Operation("conv_transpose1d", "signals", lambda s: nn.ConvTranspose1d(s[1], 4, 3, stride=2)),
    Operation("conv_transpose2d", "images", lambda s: nn.ConvTranspose2d(s[1], 6, 3, stride=2)),
    Operation("conv_transpose3d", "volumes", lambda s: nn.ConvTranspose3d(s[1], 2, 2, stride=2)),
    Operation("batch_norm 1d", "rows", lambda s: nn.BatchNorm1d(s[1])),
    Operation("batch_norm 3d", "volumes", lambda s: nn.BatchNorm3d(s[1])),
    Operation("batch_norm 2d, evaluation", "images", lambda s: nn.BatchNorm2d(s[1]).eval()),
    Operation("instance_norm", "images", lambda s: nn.InstanceNorm2d(s[1], affine=True)),
    Operation("rms_norm", "rows", lambda s: nn.RMSNorm(s[-1])),
    Operation("local_response_norm", "images", lambda s: nn.LocalResponseNorm(3)),
    Operation("normalize", "rows", _of(F.normalize)),
    Operation("avg_pool2d", "images", lambda s: nn.AvgPool2d(2, ceil_mode=True)),
    Operation("avg_pool3d", "volumes", lambda s: nn.AvgPool3d(2, ceil_mode=True)),
    Operation("max_pool1d", "signals", lambda s: nn.MaxPool1d(3, 2, 1), _PICKED, False),
    Operation("max_pool2d 3x3 stride 2", "images", lambda s: nn.MaxPool2d(3, 2, 1), _PICKED, False),
    Operation("max_pool3d", "volumes", lambda s: nn.MaxPool3d(2, ceil_mode=True), _PICKED, False),
    Operation("adaptive_avg_pool2d", "images", lambda s: nn.AdaptiveAvgPool2d((3, 2))),
    Operation("adaptive_max_pool2d", "images", lambda s: nn.AdaptiveMaxPool2d(3), _PICKED, False),
    Operation("upsample nearest", "images", _up("nearest")),
    Operation("upsample bilinear", "images", _up("bilinear")),
    # Its few coefficients are rounded to 16 bits, so that all it computes is off to one side.
    Operation("upsample bicubic", "images", _up("bicubic"), narrow=False),
    Operation("grid_sample", "images", _of(_sampled), narrow=False),
    Operation("pixel_shuffle", "images", _of(lambda x: F.pixel_shuffle(torch.cat([x] * 4, 1), 2))),
    Operation("pad reflect", "images", _of(lambda x: F.pad(x, (2, 1, 1, 2), "reflect"))),
    Operation("pad replicate", "images", _of(lambda x: F.pad(x, (2, 1, 1, 2), "replicate"))),
    Operation("pad circular", "images", _of(lambda x: F.pad(x, (2, 1, 1, 2), "circular"))),
    Operation("unfold", "images", _of(lambda x: F.unfold(x, 3, padding=1))),
    Operation("gru", "series", _recurrent(nn.GRU)),
    Operation("rnn", "series", _recurrent(nn.RNN)),
    Operation("lstm, two ways", "series", _recurrent(nn.LSTM, bidirectional=True, num_layers=2)),
    Operation("multi-head attention", "series", _self_attention),
    Operation("transformer layer", "series", _encoder),
    # Its gradient is added up in 16 bits: on a CPU 700 terms in bf16 are 9 % off.
    Operation("embedding_bag", "tokens", lambda s: nn.EmbeddingBag(WORDS, 12), (words,), False),
    Operation("relu", "images", lambda s: nn.ReLU()),
    Operation("gelu", "rows", lambda s: nn.GELU()),
    Operation("gelu tanh", "rows", lambda s: nn.GELU("tanh")),
    Operation("silu", "images", lambda s: nn.SiLU()),
    Operation("mish", "rows", lambda s: nn.Mish()),
    Operation("elu", "rows", lambda s: nn.ELU()),
    Operation("prelu", "images", lambda s: nn.PReLU(s[1])),
    Operation("hardswish", "images", lambda s: nn.Hardswish()),
    Operation("softplus", "rows", lambda s: nn.Softplus()),
    Operation("sigmoid", "rows", lambda s: nn.Sigmoid()),
    Operation("tanh", "rows", lambda s: nn.Tanh()),
    Operation("glu", "rows", _of(lambda x: F.glu(torch.cat([x, x * 0.5], -1)))),
    Operation("log_softmax", "rows", lambda s: nn.LogSoftmax(-1)),
    Operation("softmax over channels", "images", lambda s: nn.Softmax(1)),
    Operation("logsumexp", "rows", _of(lambda x: x.logsumexp(-1))),
    Operation("nll_loss", "rows", _of(lambda x, y: F.nll_loss(x, y)), (positive, classes)),
    Operation(
        "binary_cross_entropy", "rows", _of(F.binary_cross_entropy_with_logits), (normal, unit)
    ),
    Operation("mse_loss", "rows", _of(F.mse_loss), _TWO),
    Operation("smooth_l1_loss", "rows", _of(F.smooth_l1_loss), _TWO),
    Operation("cosine_similarity", "rows", _of(F.cosine_similarity), (positive, unit)),
    Operation("bmm", "series", _of(lambda a, b: torch.bmm(a, b.mT)), _TWO),
    Operation("addmm", "rows", _of(lambda a, b: torch.addmm(a[:, :1], a, b.mT, beta=0.5)), _TWO),
    Operation("einsum", "series", _of(lambda a, b: torch.einsum("ntc,nsc->tsn", a, b)), _TWO),
    Operation("mean", "images", _of(lambda x: x.mean((0, 2, 3))), (positive,)),
    Operation("var", "rows", _of(lambda x: x.var(-1, correction=0))),
    Operation("norm", "rows", _of(lambda x: x.norm(dim=-1))),
    Operation("prod", "rows", _of(lambda x: (x**0.1).prod(0)), (positive,), False),
    Operation("amax", "rows", _of(lambda x: x.amax(-1)), _PICKED, False),
    Operation("argmax", "rows", _of(lambda x: x.argmax(-1)), _PICKED, False),
    Operation("cumsum", "rows", _of(lambda x: x.cumsum(0)), (positive,)),
    Operation("sort", "rows", _of(lambda x: tuple(x.sort(-1))), _PICKED, False),
    Operation("topk", "rows", _of(lambda x: tuple(x.topk(1 + x.shape[-1] // 3))), _PICKED, False),
    Operation("gather", "rows", _of(lambda x, at: x.gather(-1, at)), (normal, places)),
    Operation("index", "rows", _of(lambda x, at: x[at[:, 0] % max(len(x), 1)]), (normal, places)),
    Operation(
        "scatter_add",
        "rows",
        _of(lambda x, at: torch.zeros_like(x).scatter_add(-1, at, x)),
        (positive, places),
    ),
    Operation(
        "index_add",
        "rows",
        _of(lambda x, at: torch.zeros_like(x).index_add(0, at[:, 0] % max(len(x), 1), x)),
        (positive, places),
    ),
    Operation("where", "images", _of(lambda m, a, b: torch.where(m, a, b)), (mask, normal, normal)),
    Operation("masked_fill", "rows", _of(lambda x, m: x.masked_fill(m, 0.25)), (normal, mask)),
    Operation("cat", "images", _of(lambda a, b: torch.cat([a, b[:, :1], a], 1)), _TWO),
    Operation("stack", "rows", _of(lambda a, b: torch.stack([a, b], -1)), _TWO),
    Operation("roll and flip", "images", _of(lambda x: x.roll(1, 2).flip(-1))),
    Operation("permute and copy", "images", _of(lambda x: x.permute(0, 2, 3, 1).contiguous())),
    Operation("clamp", "rows", _of(lambda x: x.clamp(-0.7, 0.7))),
    Operation("add, broadcast", "images", _of(lambda a, b: a + b[:, :, :1, :1]), _TWO),
    Operation("div", "rows", _of(lambda a, b: a / b), (normal, positive)),
    Operation("exp", "rows", _of(torch.exp)),
    Operation("log", "rows", _of(torch.log), (lambda s, r: positive(s, r) + 1,)),
    Operation("rsqrt", "rows", _of(torch.rsqrt), (positive,)),
    Operation("pow", "rows", _of(lambda x: x**2.5), (positive,)),
    Operation("sin and erf", "rows", _of(lambda x: x.sin() + x.erf() + 3)),
    Operation("atan2", "rows", _of(torch.atan2), (positive, positive)),
    Operation("fft", "rows", _of(_transformed), narrow=False),
    Operation("cholesky", "rows", _of(lambda x: torch.linalg.cholesky(_spread(x))), narrow=False),
    Operation("solve", "rows", _of(lambda x: torch.linalg.solve(_spread(x), x.mT)), narrow=False),
)  # fmt: skip
"""The most telling first: where time is short, the last are not reached."""
