"""What kinds of played device have, and the words they fail with: those of their backends."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from portable_amp import DeviceContext, is_oom_error
from portable_amp.testing import play
from support import KINDS

MIB = 2**20
FULL = (
    "Tried to allocate 7.00 MiB. GPU 0 has a total capacity of 10.00 MiB of which 6.00 MiB is free."
    " Of the allocated memory 4.00 MiB is allocated by PyTorch, and 3.00 MiB is reserved by PyTorch"
    " but unallocated."
)
# Sources: torch's CUDACachingAllocator.cpp, XPUCachingAllocator.cpp, MPSAllocator.mm, alloc_cpu.cpp
OUT_OF_MEMORY = {
    "t4": "CUDA out of memory. " + FULL,
    "mi250": "HIP out of memory. " + FULL,
    "arc-a770": "XPU out of memory. " + FULL,
    "gaudi2": "HPU out of memory. " + FULL,
    "m2-macos15": "MPS backend out of memory (MPS allocated: 4.00 MiB, other allocations: 0 bytes, "
    "max allowed: 10.00 MiB). Tried to allocate 7.00 MiB on private pool.",
    "cpu": f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {7 * MIB} bytes.",
}


@pytest.mark.parametrize("key", OUT_OF_MEMORY)
def test_memory_runs_out_in_the_backends_own_words(key: str) -> None:
    with play(key) as played:
        played.memory.limit = 10 * MIB
        kept, freed, more = (torch.empty(n * MIB, dtype=torch.int8) for n in (4, 3, 7))
        played.memory.take(kept)
        played.memory.take(freed)
        del freed
        with pytest.raises(RuntimeError) as caught:
            played.memory.take(more)
    assert str(caught.value).startswith(OUT_OF_MEMORY[key])
    assert is_oom_error(caught.value)
    assert isinstance(caught.value, torch.OutOfMemoryError) is (key not in ("m2-macos15", "cpu"))


@pytest.mark.parametrize(
    ("key", "pins"),
    [("t4", True), ("arc-a770", True), ("m2-macos15", False), ("gaudi2", False)],
)
def test_loaders_pin_where_torch_does(key: str, pins: bool) -> None:
    loader = DataLoader(TensorDataset(torch.zeros(2)), pin_memory=True)
    with play(key) as played, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [batch.is_pinned() for (batch,) in loader] == [pins, pins]
        assert bool(caught) is not pins
        assert torch.zeros(1).pin_memory().is_pinned()  # there is an accelerator
        assert len(played.asked("pin_memory")) == (3 if pins else 1)


@pytest.mark.parametrize(("key", "late"), [("t4", False), ("max1550", False), ("m2-macos15", True)])
def test_where_a_copy_reads_its_source_late(key: str, late: bool) -> None:
    with play(key, live=True) as played:
        if played.kind not in KINDS:
            pytest.skip(f"torch {torch.__version__} has no autocast for {played.kind}")
        source = torch.ones(2)
        copied = source.to(played.kind, non_blocking=True)
        source.fill_(7)
        assert copied.tolist() == ([7, 7] if late else [1, 1])


@pytest.mark.parametrize(
    ("key", "dtype", "error", "words"),
    [
        ("m1-macos13", torch.float64, TypeError, "the MPS framework doesn't support float64"),
        ("m1-macos13", torch.complex128, TypeError, "^Trying to convert ComplexDouble to the MPS"),
        ("m1-macos13", torch.bfloat16, TypeError, "^MPS bfloat16 type is supported on MacOS 14"),
        ("m2-macos14", torch.bfloat16, None, ""),
        ("arc-a770", torch.float64, RuntimeError, "^Required aspect fp64 is not supported"),
        ("max1550", torch.float64, None, ""),
        ("t4", torch.bfloat16, None, ""),
    ],
)
def test_a_dtype_is_refused_in_the_backends_own_words(
    key: str, dtype: torch.dtype, error: type[Exception] | None, words: str
) -> None:
    with play(key):
        device = DeviceContext(precision="fp32").device
        made = torch.zeros(2, dtype=dtype)
        for make in (
            lambda: made.to(device),
            lambda: torch.zeros(2).to(device, dtype),
            lambda: torch.zeros(2, dtype=dtype, device=device),
        ):
            if error is None:
                assert make().dtype is dtype
            else:
                with pytest.raises(error, match=words):
                    make()


@pytest.mark.parametrize(
    ("device", "error", "words"),
    [
        ("cuda", AssertionError, "^Torch not compiled with CUDA enabled$"),
        ("xpu", AssertionError, "^Torch not compiled with XPU enabled$"),
        ("mps", RuntimeError, "^PyTorch is not linked with support for mps devices$"),
        ("hpu", RuntimeError, "^PyTorch is not linked with support for hpu devices$"),
    ],
)
def test_an_absent_device_is_refused_in_torchs_own_words(
    device: str, error: type[Exception], words: str
) -> None:
    with play("cpu"), pytest.raises(error, match=words):
        torch.ones(2).to(device)
