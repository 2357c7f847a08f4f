"""The generic row on a device that torch did not know, and the device itself."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from portable_amp import (
    DeviceContext,
    DeviceError,
    PrecisionFallbackWarning,
    ScalerShim,
    StateWarning,
    Support,
    UnsupportedPrecisionError,
    clear_cache,
    cli,
    is_oom_error,
    load_checkpoint,
    maybe_autocast,
    memory_stats,
    rng_state,
    save_checkpoint,
    seed_everything,
    set_rng_state,
    split_on_oom,
)
from portable_amp.backends import MemoryStats
from portable_amp.capabilities import probe
from portable_amp.doctor import training_step
from portable_amp.testing.accelerator import Accelerator, new_accelerator

NAME = "fakegpu"
MIB = 2**20


def vendor() -> Any:
    return torch.get_device_module(NAME)


# --- the vendor's module ----------------------------------------------------------------------


def test_the_module_tells_what_those_of_torch_tell() -> None:
    module = vendor()
    assert module.is_available()
    assert module.is_initialized()
    assert module._initialized  # torch.utils.checkpoint looks at it
    assert not module._is_in_bad_fork()
    assert (module.device_count(), module.current_device()) == (1, 0)
    for device in (0, NAME, "fakegpu:0", torch.device(NAME), torch.device(NAME, 0)):
        module.set_device(device)
        with module.device(device):
            assert module.current_device() == 0
        assert module.get_device_name(device).startswith(NAME)
        module.synchronize(device)
    for device in (1, "fakegpu:1", torch.device(NAME, 1)):
        with pytest.raises(RuntimeError, match="invalid device ordinal 1: there is fakegpu:0"):
            module.set_device(device)


@pytest.mark.parametrize("dtypes", [(), (torch.float16,), (torch.float16, torch.bfloat16)])
def test_the_module_tells_what_autocast_may_use(dtypes: tuple[torch.dtype, ...]) -> None:
    new_accelerator(amp_dtypes=dtypes)
    assert vendor().get_amp_supported_dtype() == [*dtypes]
    assert vendor().is_bf16_supported() is (torch.bfloat16 in dtypes)


def test_the_module_tells_of_its_memory(accelerator: Accelerator) -> None:
    module = vendor()
    module.empty_cache()
    before = module.memory_allocated()
    module.reset_peak_memory_stats()
    kept, freed = torch.ones(MIB, device=NAME), torch.ones(2 * MIB, device=NAME)
    del freed
    held = before + 4 * MIB
    for device in (None, 0, NAME, torch.device(NAME, 0)):
        assert module.memory_allocated(device) == held
        assert module.memory_reserved(device) == module.max_memory_allocated(device)
        assert module.memory_reserved(device) == held + 8 * MIB
        assert module.mem_get_info(device) == (2**40 - held - 8 * MIB, 2**40)
    for limit, free in ((20 * MIB, 8 * MIB), (12 * MIB, 0), (6 * MIB, 0)):
        accelerator.ledger.limit = before + limit
        assert module.mem_get_info() == (free, before + limit)
    accelerator.ledger.limit = None
    module.reset_peak_memory_stats(0)
    module.empty_cache()
    assert module.max_memory_allocated() == module.memory_reserved() == held == before + kept.nbytes


def test_the_module_draws_random_numbers_of_its_own() -> None:
    module = vendor()
    states = []
    for seed in (module.manual_seed, module.manual_seed_all, torch.manual_seed):
        seed(5)
        states.append(module.get_rng_state())
        assert torch.equal(module.get_rng_state(0), states[0])
        torch.rand(2, device=NAME)
        assert not torch.equal(module.get_rng_state(), states[0])
    module.set_rng_state(states[0], 0)
    assert torch.equal(module.get_rng_state(), states[0])
    assert torch.equal(states[0], torch.Generator().manual_seed(5).get_state())


# --- choosing it, and explaining it -----------------------------------------------------------


def test_it_is_taken_before_the_cpu() -> None:
    assert DeviceContext().device == torch.device(NAME, 0)
    assert DeviceContext("cpu").device == torch.device("cpu")


@pytest.mark.parametrize("needed", ["is_available", "device_count"])
def test_without_what_is_needed_it_counts_as_absent(needed: str) -> None:
    new_accelerator(without=[needed])
    assert DeviceContext().device == torch.device("cpu")
    with pytest.raises(DeviceError, match="there is none here"):
        DeviceContext(NAME)


def test_a_second_device_of_it_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"'fakegpu:1' is not available: 1 fakegpu device\."):
        DeviceContext("fakegpu:1")
    vendor().set_device("fakegpu:0")
    with pytest.raises(RuntimeError, match="invalid device ordinal 1"):
        vendor().set_device(1)


def test_explain_says_what_is_known() -> None:
    told = DeviceContext(NAME).explain()
    assert told.startswith("Device: fakegpu:0\nMixed precision: disabled\n")
    assert (
        "Precision: fp32, asked for 'auto': portable-amp knows fakegpu only by what its torch "
        "module says." in told
    )
    assert "torch.fakegpu says fp16 True, bf16 True" in told
    assert 'DeviceContext(precision="fp16" | "bf16").' in told
    assert "Cache: torch.fakegpu.empty_cache()." in told
    assert "Copies: synchronous: nobody has said that more is safe." in told


@pytest.mark.parametrize(
    ("request_", "dtype", "scaler"),
    [
        ("auto", torch.float32, False),
        ("fp32", torch.float32, False),
        ("fp16", torch.float16, True),
        ("bf16", torch.bfloat16, False),
    ],
)
def test_precision(request_: str, dtype: torch.dtype, scaler: bool) -> None:
    ctx = DeviceContext(NAME, precision=request_, unsupported="raise")
    assert (ctx.plan.dtype, ctx.plan.scaler) == (dtype, scaler)
    x = ctx.to(torch.ones(2, 2))
    with ctx.autocast():
        assert (x @ x).dtype is dtype
    assert ctx.scaler().is_enabled() is scaler


def test_automatic_precision_says_that_it_stays_in_fp32(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "portable_amp"):
        DeviceContext(NAME)
    assert "portable-amp knows fakegpu only by what its torch module says" in caplog.text


def test_a_dtype_that_the_module_does_not_name_is_absent() -> None:
    new_accelerator(amp_dtypes=[torch.float16])
    assert probe(NAME).bfloat16 is Support.ABSENT
    with pytest.warns(PrecisionFallbackWarning, match="bf16 does not work on this device"):
        assert DeviceContext(NAME, precision="bf16").plan.dtype is torch.float32
    with pytest.raises(UnsupportedPrecisionError, match="fp16 works here"):
        DeviceContext(NAME, precision="bf16", unsupported="raise")


# --- computing on it, against the CPU ---------------------------------------------------------


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 6), torch.arange(8) % 3


def train(
    device: str, autocast: Any, scaler: torch.amp.GradScaler, kind: type[torch.optim.Optimizer]
) -> list[Any]:
    """Losses, scales and the weights at the end, of a loop in torch's own words."""
    model = mlp().to(device)
    x, y = (tensor.to(device) for tensor in data())
    optimizer = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    seen: list[Any] = []
    for _ in range(4):
        with autocast:
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.append((loss.item(), scaler.get_scale()))
    return [*seen, *(weight.detach().cpu().numpy().tobytes() for weight in model.parameters())]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_training_in_fp32_is_the_cpus_bit_for_bit(kind: type[torch.optim.Optimizer]) -> None:
    ctx = DeviceContext(NAME, precision="fp32")
    expected = train("cpu", torch.autocast("cpu", enabled=False), ScalerShim("cpu"), kind)
    assert train(NAME, ctx.autocast(), ctx.scaler(), kind) == expected
    assert expected[0] != expected[1]  # it did learn


def cpu_in_fp16(scale: float) -> list[Any]:
    return train(
        "cpu",
        torch.autocast("cpu", torch.float16),
        torch.amp.GradScaler("cpu", init_scale=scale),
        torch.optim.AdamW,
    )


@pytest.mark.parametrize("scale", [2.0**10, 2.0**22])
def test_training_in_fp16_is_the_cpus_bit_for_bit(scale: float) -> None:
    ctx = DeviceContext(NAME, precision="fp16")
    expected = cpu_in_fp16(scale)
    assert train(NAME, ctx.autocast(), ctx.scaler(scale), torch.optim.AdamW) == expected
    torchs = torch.amp.GradScaler(NAME, init_scale=scale)
    assert train(NAME, torch.autocast(NAME), torchs, torch.optim.AdamW) == expected
    overflowed = expected[0][1] < scale
    assert overflowed is (scale > 2.0**16)  # one of the two shows a skipped step
    in_fp32 = train("cpu", torch.autocast("cpu", enabled=False), ScalerShim("cpu"), torch.optim.SGD)
    assert in_fp32[0] != expected[0]  # what was compared was half precision


@pytest.mark.parametrize("fused", [False, True])
def test_a_backward_step_tells_what_it_did(fused: bool) -> None:
    ctx = DeviceContext(NAME, precision="fp16")
    scaler = ctx.scaler(1024.0)
    model, (x, y) = ctx.to(mlp()), ctx.to(data())
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    before = [weight.detach().clone() for weight in model.parameters()]
    told = []
    for factor in (float("inf"), 1.0):
        with ctx.autocast():
            loss = F.cross_entropy(model(x), y) * factor
        result = scaler.backward_step(loss, optimizer, max_norm=1.0)
        told.append((result.stepped, result.scale))
        same = all(map(torch.equal, before, model.parameters()))
        assert same is not result.stepped
    assert told == [(False, 1024.0), (True, 512.0)]


def test_autocast_picks_the_dtype_by_operation() -> None:
    ctx = DeviceContext(NAME, precision="fp16")
    image, weight = ctx.to((torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)))
    row = ctx.to(torch.randn(2, 2, 5, 4))
    with ctx.autocast():
        half = F.conv2d(image, weight)
        lowered = [
            half,
            row @ row.mT,
            F.linear(row, row[0, 0]),
            F.relu(half),
            F.scaled_dot_product_attention(row, row, row),
        ]
        kept = [
            half.softmax(1),
            half.sum(),
            F.layer_norm(half, half.shape),
            F.mse_loss(half, half),
            F.smooth_l1_loss(half, half),
            half.exp(),
            row.double() @ row.double().mT,
        ]
        widest = torch.dot(half[0, 0, 0], half[0, 0, 1].float())
        with maybe_autocast(NAME, enabled=False):
            assert (row @ row.mT).dtype is torch.float32
    assert {tensor.dtype for tensor in lowered} == {torch.float16}
    assert widest.dtype is torch.float32
    assert [tensor.dtype for tensor in kept] == [*[torch.float32] * 6, torch.float64]
    assert (row @ row.mT).dtype is torch.float32


def full(*shape: int) -> torch.Tensor:
    return torch.rand(shape, device=NAME)


def half(*shape: int) -> torch.Tensor:
    return full(*shape).to(torch.float16)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=NAME)


def cell(name: str, gates: int) -> torch.Tensor:
    state = full(2, 4) if name == "gru_cell" else (full(2, 4), full(2, 4))
    made = getattr(torch, name)(full(2, 3), state, full(4 * gates, 3), full(4 * gates, 4))
    return made if name == "gru_cell" else made[0]


ATTENTION = (1, 1, 2, 2)
# As CUDA's autocast: docs.pytorch.org, torch.amp, "Autocast Op Reference"; full() to float16.
LOWERED = {
    "_convolution": lambda: torch._convolution(
        full(1, 2, 4), full(3, 2, 2), None, [1], [0], [1], False, [0], 1, *[False] * 4
    ),
    "addbmm": lambda: torch.addbmm(full(2, 2), full(3, 2, 2), full(3, 2, 2)),
    "addmm": lambda: torch.addmm(full(2, 2), full(2, 2), full(2, 2)),
    "addmv": lambda: torch.addmv(full(2), full(2, 2), full(2)),
    "baddbmm": lambda: torch.baddbmm(full(3, 2, 2), full(3, 2, 2), full(3, 2, 2)),
    "bmm": lambda: torch.bmm(full(3, 2, 2), full(3, 2, 2)),
    "conv1d": lambda: F.conv1d(full(1, 2, 4), full(3, 2, 2)),
    "conv2d": lambda: F.conv2d(full(1, 2, 4, 4), full(3, 2, 2, 2)),
    "conv3d": lambda: F.conv3d(full(1, 2, 4, 4, 4), full(3, 2, 2, 2, 2)),
    "conv_transpose1d": lambda: F.conv_transpose1d(full(1, 2, 4), full(2, 3, 2)),
    "conv_transpose2d": lambda: F.conv_transpose2d(full(1, 2, 4, 4), full(2, 3, 2, 2)),
    "conv_transpose3d": lambda: F.conv_transpose3d(full(1, 2, 4, 4, 4), full(2, 3, 2, 2, 2)),
    "convolution": lambda: torch.convolution(
        full(1, 2, 4), full(3, 2, 2), None, [1], [0], [1], False, [0], 1
    ),
    "einsum": lambda: torch.einsum("ij->i", full(2, 2)),
    "gru_cell": lambda: cell("gru_cell", 3),
    "linear": lambda: F.linear(full(2, 2), full(2, 2)),
    "lstm_cell": lambda: cell("lstm_cell", 4),
    "matmul": lambda: torch.matmul(full(2, 2), full(2, 2)),
    "mm": lambda: torch.mm(full(2, 2), full(2, 2)),
    "mv": lambda: torch.mv(full(2, 2), full(2)),
    "prelu": lambda: torch.prelu(full(2, 2), full(1)),
    "attention": lambda: F.scaled_dot_product_attention(*(full(*ATTENTION) for _ in "qkv")),
}
# half() to float32.
KEPT: dict[str, Any] = {
    **{
        name: lambda name=name: getattr(half(2, 3), name)()
        for name in ("exp", "expm1", "log", "log10", "log1p", "log2", "reciprocal", "rsqrt", "sum")
    },
    **{
        name: lambda name=name: getattr(half(2, 3), name)(1)
        for name in ("cumprod", "cumsum", "log_softmax", "logsumexp", "prod", "softmax")
    },
    **{
        name: lambda name=name: getattr(F, name)(half(2, 3), half(2, 3))
        for name in (
            "binary_cross_entropy_with_logits", "cosine_similarity", "huber_loss", "l1_loss",
            "mse_loss", "smooth_l1_loss",
        )
    },
    "cdist": lambda: torch.cdist(half(2, 3), half(2, 3)),
    "cosine_embedding_loss": lambda: F.cosine_embedding_loss(half(2, 3), half(2, 3), zeros(2) + 1),
    "cross_entropy": lambda: F.cross_entropy(half(2, 3), zeros(2)),
    "group_norm": lambda: F.group_norm(half(2, 4, 3), 2),
    "kl_div": lambda: F.kl_div(half(2, 3), half(2, 3), reduction="sum"),
    "layer_norm": lambda: F.layer_norm(half(2, 3), (3,)),
    "linalg.vector_norm": lambda: torch.linalg.vector_norm(half(3)),
    "nll_loss": lambda: F.nll_loss(half(2, 3), zeros(2)),
    "nll_loss of images": lambda: F.nll_loss(half(2, 3, 1, 1), zeros(2, 1, 1)),
    "norm": lambda: torch.ops.aten.norm(half(3), 2.0),
    "norm of rows": lambda: torch.ops.aten.norm(half(2, 3), 2, [1]),
    "power of a number": lambda: 2.0 ** half(3),
    "power": lambda: half(3) ** half(3),
    "prod of all": lambda: half(2, 3).prod(),
    "rms_norm": lambda: F.rms_norm(half(2, 3), (3,)),
    "softplus": lambda: F.softplus(half(3)),
    "square": lambda: half(3) ** 2,
    "sum of rows": lambda: half(2, 3).sum(1),
    "triplet_margin_loss": lambda: F.triplet_margin_loss(half(2, 3), half(2, 3), half(2, 3)),
}  # fmt: skip
# Both together to float32.
WIDENED = {
    "addcdiv": lambda: torch.addcdiv(half(2), full(2), half(2)),
    "addcmul": lambda: torch.addcmul(half(2), full(2), half(2)),
    "atan2": lambda: torch.atan2(half(2), full(2)),
    "bilinear": lambda: F.bilinear(half(1, 2), full(1, 2), half(3, 2, 2)),
    "cross": lambda: torch.cross(half(2, 3), full(2, 3), dim=1),
    "dot": lambda: torch.dot(half(2), full(2)),
    "grid_sample": lambda: F.grid_sample(half(*ATTENTION), full(1, 2, 2, 2), align_corners=False),
    "index_put": lambda: half(3).index_put((zeros(1),), full(1)),
    "scatter_add": lambda: half(3).scatter_add(0, zeros(1), full(1)),
    "tensordot": lambda: torch.tensordot(half(2, 2), full(2, 2), 1),
    "vdot": lambda: torch.vdot(half(2), full(2)),
}


@pytest.mark.parametrize("name", [*LOWERED, *KEPT, *WIDENED])
def test_autocast_has_cudas_rule_for_each_operation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = (LOWERED | KEPT | WIDENED)[name]
    vendor().manual_seed(0)
    with torch.autocast(NAME, torch.float16):
        got = operation()
    vendor().manual_seed(0)
    draw = full
    if name in LOWERED:
        monkeypatch.setitem(globals(), "full", lambda *shape: draw(*shape).half())
    else:
        monkeypatch.setitem(globals(), "half", lambda *shape: draw(*shape).half().float())
    expected = operation()
    assert expected.dtype is (torch.float16 if name in LOWERED else torch.float32)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_another_devices_autocast_does_nothing_here() -> None:
    x = torch.ones(2, 2, device=NAME)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype is torch.float32
        assert torch.addbmm(x, x[None], x[None]).dtype is torch.float32  # one kernel, the CPU's
        assert (x.cpu() @ x.cpu()).dtype is torch.bfloat16


@pytest.mark.parametrize("kind", [str, torch.device])
@pytest.mark.parametrize("spelling", [NAME, "fakegpu:0"])
def test_the_two_drop_ins_agree(kind: Any, spelling: str) -> None:
    name = kind(spelling)
    x = torch.ones(2, 2, device=NAME)
    with maybe_autocast(name):
        assert (x @ x).dtype is torch.float16
    assert ScalerShim(name).is_enabled()
    with maybe_autocast(name, torch.bfloat16):
        assert (x @ x).dtype is torch.bfloat16


def test_without_a_device_the_two_agree_on_fp32() -> None:
    x = torch.ones(2, 2, device=NAME)
    with maybe_autocast():
        assert (x @ x).dtype is torch.float32
    assert not ScalerShim().is_enabled()


LAYERS = {
    "linear": (nn.Linear(4, 3), (5, 4)),
    "conv": (nn.Conv2d(4, 8, 3, padding=1, groups=2), (2, 4, 8, 8)),
    "conv without bias": (nn.Conv2d(3, 4, 3, bias=False), (2, 3, 8, 8)),
    "transposed conv": (nn.ConvTranspose2d(4, 8, 2, groups=2), (2, 4, 5, 5)),
    "batch norm": (nn.BatchNorm2d(3), (2, 3, 4, 4)),
    "layer norm": (nn.LayerNorm(4), (5, 4)),
    "group norm": (nn.GroupNorm(2, 4), (2, 4, 3, 3)),
    "transformer": (nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), (2, 5, 8)),
    "lstm": (nn.LSTM(4, 5, num_layers=2, batch_first=True), (2, 5, 4)),
    "lstm without bias": (nn.LSTM(4, 5, bias=False), (5, 2, 4)),
    "gru": (nn.GRU(4, 5), (5, 2, 4)),
    "gru without bias": (nn.GRU(4, 5, bias=False, bidirectional=True), (5, 2, 4)),
    "max pool": (nn.MaxPool2d(2), (2, 3, 8, 8)),
    "upsample": (nn.Upsample(scale_factor=2, mode="bilinear"), (2, 3, 4, 4)),
    "softmax": (nn.Softmax(-1), (3, 4)),
    "pixel shuffle": (nn.PixelShuffle(2), (2, 4, 3, 3)),
}


@pytest.mark.parametrize("key", LAYERS)
def test_layers_compute_what_they_do_on_the_cpu(key: str) -> None:
    model, shape = LAYERS[key]
    torch.manual_seed(0)
    x = torch.randn(shape)

    def run(device: str) -> list[torch.Tensor]:
        layer, mine = copy.deepcopy(model).to(device), x.to(device, copy=True).requires_grad_()
        out = layer(mine)
        out = out[0] if isinstance(out, tuple) else out
        assert out.device.type == torch.device(device).type
        out.square().mean().backward()
        grads = [mine.grad, *(weight.grad for weight in layer.parameters())]
        return [out.detach().cpu(), *(grad.cpu() for grad in grads if grad is not None)]

    expected, got = run("cpu"), run(NAME)
    assert len(expected) == 2 + len(list(model.parameters()))
    for one, other in zip(expected, got, strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_a_model_of_timm_trains(name: str) -> None:
    timm = pytest.importorskip("timm", reason="needs timm, of the extra `example`")
    size = {"img_size": 32} if name.startswith("vit") else {}
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **size)
    ctx = DeviceContext(NAME, precision="fp16")
    x, y = ctx.to((torch.randn(4, 3, 32, 32), torch.arange(4) % 3))
    scaler = ctx.scaler(1024.0)
    model = ctx.to(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        with ctx.autocast():
            loss = F.cross_entropy(model(x), y)
        assert scaler.backward_step(loss, optimizer, max_norm=1.0).stepped
        losses.append(loss.item())
    assert losses[1] < losses[0]
    with torch.inference_mode(), ctx.autocast():
        assert model.eval()(x).dtype is torch.float16


# --- moving data ------------------------------------------------------------------------------


def test_batches_arrive_whole() -> None:
    batch = {"x": torch.arange(6.0), "y": [torch.ones(2, dtype=torch.float64), "name"]}
    moved = DeviceContext(NAME).to(batch)
    assert moved["x"].device == moved["y"][0].device == torch.device(NAME, 0)
    assert moved["x"].tolist() == batch["x"].tolist()
    assert moved["y"][0].dtype is torch.float64
    assert moved["y"][1] == "name"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_feeds_it_without_a_word(num_workers: int) -> None:
    ctx = DeviceContext(NAME, precision="fp32")
    data = torch.utils.data.TensorDataset(torch.arange(32.0).reshape(8, 4))
    options = ctx.loader_options(num_workers)
    assert options["pin_memory"] is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = torch.utils.data.DataLoader(data, batch_size=4, **options)
        got = torch.cat([ctx.to(batch)[0] for batch in loader])
    assert torch.equal(got.cpu(), data.tensors[0])


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[1].weight = model[0].weight
    DeviceContext(NAME, precision="fp32").to(model)
    assert model[1].weight is model[0].weight


def test_devices_do_not_mix() -> None:
    x = torch.ones(2, 2, device=NAME)
    told = "Expected all tensors to be on the same device, but found at least two devices"
    for wrong in (lambda: x + torch.ones(2, 2), lambda: x @ torch.ones(2, 2)):
        with pytest.raises(RuntimeError, match=told):
            wrong()
    with pytest.raises(RuntimeError, match=told):
        x[torch.tensor([0])] = torch.ones(2)
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        torch.ones(2)[torch.tensor([0], device=NAME)]
    with pytest.raises(TypeError, match="can't convert fakegpu:0 device type tensor to numpy"):
        x.numpy()
    assert (x + torch.tensor(1.0)).tolist() == [[2, 2], [2, 2]]  # a CPU scalar may mix
    assert x[torch.tensor([0])].tolist() == [[1, 1]]  # and so may indices


def gathered(x: torch.Tensor) -> torch.Tensor:
    x.requires_grad_()
    (x[torch.tensor([2, 0, 2])] * 3).sum().backward()
    assert x.grad is not None
    return x.grad


def packed(x: torch.Tensor) -> torch.Tensor:
    lengths = torch.tensor([3, 1])
    return nn.utils.rnn.pack_padded_sequence(x.view(2, 3), lengths, batch_first=True).data


@pytest.mark.parametrize(
    "take",
    [
        lambda x: x[torch.tensor([2, 0])],
        lambda x: torch.ops.aten._unsafe_index(x, [torch.tensor([2, 0])]),
        lambda x: x.index_put((torch.tensor([2, 0]),), x[:2]),
        lambda x: x.index_put_((torch.tensor([2, 0]),), x[:2].clone()),
        gathered,
        packed,
    ],
)
def test_indices_and_lengths_may_stay_on_the_cpu(take: Any) -> None:
    x = torch.arange(6.0)
    expected, got = take(x.clone()), take(x.to(NAME))
    assert got.device.type == NAME
    assert got.tolist() == expected.tolist()


def test_views_share_memory_and_geometry() -> None:
    x = torch.arange(12.0, device=NAME).reshape(3, 4)
    x.t()[1, 0] = 50
    x[:, 2].mul_(10)
    x.view(-1)[3:5].zero_()
    assert x.tolist() == [[0, 50, 20, 0], [0, 5, 60, 7], [8, 9, 100, 11]]
    assert not x.t().is_contiguous()
    assert x[1:, 1].storage_offset() == 5
    image = torch.empty(2, 3, 4, 4, device=NAME).to(memory_format=torch.channels_last)
    assert image.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        x.t().view(-1)
    x.transpose_(0, 1).resize_(20)[19] = 1
    assert x.shape == (20,)
    assert x[1].item() == 50


def test_a_view_into_inference_mode_stays_what_its_base_is() -> None:
    weight = torch.ones(4, device=NAME, requires_grad=True)
    with torch.inference_mode():
        made = torch.ones(4, device=NAME)
        assert not weight.view(2, 2).is_inference()
    assert made.view(2, 2).is_inference()


@pytest.mark.parametrize("inference", [False, True])
def test_what_is_written_to_is_what_comes_back(inference: bool) -> None:
    with torch.inference_mode(inference):
        x = torch.ones(3, device=NAME)
        out = torch.empty(0, device=NAME)
        assert x.add_(1) is x
        assert torch.mul(x, x, out=out) is out
        assert out.tolist() == [4, 4, 4]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_a_tensor_can_take_over_memory(dtype: torch.dtype) -> None:
    x = torch.arange(4, device=NAME).to(dtype)
    y = torch.empty(0, dtype=dtype, device=NAME).set_(x.untyped_storage())
    x[1] = 9
    assert y.tolist() == [0, 9, 2, 3]
    assert y.stride() == (1,)


def test_memory_of_others_is_refused_with_what_works() -> None:
    with pytest.raises(NotImplementedError, match=r"torch\.save works here, pickle .* do not"):
        pickle.loads(pickle.dumps(torch.ones(2, device=NAME)))


def test_plain_numbers_mix_with_every_dtype() -> None:
    for dtype in (torch.int64, torch.float16, torch.float64):
        cpu = torch.arange(1, 5).to(dtype)
        mine = cpu.to(NAME)
        for operation in (
            lambda x: x % 3,
            lambda x: 7 % x,
            lambda x: x * 2.5,
            lambda x: x.add(1, alpha=2),
            lambda x: torch.where(x > 2, x, 0),
            lambda x: x.clamp(2, 3),
            lambda x: 2**x,
            lambda x: x.masked_fill(x > 2, 1),
        ):
            expected, got = operation(cpu), operation(mine)
            assert got.dtype is expected.dtype
            assert torch.equal(got.cpu(), expected)


def test_conjugates_are_computed() -> None:
    x = torch.complex(torch.ones(2), torch.arange(2.0)).to(NAME)
    assert x.conj().is_conj()
    assert x.conj().cpu().tolist() == [1, 1 - 1j]
    assert (x * x.conj()).real.tolist() == [1, 2]
    assert x.conj().imag.cpu().tolist() == [0, -1]


def test_gradients_flow_through_changes_in_place() -> None:
    x = torch.ones(4, device=NAME, requires_grad=True)
    y = x * 2
    y[1:3].mul_(3)
    y.view(2, 2).square().sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [8, 72, 72, 8]


def test_a_gradient_may_have_no_memory() -> None:
    x = torch.ones(2, device=NAME, requires_grad=True)
    (x.sgn() + x).sum().backward()  # the gradient of sgn is torch's zero without memory
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1]


# --- memory -----------------------------------------------------------------------------------


def test_memory_is_counted(accelerator: Accelerator) -> None:
    gc.collect()
    before = accelerator.ledger.allocated
    x = torch.ones(MIB, device=NAME)
    view = x[10:]
    assert accelerator.ledger.allocated == before + 4 * MIB
    del x
    assert accelerator.ledger.allocated == before + 4 * MIB
    del view
    assert accelerator.ledger.allocated == before
    assert vendor().max_memory_allocated() >= before + 4 * MIB
    vendor().reset_peak_memory_stats()
    assert vendor().max_memory_allocated() == before


def test_memory_that_grows_is_counted_once(accelerator: Accelerator) -> None:
    gc.collect()
    before = accelerator.ledger.allocated
    x = torch.ones(2, device=NAME)
    vendor().reset_peak_memory_stats()
    x.resize_(MIB)
    assert accelerator.ledger.peak <= before + 4 * MIB + 64
    del x
    assert accelerator.ledger.allocated == before


def test_training_steps_leave_nothing_behind(accelerator: Accelerator) -> None:
    ctx = DeviceContext(NAME, precision="fp16")
    gc.collect()
    empty = accelerator.ledger.allocated
    model, (x, y) = ctx.to(mlp()), ctx.to(data())
    optimizer, scaler = torch.optim.AdamW(model.parameters()), ctx.scaler()
    seen = set()
    for at in range(6):
        with ctx.autocast():
            loss = F.cross_entropy(model(x), y)
        scaler.backward_step(loss, optimizer, max_norm=1.0)
        if at:
            seen.add(accelerator.ledger.allocated)
    assert len(seen) == 1
    del model, x, y, optimizer, scaler, loss
    gc.collect()
    assert accelerator.ledger.allocated == empty


def test_torchs_own_calls_raise_here() -> None:
    """Which is why the library asks the vendor's module, and not torch.accelerator."""
    for call in ("empty_cache", "memory_allocated", "memory_stats"):
        with pytest.raises(RuntimeError):
            getattr(torch.accelerator, call)()


def test_clearing_gives_back_what_was_cached(accelerator: Accelerator) -> None:
    clear_cache(NAME)
    x = torch.ones(MIB, device=NAME)
    del x
    assert clear_cache(NAME) == 4 * MIB
    assert clear_cache() == 0  # the best device is this one
    stats = memory_stats(NAME)
    assert stats == MemoryStats(accelerator.ledger.allocated, accelerator.ledger.reserved, 2**40)
    assert clear_cache(NAME, min_pressure=0.9) is None


def test_pressure_is_of_what_the_device_has(accelerator: Accelerator) -> None:
    x = torch.ones(MIB, device=NAME)
    del x
    accelerator.ledger.limit = accelerator.ledger.reserved
    assert memory_stats(NAME).total == accelerator.ledger.reserved
    assert clear_cache(NAME, min_pressure=0.9) is not None


def boom(*args: object) -> None:
    raise AssertionError("INTERNAL ASSERT FAILED, please report a bug")


@pytest.mark.parametrize("broken", ["empty_cache", "memory_reserved", "mem_get_info"])
def test_clearing_never_raises(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    monkeypatch.setattr(vendor(), broken, boom)
    assert clear_cache(NAME) is None
    assert DeviceContext(NAME).clear_cache(min_pressure=0.5) is None


def hungry(ctx: DeviceContext) -> tuple[nn.Module, torch.Tensor, Any]:
    """A model, a batch of 8 and a step whose activations take 4 MiB per sample."""
    torch.manual_seed(0)
    model = ctx.to(nn.Linear(4, 1))
    x = ctx.to(torch.randn(8, 4))

    def step(part: torch.Tensor, share: float) -> float:
        wide = (model(part).exp() + 1).expand(-1, MIB).clone()
        loss = wide.log().mean()
        (loss * share).backward()
        return float(loss.detach())

    return model, x, step


@pytest.fixture
def scarce(accelerator: Accelerator) -> Iterator[Accelerator]:
    """Room for less than half of the batch of `hungry`."""
    gc.collect()
    yield accelerator
    accelerator.ledger.limit = None


def test_its_out_of_memory_error_is_recognised(scarce: Accelerator) -> None:
    scarce.ledger.limit = scarce.ledger.allocated + 8 * MIB
    with pytest.raises(RuntimeError) as caught:
        torch.ones(5 * MIB, device=NAME)
    room = scarce.ledger.limit / MIB
    assert str(caught.value) == (
        "FAKEGPU out of memory. Tried to allocate 20.00 MiB. FAKEGPU 0 has a total capacity of "
        f"{room:.2f} MiB of which 8.00 MiB is free."
    )
    assert type(caught.value) is RuntimeError  # no type of its own to know it by
    assert is_oom_error(caught.value)
    kept = torch.ones(MIB, device=NAME)
    assert kept.sum().item() == MIB
    scarce.ledger.limit = MIB
    with pytest.raises(RuntimeError, match=r"of 1\.00 MiB of which 0\.00 MiB is free"):
        torch.ones(1, device=NAME)


def test_a_batch_that_does_not_fit_is_split(scarce: Accelerator) -> None:
    ctx = DeviceContext(NAME, precision="fp32")
    model, x, step = hungry(ctx)
    whole = step(x, 1.0)
    expected = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    scarce.ledger.limit = scarce.ledger.allocated + 40 * MIB
    with pytest.raises(RuntimeError, match="FAKEGPU out of memory"):
        step(x, 1.0)
    model.zero_grad()
    losses = split_on_oom(step, x, parameters=model.parameters())
    assert len(losses) in (4, 8)
    assert sum(losses) / len(losses) == pytest.approx(whole)
    for weight, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, grad)


def test_memory_that_runs_out_in_the_backward_pass(scarce: Accelerator) -> None:
    ctx = DeviceContext(NAME, precision="fp32")
    model, x, step = hungry(ctx)
    step(x, 1.0)
    expected = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    failed = []

    def failing(part: torch.Tensor, share: float) -> None:
        loss = model(part).exp().add(1).log().mean() * share
        if len(part) == len(x):
            scarce.ledger.fail_after(1)  # backward's second allocation
        try:
            loss.backward()
        except RuntimeError as error:
            failed.append(str(error))
            raise

    split_on_oom(failing, x, parameters=model.parameters())
    assert len(failed) == 1
    assert failed[0].startswith("FAKEGPU out of memory")
    for weight, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, grad)


# --- state ------------------------------------------------------------------------------------


def test_a_checkpoint_goes_over_the_cpu_and_back(tmp_path: Path) -> None:
    ctx = DeviceContext(NAME, precision="fp16")
    model, (x, y) = ctx.to(mlp()), ctx.to(data())
    optimizer, scaler = torch.optim.AdamW(model.parameters()), ctx.scaler()
    for factor in (float("inf"), 1.0):
        with ctx.autocast():
            loss = F.cross_entropy(model(x), y) * factor
        scaler.backward_step(loss, optimizer)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    save_checkpoint(tmp_path / "c.pt", {name: part.state_dict() for name, part in parts.items()})
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert {tensor.device.type for tensor in loaded["model"].values()} == {"cpu"}

    on_cpu, held = mlp(), ScalerShim("cpu")
    on_cpu.load_state_dict(loaded["model"])
    held.load_state_dict(loaded["scaler"])
    save_checkpoint(tmp_path / "c.pt", {"model": on_cpu.state_dict(), "scaler": held.state_dict()})
    back = load_checkpoint(tmp_path / "c.pt")
    again, resumed, after = ctx.to(nn.Sequential(*mlp())), ctx.scaler(), None
    again.load_state_dict(back["model"])
    resumed.load_state_dict(back["scaler"])
    after = torch.optim.AdamW(again.parameters())
    after.load_state_dict(loaded["optimizer"])
    for old, new in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(old, new)
        assert torch.equal(optimizer.state[old]["exp_avg"], after.state[new]["exp_avg"])
        assert after.state[new]["exp_avg"].device == ctx.device
    assert resumed.get_scale() == 2.0**15


def test_torchs_own_files_know_the_device() -> None:
    file = io.BytesIO()
    torch.save(torch.arange(6.0, device=NAME)[2:4], file)
    for where in (None, NAME, torch.device(NAME, 0), "cpu"):
        file.seek(0)
        loaded = torch.load(file, map_location=where)
        assert loaded.device.type == (torch.device(where).type if where else NAME)
        assert loaded.tolist() == [2, 3]


def test_a_model_can_be_copied() -> None:
    model = mlp().to(NAME)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert other[0].weight.device == torch.device(NAME, 0)
    assert other[0].weight.abs().sum().item() > 0
    buffer = torch.arange(6.0, device=NAME)[2:4]
    assert copy.deepcopy({"buffer": buffer})["buffer"].tolist() == [2, 3]


def test_random_state_comes_back() -> None:
    seed_everything(1)
    state = rng_state()
    first = torch.rand(8, device=NAME).cpu()
    assert not torch.equal(torch.rand(8, device=NAME).cpu(), first)
    set_rng_state(state)
    assert torch.equal(torch.rand(8, device=NAME).cpu(), first)
    seed_everything(1)
    assert torch.equal(F.dropout(torch.ones(8, device=NAME)).cpu(), F.dropout(torch.ones(8)))
    seed_everything(1)
    on_cpu = torch.rand(8)
    seed_everything(1)
    torch.rand(3, device=NAME)
    assert torch.equal(torch.rand(8), on_cpu)  # the two do not draw from one another


def test_a_generator_of_the_cpu_is_refused() -> None:
    with pytest.raises(RuntimeError, match="Expected a 'fakegpu' device type for generator"):
        torch.rand(2, device=NAME, generator=torch.Generator())


def test_checkpointed_activations_draw_the_same_again() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5)).to(NAME)
    x = torch.ones(2, 4, device=NAME, requires_grad=True)
    torch.manual_seed(0)
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    torch.manual_seed(0)
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, expected)


# --- the command line -------------------------------------------------------------------------


def test_the_doctor_examines_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    told = capsys.readouterr().out
    mine = told[told.index("fakegpu:0: ") : told.index("cpu: ")]
    assert "<- DeviceContext() takes it" in mine
    assert "float16 native, bfloat16 native, float64 unknown" in mine
    assert "auto -> fp32: portable-amp knows fakegpu only by what its torch module says" in mine
    assert "fp16 -> fp16 with a gradient scaler" in mine
    assert "training step: ran" in mine


def test_the_doctor_finds_it_broken(capsys: pytest.CaptureFixture[str]) -> None:
    new_accelerator(limit=0)
    assert cli.main(["doctor"]) == 1
    assert "training step: FAILED: RuntimeError: FAKEGPU out of memory" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["auto", "fp32", "fp16", "bf16"])
def test_a_training_step_runs_under_every_plan(precision: str) -> None:
    ctx = DeviceContext(NAME, precision=precision)
    assert training_step(ctx) == {"ok": True, "error": None}


# --- modules that lack functions --------------------------------------------------------------


def everything(precision: str) -> None:
    """All that the library does with a device's module."""
    ctx = DeviceContext(NAME, precision=precision)
    assert training_step(ctx) == {"ok": True, "error": None}
    ctx.synchronize()
    ctx.memory()
    ctx.clear_cache()
    clear_cache(NAME, min_pressure=0.5)
    seed_everything(1)
    set_rng_state(rng_state())
    ctx.explain()
    with maybe_autocast(NAME, enabled=False), maybe_autocast(NAME, torch.bfloat16):
        pass


OPTIONAL = [
    "synchronize", "set_device", "current_device", "device", "get_device_name",
    "is_bf16_supported", "empty_cache", "memory_allocated", "memory_reserved",
    "max_memory_allocated", "reset_peak_memory_stats", "mem_get_info", "get_rng_state",
    "manual_seed",
]  # fmt: skip


@pytest.mark.parametrize("missing", OPTIONAL)
def test_a_module_may_lack(missing: str) -> None:
    new_accelerator(without=[missing])
    assert not hasattr(vendor(), missing)
    everything("fp16")


def test_a_module_may_lack_all_of_them() -> None:
    new_accelerator(without=OPTIONAL)
    everything("fp16")
    ctx = DeviceContext(NAME)
    assert ctx.capabilities.name == NAME
    assert ctx.memory() == MemoryStats()
    assert ctx.clear_cache() is None
    assert NAME not in rng_state()


def test_a_module_may_lack_what_autocast_asks_for() -> None:
    new_accelerator(without=["get_amp_supported_dtype"])
    with pytest.warns(PrecisionFallbackWarning, match="no working autocast for fakegpu"):
        everything("fp32")


def test_random_state_that_cannot_be_put_back_is_told() -> None:
    new_accelerator(without=["set_rng_state"])
    with pytest.warns(StateWarning, match=r"of 1 fakegpu device\(s\) does not fit"):
        set_rng_state(rng_state())


def test_a_module_that_cannot_seed_is_torchs_to_complain_of() -> None:
    new_accelerator(without=["manual_seed_all"])
    with pytest.warns(UserWarning, match="Set seed for `fakegpu` device does not take effect"):
        seed_everything(1)


# --- asking for it ----------------------------------------------------------------------------


def test_asked_again_it_is_the_same() -> None:
    first, again = new_accelerator(limit=MIB), new_accelerator(NAME, limit=2 * MIB)
    assert first.ledger is again.ledger
    assert again.device == torch.device(NAME, 0)
    assert vendor().mem_get_info()[1] == 2 * MIB
    assert torch.get_device_module(NAME) is vendor()


def test_another_name_is_refused() -> None:
    with pytest.raises(DeviceError) as caught:
        new_accelerator("other")
    assert str(caught.value) == (
        "new_accelerator('other') is refused: torch takes one plugin per process, and this one has "
        "'fakegpu'. Use a new process."
    )


def test_a_function_that_no_vendor_offers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"without='mem_info': the module offers ") as caught:
        new_accelerator(without=["mem_info"])
    assert "mem_get_info" in str(caught.value)
    assert "synchronize" not in str(caught.value)  # the nearest alone
    with pytest.raises(ValueError, match=r"the module offers is_available, .*mem_get_info"):
        new_accelerator(without=["zzz"])
    assert hasattr(vendor(), "mem_get_info")


def test_what_torch_cannot_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has no plugin yet."""
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "privateuseone")
    for name in ("Other", "1st", "other-gpu", "", "cuda", "nn"):
        with pytest.raises(DeviceError, match=f"torch.{name}, which must be a new lower-case name"):
            new_accelerator(name)
    assert new_accelerator("other").name == "other"
    registration = torch.utils.backend_registration
    monkeypatch.delattr(registration, "_setup_privateuseone_for_python_backend")
    with pytest.raises(DeviceError, match="takes no plugin device written in Python"):
        new_accelerator("other")
    assert new_accelerator(NAME).name == NAME
