from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from portable_amp import choose, memory_stats, ranks
from portable_amp.backends import BACKENDS
from portable_amp.launchers import LAUNCHERS
from portable_amp.numerics.judge import Distance, Measure
from portable_amp.numerics.report import Fault, Report
from portable_amp.testing.machines import MACHINES
from portable_amp.testing.play import Call, Quirks
from portable_amp.traps import TRAPS

A100 = next(row for row in MACHINES if row.key == "a100")
RECORDS = (
    A100, A100.hardware, A100.capabilities, choose("auto", A100.capabilities), BACKENDS[0],
    LAUNCHERS[0], TRAPS[0], Call("copy"), Quirks(), ranks(), memory_stats("cpu"),
    Distance("output", 0.0), Measure("off", 0.0, 1.0), Report("cpu", "fp32", (), 0, 0.0, ()),
    Fault("", "Net", "wrong", "output", "off", 1.0, 0.1),
)  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_facts_and_decisions_cannot_be_changed(record: Any) -> None:
    for field in fields(record):
        with pytest.raises(FrozenInstanceError):
            setattr(record, field.name, None)
