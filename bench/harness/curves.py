# SPDX-License-Identifier: Apache-2.0
"""Curves for the report as inline SVG. Colours are classes of the page's style sheet, which knows light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape
from units import length

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 10, 38
MOST_TICKS = 9


@dataclass(frozen=True)
class Line:
    label: str
    style: str  # a class of the style sheet
    points: Sequence[tuple[float, float]]


def panel(title: str, x_label: str, y_label: str, lines: Sequence[Line], base: int) -> Markup:
    """Lines on two logarithmic scales, x of base 2; y shows whole powers of its base."""
    xs = sorted({x for line in lines for x, _ in line.points})
    ticks = _powers(base, [y for line in lines for _, y in line.points])
    first, last = math.log(xs[0]), math.log(xs[-1])
    spell = _fraction if base == 2 else _short
    low, high = math.log(ticks[0]), math.log(ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - first) / (last - first)
        up = (math.log(y) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {y_label} over {x_label}")}">'
    ]
    for tick in ticks[:: -(-len(ticks) // MOST_TICKS)]:
        _, y = place(xs[0], tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y + 3.5:.1f}">{spell(tick)}</text>')
    room = -math.inf
    for tick in xs:
        x, _ = place(tick, ticks[-1])
        if x - room >= 26:  # labels that would run into each other are left out
            parts.append(f'<text class="middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}">{length(tick)}</text>')
            room = x
    parts.append(f'<text class="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}">{escape(x_label)}</text>')
    for line in lines:
        places = [place(x, y) for x, y in line.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<g class="line {line.style}"><path d="M{path}"/>')
        for (x, y), point in zip(places, line.points, strict=True):
            tip = escape(f"{line.label}: {_short(point[1])} at {point[0]:g}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{tip}</title></circle>')
        parts.append("</g>")
    return Markup("".join(parts) + "</svg>")


def _powers(base: int, values: Sequence[float]) -> list[float]:
    """Of the base, from below all values to above them."""
    first, last = math.floor(math.log(min(values), base)), math.ceil(math.log(max(values), base))
    return [float(base) ** power for power in range(first, max(last, first + 1) + 1)]


def _short(number: float) -> str:
    for suffix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g}{suffix}"
    return f"{number:.3g}"


def _fraction(number: float) -> str:
    return f"1/{1 / number:g}" if number < 1 else f"{number:g}"
