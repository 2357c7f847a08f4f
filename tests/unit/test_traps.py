from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from portable_amp import DeviceContext, api, maybe_autocast
from portable_amp.testing import Machine, machine
from portable_amp.testing.machines import MACHINES
from portable_amp.traps import TRAPS, traps_for

Where = Callable[[Machine], bool]

# A trap by its source or by what it says, and who is to be told of it: where the catalogue says
# that the machine computes so, or with the versions of torch that the source names.
TOLD: dict[str, Where] = {
    "is_bf16_supported": lambda row: on("cuda", row) and not fine(torch.bfloat16, row),
    "pytorch#58123": lambda row: on("cuda", row) and torch.float16 in row.wrong,
    "pytorch#139550": lambda row: row.hardware.system == "Darwin",
    "pytorch#175189": lambda row: row.hardware.system == "Darwin",
    "pytorch#181485": lambda row: row.hardware.system == "Darwin",
    "torch 2.5 on MPS": lambda row: on("mps", row) and row.hardware.torch_version == (2, 5),
    "pytorch#186430": lambda row: on("mps", row) and row.hardware.torch_version[1] in range(9, 13),
    "are spawned": lambda row: row.hardware.system in ("Darwin", "Windows"),
    "Triton": lambda row: not row.triton,
    "pytorch#142397": lambda row: torch.float64 in row.capabilities.missing_dtypes,
    "pytorch#118499": lambda row: on("cpu", row) and torch.bfloat16 in row.slow,
    "fp16 on this CPU": lambda row: on("cpu", row) and torch.float16 in row.slow,
    "never learns": lambda row: True,
    "pytorch#112583": lambda row: row.hardware.torch_version[1] < 11,
    "say enabled": lambda row: on("cpu", row),
}


WINDOWS = [
    replace(row, triton=triton, hardware=replace(row.hardware, system="Windows"))
    for row, triton in ((machine("arc-a770"), False), (machine("cpu"), True))
]


def on(device_type: str, row: Machine) -> bool:
    return row.hardware.device_type == device_type


def fine(dtype: torch.dtype, row: Machine) -> bool:
    return dtype not in (*row.slow, *row.wrong)


@pytest.mark.parametrize("minor", range(4, 16))
def test_each_machine_is_told_of_its_own_traps(minor: int) -> None:
    for old in (*MACHINES, *WINDOWS):
        row = replace(old, hardware=replace(old.hardware, torch_version=(2, minor)))
        found = traps_for(row.hardware, row.capabilities)
        for words, where in TOLD.items():
            told = [
                trap for trap in found if re.search(rf"\b{words}", f"{trap.what} {trap.source}")
            ]
            assert len(told) == where(row), (row.key, words)
        assert len(found) == sum(where(row) for where in TOLD.values())


def test_what_a_cure_names_exists() -> None:
    takes = (DeviceContext, DeviceContext.autocast, maybe_autocast, torch.utils.data.DataLoader)
    arguments = {name for what in takes for name in inspect.signature(what).parameters}
    for trap in TRAPS:
        for name in re.findall(r"(\w+)=", trap.cure):
            assert name in arguments, trap.cure
        for precision in re.findall(r"precision='(\w+)'", trap.cure):
            DeviceContext("cpu", precision=precision)
        for method in re.findall(r"\bctx\.(\w+)\(", trap.cure):
            assert callable(getattr(DeviceContext, method)), trap.cure
        for name in re.findall(r"(?<!\.)\b(maybe_\w+|[A-Z]\w+)\(", trap.cure):
            assert name in api.__all__, trap.cure
