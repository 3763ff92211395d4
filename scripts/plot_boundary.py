"""Draw the pass@k curves of a boundary.json as an SVG that reads on light and dark pages.

usage: python scripts/plot_boundary.py RUN_DIR/boundary/boundary.json OUT.svg   (needs matplotlib)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

INK = "#808080"  # readable on white and on black
COLOURS = ("#808080", "#56b4e9", "#d55e00", "#009e73", "#cc79a7")


def main(source: str, target: str) -> None:
    found = json.loads(Path(source).read_text())
    plt.rcParams.update({"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK})
    plt.rcParams.update({"axes.edgecolor": INK, "svg.fonttype": "none", "svg.hashsalt": "rlvr", "font.family": "sans-serif"})
    figure, axes = plt.subplots(figsize=(7, 4))
    for model, colour in zip(found["models"], COLOURS, strict=False):
        curve = [model["pass_at_k"][str(k)] for k in found["k"]]
        low, high = zip(*(model["ci95"][str(k)] for k in found["k"]), strict=True)
        style = "--" if model["step"] == 0 else "-"
        axes.plot(found["k"], curve, style, color=colour, label=model["name"], marker="o", markersize=3)
        axes.fill_between(found["k"], low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(found["k"], [str(k) for k in found["k"]])
    axes.set(xlabel="k", ylabel="pass@k", ylim=(0, 1))
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, labelcolor=INK)
    figure.savefig(target, transparent=True, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
