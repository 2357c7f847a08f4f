"""Recording: nothing changes, nothing waits, and what is recorded is what was computed."""

from __future__ import annotations

import copy
import gc
import random
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from portable_amp import DeviceContext, PortableAmpWarning, TraceError, cli, rng_state
from portable_amp.numerics import fingerprint, pending, tracefile
from portable_amp.numerics.fingerprint import sample, stats
from portable_amp.testing import play

CPU = DeviceContext("cpu", precision="fp32")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.shared = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor, *, twice: bool = False) -> dict[str, Any]:
        self.seen = self.seen + 1
        y = self.drop(self.act(self.norm(self.first(x)))).mean((2, 3))
        for _ in range(1 + twice):
            y = self.shared(input=y)
        return {"logits": (y, None), "n": 3}


def loop(model: nn.Module, steps: int, **given: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        loss = model(torch.randn(4, 3, 8, 8), **given)["logits"][0].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def recorded(model: nn.Module, path: Path, train: Callable[[], Any], **given: Any) -> Any:
    with CPU.trace(model, path, **given):
        train()
    return tracefile.read(path)


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    ends = []
    for traced in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        model = Net()
        before = {name: vars(one).copy() for name, one in model.named_modules()}
        followed = torch.nn.Module.__call__, torch.autograd.backward, torch.amp.GradScaler.step
        if traced:
            with CPU.trace(model, tmp_path / "t"):
                optimizer = loop(model, 3, twice=True)
        else:
            optimizer = loop(model, 3, twice=True)
        assert followed == (
            torch.nn.Module.__call__, torch.autograd.backward, torch.amp.GradScaler.step,
        )  # fmt: skip
        for name, one in model.named_modules():
            assert vars(one).keys() == before[name].keys()
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
                assert not vars(one)[hooks]
        momenta = [one["momentum_buffer"] for one in optimizer.state.values()]
        ends.append(([*model.state_dict().values(), *momenta], rng_state()["torch"]))
    (one, drawn), (other, drawn_too) = ends
    assert len(one) == len(other) > 10
    assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))
    assert torch.equal(drawn, drawn_too)


def test_what_is_recorded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    trace = recorded(model, tmp_path / "t", lambda: loop(model, 2, twice=True))
    assert len(trace.steps) == 2
    assert (trace.notes, trace.header["plan"], [*trace.states]) == ([], "fp32", [0, 1, 2])
    step = trace.steps[0]
    names = [(call.name, call.number, call.type) for call in step.calls]
    assert names == [
        ("", 1, "Net"), ("first", 1, "Conv2d"), ("norm", 1, "BatchNorm2d"), ("act", 1, "ReLU"),
        ("drop", 1, "Dropout"), ("shared", 1, "Linear"), ("shared", 2, "Linear"),
    ]  # fmt: skip
    assert [call.parent for call in step.calls] == [None, *[0] * 6]
    norm, act, last = step.calls[2], step.calls[3], step.calls[6]
    assert norm.outputs == act.inputs  # one tensor, before it is overwritten
    assert act.outputs != act.inputs
    assert last.outputs == step.calls[0].outputs
    assert set(act.outputs + act.inputs + last.inputs + last.outputs) <= set(step.gradients)
    assert set(step.parameters) == {name for name, _ in model.named_parameters()}
    assert step.loss is not None
    assert step.loss > 0
    assert (step.scale, step.rates, step.skipped, step.coarse) == (1.0, [0.1], False, False)
    assert step.values[0][:2] == ("float32", [4, 3, 8, 8])
    assert trace.states[1]["seen"].rms == 1
    assert trace.states[2]["seen"].rms == 2


def test_the_numbers_of_a_tensor() -> None:
    one = torch.tensor([1.0, -3.0, 2.0, 0.0])
    (row,) = stats([s for s in [sample(one)] if s])
    assert (row.largest, row.mean, row.nonfinite) == (3, 0, 0)
    assert row.rms == pytest.approx(14**0.5 / 2)
    assert [abs(p) for p in row.projections] == [1, 3, 2, 0]
    big = torch.ones(10_000)
    big[1] = torch.nan  # none of the sampled elements
    rows = stats([s for s in map(sample, (big, torch.full((3,), torch.inf))) if s])
    assert [one.nonfinite for one in rows] == [1e-4, 1]
    assert rows[0].rms == 1


@pytest.mark.parametrize(
    "size", [(3, 8, 5, 7), (4, 64, 31, 33), (2, 3, 16, 16, 9), (5000,), (1, 1)]
)
def test_a_fingerprint_knows_nothing_of_layout_and_dtype(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    one = torch.randn(size).bfloat16().float()
    others = [one.bfloat16(), one.double(), one.clone().requires_grad_(), one.flip(0).flip(0)]
    if len(size) > 3:
        layout = torch.channels_last if len(size) == 4 else torch.channels_last_3d
        others += [
            one.contiguous(memory_format=layout),
            one.transpose(1, 2).clone().transpose(1, 2),
        ]
        others.append(torch.stack([one, one], -1)[..., 1])
    state = torch.get_rng_state()
    rows = stats([s for s in map(sample, [one, *others]) if s])
    assert len(rows) == len(others) + 1
    assert set(rows) == {rows[0]}
    assert torch.equal(torch.get_rng_state(), state)
    assert rows[0].rms == pytest.approx(float(one.square().mean().sqrt()), rel=0.1)


def test_each_element_may_be_sampled_and_counts_in_one_direction() -> None:
    directions = fingerprint._directions()
    assert directions.abs().sum(1).eq(1).all()
    assert directions.sum(0).abs().max() < 4 * 512**0.5
    assert directions[:6].sum(1).tolist() == [-1.0, 1.0, -1.0, -1.0, -1.0, -1.0]  # on every machine
    for count in (1, 7, 2048, 2049, 50_000, 64 * 112 * 112):
        one = sample(torch.arange(count).float())
        assert one
        assert count / 4 <= min(len(one.elements), 2048 + count) <= 2048 or count > 4 * 2048
        assert one.elements[-1] > count * 0.9 - 1


@pytest.mark.parametrize(
    "one",
    [
        torch.ones(3, dtype=torch.long), torch.ones(0), torch.ones(3, device="meta"),
        torch.ones(2, dtype=torch.bool),
    ],
)  # fmt: skip
def test_what_has_no_numbers_is_left_out(one: torch.Tensor) -> None:
    assert sample(one) is None


def test_complex_and_sparse_tensors_have_numbers() -> None:
    one = torch.tensor([3 + 4j, 0])
    sparse = torch.tensor([[0.0, 5.0]]).to_sparse()
    rows = stats([s for s in map(sample, (one, one.conj(), sparse)) if s])
    assert [row.largest for row in rows] == [4, 4, 5]
    assert rows[1].mean == pytest.approx(-0.25)


def test_accumulation_evaluation_and_several_optimizers(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 2)})
    optimizers = [
        torch.optim.SGD(one.parameters(), lr=rate)
        for one, rate in ((model["a"], 0.1), (model["b"], torch.tensor(0.2)))
    ]

    def train() -> None:
        for _ in range(3):
            for _ in range(2):
                model["b"](model["a"](torch.randn(3, 4))).sum().backward()
                with torch.no_grad():
                    model["b"](model["a"](torch.randn(3, 4)))
            for one in optimizers:
                one.step()
                one.zero_grad()
            with torch.inference_mode():
                model["a"](torch.randn(3, 4))

    trace = recorded(model, tmp_path / "t", train)
    assert len(trace.steps) == 3
    for step in trace.steps:
        assert [(call.name, call.number) for call in step.calls] == [
            ("a", 1), ("b", 1), ("a", 2), ("b", 2),
        ]  # fmt: skip
        assert step.rates == [0.1, pytest.approx(0.2)]
        assert len(step.parameters) == 4
        assert len(step.gradients) == 4  # the batch needs none


@pytest.mark.filterwarnings("ignore:.*autocast:FutureWarning")  # torch 2.4's own
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_does_not_count_twice(reentrant: bool, tmp_path: Path) -> None:
    class Checkpointed(Net):
        def forward(self, x: torch.Tensor, **kwargs: Any) -> Any:
            x = x.requires_grad_()
            return checkpoint(super().forward, x, use_reentrant=reentrant, **kwargs)

    if reentrant:
        model: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        def train() -> None:
            x = torch.randn(3, 4, requires_grad=True)
            checkpoint(model, x, use_reentrant=True).sum().backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()

        # Its first pass has no gradients, and its second is in the backward pass.
        assert recorded(model, tmp_path / "t", train).steps == []
        return
    model = Checkpointed()
    trace = recorded(model, tmp_path / "t", lambda: loop(model, 1))
    assert len(trace.steps[0].calls) == 6
    assert len(trace.steps[0].gradients) > 4


def test_a_module_that_is_called_often_is_recorded_at_first(tmp_path: Path) -> None:
    cell = nn.Linear(4, 4)

    def train() -> None:
        y = torch.randn(3, 4)
        for _ in range(20):
            y = cell(y)
        y.sum().backward()
        torch.optim.SGD(cell.parameters(), lr=0.1).step()

    (step,) = recorded(cell, tmp_path / "t", train).steps
    assert [call.number for call in step.calls] == [*range(1, pending.CALLS + 1)]


def test_steps_of_other_optimizers_end_when_told(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    with CPU.trace(model, tmp_path / "t") as trace:
        for number in range(3):
            model(torch.ones(2, 4)).sum().backward()
            with torch.no_grad():
                for one in model.parameters():
                    one -= 0.1 * one.grad
                    one.grad = None if number else one.grad
            trace.step(float(number))
        model(torch.ones(2, 4))  # no backward pass: no step
    steps = tracefile.read(tmp_path / "t").steps
    assert [step.loss for step in steps] == [0, 1, 2]
    assert set(steps[0].parameters) == {"weight", "bias"}


def test_gradients_have_no_loss_scale_in_them(tmp_path: Path) -> None:
    steps = []
    for machine in ("cpu", "t4"):
        with play(machine, live=True):
            ctx = DeviceContext(precision="fp16" if machine == "t4" else "fp32")
            torch.manual_seed(0)
            model = ctx.to(nn.Linear(8, 4))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            scaler = ctx.scaler(1024.0)
            with ctx.trace(model, tmp_path / machine):
                with ctx.autocast():
                    loss = model(ctx.to(torch.ones(4, 8))).square().mean()
                scaler.backward_step(loss, optimizer)
        steps += tracefile.read(tmp_path / machine).steps
    one, other = steps
    assert (one.scale, other.scale) == (1, 1024)
    assert one.loss == pytest.approx(other.loss, rel=1e-2)
    for mine, its in (
        (one.parameters["weight"][2], other.parameters["weight"][2]),
        (next(iter(one.gradients.values()))[1], next(iter(other.gradients.values()))[1]),
    ):
        assert mine.rms == pytest.approx(its.rms, rel=1e-2)


def test_a_skipped_step_is_a_step(tmp_path: Path) -> None:
    with play("t4", live=True):
        ctx = DeviceContext()
        model = ctx.to(nn.Linear(8, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = ctx.scaler(2.0**20)
        with ctx.trace(model, tmp_path / "t"):
            for _ in range(12):
                with ctx.autocast():
                    loss = 20 * model(ctx.to(torch.ones(4, 8))).square().mean()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    steps = tracefile.read(tmp_path / "t").steps
    assert len(steps) == 12
    assert steps[0].skipped
    assert not steps[-1].skipped
    assert steps[0].parameters["weight"][2].nonfinite > 0
    assert steps[0].scale == 2.0**20 > steps[-1].scale


def test_wrappers_copies_and_graphs(tmp_path: Path) -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    trace = recorded(compiled, tmp_path / "t", lambda: loop(compiled, 1))
    assert [call.name for call in trace.steps[0].calls] == [""]  # one call is what is compiled
    assert set(trace.steps[0].parameters) == {name for name, _ in model.named_parameters()}
    with CPU.trace(model, tmp_path / "t"):
        twin = copy.deepcopy(model)
        loop(twin, 1)  # not what is traced
        loop(model, 1)
    assert len(tracefile.read(tmp_path / "t").steps) == 1
    with CPU.trace(model, tmp_path / "t"):
        loop(torch.compile(model, backend="eager"), 2)
    assert [call.name for call in tracefile.read(tmp_path / "t").steps[1].calls] == [""]
    gone = weakref.ref(model := Net())
    with CPU.trace(model, tmp_path / "t") as trace:
        loop(model, 1)
    del model
    gc.collect()
    assert (gone(), trace.recorded) == (None, 1)


def test_an_exception_ends_the_trace_and_not_what_is_known(tmp_path: Path) -> None:
    model = Net()
    with pytest.raises(ZeroDivisionError), CPU.trace(model, tmp_path / "t") as trace:
        loop(model, 2)
        raise ZeroDivisionError
    assert trace.recorded == 2
    read = tracefile.read(tmp_path / "t")
    assert len(read.steps) == 2
    assert read.notes == [f"{str(tmp_path / 't')!r} ends with ZeroDivisionError"]
    with (
        pytest.raises(RuntimeError, match="one at a time"),
        CPU.trace(model, tmp_path / "t"),
        CPU.trace(model, tmp_path / "u"),
    ):
        pass
    assert torch.nn.Module.__call__.__name__ == "_wrapped_call_impl"


def test_the_limit_ends_it_within_the_block(tmp_path: Path) -> None:
    model = Net()
    with CPU.trace(model, tmp_path / "t", steps=2):
        loop(model, 3)
        assert torch.nn.Module.__call__.__name__ == "_wrapped_call_impl"
        assert [one.name for one in tmp_path.iterdir()] == ["t"]
    assert len(tracefile.read(tmp_path / "t").steps) == 2
    for wrong in (0, True, -3):
        with pytest.raises(ValueError, match="from 1 on"):
            CPU.trace(model, tmp_path / "t", steps=wrong)


def test_a_full_disk_ends_the_trace_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    with CPU.trace(model, tmp_path / "t") as trace:
        loop(model, 2)

        def full(writer: Any, data: bytes) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tracefile.Writer, "_put", full)
        with pytest.warns(PortableAmpWarning, match="No space left.*the training goes on"):
            loop(model, 2)
        loop(model, 1)
    assert trace.recorded == 1
    (left,) = tmp_path.iterdir()
    read = tracefile.read(left)
    assert len(read.steps) == 1
    assert "cut off after step 1" in read.notes[0]


def test_a_folder_that_is_gone_ends_the_trace_alone(tmp_path: Path) -> None:
    model, folder = Net(), tmp_path / "folder"
    folder.mkdir()
    with (
        pytest.warns(PortableAmpWarning, match="the training goes on"),
        CPU.trace(model, folder / "t"),
    ):
        loop(model, 1)
        shutil.rmtree(folder)
    assert torch.nn.Module.__call__.__name__ == "_wrapped_call_impl"


def test_a_file_that_cannot_be_written_is_told_before_training(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "t", "a\0b"):
        with pytest.raises(TraceError, match="cannot write the trace"), CPU.trace(Net(), path):
            pass
        assert torch.nn.Module.__call__.__name__ == "_wrapped_call_impl"


def test_each_rank_has_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    model = Net()
    with CPU.trace(model, tmp_path / "t"):
        loop(model, 1)
    assert [one.name for one in tmp_path.iterdir()] == ["t.rank2"]


def test_no_wait_before_the_end_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, events = Net(), []
    fetched = fingerprint.fetched

    def fetching(tensors: Any) -> Any:
        events.append("fetch")
        return fetched(tensors)

    for room in (fingerprint, pending):
        monkeypatch.setattr(room, "fetched", fetching)
    for name in ("item", "tolist", "cpu", "__float__", "__bool__"):
        real = getattr(torch.Tensor, name)

        def waiting(one: torch.Tensor, *args: Any, real: Any = real, name: str = name) -> Any:
            if not events or events[-1] != "fetch":
                events.append(name)
            return real(one, *args)

        monkeypatch.setattr(torch.Tensor, name, waiting)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with CPU.trace(model, tmp_path / "t"):
        for number in range(2):
            out = model(torch.randn(4, 3, 8, 8))
            events.append("forward")
            out["logits"][0].sum().backward()
            events.append("backward")
            optimizer.step()
            events.append(f"step {number}")
    told = [one for one in events if one != "fetch"]
    assert told == ["forward", "backward", "step 0", "forward", "backward", "step 1"]
    assert events[:3] == told[:3]
    assert "fetch" in events


SCRIPT = """
import sys, torch
from helper import width
print(sys.argv[1:], __name__, __file__.endswith("train.py"))
model = torch.nn.Linear(width, 2)
other = torch.nn.Sequential(torch.nn.Linear(2, 2))
optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
for step in range(4):
    other(model(torch.randn(3, width))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program with a module of its own beside it, in a folder; we are in the one above."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "helper.py").write_text("width = 3")
    script = tmp_path / "own" / "train.py"
    script.write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    return script


def trace_of(*words: str) -> int | None:
    """The exit code of `portable-amp trace`."""
    try:
        return cli.main(["trace", *words])
    except SystemExit as left:
        return left.code  # type: ignore[return-value]
    finally:
        sys.modules.pop("helper", None)


def test_a_program_is_recorded_as_it_is(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.argv[:], sys.path[:]
    assert trace_of("record", "--steps", "3", "out.trace", "own/train.py", "--steps", "7") == 0
    assert capsys.readouterr() == ("['--steps', '7'] __main__ True\n", "")
    assert before == (sys.argv, sys.path)
    steps = tracefile.read("out.trace").steps
    assert len(steps) == 3
    assert [call.name for call in steps[0].calls] == ["", "Sequential 2: ", "Sequential 2: 0"]
    assert set(steps[0].parameters) == {
        "weight", "bias", "Sequential 2: 0.weight", "Sequential 2: 0.bias",
    }  # fmt: skip


def test_a_program_ends_as_it_would_alone(
    program: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program.write_text(SCRIPT + "def f():\n    1 / 0\nf()\n")
    assert trace_of("record", "out.trace", "own/train.py") == 1
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "Traceback (most recent call last):"
    assert told[1].startswith('  File "own/train.py", line ')
    assert told[-1] == "ZeroDivisionError: division by zero"
    assert "runpy" not in "".join(told)
    assert len(tracefile.read("out.trace").steps) == 4

    Path("helper.py").write_text("width = 5")
    Path("train.py").write_text(SCRIPT + "import os; os.chdir('own'); sys.exit(7)\n")
    assert trace_of("record", "out.trace", "-m", "train", "a") == 7
    assert capsys.readouterr().out.startswith("['a'] __main__")
    monkeypatch.chdir("..")
    assert tracefile.read("out.trace").notes == []
    assert tracefile.read("out.trace").steps[0].values[0][1] == [3, 5]

    Path("idle.py").write_text("raise KeyboardInterrupt")
    assert trace_of("record", "out.trace", "idle.py") == 130
    assert "no step of training was seen in 'idle.py'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["out"], "what to run?"),
        (["out", "--steps", "3", "own/train.py"], "what to run?"),
        (["out", "none.py"], "there is no program 'none.py'"),
        (["--steps", "0", "out", "own/train.py"], "--steps 0: a number from 1 on"),
        (["none/out", "own/train.py"], "cannot write the trace 'none/out'"),
    ],
)
def test_what_cannot_be_recorded_is_told_in_a_line(
    words: list[str], why: str, program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trace_of("record", *words) == 2
    out, told = capsys.readouterr()
    assert (out, told.count("\n")) == ("", 1)
    assert why in told


def test_what_a_program_that_dies_has_done_can_be_read(
    program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program.write_text(SCRIPT + "import os; os._exit(9)\n")
    command = [sys.executable, "-m", "portable_amp", "trace", "record", "out", "own/train.py"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 9
    (left,) = Path().glob("out.*.partial")
    assert "cut off after step 3" in tracefile.read(left).notes[0]
    assert trace_of("compare", "out", "out") == 2
    assert left.name in capsys.readouterr().err
    assert trace_of("compare", str(left), str(left)) == 0
    assert "the two runs agree over 3 steps" in capsys.readouterr().out
