"""`portable-amp doctor --thorough`: what computes right is certified, what does not is named."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planted import backward
from portable_amp import cli, doctor
from portable_amp.capabilities import probe
from portable_amp.numerics import certificate, children
from portable_amp.numerics.cases import BY_NAME, FAULTS, STATUSES, Case, Row, cases
from portable_amp.numerics.layouts import LAYOUTS
from portable_amp.numerics.operations import OPERATIONS
from portable_amp.numerics.trial import compare
from portable_amp.testing import machine, play

CPU = torch.device("cpu")


@pytest.mark.parametrize("row", OPERATIONS[::2], ids=lambda row: row.name)
def test_every_operation_is_right_here(row: Any) -> None:
    assert compare(Case(row.name, "fp32", "contiguous", "odd"), CPU).status == "right"


def test_the_table_is_as_wide_as_is_said() -> None:
    assert len(BY_NAME) == len(OPERATIONS) > 80
    can = machine("h100").capabilities
    todo = cases(can)
    assert {one.precision for one in todo} == {
        "fp32", "bf16 autocast", "bf16", "fp16 autocast", "fp16",
    }  # fmt: skip
    assert {one.layout for one in todo} == {*LAYOUTS}
    assert {one.size for one in todo} == {"small", "odd", "large", "one", "empty"}
    assert len({*todo}) == len(todo)
    assert todo[0] == Case("linear", "fp32", "contiguous", "odd")
    assert {one.precision for one in todo[:200]} == {"fp32"}
    for row in OPERATIONS:
        assert row.sizes or torch.Size(row.shapes()["large"]).numel() > 2**15
    assert {one.precision for one in cases(machine("gtx1660").capabilities)} == {
        "fp32", "bf16 autocast", "bf16",
    }  # fmt: skip
    assert {one.operation for one in cases(can, "gelu")} == {"gelu"}


def test_the_layouts_are_what_they_are_called() -> None:
    shape = (3, 5, 4, 6)
    strides = {}
    for name, layout in LAYOUTS.items():
        base = torch.arange(float(torch.Size(layout.base(shape)).numel())).view(layout.base(shape))
        view = layout.view(base, shape)
        assert view.shape == shape
        strides[name] = view.stride(), view.storage_offset()
    assert strides == {
        "contiguous": ((120, 24, 6, 1), 0),
        "channels_last": ((120, 1, 30, 5), 0),
        "strided view": ((260, 52, 13, 2), 1),
        "transposed": ((120, 24, 1, 4), 0),
        "expanded": ((0, 24, 6, 1), 0),
        "far apart": ((2**30 + 1, 24, 6, 1), 0),
    }


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    with play("h100", live=True):
        yield torch.device("cuda:0")


def certified(
    only: str, device: torch.device, precisions: tuple[str, ...] = ("fp32",)
) -> list[dict[str, Any]]:
    def run(device: torch.device, todo: list[Case], **options: Any) -> Iterator[Any]:
        few = [one for one in todo if one.precision in precisions and one.layout != "far apart"]
        return children.here(device, few, **options)

    found = certificate.certify([device], seconds=300, only=only, run=run)
    (one,) = found["devices"]
    rows: list[dict[str, Any]] = one["rows"]
    assert found["ok"] == (not any(row["status"] in FAULTS for row in rows))
    return rows


def off(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["status"] in FAULTS]


def there(x: torch.Tensor) -> bool:
    return x.device.type == "cuda"


def planted(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[..., torch.Tensor]) -> None:
    """On the played device the function of that name gives what `wrong(result, input)` makes."""
    real = getattr(F, name)

    def function(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y: torch.Tensor = real(x, *args, **kwargs)
        return wrong(y, x) if there(x) else y

    monkeypatch.setattr(F, name, function)


def test_nothing_is_found_where_nothing_is_planted(cuda: torch.device) -> None:
    for only in ("batch_norm 2d", "gelu"):
        rows = certified(only, cuda, ("fp32", "fp16", "bf16 autocast"))
        assert {row["status"] for row in rows} <= {"right", "raises"}


def test_a_gradient_that_is_off_in_one_layout_is_found(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        last = x.dim() == 4 and not x.is_contiguous()
        last = last and x.is_contiguous(memory_format=torch.channels_last)
        return backward(y, lambda g: g * 1.02) if last else y

    planted(monkeypatch, "batch_norm", wrong)
    rows = off(certified("batch_norm 2d", cuda, ("fp32", "bf16 autocast", "fp16")))
    assert {row["layout"] for row in rows} == {"channels_last"}
    assert {row["direction"] for row in rows} == {"backward"}
    assert {row["precision"] for row in rows} == {"fp32", "bf16 autocast", "fp16"}
    told = certificate.fault(rows[0])
    assert told.startswith("WRONG batch_norm 2d, fp32, channels_last, odd (3, 5, 9, 7), seed 0: ")
    assert "backward, gradient of " in told
    assert "allowed are " in told


def test_a_gradient_that_is_wrong_beyond_32768_elements_is_found(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beyond(g: torch.Tensor) -> torch.Tensor:
        if g.numel() <= 2**15:
            return g
        flat = g.clone().flatten()
        flat[2**15 :] = 0
        return flat.view(g.shape)

    planted(monkeypatch, "gelu", lambda y, x: backward(y, beyond))
    rows = off(certified("gelu", cuda))
    assert {(row["size"], row["direction"]) for row in rows} == {("large", "backward")}


def test_what_is_wrong_the_second_time_alone_is_found(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def wrong(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return y * (1.05, 1)[len(calls) % 2]

    planted(monkeypatch, "gelu", wrong)
    rows = off(certified("gelu", cuda))
    assert {row["repeat"] for row in rows} == {2}
    assert ", in the second run alone" in certificate.fault(rows[0])


def turned(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return y.as_strided(y.shape, y.stride()[::-1])


@pytest.mark.parametrize(
    ("only", "name", "wrong", "sizes", "what"),
    [
        ("layer_norm", "layer_norm", lambda y, x: y / (x.shape[-1] % 2 == 0), "odd one", "output"),
        ("normalize", "normalize", turned, "odd small large", ""),
        ("mse_loss", "mse_loss", lambda y, x: y.double(), "odd small large one empty", "dtype"),
        ("pad replicate", "pad", lambda y, x: y[..., 1:], "odd small large one", ""),
    ],
    ids=["odd", "strides", "dtype", "shape"],
)
def test_what_is_wrong_in_some_sizes_is_found(
    only: str, name: str, wrong: Callable[..., torch.Tensor], sizes: str, what: str,
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    planted(monkeypatch, name, wrong)
    rows = off(certified(only, cuda))
    assert {row["size"] for row in rows} >= {*sizes.split()}
    assert ("odd one" in sizes) == ("large" not in {row["size"] for row in rows})
    assert all(what in " ".join([row["what"], *row["also"]]) for row in rows)


def test_a_gradient_of_nothing_that_is_not_finite_is_found(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = F.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if there(x) and not len(x):
            weight = backward(weight, lambda g: g + math.nan)
        return real(x, weight, bias)

    monkeypatch.setattr(F, "linear", linear)
    rows = off(certified("linear", cuda))
    assert [(row["size"], row["what"]) for row in rows] == [
        ("empty", "gradient of module.weight"),
    ]
    assert rows[0]["error"] is None


def test_what_is_not_implemented_is_told_and_is_no_fault(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(error: Exception) -> Callable[..., torch.Tensor]:
        def function(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            raise error

        return function

    for error, status in (
        (NotImplementedError("no kernel"), "missing"),
        (RuntimeError("\"mish_cuda\" not implemented for 'Half'"), "missing"),
        (RuntimeError("invalid configuration argument"), "fails"),
        (RuntimeError("CUDA out of memory. Tried to allocate 9.00 GiB"), "memory"),
    ):
        with monkeypatch.context() as patch:
            planted(patch, "mish", raises(error))
            rows = certified("mish", cuda)
        assert {row["status"] for row in rows} == {status}
        assert str(error) in rows[0]["says"]


def test_random_states_stay() -> None:
    state = torch.get_rng_state()
    compare(Case("lstm", "fp32", "contiguous", "small"), CPU)
    assert torch.equal(state, torch.get_rng_state())


def test_another_seed_gives_other_numbers_and_the_same_seed_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    monkeypatch.setattr(
        nn.functional, "gelu", lambda x, **_: (seen.append(x.detach().flatten()[0].item()), x)[1]
    )
    for seed in (0, 0, 1):
        compare(Case("gelu", "fp32", "contiguous", "odd"), CPU, seed)
    first, second, third = seen[0], seen[len(seen) // 3], seen[-1]
    assert first == second != third


def few(case: Case) -> bool:
    return case.precision == "fp32" and case.layout == "contiguous"


def doctored(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    code = cli.main(["doctor", "--thorough", "--in-process", "--device", "cpu", *options])
    return code, capsys.readouterr().out


def test_the_certificate_as_text_json_and_markdown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = certificate.cases
    monkeypatch.setattr(
        certificate, "cases", lambda *given: [one for one in every(*given) if few(one)]
    )
    code, told = doctored(capsys, "--only", "relu")
    assert code == 0
    first, second, *rest = told.splitlines()
    assert first.startswith("cpu: no fault found; ")
    assert second.startswith(f"torch {torch.__version__}, Python ")
    assert any(line.startswith("  fp32: ") for line in rest)
    monkeypatch.setattr(
        F, "relu", lambda x, inplace: x.relu() * (1.1 if x.dtype is torch.float32 else 1)
    )
    code, told = doctored(capsys, "--only", "relu", "--seed", "3")
    assert code == 1
    assert told.splitlines()[0].startswith("cpu: NOT right: relu on cpu; ")
    assert "  WRONG relu, fp32, contiguous, odd (3, 5, 9, 7), seed 3: " in told
    assert "portable-amp doctor --thorough --device cpu --only 'relu' --seed 3" in told
    code, told = doctored(capsys, "--only", "relu", "--json")
    found = json.loads(told)
    assert code == 1
    assert found["ok"] is False
    (device,) = found["devices"]
    assert (
        len(device["rows"])
        == device["cases"]
        == sum(count for row in device["counts"].values() for count in row.values())
    )
    assert {row["status"] for row in device["rows"]} <= {*STATUSES}
    code, told = doctored(capsys, "--only", "relu", "--markdown")
    assert code == 1
    assert told.startswith("**cpu: NOT right: relu on cpu; ")
    assert "\n| fp32 | " in told
    assert "\n```text\nWRONG relu, fp32" in told


def test_where_standard_output_is_closed_the_exit_code_tells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "certificate", lambda **given: {"ok": given["seed"] == 3})
    monkeypatch.setattr(doctor, "certified", lambda found, **given: "")
    monkeypatch.setattr("sys.stdout", None)
    assert cli.main(["doctor", "--thorough", "--seed", "3"]) == 0
    assert cli.main(["doctor", "--thorough", "--seed", "4"]) == 1


def test_what_was_not_reached_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = certificate.certify([CPU], seconds=1e-9, only="relu", run=children.here)
    (device,) = found["devices"]
    assert len(device["rows"]) == 1
    missed = sum(row.get("not reached", 0) for row in device["counts"].values())
    assert missed == device["cases"] - 1
    assert f"1 cases compared of {device['cases']}" in certificate.text(found)
    with play("a100", count=2):
        asked: list[tuple[str, float]] = []

        def run(device: torch.device, todo: Any, **options: Any) -> Iterator[Any]:
            asked.append((str(device), options["until"] - time.monotonic()))
            yield from ()

        monkeypatch.setattr(doctor, "in_children", run)
        doctor.certificate(seconds=30)
    assert [name for name, _ in asked] == ["cuda:0", "cuda:1", "cpu"]
    assert [left for _, left in asked] == pytest.approx([10, 15, 30], abs=2)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--thorough", "--seconds", "0"], "--seconds"),
        (["--thorough", "--seconds", "nan"], "--seconds"),
        (["--thorough", "--json", "--markdown"], "--markdown"),
        (["--seconds", "3"], "--seconds is about --thorough"),
        (["--markdown"], "--markdown is about --thorough"),
        (["--thorough", "--only", "softmx"], "there is no operation 'softmx'; did you mean"),
        (["--thorough", "--device", "cuda:7"], "'cuda:7' is not available"),
    ],
)
def test_wrong_words_end_with_2(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = cli.main(["doctor", *options])
    except SystemExit as end:
        code = end.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def in_children(
    monkeypatch: pytest.MonkeyPatch, fault: str, sizes: tuple[str, ...] = ("odd", "large", "small")
) -> list[Row]:
    """What comes of F.softplus in these sizes, where its float32 has that fault."""
    code = f"""
import os, time, torch, torch.nn.functional as F
from portable_amp.numerics import children
real, sizes = F.softplus, {sizes}
every, compare, at = children.cases, children.compare, []
children.cases = lambda *given: [
    one for one in every(*given)
    if one.precision == "fp32" and one.layout == "contiguous" and one.size in sizes
]
children.compare = lambda *given: at.append(given) or compare(*given)
def softplus(x, *given):
    if x.dtype is torch.float32:
        {fault}
    return real(x, *given)
F.softplus = softplus
children.work()
"""
    monkeypatch.setattr(children, "_CODE", code)
    todo = [one for one in cases(probe(CPU), "softplus") if few(one) and one.size in sizes]
    run = children.in_children(CPU, todo, seed=0, only="softplus", until=time.monotonic() + 300)
    return [*run]


def test_a_crash_is_told_and_the_rest_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = in_children(monkeypatch, "os.write(2, b'corrupted\\n'); os.abort()")
    assert told(rows) == [("odd", "crashes"), ("large", "untried"), ("small", "untried")]
    assert rows[0].says in ("SIGABRT: corrupted", "exit code 0x3: corrupted")


def told(rows: list[Row]) -> list[tuple[str, str]]:
    return [(one.size, one.status) for one in rows]


def test_a_crash_that_another_caused_and_one_that_hangs_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(children, "PATIENCE_S", 3.0)
    fault = "x.numel() > 2**15 and len(at) > 1 and os._exit(7); x.numel() < 70 and time.sleep(60)"
    rows = in_children(monkeypatch, fault)
    assert told(rows) == [
        ("odd", "right"), ("large", "crashes"), ("large", "right"), ("small", "hangs"),
    ]  # fmt: skip
    assert rows[1].says.startswith("exit code 0x7, but not where it is run first: ")
    assert rows[3].says == "no answer in 3 s"


def test_no_process_is_left_where_its_parent_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        children,
        "_CODE",
        "import time; from portable_amp.numerics import children as c; c.cases = c.probe = "
        "lambda *given: time.sleep(100); c.work()",
    )
    with children._Child(device="cpu", dead=[], only=None) as child:
        assert child.process.stdin
        child.process.stdin.close()  # as the system does where the parent has died
        assert child.process.wait(timeout=120) == 1
