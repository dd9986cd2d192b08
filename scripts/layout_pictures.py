# SPDX-License-Identifier: Apache-2.0
"""Draws where each value of an int4 weight lies once it is packed: docs/ops/int4_linear_layouts.png.

The pictures are read off the packing functions themselves: positions are packed digit by digit.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from torch_kernels.int4_linear import layout_cpu, layout_gpu

matplotlib.use("Agg")
OUT = Path(__file__).resolve().parents[1] / "docs" / "ops" / "int4_linear_layouts.png"
FEATURES, CHANNELS = 64, 128  # whole tiles of both layouts
SHOWN = 32, 64


def stream(layout) -> list[tuple[int, int]]:
    """(feature, channel) of each 4-bit value, in the order of memory, low bits first."""
    position = torch.arange(FEATURES * CHANNELS).view(FEATURES, CHANNELS)
    order = torch.zeros(FEATURES * CHANNELS, dtype=torch.long)
    for digit in range(4):
        packed = layout.pack((position >> 4 * digit & 15).to(torch.uint8)).contiguous().view(torch.uint8).flatten()
        values = torch.stack([packed & 15, packed >> 4], 1).flatten().long()
        order += values[: len(order)] << 4 * digit
    return [divmod(int(place), CHANNELS) for place in order]


def draw(axes, layout, run: int, title: str, marked: str) -> None:
    """Colours a weight by the `run` bytes of memory that a value lies in; numbers the values of the first run."""
    place = stream(layout)
    color = torch.zeros(FEATURES, CHANNELS)
    for index, (feature, channel) in enumerate(place):
        color[feature, channel] = index // 2 // run % 20
    axes.imshow(color[: SHOWN[0], : SHOWN[1]], cmap="tab20", alpha=0.55, aspect="equal", interpolation="nearest")
    for index, (feature, channel) in enumerate(place[: 2 * run]):
        axes.add_patch(plt.Rectangle((channel - 0.5, feature - 0.5), 1, 1, fill=False, edgecolor="#c0392b", lw=0.9))
        axes.text(channel, feature, index, ha="center", va="center", fontsize=4.2, color="#222222")
    axes.set_title(f"{title}\n{marked}", fontsize=9.5, loc="left", color="#222222")
    axes.set_xlabel("input feature k", fontsize=8.5)
    axes.set_ylabel("output feature n", fontsize=8.5)
    axes.set_xticks(range(0, SHOWN[1], 8))
    axes.set_yticks(range(0, SHOWN[0], 8))
    axes.tick_params(labelsize=7.5)


def main() -> None:
    figure, (gpu, cpu) = plt.subplots(2, 1, figsize=(9, 10), layout="constrained")
    draw(
        gpu,
        layout_gpu,
        16,
        "CUDA and Triton",
        "a colour: what a thread loads at once; numbered: the first thread's nibbles",
    )
    draw(cpu, layout_cpu, 64, "CPU", "a colour: a cache line; numbered: the nibbles of the first")
    figure.savefig(OUT, dpi=130)


if __name__ == "__main__":
    main()
