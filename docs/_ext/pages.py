"""Pages of tables that are made from the code and kept with it, so that they can be read anywhere.

`python docs/_ext/pages.py` writes them; building the documentation refuses a stale one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from sphinx.application import Sphinx
from sphinx.util import logging
from torch import nn

from portable_amp import choose
from portable_amp.backends import torch_version
from portable_amp.testing import MACHINES, Machine, dtype_flow

DOCS = Path(__file__).resolve().parents[1]
MADE = "<!-- Made by docs/_ext/pages.py: change that, and run it. -->\n"
REQUESTS = ("auto", "fp16", "bf16")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of Markdown cells as a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def support_matrix() -> str:
    """Machine x request -> plan, and why."""
    plans = [[f"`{row.key}`", *(cell(row, request) for request in REQUESTS)] for row in MACHINES]
    reasons = []
    for request in REQUESTS:
        rows = [
            [f"`{row.key}`", cell(row, request), choose(request, row.capabilities).reason]
            for row in MACHINES
        ]
        reasons += [f'## Why: `precision="{request}"`', table(["machine", "plan", "reason"], rows)]
    machines = [
        [f"`{row.key}`", row.hardware.device_type, row.hardware.name, readings(row), row.source]
        for row in MACHINES
    ]
    return "\n\n".join(
        [
            "# What is decided on which machine",
            MADE.strip(),
            f"{len(MACHINES)} machines, as rows of facts: hardware that we do not own.\n"
            "What *your* machine gets is printed by `portable-amp doctor`.",
            "- **bold**: mixed precision, in this dtype;\n"
            "- `+ scaler`: gradients are scaled, as fp16 needs;\n"
            "- *italic*: the request cannot be honoured, and becomes fp32 with one\n"
            "  `PrecisionFallbackWarning`, or is an `UnsupportedPrecisionError`, as you asked.",
            '`precision="fp32"` is fp32 everywhere: autocast is off, and there is no scaler.',
            table(["machine", *(f'`"{request}"`' for request in REQUESTS)], plans),
            *reasons,
            "## The machines",
            "What torch reports there. A test plays one with `portable_amp.testing.play(name)`:\n"
            "see {doc}`../how-to/test-other-machines`.",
            table(["machine", "device", "name", "readings", "source"], machines),
        ]
    )


def cell(row: Machine, request: str) -> str:
    """One plan, in Markdown."""
    plan = choose(request, row.capabilities)
    got = plan.name + (" + scaler" if plan.scaler else "")
    return f"*{got}*" if plan.fell_back else f"**{got}**" if plan.autocast else got


def readings(row: Machine) -> str:
    """What sets this machine apart."""
    hw = row.hardware
    told = [
        hw.compute_capability and "compute capability {}.{}".format(*hw.compute_capability),
        hw.arch,
        hw.macos and "macOS {}.{}".format(*hw.macos),
        ", ".join(sorted(hw.cpu_features)),
        hw.total_memory and f"{hw.total_memory // 2**30} GiB",
        "no float64" if hw.float64 is False else "",
        "Windows, no Triton" if not row.triton else "",
        "torch {}.{}".format(*hw.torch_version),
    ]
    return "; ".join(filter(None, told))


class Function(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Call it."""
        return self.function(x)


F = nn.functional
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(8, 8),
    "Conv1d": lambda: nn.Conv1d(4, 4, 1),
    "scaled_dot_product_attention": lambda: Function(
        lambda x: F.scaled_dot_product_attention(x, x, x)
    ),
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "Dropout": nn.Dropout,
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "LayerNorm": lambda: nn.LayerNorm(8),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "softmax": lambda: nn.Softmax(-1),
    "exp": lambda: Function(torch.exp),
    "sum": lambda: Function(torch.sum),
    "mse_loss": lambda: Function(lambda x: F.mse_loss(x, torch.zeros_like(x))),
    "cross_entropy": lambda: Function(lambda x: F.cross_entropy(x, x.argmax(1))),
}
DEVICES = ("cpu", "cuda", "xpu", "mps")


def autocast_dtypes() -> str:
    """Layer x backend -> the dtype of its result, behind a linear layer in bf16."""
    names = {torch.bfloat16: "bf16", torch.float32: "**fp32**"}
    rows = []
    for name, make in LAYERS.items():
        model = nn.Sequential(nn.Linear(8, 8), make())
        given = [
            dtype_flow(model, torch.ones(2, 4, 8), device, torch.bfloat16)[-1].gives[0]
            for device in DEVICES
        ]
        rows.append([f"`{name}`", *(names[dtype] for dtype in given)])
    major, minor = torch_version()
    return "\n\n".join(
        [
            "# Which dtype each layer computes in",
            MADE.strip(),
            "What a layer gives that stands behind a linear one, under\n"
            "`torch.autocast(device_type, torch.bfloat16)`. The lists are torch's own, and differ\n"
            "between back ends: who compares a CPU run with a GPU run compares two arithmetics.",
            table(["layer", *(f"`{device}`" for device in DEVICES)], rows),
            f"This is torch {major}.{minor}, asked by `portable_amp.testing.dtype_flow`\n"
            "without the hardware: shapes and dtypes flow, no numbers. Ask it of your own model:",
            "```python\n"
            "import torch\n"
            "from portable_amp.testing import dtype_flow\n\n"
            "model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))\n"
            'for device_type in ("cpu", "cuda"):\n'
            "    for layer in dtype_flow(model, torch.ones(2, 8), device_type, torch.bfloat16):\n"
            "        print(device_type, layer.name, layer.kind, layer.gives)\n"
            "```",
            "Kernels may still differ inside: CUDA's add up bf16 products in fp32, for example.\n"
            "This was not compared with real hardware.",
        ]
    )


COUNTS = DOCS / "explanation" / "evidence" / "mutation.json"
EXPLAINED = DOCS / "explanation" / "evidence" / "mutation-explained.json"
TESTED = "explanation/what-is-tested.md"


def noticed(found: Mapping[str, int]) -> str:
    """The share of the faults that change behaviour which a test notices, in percent."""
    real = found["faults"] - found["equivalent"]
    return f"{100 * found['killed'] / real:.1f} %" if real else "-"


def what_is_tested() -> str:
    """The page as it is, with the table of faults of the last run."""
    told = json.loads(COUNTS.read_text("utf-8"))
    keys = ("all", "faults", "equivalent", "killed", "missed", "explained")
    modules = dict(sorted(told["modules"].items()))
    total = {key: sum(found[key] for found in modules.values()) for key in keys}
    rows = [
        [name, *(str(found[key]) for key in keys), noticed(found)]
        for name, found in {**modules, "*all*": total}.items()
    ]
    head = ["module", "faults", "tried", "no change", "noticed", "missed", "explained", "share"]
    made = (
        f"Commit {told['commit']}, {told['date']}, {told['machine']}, Python {told['python']},\n"
        f"torch {told['torch']}, cosmic-ray {told['cosmic-ray']}:"
    )
    found = f"{made}\n\n{table(head, rows)}" if modules else "No module has been counted so far."
    before, begin, rest = (DOCS / TESTED).read_text("utf-8").partition("<!-- faults -->\n")
    _, end, behind = rest.partition("<!-- end of faults -->")
    return (before + begin + found + "\n\n" + end + behind).rstrip("\n")


def explained_faults() -> str:
    """Every fault that no test notices, and why."""
    rows = json.loads(EXPLAINED.read_text("utf-8"))
    sections = []
    for kind, title in (
        ("equivalent", "That change nothing that is promised"),
        ("untested", "That would be felt, and are not noticed"),
    ):
        lines = [
            [f"`{row['module']}`", f"`{row['was']}`", f"`{row['becomes']}`", row["why"]]
            for row in sorted(rows, key=lambda row: row["module"])
            if row["kind"] == kind
        ]
        if lines:
            sections += [f"## {title}", table(["module", "was", "becomes", "why"], lines)]
    return "\n\n".join(
        [
            "# Faults that no test notices",
            MADE.strip(),
            "Deliberate ones, of `tools/mutation.sh`: see {doc}`what-is-tested`. Kept in\n"
            "`docs/explanation/evidence/mutation-explained.json`.",
            *sections,
        ]
    )


PAGES = {
    TESTED: what_is_tested,
    "explanation/unnoticed-faults.md": explained_faults,
    "reference/support-matrix.md": support_matrix,
    "reference/autocast-dtypes.md": autocast_dtypes,
}


def check(app: Sphinx) -> None:
    """Warn of each page that the code would make otherwise; warnings are errors."""
    for name, make in PAGES.items():
        path = DOCS / name
        if not path.is_file() or path.read_text(encoding="utf-8") != make() + "\n":
            logging.getLogger(__name__).warning(
                f"docs/{name} is stale: run python docs/_ext/pages.py and commit it"
            )


def setup(app: Sphinx) -> dict[str, bool]:
    """Check the pages before they are read."""
    app.connect("builder-inited", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(make() + "\n", encoding="utf-8")
        sys.stdout.write(f"docs/{name}\n")
