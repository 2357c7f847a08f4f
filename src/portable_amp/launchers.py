"""Which process of how many this is: where torchrun, srun and mpirun say it."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launcher:
    """The environment variables that one way of starting processes sets."""

    sign: str
    """Where this one is set, that launcher has started the process."""
    rank: str
    local_rank: str
    world_size: str
    address: str = (
        "export MASTER_ADDR=$(hostname) MASTER_PORT=29500 (and with Open MPI on several machines: "
        "mpirun -x MASTER_ADDR -x MASTER_PORT)"
    )
    """What to write before the command so that the processes find each other."""


_SRUN_ADDRESS = (
    'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) '
    "MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))"
)
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")

# The first whose sign is there. mpirun comes before srun, which it uses to start its own daemons:
# their SLURM_PROCID is inherited, and is no rank.
# Source: Open MPI's and MVAPICH2's documentation; Hydra, the launcher of MPICH and Intel MPI;
# Cray's PALS; Slurm's srun: only it sets SLURM_STEP_NUM_TASKS. A batch script, or a shell of
# salloc, has SLURM_PROCID=0 and the SLURM_NTASKS of the whole job, though it is one process.
LAUNCHERS = (
    Launcher("RANK", *_TORCHRUN),
    Launcher("WORLD_SIZE", *_TORCHRUN),
    *(
        Launcher(f"{stem}_RANK", f"{stem}_RANK", f"{stem}_LOCAL_RANK", f"{stem}_SIZE")
        for stem in ("OMPI_COMM_WORLD", "MV2_COMM_WORLD")
    ),
    Launcher("MPI_LOCALRANKID", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
    Launcher("PMI_LOCAL_RANK", "PMI_RANK", "PMI_LOCAL_RANK", "PMI_SIZE"),
    Launcher(
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_STEP_NUM_TASKS",
        _SRUN_ADDRESS,
    ),
    # srun with PMI sets this one too; alone it does not say which process of its node this is.
    Launcher("PMI_RANK", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
)


def launcher() -> Launcher | None:
    """What has started this process along with others; None where nobody says so."""
    return next((row for row in LAUNCHERS if row.sign in os.environ), None)


def is_first() -> bool:
    """Whether this is the process of rank 0, or the only one; never raises."""
    row = launcher()
    return row is None or os.environ.get(row.rank, "0") == "0"


def local_rank() -> tuple[str, int] | None:
    """The variable that says which process of its node this is, and what it says."""
    row = launcher()
    for name in ("LOCAL_RANK", row.local_rank if row else ""):
        if os.environ.get(name, "").isdecimal():
            return name, int(os.environ[name])
    return None
