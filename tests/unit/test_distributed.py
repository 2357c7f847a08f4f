from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from portable_amp import DistributedError, Ranks, init_distributed, ranks
from portable_amp.testing import play
from support import playing


def test_one_process_needs_no_launcher() -> None:
    assert ranks() == Ranks(0, 0, 1)
    assert ranks().is_main
    assert init_distributed("cpu") == Ranks(0, 0, 1)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "0"}, r"\$LOCAL_RANK is not set"),
        ({"WORLD_SIZE": "2"}, r"\$RANK is not set"),
        ({"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "are numbers"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "not below WORLD_SIZE=2"),
    ],
)
def test_a_broken_environment_is_told(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], message: str
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match=message):
        ranks()


def _two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


def test_a_device_that_cannot_talk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _two_ranks(monkeypatch)
    with playing("m2-macos14"), pytest.raises(DistributedError, match="mps has no distributed"):
        init_distributed("mps:0")


def test_a_torch_without_the_backend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    _two_ranks(monkeypatch)
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: False)
    with playing("a100"), pytest.raises(DistributedError, match="built without 'nccl'"):
        init_distributed("cuda:1")


@pytest.mark.parametrize(
    ("key", "device", "backend"), [("a100", "cuda:1", "nccl"), ("max1550", "xpu:1", "xccl")]
)
def test_each_kind_of_device_talks_its_own_way(
    monkeypatch: pytest.MonkeyPatch, key: str, device: str, backend: str
) -> None:
    _two_ranks(monkeypatch)
    joined = []
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", joined.append)
    with play(key, count=2) as played:
        assert init_distributed(device) == Ranks(1, 1, 2)
    assert (joined, played.current) == ([backend], 1)


PROGRAM = """
import os
import sys
import torch
from portable_amp import DeviceContext, init_distributed, context
from portable_amp.testing import machine

mine = init_distributed("cpu")
# Each rank believes to be on another machine.
kinds = [machine(key).capabilities for key in sys.argv[1:]]
ctx = context._restore(torch.device("cpu"), kinds[mine.rank],
                       context.choose("auto", kinds[mine.rank]), "fallback")
agreed = ctx.agreed()
print(f"rank {mine.rank}: {ctx.plan.name} -> {agreed.plan.name}", flush=True)
# Up to torch 2.6 a rank that leaves gloo while another is still receiving may hang for good.
sys.stdin.readline()
os._exit(0)
"""


@pytest.mark.parametrize(
    ("machines", "expected"),
    [
        (["a100", "t4"], ["bf16 -> fp16", "fp16 -> fp16"]),
        (["a100", "cpu"], ["bf16 -> fp32", "fp32 -> fp32"]),
    ],
)
def test_real_ranks_agree_on_the_weakest_plan_and_one_tells(
    tmp_path: Path, machines: list[str], expected: list[str]
) -> None:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # What torchrun sets, without its own start-up time.
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, str(program), *machines],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    lines = [
        next(line.strip() for line in process.stdout if line.startswith("rank"))  # gloo prints, too
        for process in started
        if process.stdout
    ]
    told = [process.communicate("leave\n", timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    assert lines == [f"rank {i}: {p}" for i, p in enumerate(expected)]
    off = [err.count("mixed precision is off") for _, err in told]
    assert off == [int("fp32" in expected[0]), 0]
