"""Draw docs/batch-size.svg: accuracy against batch size, with intervals, from a study's report.

normsurgeon study batch-size.yaml
python docs/make_study_picture.py study-batch-size/answer.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

COLOURS = {"bn": "#c0504d", "gn": "#1f6fb4", "ln": "#4f8f46"}


def main() -> None:
    """Read the report that is named on the command line, and write the picture."""
    answer = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "normsurgeon", "font.family": "sans-serif"})
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for norm in answer["study"]["norms"]:
        rows = [row for row in answer["table"] if row["norm"] == norm and row["mean"] is not None]
        sizes, errors = [row["batch_size"] for row in rows], [100 * (1 - row["mean"]) for row in rows]
        arms = [100 * (row["ci"][1] - row["mean"]) for row in rows]
        axes.errorbar(sizes, errors, arms, marker="o", capsize=4, color=COLOURS.get(norm), label=norm, linewidth=1.8)
    axes.set(xscale="log", yscale="log", xlabel="images a batch", ylabel="error on held-out images, per cent")
    sizes = sorted({row["batch_size"] for row in answer["table"]})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_yticks([10, 20, 40, 80], ["10", "20", "40", "80"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(Path(__file__).parent / "batch-size.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
