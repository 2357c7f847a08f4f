"""The file of a trace: whole, cut off, damaged, foreign; and two that do not fit."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portable_amp import TraceError, cli
from portable_amp.numerics import tracefile
from portable_amp.numerics.compare import compare
from portable_amp.numerics.difference import distance
from portable_amp.numerics.tracefile import Call, Stats, Step, Writer, pack, read, unpack

NUMBER = st.floats(width=32)
ROW = st.builds(Stats, NUMBER, NUMBER, NUMBER, NUMBER, st.tuples(*[NUMBER] * 4))


def near(a: float, b: float, width: int) -> bool:
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    if math.isinf(a) or width == 4:
        return a == b
    return abs(a - b) <= max(abs(a) * 2.0**-15, 1e-40)


@given(st.lists(ROW, max_size=5), st.sampled_from([3, 4]))
def test_numbers_come_back(rows: list[Stats], width: int) -> None:
    back = unpack(pack(rows, width), width)
    assert len(back) == len(rows)
    for row, other in zip(rows, back, strict=True):
        pairs = zip([*row[:4], *row.projections], [*other[:4], *other.projections], strict=True)
        assert all(near(a, b, width) for a, b in pairs)


def row(size: float = 1.0) -> Stats:
    return Stats(2 * size, 0.0, size, 0.0, (size, -size, size, size))


def a_step(number: int = 1, name: str = "fc", **given: Any) -> Step:
    step = Step(number, 1.0, 1.0, [0.1], False)
    step.calls = [
        Call("", 1, "Net", None, [0], [1], True),
        Call(name, 1, "Linear", 0, [0], [1], True),
    ]
    step.values = [("float32", [4, 8], row()), ("float32", [4, 2], row())]
    step.gradients = {1: ("float32", row(0.1))}
    step.parameters = {f"{name}.weight": ("float32", [2, 8], row())}
    for key, value in given.items():
        setattr(step, key, value)
    return step


def written(path: Path, steps: list[Step], *, state: bool = True, why: str = "") -> Path:
    writer = Writer(path, {"torch": "2", "device": "cpu"})
    for step in steps:
        if state and step.number == 1:
            writer.state(0, {name: row() for name in step.parameters})
        writer.step(step)
    writer.close(why)
    return path


@pytest.mark.parametrize("name", ["fc", "schön.層", 'a\nb\\"c', "x" * 5000, "\ud800"])
def test_a_file_comes_back(name: str, tmp_path: Path) -> None:
    steps = [a_step(1, name), a_step(2, name), a_step(3, name, calls=[], gradients={})]
    trace = read(written(tmp_path / "t", steps))
    assert trace.header == {"torch": "2", "device": "cpu"}
    assert (len(trace.steps), trace.notes) == (3, [])
    assert [vars(step)["calls"] for step in trace.steps] == [step.calls for step in steps]
    assert trace.steps[0].values[0][:2] == ("float32", [4, 8])
    assert [*trace.states[0]] == [f"{name}.weight"]
    assert [one.name for one in tmp_path.iterdir()] == ["t"]


def test_wherever_it_is_cut_off_the_steps_before_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "t", [a_step(n) for n in range(1, 5)])
    data = path.read_bytes()
    counts = []
    for length in [*range(0, len(data), 3), len(data) - 1]:
        path.write_bytes(data[:length])
        try:
            trace = read(path)
        except TraceError:
            assert not counts  # not once a step was read
        else:
            assert "cut off" in trace.notes[0]
            counts.append(len(trace.steps))
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 4)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = written(tmp_path / "t", [a_step(n) for n in range(1, 3)])
    data = path.read_bytes()
    for at in range(0, len(data), 5):
        broken = bytearray(data)
        broken[at] ^= 4
        path.write_bytes(broken)
        try:
            notes = read(path).notes
        except TraceError:
            continue
        assert "cut off" in notes[0], at  # a length that leads beyond the end


def record(kind: bytes, content: bytes) -> bytes:
    packed = zlib.compress(content)
    return tracefile._HEAD.pack(kind, len(packed), zlib.crc32(kind + packed)) + packed


FIRST = b"portable-amp trace 1\n"
UNUSABLE = {
    "empty": (b"", "is empty"),
    "foreign": (b"\x80\x02}q\x00.", "is no trace"),
    "a photograph": (b"\xff\xd8\xff\n" * 50, "is no trace"),
    "newer": (b"portable-amp trace 2\nwhatever", "is of version 2"),
    "no version": (b"portable-amp trace x\n", "is no trace"),
    "a long version": (b"portable-amp trace " + b"9" * 5000 + b"\n", "is no trace"),
    "nothing after it": (FIRST, "ends before its first step"),
    "junk after it": (FIRST + b"junk" * 9, "is"),
    "no header": (FIRST + record(b"S", b"{}"), "damaged"),
    "a header that is none": (FIRST + record(b"H", b"["), "damaged"),
    "deep": (FIRST + record(b"H", b"[" * 10**6), "damaged"),
    "a step without its layout": (
        FIRST + record(b"H", b"{}") + record(b"S", b"\x02\0\0\0{}"), "damaged",
    ),
    "bomb": (FIRST + record(b"H", b" " * 10**6), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNUSABLE)
def test_an_unusable_file_is_told_in_one_line(
    what: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracefile, "LARGEST", 999_999 if what == "bomb" else 10**7)
    content, why = UNUSABLE[what]
    (tmp_path / "bad").write_bytes(content)
    good = written(tmp_path / "good", [a_step()])
    for files in ((tmp_path / "bad", good), (good, tmp_path / "bad")):
        assert cli.main(["trace", "compare", *map(str, files)]) == 2
        out, told = capsys.readouterr()
        assert (out, told.count("\n")) == ("", 1)
        assert told.startswith("portable-amp: ")
        assert why in told


@pytest.mark.parametrize("path", [".", "none", "", "a\0b", "none/none"])
def test_a_file_that_is_not_there_is_told_in_one_line(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["trace", "compare", path, path]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_two_that_write_one_path_leave_one_whole_file(tmp_path: Path) -> None:
    first = Writer(tmp_path / "t", {"who": 1})
    first.partial = first.partial.rename(tmp_path / "t.1.partial")
    other = Writer(tmp_path / "t", {"who": 2})
    for writer in (first, other):
        writer.step(a_step())
    other.close("")
    assert read(tmp_path / "t").header == {"who": 2}
    first.close("")
    assert read(tmp_path / "t").header == {"who": 1}
    assert len([*tmp_path.iterdir()]) == 1


def test_reading_and_comparing_import_no_torch(tmp_path: Path) -> None:
    path = written(tmp_path / "t", [a_step()])
    code = (
        "import sys, portable_amp.cli\n"
        f"assert portable_amp.cli.main(['trace', 'compare', {str(path)!r}, {str(path)!r}]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def verdict(tmp_path: Path, one: list[Step], other: list[Step]) -> Any:
    return compare(read(written(tmp_path / "a", one)), read(written(tmp_path / "b", other)))


def test_unequal_records_are_told(tmp_path: Path) -> None:
    found = verdict(tmp_path, [a_step()], [a_step(), a_step(2)])
    assert found.same
    assert found.notes == ["1 and 2 steps: the first 1 are compared"]
    found = verdict(tmp_path, [], [a_step()])
    assert (found.kind, found.text) == ("unequal", "there is no step to compare")
    more = a_step()
    more.calls.append(Call("extra", 1, "ReLU", 0, [1], [1], True))
    found = verdict(tmp_path, [a_step()], [more])
    assert found.same
    assert found.notes == ["called in the second run only: 1 calls, of extra"]
    shaped = a_step(values=[("float32", [4, 8], row()), ("float32", [4, 3], row())])
    found = verdict(tmp_path, [a_step()], [shaped])
    assert found.same
    assert "has other shapes: [4, 2] and [4, 3]" in found.notes[0]
    other = a_step(calls=[Call("x", 1, "Net", None, [0], [1], True)], parameters={}, gradients={})
    assert verdict(tmp_path, [a_step()], [other]).kind == "unequal"
    found = verdict(tmp_path, [a_step()], [a_step(rates=[0.1, 0.2])])
    assert found.notes == ["optimizers of 1 and 2 groups of parameters made step 1"]


def test_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = Stats(math.inf, math.nan, math.nan, 0.5, (math.nan,) * 4)
    broken = a_step(values=[("float32", [4, 8], row()), ("float32", [4, 2], bad)])
    one, other = written(tmp_path / "a", [a_step()]), written(tmp_path / "b", [broken])
    assert cli.main(["trace", "compare", "--json", str(one), str(other)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["same"], found["kind"], found["module"], found["step"]) == (
        False,
        "forward",
        "fc",
        1,
    )
    assert found["rows"][0]["distance"] is None
    assert cli.main(["trace", "compare", str(one), str(other)]) == 1
    assert capsys.readouterr().out.splitlines()[0] == (
        "step 1: the output of fc (Linear) is infinite or NaN in one of them, "
        "and what went in is not"
    )


def test_a_name_is_told_in_one_line(tmp_path: Path) -> None:
    broken = a_step(1, "a\nb", values=[("float32", [4, 8], row()), ("float32", [4, 2], row(2))])
    found = verdict(tmp_path, [a_step(1, "a\nb")], [broken])
    assert str(found).splitlines() == [
        r"step 1: the output of 'a\nb' (Linear) is off, and what went in agrees",
        r"- step 1, 'a\nb': output: 5.0e-01 apart, allowed are 1.5e-04",
    ]


def test_distances() -> None:
    assert distance(row(), row()) == 0
    assert distance(row(0), row(0)) == 0
    assert distance(row(), row(1.01)) == pytest.approx(0.01, rel=0.02)
    assert distance(row(), row(0)) == 1
    assert distance(row(1e-9), row(0), least=1.0) == pytest.approx(1e-9)
    one = row()._replace(projections=(1.0, -1.0, 1.0, 3.0))
    assert distance(row(), one) == 0
    assert distance(row(), one, robust=False) == 1
    bad = row()._replace(largest=math.inf)
    assert (distance(bad, bad), distance(row(), bad), distance(bad, row())) == (
        0,
        math.inf,
        math.inf,
    )


def test_gradients_may_be_as_far_apart_as_branches_make_them(tmp_path: Path) -> None:
    def step(dtype: str, forward: float, gradient: float) -> Step:
        values = [("float32", [4, 8], row()), (dtype, [4, 2], row(forward))]
        return a_step(values=values, gradients={1: (dtype, row(gradient))})

    for dtype, forward, gradient, kind in (
        ("bfloat16", 1.004, 1.1, "same"),  # of a share of 0.004 of the elements
        ("bfloat16", 1.004, 1.3, "backward"),
        ("float32", 1.0, 1.01, "same"),
        ("float32", 1.0, 1.1, "backward"),
    ):
        found = verdict(tmp_path, [step(dtype, 1.0, 1.0)], [step(dtype, forward, gradient)])
        assert found.kind == kind, f"{dtype} {gradient}: {found}"
