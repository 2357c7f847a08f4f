"""Faults put into models on purpose: `verify` names each where it is, and accuses nobody else."""

from __future__ import annotations

import pytest

from planted import PLANTED, plant
from portable_amp import DeviceContext

KINDS = {"products in TF32": "tf32", "products in bf16": "bf16"}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_fault_is_named_where_it_is(what: str) -> None:
    name = PLANTED[what][0]
    if "_" in name or name.startswith("resnet"):
        pytest.importorskip("timm")
    model, batch, place = plant(what)
    repeats = 1 + (what == "the second run")
    report = DeviceContext("cpu", precision="fp32").verify(model, batch, repeats=repeats)
    assert {one.module for one in report.faults} == {place}, str(report)
    assert {one.kind for one in report.faults} == {KINDS.get(what, "wrong")}
    assert {one.type for one in report.faults} == {"Planted"}


def test_there_are_forty() -> None:
    assert len(PLANTED) >= 40
