from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from portable_amp import DeviceError, DistributedError, Ranks, init_distributed, notices, ranks
from portable_amp.backends import resolve_device
from portable_amp.distributed import of_rank_0
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
        (
            {"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
            "LOCAL_RANK, WORLD_SIZE are numbers: ",
        ),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"RANK": "-1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK=-1 is not below"),
        ({"RANK": "0", "LOCAL_RANK": "2", "WORLD_SIZE": "2"}, "LOCAL_RANK=2 is not below"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, r"\$MPI_LOCALRANKID is not set, but \$PMI_RANK is"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, r"\$SLURM_PROCID is not set"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, r"\$OMPI_COMM_WORLD_LOCAL_RANK is not set"),
    ],
)
def test_a_broken_environment_is_told(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], message: str
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match=message):
        ranks()


TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "6"}
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in
            {"RANK": "5", "LOCAL_RANK": "1", "SIZE": "6", "LOCAL_SIZE": "4"}.items()}  # fmt: skip
MVAPICH = {f"MV2_COMM_WORLD_{name}": value for name, value in
           {"RANK": "5", "LOCAL_RANK": "1", "SIZE": "6"}.items()}  # fmt: skip
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "6", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
PALS = {"PMI_RANK": "5", "PMI_SIZE": "6", "PMI_LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_NTASKS": "12", "SLURM_JOB_ID": "7"}  # fmt: skip
# What mpirun's own daemons leave, started by srun, one on each node
DAEMON = {**SRUN, "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}


@pytest.mark.parametrize(
    ("given", "variable"),
    [
        (TORCHRUN, "LOCAL_RANK"),
        (OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK"),
        (MVAPICH, "MV2_COMM_WORLD_LOCAL_RANK"),
        (MPICH, "MPI_LOCALRANKID"),
        (PALS, "PMI_LOCAL_RANK"),
        (SRUN, "SLURM_LOCALID"),
        ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "6"}, "SLURM_LOCALID"),  # srun --mpi=pmi2
        ({**DAEMON, **OPEN_MPI}, "OMPI_COMM_WORLD_LOCAL_RANK"),
        ({**DAEMON, **MPICH}, "MPI_LOCALRANKID"),
        ({**DAEMON, **TORCHRUN}, "LOCAL_RANK"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0", **TORCHRUN}, "LOCAL_RANK"),
    ],
)
def test_every_launcher_says_which_process_this_is(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    given: dict[str, str],
    variable: str,
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert ranks() == Ranks(5, 1, 6)
    assert not ranks().is_main
    with caplog.at_level(logging.WARNING):
        notices.tell("said by the first process only")
    assert caplog.records == []
    with playing("a100", count=2):
        assert resolve_device().index == 1
    monkeypatch.setenv(variable, "3")
    with playing("a100", count=2), pytest.raises(DeviceError, match=rf"\(from \${variable}\)"):
        resolve_device()


def test_one_process_of_a_batch_script_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without srun, Slurm's variables are those of the job, and the others would never come."""
    for name, value in {
        "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8",
        "SLURM_NPROCS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_TASKS_PER_NODE": "4(x2)",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert ranks() == Ranks(0, 0, 1)
    assert init_distributed("cpu") == Ranks(0, 0, 1)


@pytest.mark.parametrize("given", [TORCHRUN, OPEN_MPI, SRUN], ids=["torchrun", "mpirun", "srun"])
def test_the_first_of_the_second_node_is_not_the_main_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, given: dict[str, str]
) -> None:
    for rank, main in (("4", False), ("0", True)):
        for name, value in given.items():
            local, first = "LOCAL" in name, name.endswith(("RANK", "PROCID"))
            monkeypatch.setenv(name, "0" if local else rank if first else value)
        assert ranks() == Ranks(int(rank), 0, 6)
        assert ranks().is_main is main
        with caplog.at_level(logging.WARNING):
            notices.tell("told")
        assert len(caplog.records) == int(main)


@pytest.mark.parametrize("given", [OPEN_MPI, SRUN], ids=["mpirun", "srun"])
def test_it_is_said_what_to_write_where_nobody_says_where_to_meet(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with playing("a100"), pytest.raises(DistributedError, match="MASTER_ADDR is not set") as caught:
        init_distributed("cpu")
    assert str(caught.value).endswith(
        '$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))'
        if given is SRUN
        else "MASTER_PORT=29500 (and with Open MPI on several machines: mpirun -x MASTER_ADDR "
        "-x MASTER_PORT)"
    )
    monkeypatch.setenv("MASTER_ADDR", "node1")
    with pytest.raises(DistributedError, match="MASTER_PORT is not set"):
        init_distributed("cpu")


def _two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1",
    }.items():  # fmt: skip
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
    ("key", "device", "backend"),
    [("a100", "cuda:1", "nccl"), ("max1550", "xpu:1", "xccl"), ("cpu", "cpu:0", "gloo")],
)
def test_each_kind_of_device_talks_its_own_way(
    monkeypatch: pytest.MonkeyPatch, key: str, device: str, backend: str
) -> None:
    _two_ranks(monkeypatch)
    joined = []
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: True)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *args, **how: joined.append((*args, how))
    )
    with play(key, count=int(device[-1]) + 1) as played:
        assert init_distributed(device) == Ranks(1, 1, 2)
    assert joined == [(backend, {"rank": 1, "world_size": 2})]
    assert played.current == int(device[-1])


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_decides_or_fails_for_all(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    sent: list[Any] = [7, ""]

    def broadcast(told: list[Any], src: int) -> None:
        assert src == 0
        if rank:
            told[:] = sent

    def refuse() -> int:
        raise ValueError("no")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    assert of_rank_0(lambda: 7 if rank == 0 else 8) == 7
    sent = [None, "ValueError: no"]
    with pytest.raises(RuntimeError, match=r"^rank 0 failed: ValueError: no$"):
        of_rank_0(refuse)


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
    ("machines", "expected", "names"),
    [
        (["a100", "t4"], ["bf16 -> fp16", "fp16 -> fp16"], ["RANK", "LOCAL_RANK", "WORLD_SIZE"]),
        (
            ["a100", "cpu"],
            ["bf16 -> fp32", "fp32 -> fp32"],
            ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"],
        ),
    ],
    ids=["torchrun", "srun"],
)
def test_real_ranks_agree_on_the_weakest_plan_and_one_tells(
    tmp_path: Path, machines: list[str], expected: list[str], names: list[str]
) -> None:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # What the launcher sets, without its own start-up time.
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, str(program), *machines],
            env={**os.environ, **common, **dict(zip(names, (str(rank), str(rank), "2")))},  # noqa: B905
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


def test_one_that_lacks_its_rank_still_speaks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The error about it would be silenced otherwise."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with caplog.at_level(logging.WARNING):
        notices.tell("said by all who cannot know")
    assert len(caplog.records) == 1


def test_what_a_process_is_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        ranks().rank = 1  # type: ignore[misc]
