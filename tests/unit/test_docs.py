"""README and docs: their code runs, prints what they say, and they leave nothing public out."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import portable_amp
from cv_classification import __main__ as example
from cv_classification.config import InputError, load_config
from portable_amp import DeviceContext, ScalerShim, choose, cli
from portable_amp.autocast import Autocast, NoAutocast, OffAutocast
from portable_amp.numerics import program
from portable_amp.testing import play
from support import SETTINGS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("[!_]*/**/*.md")), DOCS / "index.md"]
MARK = re.compile(r"<!-- not run:(.*?)-->\s*\Z")
FENCE = re.compile(r"^```(\w*|\{[\w-]+\})[^\n]*\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """One fenced block of a page."""

    language: str
    text: str
    line: int
    mark: str | None
    """Why it is not run, None where it is."""
    prints: str | None
    """The `text` block that follows at once: what the block is to print."""


def blocks(page: str) -> list[Block]:
    found = list(FENCE.finditer(page))
    made = []
    for this, after in zip(found, [*found[1:], None], strict=False):
        mark = MARK.search(page[: this.start()])
        follows = after and after[1] == "text" and not page[this.end() : after.start()].strip()
        line = page.count("\n", 0, this.start()) + 1
        prints = after[2] if after and follows else None
        made.append(Block(this[1], this[2], line, mark and mark[1].strip(), prints))
    return made


def run(name: str, page: str, after: Callable[[dict[str, Any]], None] | None = None) -> int:
    """Run a page's Python in one namespace; how many blocks it has.

    With `after`, called after each block, it is not this machine that prints.
    """
    namespace: dict[str, Any] = {"__name__": "page"}
    count = 0
    for block in blocks(page):
        if block.language != "python":
            continue
        count += 1
        where = f"{name}, line {block.line}"
        assert block.mark is None or len(block.mark) > 5, f"{where}: 'not run' needs a reason"
        # The padding makes the lines of a traceback those of the page.
        code = compile("\n" * block.line + block.text, name, "exec", dont_inherit=True)
        if block.mark is not None:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if after:
            after(namespace)
            continue
        assert block.prints in (None, printed.getvalue()), f"{where} prints {printed.getvalue()!r}"
    return count


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory; a page may change neither filters nor loggers for the others."""
    monkeypatch.chdir(tmp_path)
    logger = portable_amp.notices.logger
    level = logger.level
    yield
    logger.setLevel(level)
    assert not (torch.distributed.is_available() and torch.distributed.is_initialized())


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.filterwarnings("ignore::portable_amp.PrecisionFallbackWarning")  # as the machine is
@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_code_of_a_page_runs(path: Path) -> None:
    page = path.read_text("utf-8")
    assert bool(run(path.name, page)) is ("```python" in page)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    "page",
    [
        "```python\n1 / 0\n```",
        "```python\nx = 1\n```\ntext\n```python\ny\n```",
        "```python\nimport warnings; warnings.warn('careful')\n```",
        "<!-- not run: needs a GPU -->\n```python\nx = (\n```",
        "<!-- not run: -->\n```python\nx = 1\n```",
        "```python\nprint(1)\n```\n\n```text\n2\n```",
    ],
)
def test_a_page_that_is_wrong_is_noticed(page: str) -> None:
    with pytest.raises((ZeroDivisionError, NameError, UserWarning, SyntaxError, AssertionError)):
        run("page", page)


# Each section of the rules is a program of its own (see tests/migrate); the second one and the
# last two play machines themselves, and the third one sets a region against a context on purpose.
APART = (
    "rules.md", "test-other-machines.md", "autocast-and-reentry.md", "compare-two-machines.md",
    "trust-the-numbers.md",
)  # fmt: skip
MACHINES = ("t4", "a100", "gtx1080", "m2-macos14", "cpu", "cpu-avx512bf16")
LOOPS = [
    (path, machine)
    for path in PAGES
    for machine in MACHINES
    if path.name not in APART
    and any("DeviceContext(" in one.text for one in blocks(path.read_text("utf-8")))
    and (path.name != "first-loop.md" or machine == "t4")  # it takes ten seconds
]


def run_by_law(name: str, page: str) -> None:
    """Run a page that has to compute what its context tells, and to scale fp16's gradients alone.

    Tuning, which measures, finds another precision than the context had before.
    """
    entered: list[torch.dtype] = []

    def entering(enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def wrapped(region: Any) -> Any:
            on = getattr(region, "_enabled", False)
            entered.append(region.fast_dtype if on else torch.float32)
            return enter(region)

        return wrapped

    def step(scaler: ScalerShim, *args: Any, **options: Any) -> Any:
        if entered:
            assert scaler.is_enabled() is (torch.float16 in entered), f"{name}: {entered}"
        entered.clear()
        return steps(scaler, *args, **options)

    def tuned(ctx: DeviceContext, *args: Any, **options: Any) -> DeviceContext:
        other = "fp32" if ctx.plan.scaler else "fp16"
        other = "fp32" if choose(other, ctx.capabilities).fell_back else other
        return DeviceContext(ctx.device, precision=other)

    def after(namespace: dict[str, Any]) -> None:
        ctx, scaler = namespace.get("ctx"), namespace.get("scaler")
        if isinstance(ctx, DeviceContext):
            assert {*entered} <= {ctx.plan.dtype, torch.float32}, f"{name}: {ctx} {entered}"
            if isinstance(scaler, ScalerShim):
                assert scaler.is_enabled() is ctx.plan.scaler, f"{name}: {ctx}"

    steps = ScalerShim.step
    with pytest.MonkeyPatch.context() as patch:
        for kind in (Autocast, OffAutocast, NoAutocast):
            patch.setattr(kind, "__enter__", entering(kind.__enter__))
        patch.setattr(ScalerShim, "step", step)
        patch.setattr(DeviceContext, "tuned", tuned)
        run(name, page, after)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.filterwarnings("ignore::portable_amp.PrecisionFallbackWarning")
@pytest.mark.parametrize(("path", "machine"), LOOPS, ids=lambda one: getattr(one, "name", one))
def test_a_page_computes_what_it_tells(path: Path, machine: str) -> None:
    with play(machine):
        run_by_law(path.name, path.read_text("utf-8"))


CONTEXT = """```python
import torch
from portable_amp import DeviceContext, ScalerShim, maybe_autocast
ctx, model = DeviceContext(), torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""


@pytest.mark.parametrize(
    ("machine", "page"),
    [
        ("a100", "scaler = ctx.scaler()\nctx = ctx.tuned(model, torch.ones(2, 2))"),
        ("cpu", "with maybe_autocast(ctx.device): pass"),
        ("gtx1080", "with maybe_autocast(ctx.device): pass"),
        ("m2-macos14", "scaler = ScalerShim(ctx.device)"),
        ("m2-macos14", "with ctx.autocast(): pass\nScalerShim('mps').step(optimizer)"),
        ("t4", "with ctx.autocast(): pass\nScalerShim(enabled=False).step(optimizer)"),
    ],
)
def test_the_law_can_fail(machine: str, page: str) -> None:
    with play(machine), pytest.raises(AssertionError, match=r"page: "):
        run_by_law("page", CONTEXT + page + "\n```")


def exit_code(line: str) -> int | None:
    """What the program says to a command line, doing nothing; None where it is another program."""
    words = [word for word in shlex.split(line, comments=True) if not re.match("[A-Z_]+=", word)]
    if words[:2] == ["python", "-m"]:
        words = words[2:]
    try:
        if words[0] in ("portable-amp", "portable_amp"):
            return cli.main(words[1:])
        if words[0] == "cv_classification":
            load_config(None, example.parse(words[1:])[1])
            return 0
    except SystemExit as left:
        return left.code  # type: ignore[return-value]
    except InputError:
        return 2
    return None


def test_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_doctor", lambda options: 0)
    monkeypatch.setattr(cli, "_migrate", lambda options: 0)
    monkeypatch.setattr(program, "run", lambda options: 0)
    told = [block for path in PAGES for block in blocks(path.read_text("utf-8"))]
    console = "".join(block.text for block in told if block.language == "console")
    codes = {line: exit_code(line) for line in re.findall(r"^\$ (.+)$", console, re.M)}
    assert {line: code for line, code in codes.items() if code} == {}
    assert list(codes.values()).count(0) > 10
    for wrong in (
        "portable-amp doctr",
        "X=1 portable-amp doctor --jsn",
        "python -m cv_classification train train.lrr=1",
        "python -m cv_classification tran",
    ):
        assert exit_code(wrong) == 2, wrong


def missing(names: set[str], page: str, form: str) -> set[str]:
    """The names that do not stand on the page in this form."""
    return {name for name in names if not re.search(form.format(re.escape(name)), page, re.M)}


def test_every_public_name_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "api.md").read_text("utf-8")
    form = r"^\.\. auto(?:class|function|exception):: {}(?:\(\))?$"
    assert missing(set(portable_amp.__all__), page, form) == set()
    assert missing({"nothing"}, page, form) == {"nothing"}


def variables(source: str) -> set[str]:
    """Names of environment variables in a source."""
    lines = [line for line in source.splitlines() if re.search(r"environ\b|_VARIABLE =", line)]
    return set(re.findall('"([A-Z_]{4,})"', "\n".join(lines)))


def test_every_environment_variable_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "environment.md").read_text("utf-8")
    code = [*ROOT.glob("src/**/*.py"), *ROOT.glob("examples/**/*.py")]
    read = set[str]().union(*(variables(path.read_text("utf-8")) for path in code))
    read |= SETTINGS  # with what launchers set
    assert {"PORTABLE_AMP_DEVICE", "PORTABLE_AMP_STRICT", "RANK", "WORLD_SIZE"} <= read
    assert missing(read, page, r"^\| `{}` \|") == set()
    assert missing(variables('os.environ["NEWS"]'), page, r"^\| `{}` \|") == {"NEWS"}


def links(page: str) -> list[str]:
    """Relative links of a page, and the pages that its roles and tables of contents name."""
    whole = re.sub(r"(```\{toctree\}.*?^```)|^```.*?^```", r"\1", page, flags=re.M | re.S)
    found = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", whole)]
    named = re.findall(r"\{doc\}`([^`]+)`|^([\w-]+/[\w-]+)$", whole, re.M)
    return [link for link in found if link and "://" not in link] + [
        f"{role or entry}.md" for role, entry in named
    ]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    broken = [one for one in links(path.read_text("utf-8")) if not (path.parent / one).exists()]
    assert broken == []


def test_links_are_found() -> None:
    page = "[a](b/c.md#d) {doc}`x/y` [web](https://x)\n```{toctree}\nhow/to\n```\n"
    page += "```text\n[z](z)\n```"
    assert links(page) == ["b/c.md", "x/y.md", "how/to.md"]
