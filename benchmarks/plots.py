"""Plots for the docs of the numbers in a folder: python benchmarks/plots.py FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

mpl.use("svg")
mpl.rcParams |= {"svg.hashsalt": "portable-amp", "font.size": 9, "axes.grid": True}
STATIC = Path(__file__).parents[1] / "docs" / "_static"


def main() -> None:
    """Draw both."""
    folder = Path(sys.argv[1])
    tuned = json.loads((folder / "tuned.json").read_text("utf-8"))["models"]
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    names = list(dict.fromkeys(one["model"] for one in tuned))
    for offset, training in ((-0.2, True), (0.2, False)):
        values = [one["regret"] for one in tuned if one["training"] is training]
        places = [place + offset for place in range(len(names))]
        axes.bar(places, values, 0.38, label="training" if training else "inference")
    axes.axhline(1.15, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylim(0.95, max(1.2, *(one["regret"] for one in tuned)))
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_ylabel("regret (1: the best there is)")
    axes.legend()
    figure.savefig(STATIC / "regret.svg", metadata={"Date": None})
    models = json.loads((folder / "tta.json").read_text("utf-8"))["models"]
    figure, several = plt.subplots(1, len(models), figsize=(7, 2.6), layout="constrained")
    for axes, one in zip(several, models, strict=True):
        axes.plot(one["sizes"], one["plain"], "o-", label="fp32 contiguous")
        layout = one["layout"].removeprefix("torch.").removesuffix("_format")
        axes.plot(one["sizes"], one["tuned"], "s-", label=f"tuned: {one['plan']} {layout}")
        axes.axvline(one["chunk"], color="black", linewidth=0.8, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_ylim(0)
        axes.set_title(one["model"])
        axes.set_xlabel("images in a pass")
        axes.legend(fontsize=6)
    several[0].set_ylabel("images per second")
    figure.savefig(STATIC / "throughput.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
