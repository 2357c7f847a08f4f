from __future__ import annotations

import dataclasses
import logging
import types
import warnings

import numpy as np
import pytest
import torch

from portable_amp import (
    DeviceContext,
    DeviceError,
    backends,
    choose,
    clear_cache,
    is_oom_error,
    probe,
)
from portable_amp.backends import OUT_OF_MEMORY, MemoryStats, parse_device, present, resolve_device
from support import playing


def test_the_cpu_is_always_there_and_last() -> None:
    assert present()[-1].device_type == "cpu"
    with playing("t4"):
        assert [row.device_type for row in present()] == ["cuda", "cpu"]


@pytest.mark.parametrize(
    ("key", "expected"), [("t4", "cuda:0"), ("m2-macos14", "mps:0"), ("arc-a770", "xpu:0")]
)
def test_the_best_device_present_is_chosen(key: str, expected: str) -> None:
    with playing(key):
        assert str(resolve_device()) == expected


def test_told_wins_over_the_environment_which_wins_over_the_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with playing("t4", count=2):
        assert str(resolve_device()) == "cuda:0"
        monkeypatch.setenv("PORTABLE_AMP_DEVICE", "cuda:1")
        assert str(resolve_device()) == "cuda:1"
        assert str(resolve_device("cpu")) == "cpu"
        assert str(DeviceContext().device) == "cuda:1"


def test_the_environment_is_named_where_it_is_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTABLE_AMP_DEVICE", "cuda:1")
    with playing("t4"), pytest.raises(DeviceError, match=r"\(from \$PORTABLE_AMP_DEVICE\)"):
        resolve_device()


@pytest.mark.parametrize(("local_rank", "count", "index"), [("1", 2, 1), ("3", 1, 0), ("", 2, 0)])
def test_each_rank_takes_its_own_device(
    monkeypatch: pytest.MonkeyPatch, local_rank: str, count: int, index: int
) -> None:
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with playing("a100", count=count):
        assert resolve_device().index == index
        assert resolve_device("cuda").index == index
        assert resolve_device("cuda:0").index == 0


def test_torchs_current_device_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    with playing("a100", count=2):
        torch.cuda.set_device(1)
        assert resolve_device("cuda").index == 1
        assert resolve_device().index == 1
        monkeypatch.setenv("LOCAL_RANK", "0")
        assert resolve_device("cuda").index == 0


def test_a_rank_without_a_device_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    with (
        playing("a100", count=2),
        pytest.raises(DeviceError, match=r"'cuda:2' \(from \$LOCAL_RANK\)"),
    ):
        resolve_device()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("cuda:3", r"'cuda:3' is not available: 1 cuda device. This machine has: cuda:0, cpu."),
        ("mps", r"'mps:0' is not available: there is none here"),
        ("cpu:1", "the CPU is one device"),
        ("cudda", "Did you mean 'cuda'"),
        ("", "'' is not a device torch knows"),
        ("größe:1", "not a device torch knows"),
        (7, "'cuda:7' is not available: 1 cuda device"),
        (-1, "-1 is no index of an accelerator of this machine, which has: cuda:0, cpu"),
        (True, "True is not a device torch knows. This machine"),
        (1.0, "1.0 is not a device torch knows. This machine"),
        ("gpu", "Did you mean 'cuda'"),
        ("GPU:0", "Did you mean 'cuda'"),
        ("1", "Did you mean 'cuda:1'"),
        ("CUDA", "Did you mean 'cuda'"),
        (" cuda", "Did you mean 'cuda'"),
        ("cuda:", "Did you mean 'cuda'"),
        ("cuda:-1", "Did you mean 'cuda'"),
        ("cuda:256", "'cuda:256' is not a device torch knows"),
        ("rocm", "Did you mean 'cuda'"),
        ("amd", "Did you mean 'cuda'"),
        ("metal", "Did you mean 'mps'"),
        ("intel", "Did you mean 'xpu'"),
        ("npu", "It comes with torch_npu, to be imported first"),
        ("tpu", "knows. This machine has"),
        ("hip", "'hip:0' is not available: there is none here. Did you mean 'cuda'"),
        ("x" * 1000, r"'x{76}\.\.\. is not a device torch knows"),
        (None, None),
    ],
)
def test_messages_say_what_was_given_and_what_works(asked: object, message: str | None) -> None:
    with playing("t4"):
        if message is None:
            assert str(resolve_device(None)) == "cuda:0"
            return
        with pytest.raises(DeviceError, match=message):
            resolve_device(asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("index", [0, 1, np.int64(1), np.uint8(0)])
def test_a_number_is_the_index_of_an_accelerator(index: int) -> None:
    for key, kind in (("a100", "cuda"), ("max1550", "xpu")):
        with playing(key, count=2):
            assert str(resolve_device(index)) == f"{kind}:{int(index)}"
            assert str(DeviceContext(index).device) == f"{kind}:{int(index)}"


def test_without_an_accelerator_no_number_is_a_device() -> None:
    for asked in (0, "gpu", "0"):
        with pytest.raises(DeviceError, match=r"of this machine, which has: cpu|knows. This mach"):
            resolve_device(asked)


def test_torch_devices_are_taken_as_they_are() -> None:
    assert parse_device(torch.device("mps")) == torch.device("mps")
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")


class _Vendor(types.ModuleType):
    """What a vendor registers as torch.<device type>."""

    def __init__(self, **answers: object) -> None:
        super().__init__("torch.hpu")
        self.emptied = 0
        for name, answer in answers.items():
            setattr(self, name, lambda *args, answer=answer: answer)

    def empty_cache(self) -> None:
        self.emptied += 1


def test_a_vendors_accelerator_is_used_through_the_generic_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vendor = _Vendor(
        is_available=True,
        device_count=2,
        get_device_name="Gaudi",
        get_amp_supported_dtype=[torch.bfloat16],
        memory_allocated=1,
        memory_reserved=5,
        mem_get_info=(3, 9),
    )
    monkeypatch.setattr(torch, "hpu", vendor, raising=False)
    assert str(resolve_device()) == "hpu:0"
    can = probe("hpu:1")
    assert choose("bf16", can).name == "bf16"
    assert choose("fp16", can).name == "fp32"
    auto = choose("auto", can)
    assert auto.name == "fp32"
    assert "only by what its torch module says" in auto.reason
    ctx = DeviceContext("hpu", precision="bf16")
    assert ctx.memory() == MemoryStats(allocated=1, reserved=5, total=9)
    assert ctx.clear_cache() == 0
    assert vendor.emptied == 1


def test_a_vendors_module_that_says_little_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "hpu", _Vendor(is_available=True, device_count=1), raising=False)
    ctx = DeviceContext("hpu")
    assert ctx.plan.name == "fp32"
    assert ctx.memory() == MemoryStats()
    assert clear_cache("hpu") is None


def test_a_vendors_module_that_fails_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "hpu", types.ModuleType("torch.hpu"), raising=False)
    assert "hpu" not in [row.device_type for row in present()]


def test_a_broken_driver_is_told_once_and_not_by_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> bool:
        warnings.warn("CUDA initialization: driver too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    with caplog.at_level(logging.WARNING):
        assert backends.CUDA.count() == 0
        assert backends.CUDA.count() == 0
    assert [record.message for record in caplog.records] == [
        "cuda is not usable: CUDA initialization: driver too old"
    ]


def test_cpu_features_on_a_torch_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    text = "model name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx512_bf16 avx512fp16\n"
    monkeypatch.setattr(backends.Path, "read_text", lambda self, **kwargs: text)
    assert backends._cpu_name_and_features() == (
        "Some CPU @ 2 GHz",
        {"fpu", "avx512_bf16", "avx512_fp16"},
    )


def test_cpu_features_on_a_torch_that_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"cpu_name": "Some CPU", "avx512_bf16": True, "sve": False, "cores": 2}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert backends._cpu_name_and_features() == ("Some CPU", {"avx512_bf16"})


def test_cpu_features_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)

    def absent(self: object, **kwargs: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(backends.Path, "read_text", absent)
    assert backends._cpu_name_and_features()[1] == set()


# As the back ends say it; from torch's source, and from what was reported.
OUT_OF_MEMORY_TEXTS = """\
CUDA out of memory. Tried to allocate 20.00 MiB
HIP out of memory. Tried to allocate 2.00 GiB
XPU out of memory. Tried to allocate 1.00 GiB
MPS backend out of memory (MPS allocated: 18.13 GB, max allowed: 18.13 GB)
CUDA error: out of memory
CUDA ran out of memory outside PyTorch's allocator. If this workload
Unable to find a valid cuDNN algorithm to run convolution
GET was unable to find an engine to execute this computation
DefaultCPUAllocator: can't allocate memory: you tried to allocate 1000000000000000 bytes.
DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.
HIP error: out of memory
CUDA driver error: out of memory
NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'
ncclUnhandledCudaError: Call to CUDA function failed. Last error: Cuda failure 'out of memory'
CUDA error: cudaErrorMemoryAllocation
HIP error: hipErrorOutOfMemory
NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":830
cuDNN error: CUDNN_STATUS_ALLOC_FAILED
cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`
CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`
cuFFT error: CUFFT_ALLOC_FAILED
CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`
miopenStatusAllocFailed
Current platform can NOT allocate memory block with size larger than 4GB! Tried to allocate 6.85 GiB
Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES) -5 (PI_ERROR_OUT_OF_RESOURCES)
Native API returns: -6 (PI_ERROR_OUT_OF_HOST_MEMORY)
Native API returns: -4 (PI_ERROR_MEM_OBJECT_ALLOCATION_FAILURE)
level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)
level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)
level_zero backend failed with error: 25 (UR_RESULT_ERROR_MEM_OBJECT_ALLOCATION_FAILURE)
ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY
Invalid buffer size: 19.45 GB
Invalid buffer size: 19.38 GiB
Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)
MLU out of memory. Tried to allocate 22.00 MiB
MUSA out of memory. Tried to allocate 22.00 MiB
[Rank:0] FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::939524096 (896)MB
EL0004: [PID: 316198] 2025-09-28-07:22:29.827.496 Failed to allocate memory.
RESOURCE_EXHAUSTED: Attempting to reserve 6.48G at the bottom of memory. That was not possible.
Resource exhausted: From /job:tpu_worker/replica:0/task:0: Attempting to reserve 3.95G
Could not allocate tensor with 234881024 bytes. There is not enough GPU video memory available!
std::bad_alloc
bad allocation
Caught RuntimeError in replica 0 on device 0. RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED\
""".splitlines()


@pytest.mark.parametrize("text", OUT_OF_MEMORY_TEXTS)
def test_each_back_ends_words_for_out_of_memory_are_known(text: str) -> None:
    assert is_oom_error(RuntimeError(text))
    assert not is_oom_error(ValueError(text)), "an error of the user's own"
    for name in ("AcceleratorError", "OutOfMemoryError"):  # torch 2.8+, 2.5+
        kind = getattr(torch, name, RuntimeError)
        assert issubclass(kind, RuntimeError)
        assert is_oom_error(kind(text))


# A smaller batch cures none of these; two are the shared memory of a kernel, and of Linux.
OTHER_TEXTS = """\
out of resource: shared memory, Required: 131072, Hardware limit: 101376. Reducing block sizes or
DataLoader worker (pid 1) is killed by signal: Bus error. workers are out of shared memory
No valid triton configs. OutOfResources: out of resource: shared memory, Required: 180224
CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`
CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`
cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. You may have passed in a non-contiguous input.
CUDA error: device-side assert triggered
CUDA error: an illegal memory access was encountered
level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)
Native API returns: -1 (PI_ERROR_INVALID_MEM_OBJECT)
Placeholder storage has not been allocated on MPS device!
could not create a primitive
NCCL error: unhandled system error
unable to open shared memory object </torch_1> in read-write mode: Too many open files
INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":830\
""".splitlines()


@pytest.mark.parametrize("text", OTHER_TEXTS)
def test_other_errors_of_back_ends_are_no_lack_of_memory(text: str) -> None:
    assert not is_oom_error(RuntimeError(text))


def test_an_error_that_was_raised_from_one_is_another() -> None:
    """Whoever wraps an error says something else by it; split_on_oom itself does."""
    error = RuntimeError("gradients are half-added")
    error.__cause__ = torch.cuda.OutOfMemoryError("CUDA out of memory")
    assert not is_oom_error(error)


def test_each_text_is_there_for_something() -> None:
    said = "\n".join(OUT_OF_MEMORY_TEXTS)
    assert [text for text in OUT_OF_MEMORY if text not in said] == []


@pytest.mark.parametrize("row", backends.BACKENDS, ids=lambda row: row.device_type)
def test_rows_agree_with_torch(row: backends.Backend) -> None:
    """What torch has for a kind of device, its row knows."""
    own = getattr(torch, row.device_type, torch)
    names = ("empty_cache", "get_rng_state", "set_rng_state", "set_device", "synchronize")
    for name in names:
        if row is not backends.CPU and hasattr(own, name):
            assert backends.torch_function(getattr(row, name)) is getattr(own, name)
    ways = torch.distributed.Backend.default_device_backend_map
    if row.distributed is not None and row.device_type in ways:
        assert row.distributed == ways[row.device_type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.device_type = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("t4", "nvidia geforce rocm hip amd radeon gpu accelerator auto GPU"),
        ("m2-macos15", "metal apple gpu accelerator auto"),
        ("arc-a770", "intel sycl arc gpu accelerator auto"),
    ],
)
def test_what_people_call_a_device_leads_to_it(key: str, words: str) -> None:
    with playing(key):
        best = resolve_device().type
        for word in (*words.split(), ""):
            with pytest.raises(DeviceError, match=f"Did you mean '{best}'"):
                resolve_device(word)


@pytest.mark.parametrize("device_type", ["npu", "mlu", "musa", "xla"])
def test_a_vendors_device_is_said_to_come_with_its_package(device_type: str) -> None:
    with pytest.raises(DeviceError, match=f" torch_{device_type}, to be imported first"):
        resolve_device(f"{device_type}:0")


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_a_torch_that_cannot_tell_the_current_device_means_the_first(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def fails() -> int:
        raise kind("no driver")

    with playing("t4", count=2), monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", fails)
        assert resolve_device().index == 0
