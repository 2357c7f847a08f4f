"""Faults put into models on purpose: `verify` names each where it is, and accuses nobody else."""

from __future__ import annotations

from pathlib import Path

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


def test_the_page_has_all() -> None:
    page = Path(__file__).parents[2] / "docs" / "explanation" / "evidence" / "planted.md"
    rows = [f"| {what} | {name} | " for what, (name, _, _) in PLANTED.items()]
    told = page.read_text("utf-8")
    assert [row for row in rows if row not in told] == []
