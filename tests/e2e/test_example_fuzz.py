"""Hostile input at random: it works, or is refused in one line, and nothing is half-written.

The number of cases is a share of Hypothesis' `max_examples`: 125 in all by default, 500 with
HYPOTHESIS_PROFILE=ci, 20,000 with HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import itertools
import json
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from PIL import Image

import cv_classification.train as training
from cv_classification.__main__ import main
from cv_classification.config import InputError, load_config
from cv_classification.data import read_rows
from portable_amp import CheckpointError, load_checkpoint, save_checkpoint

from .conftest import write_tiny

SECONDS = 20  # a case takes a tenth of one; what takes so long hangs
TINY = (
    *("model.name=test_resnet", "model.image_size=32", "device=cpu", "precision=fp32"),
    *("data.batch_size=8", "data.validation=0.25", "train.epochs=1"),
)


def cases(share: float) -> Any:
    return settings(
        max_examples=max(1, round(share * settings.default.max_examples)),
        deadline=None,
        suppress_health_check=[*HealthCheck],
    )


class Hung(BaseException):
    """Not an Exception, so that no handler of what is tested takes it for a damaged file."""


class Stopped(BaseException):
    """The first epoch is done, which is far enough."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise Hung(f"a case takes longer than {SECONDS} s")

    usual = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    # Where no Python code runs, no handler does: then the whole process ends, and tells where.
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, usual)


def stream() -> io.TextIOWrapper:
    """As a terminal's: what is no UTF-8 cannot be written to it."""
    return io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)


def said(text: io.TextIOWrapper) -> str:
    assert isinstance(text.buffer, io.BytesIO)
    return text.buffer.getvalue().decode("utf-8", "surrogateescape")


def works_or_is_refused(argv: Sequence[str], root: Path) -> int:
    """Run a command, and hold it to the law; its exit status."""
    out, err = stream(), stream()
    err.reconfigure(errors="backslashreplace")  # as Python's own standard error
    with (
        limited(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("default")  # as users have it
        try:
            status = main(argv)
        except Stopped:
            status = 0
    told = said(err)
    assert status in (0, 2), told
    if status == 2:
        assert told.endswith("\n"), told
        assert len(told.splitlines()) == 1, told
        assert len(told) < 1500, told
        assert "Traceback" not in told, told
    check_files(root)
    return status


def check_files(root: Path) -> None:
    """Nothing in it is half-written."""
    assert list(root.rglob(".*.tmp")) == []
    for path in (root / "new").rglob("*"):
        if path.suffix == ".pt":
            load_checkpoint(path)
        elif path.name == "metrics.jsonl":
            [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        elif path.suffix == ".csv":
            read_rows(path)
        elif path.suffix == ".html":
            assert path.read_text("utf-8").rstrip().endswith("</html>")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good data, and a run on it."""
    root = tmp_path_factory.mktemp("fuzz")
    write_tiny(root / "data", per_class=4)
    assert main(["train", f"data.path={root}/data", f"output={root}/run", *TINY]) == 0
    shutil.copytree(root / "run", root / "kept")
    return root


@pytest.fixture(autouse=True)
def one_epoch_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Settings may ask for a million epochs, and for a cache in a folder of any name."""
    monkeypatch.chdir(tmp_path)
    real = training.train_epoch

    def first(*args: Any) -> None:
        real(*args)
        raise Stopped

    monkeypatch.setattr(training, "train_epoch", first)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lists(strategy: st.SearchStrategy[Any], most: int = 3) -> st.SearchStrategy[list[Any]]:
    return st.lists(strategy, min_size=1, max_size=most)


# --- Settings ------------------------------------------------------------------------------------

LAUGHS = "[" + ", ".join(
    f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" if n else "&a0 [lol]" for n in range(9)
) + "]"  # fmt: skip
HOSTILE = (
    *("null", "~", "", "true", "no", "-1", "0", "1", "2", "3", "7", "-0.0", "0.5", "1.0", "1e-6"),
    *("1E3", "1e400", ".nan", ".inf", "-.inf", "nan", "inf", "1.5", "'3'", "'0.1'", "0x10", "0o7"),
    *("2001-01-01", "2001-99-99", "2001-01-01 99:99:99", "1:30:00", "1_000", "017", "0b1"),
    *("!!int abc", "!!int", "!!float x", "!!bool x", "!!timestamp x", "!!binary x", "!!null x"),
    *("!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!str 3", "!!python/object:os.system x"),
    *("!!python/name:os.system", "!own x", "{}", "[]", "[[]]", "[1, [2]]", "{a: 1}", "{1: 2}"),
    *("{[1]: 2}", "{{a: 1}: 2}", "{null: 1}", "{true: 1}", "{a: 1, a: 2}", "{? }", "[{}]"),
    *(r'"\0"', r'"a\0b"', r'"\uD800"', r'"\uDCFF"', r'"\x85\u2028"', r'"\e[2J"', r'"\n\n"'),
    *("9" * 5000, "9" * 400, "-" + "9" * 30, "0x" + "f" * 5000, "1" + "0" * 18, "2147483648"),
    *("&a [*a]", "&a {b: *a}", "*nowhere", LAUGHS, "[" * 1500 + "]" * 1500, "[" * 40 + "]" * 40),
    *("{a: " * 1500 + "}" * 1500, "'", '"', "@", "`", "%", "|", ">", "a: b: c", "<<: 1", "- 1"),
    *("\t1", "x" * 5000, "写真", "🙂", "\x01", "\x7f", "写/真"),
    *("/proc/self", "/dev/null", "/dev/full", "/etc/passwd", "~"),
)  # fmt: skip
# Words that some setting takes.
KNOWN = (
    *("auto", "tuned", "fp16", "bf16", "fp64", "meta", "cpu:7", "cuda", "mps", "privateuseone"),
    *("full", "head", "scratch", "sampler", "copies", "focal", "balanced", "accuracy", "log_loss"),
    *("sgd", "lion", "SGD", "torch.AdamW", "LBFGS", "SparseAdam", "Optimizer", "adafactor"),
    *("onecycle", "plateau", "CyclicLR", "ExponentialLR", "multistep", "tanh", "poly", "step"),
    *("test_vit", "test_byobnet", "resnet18.nope", "test_resnet.r160_in1k", "hf_hub:a/b"),
    *("local-dir:/etc", "digits", "documents", "[tensorboard]", "[wandb, wandb]", "true", "null"),
    *("{cycle_limit: 3}", "{cycle_mul: 0}", "{min_lr: 1e-6}", "{gamma: []}", "{k_decay: 0}"),
    *("{optimizer: 3}", "{last_epoch: 5}", "{milestones: [a]}", "{decay_t: 0}"),
    *("{base_lr: 1e-9, max_lr: 1}", "{T_0: 0}", "{start_factor: 0}", "{mode: x}", "{power: 0}"),
)  # fmt: skip
NUMBERS = ("0", "1", "2", "3", "5", "64", "999", "0.1", "0.999", "1.0", "1e-300", "1e300")
values = st.one_of(
    st.sampled_from(HOSTILE),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=8).map(lambda text: json.dumps(text)),
    st.text(max_size=8),
)


def leaves(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


NAMES = [*leaves(training.Config().model_dump())]
names = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(["data", "model", "train", "model.head", "train.schedule_options", "nothing"]),
    st.text(max_size=6),
)


def fits(name: str, value: str) -> bool:
    """Whether the type is right, at least."""
    try:
        return bool(load_config(None, [f"{name}={value}"]))
    except InputError:
        return False


# What fits gets further than what is hostile.
# Thousands are tried, once they are asked for: not by whoever only collects.
fitting = st.deferred(
    lambda: st.sampled_from(
        [pair for pair in itertools.product(NAMES, (*KNOWN, *NUMBERS)) if fits(*pair)]
    )
)
chosen = st.one_of(st.tuples(names, values), *3 * [fitting])


def tree(root: Path) -> dict[str, Any]:
    """A valid config as nested snippets of YAML."""
    written: dict[str, Any] = {}
    for setting in (*TINY, f"data.path={root}/data", f"output={root}/new"):
        name, _, value = setting.partition("=")
        put(written, name, value)
    return written


def put(sections: dict[str, Any], name: str, snippet: str) -> None:
    *outer, last = name.split(".")
    for section in outer:
        inside = sections.get(section)
        if not isinstance(inside, dict):
            inside = sections[section] = {}
        sections = inside
    sections[last] = snippet


def drop(sections: dict[str, Any], name: str, snippet: str) -> None:
    outer, _, last = name.partition(".")
    if last and isinstance(sections.get(outer), dict):
        drop(sections[outer], last, snippet)
    else:
        sections.pop(outer, None)


def rename(sections: dict[str, Any], name: str, snippet: str) -> None:
    outer = name.partition(".")[0]
    if outer in sections:
        sections[snippet] = sections.pop(outer)


def dump(sections: dict[str, Any], indent: str = "") -> str:
    lines = []
    for key, value in sections.items():
        inner = f"\n{dump(value, indent + '  ')}" if isinstance(value, dict) else f" {value}\n"
        lines.append(f"{indent}{key}:{inner}")
    return "".join(lines)


BYTES = (
    *(b"\0", b"\t", b"\xff", b'"', b"'", b",", b";", b"\r", b"\n", b"\x1d", b"\xed\xa0\x80"),
    *(b"\xef\xbb\xbf", b"NaN", b"-", b"{", b"1e9999", b"9" * 5000, b"\xef\xbc\x91", b"../", b"/"),
)  # fmt: skip


@st.composite
def spoilt(draw: st.DrawFn, content: bytes, binary: bool = False) -> bytes:
    """Real text or a real file, changed as disks, editors and networks do."""
    at, to = (draw(st.integers(0, len(content))) for _ in range(2))
    low, high = min(at, to), max(at, to)
    ways: list[Callable[[], bytes]] = [
        lambda: content[:at],
        lambda: content[:low] + content[high:],
        lambda: content[:high] + content[low:],
        lambda: content[:at] + draw(st.binary(max_size=9)) + content[at:],
        lambda: b"",
        lambda: bytes(high - low).join((content[:low], content[high:])),
    ]
    if content:
        flip = at % len(content)
        changed = content[flip] ^ 1 << draw(st.integers(0, 7))
        ways += 5 * [lambda: content[:flip] + bytes([changed]) + content[flip + 1 :]]
    if not binary:
        lines = content.splitlines(keepends=True)
        line = lines[at % len(lines)] if lines else b""
        hostile = draw(st.sampled_from(BYTES))
        ways += [
            lambda: content + line,
            lambda: line + content,
            lambda: b"\xef\xbb\xbf" + content,
            lambda: content.replace(b"\n", b"\r\n"),
            lambda: content.replace(b"\r\n", b"\n").replace(b"\n", b"\r"),
            lambda: content.decode().encode("utf-16"),
            lambda: b"".join(sorted(lines)),
            lambda: content.replace(line, b""),
            lambda: content[:at] + hostile + content[at:],
            lambda: content[:at] + hostile + content[at:],
            lambda: content[:at] + hostile + content[at:],
        ]
    return draw(st.sampled_from(ways))()


@cases(0.45)
@given(
    edits=lists(st.tuples(st.sampled_from([put, put, put, put, drop, rename]), chosen)),
    data=st.data(),
)
def test_settings_in_a_file(root: Path, edits: list[Any], data: st.DataObject) -> None:
    written = tree(root)
    for edit, (name, snippet) in edits:
        # Without model.name it would be a large one.
        (put if name.startswith("model") else edit)(written, name, snippet)
    text = dump(written).encode("utf-8", "surrogatepass")
    if data.draw(st.integers(0, 3)) == 0 and len(text) < 3000:
        with contextlib.suppress(UnicodeDecodeError):
            text = data.draw(spoilt(text))
    try:
        (root / "c.yaml").write_bytes(text)
        works_or_is_refused(["train", "--config", f"{root}/c.yaml", f"output={root}/new"], root)
    finally:
        shutil.rmtree(root / "new", ignore_errors=True)


@cases(0.25)
@given(
    command=st.sampled_from(["train", "train", "evaluate", "predict"]),
    words=lists(chosen.map("=".join)),
)
def test_settings_on_the_command_line(root: Path, command: str, words: list[str]) -> None:
    good = [*TINY, f"data.path={root}/data"] if command == "train" else [f"{root}/run"]
    last = [f"output={root}/new"] if command == "train" else []
    last = ["--output", f"{root}/new/s.csv"] if command == "predict" else last
    try:
        works_or_is_refused([command, *good, *words, *last], root)
    finally:
        shutil.rmtree(root / "new", ignore_errors=True)


# --- Files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    kept = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(kept)
        for made in ("new", "run"):
            shutil.rmtree(path_root(path) / made, ignore_errors=True)
        shutil.copytree(path_root(path) / "kept", path_root(path) / "run")


def path_root(path: Path) -> Path:
    return next(parent for parent in path.parents if (parent / "kept").is_dir())


@cases(0.2)
@given(
    name=st.sampled_from(["train.csv", "train.csv", "meta.csv", "sample_submission.csv"]),
    data=st.data(),
)
def test_tables(root: Path, name: str, data: st.DataObject) -> None:
    content = (root / "data" / name).read_bytes()
    predicts = name == "sample_submission.csv" or data.draw(st.booleans())
    argv = ["predict", f"{root}/run", "--output", f"{root}/new/s.csv"]
    if not predicts:
        argv = ["train", *TINY, f"data.path={root}/data", f"output={root}/new"]
    with changed(root / "data" / name, data.draw(spoilt(content))):
        works_or_is_refused(argv, root)


def picture(form: str, mode: str, size: tuple[int, int], **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.effect_noise(size, 60).convert("RGB")
    image.convert(mode).save(file, form, **options)
    return file.getvalue()


def plain(form: str, size: tuple[int, int]) -> bytes:
    """Of one colour: a few kB, however many pixels; noise for a hundred million takes seconds."""
    file = io.BytesIO()
    Image.new("1", size).save(file, form)
    return file.getvalue()


SMALL = (24, 20)
TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
Image.init()
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "AVIF")
PICTURES = {
    **{form: picture(form, "RGB", SMALL) for form in FORMATS if form in Image.SAVE},
    "CMYK": picture("JPEG", "CMYK", SMALL),
    "bit": picture("PNG", "1", SMALL),
    "grey with alpha": picture("PNG", "LA", SMALL),
    "alpha": picture("WEBP", "RGBA", SMALL),
    "palette": picture("PNG", "P", SMALL, transparency=3),
    "16 bits": picture("PNG", "I;16", SMALL),
    "floats": picture("TIFF", "F", SMALL),
    "LAB": picture("TIFF", "LAB", SMALL),
    "progressive": picture("JPEG", "RGB", SMALL, progressive=True),
    "animated": picture(
        "GIF", "P", SMALL, save_all=True, append_images=3 * [Image.new("P", SMALL)]
    ),
    "turned": picture("JPEG", "RGB", SMALL, exif=TURNED),
    "1x1": picture("PNG", "RGB", (1, 1)),
    "wide": picture("PNG", "L", (65500, 1)),
    "high": picture("PNG", "L", (1, 65500)),
    "huge": plain("PNG", (12000, 9000)),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "pdf": b"%PDF-1.4\n1 0 obj<<>>endobj\ntrailer<<>>\n%%EOF",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
}


@cases(0.15)
@given(kind=st.sampled_from(sorted(PICTURES)), whole=st.booleans(), data=st.data())
def test_images(root: Path, kind: str, whole: bool, data: st.DataObject) -> None:
    content = PICTURES[kind] if whole else data.draw(spoilt(PICTURES[kind], True))
    argv = data.draw(
        st.sampled_from(
            [
                ["predict", f"{root}/run", "--output", f"{root}/new/s.csv"],
                ["train", *TINY, f"data.path={root}/data", f"output={root}/new"],
                ["train", *TINY, f"data.path={root}/data", f"output={root}/new",
                 f"data.cache={root}/new", "--skip-bad-images"],
            ]
        )
    )  # fmt: skip
    part = "test/0.png" if argv[0] == "predict" else "train/naïve 3 写真 0.png"
    with changed(root / "data" / part, content):
        works_or_is_refused(argv, root)


JUNK = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4),
        st.sampled_from([torch.zeros(3), torch.float16, -1, 10**30, "test_vit"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=4,
)  # fmt: skip


# What is still a tensor.
RESHAPED: tuple[Callable[[torch.Tensor], Any], ...] = (
    *(torch.Tensor.flatten, torch.Tensor.double, torch.Tensor.half, torch.Tensor.bool),
    torch.Tensor.tolist,
    lambda tensor: tensor[None],
    lambda tensor: tensor[..., :0] if tensor.dim() else tensor.new_empty(0),
    lambda tensor: torch.full_like(tensor, 1e30 if tensor.is_floating_point() else 7),
    lambda tensor: torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else -tensor,
)  # fmt: skip


@st.composite
def twisted(draw: st.DrawFn, state: Any) -> Any:
    """A checkpoint's content with one node replaced by another, or dropped."""
    if isinstance(state, dict) and state and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(state, key=str)))
        rest = {name: value for name, value in state.items() if name != key}
        return rest if not draw(st.integers(0, 5)) else {**rest, key: draw(twisted(state[key]))}
    if isinstance(state, list | tuple) and state and draw(st.booleans()):
        at = draw(st.integers(0, len(state) - 1))
        return type(state)([*state[:at], draw(twisted(state[at])), *state[at + 1 :]])
    if isinstance(state, torch.Tensor) and draw(st.integers(0, 3)):
        return draw(st.sampled_from(RESHAPED))(state)
    return draw(JUNK)


@cases(0.02)
@given(data=st.data())
def test_histories(root: Path, data: st.DataObject) -> None:
    log = root / "run" / "metrics.jsonl"
    (row,) = log.read_text("utf-8").splitlines()
    written = json.dumps(data.draw(twisted(json.loads(row))), default=str).encode()
    content = data.draw(st.one_of(spoilt(row.encode()), st.just(written)))
    with changed(log, content):
        works_or_is_refused(["report", f"{root}/run", "--output", f"{root}/new/r.html"], root)


# --- Checkpoints ---------------------------------------------------------------------------------

HALFWAY = (*TINY, "train.epochs=2", "train.ema=0.9", "data.batch_size=4")
REAL_EPOCH = training.train_epoch


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its first epoch of two."""
    root = tmp_path_factory.mktemp("begun")
    write_tiny(root / "data", per_class=4)
    epochs = iter([REAL_EPOCH])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_epoch", lambda *args: next(epochs)(*args))
        with pytest.raises(StopIteration):
            main(["train", f"data.path={root}/data", f"output={root}/run", *HALFWAY])
    shutil.copytree(root / "run", root / "kept")
    return root


@pytest.fixture
def to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may be resumed to its last line, but for the report."""

    def stop(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr(training, "train_epoch", REAL_EPOCH)
    monkeypatch.setattr(training, "picture", stop)


def commands(root: Path) -> st.SearchStrategy[tuple[list[str], str]]:
    """A command, and the checkpoint that it reads."""
    resume = ["train", f"data.path={root}/data", f"output={root}/run", *HALFWAY, "--resume"]
    return st.sampled_from(
        [
            (["predict", f"{root}/run", "--output", f"{root}/new/s.csv"], "best.pt"),
            (["evaluate", f"{root}/run"], "best.pt"),
            (["evaluate", f"{root}/run/last.pt"], "last.pt"),
            *[(resume, name) for name in ("best.pt", "last.pt", "last.pt", "last.pt")],
        ]
    )


def check_checkpoint(root: Path, argv: Sequence[str], name: str, content: bytes) -> None:
    """Of a checkpoint with that content, whatever it is."""
    with changed(root / "run" / name, content):
        before = {path: path.read_bytes() for path in (root / "run").glob("*.pt")}
        works_or_is_refused(argv, root)
        for path, had in before.items():
            if path.read_bytes() != had:
                load_checkpoint(path)


@cases(0.06)
@given(data=st.data())
def test_damaged_checkpoints(begun: Path, to_the_end: None, data: st.DataObject) -> None:
    argv, name = data.draw(commands(begun))
    content = (begun / "kept" / name).read_bytes()
    check_checkpoint(begun, argv, name, data.draw(spoilt(content, True)))


@cases(0.12)
@given(data=st.data())
def test_checkpoints_with_something_else_in_them(
    begun: Path, to_the_end: None, data: st.DataObject
) -> None:
    argv, name = data.draw(commands(begun))
    state = data.draw(twisted(load_checkpoint(begun / "kept" / name)))
    written = begun / "written.pt"
    try:
        save_checkpoint(written, state)
    except CheckpointError:  # no mapping, or keys that none can have
        reject()
    check_checkpoint(begun, argv, name, written.read_bytes())
