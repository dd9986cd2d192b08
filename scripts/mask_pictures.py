# SPDX-License-Identifier: Apache-2.0
"""Draws block masks of Graph-KV attention, as SegmentGraph.plot shows them: docs/ops/graph_attention_masks.svg."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from torch_kernels import SegmentGraph

matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.hashsalt": "masks", "svg.fonttype": "none"})  # the same file each time, text as text
OUT = Path(__file__).resolve().parents[1] / "docs" / "ops" / "graph_attention_masks.svg"
LENGTHS = (60, 90, 40, 75, 55, 110)
GRAPHS = {
    "star: the last sees all": SegmentGraph.star(LENGTHS),
    "bipartite, m = 2: the rest sees the first two": SegmentGraph.bipartite(LENGTHS, 2),
    "chain: each sees the one before": SegmentGraph.chain(LENGTHS),
}


def main() -> None:
    figure, panels = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
    for axes, (title, graph) in zip(panels, GRAPHS.items()):
        graph.plot(axes)
        axes.set_title(title, fontsize=9.5, loc="left", color="#222222")
    figure.savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    main()
