# SPDX-License-Identifier: Apache-2.0
"""Pictures of a benchmark: for every case the time of each contender over ours, with the machine's floor marked; cases
that form curves as speedups over one peer in a picture of their own, <name>-curves.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from units import duration, length, percent, significant

from . import table

OURS, FLOOR, INK, FAINT = "#1f6f5c", "#c0392b", "#222222", "#8a8a8a"
PEERS = ("#9fb4c7", "#d9b26f", "#b39bc8", "#c9a0a0", "#a7b98b")


def draw(record: dict, path: Path) -> None:
    try:
        import matplotlib
    except ImportError as missing:
        raise SystemExit("--plot needs matplotlib: pip install 'torch-kernels[bench]'") from missing
    matplotlib.use("Agg")
    cases = {name: case for name, case in record["cases"].items() if "failed" not in case}
    if not cases:
        raise SystemExit("no case to plot")
    curves = {name: case for name, case in cases.items() if "curve" in case}
    if curves:
        _draw_curves(record, curves, path.with_stem(f"{path.stem}-curves"))
    if bars := {name: case for name, case in cases.items() if name not in curves}:
        _draw_bars(record, bars, path)


def _draw_curves(record: dict, cases: dict, path: Path) -> None:
    """Ours, the peers and the floor over the number in which the cases of a series differ: one panel with the speedup
    over the baseline, or where items are counted one with times and one with items per second."""
    import matplotlib.pyplot as plt

    series: dict[str, list[dict]] = {}
    for case in cases.values():
        series.setdefault(case["curve"]["series"], []).append(case)
    drawn = [
        (name, sorted(points, key=lambda point: point["curve"]["x"]), measure)
        for name, points in series.items()
        if len(points) > 1
        for measure in (("time", "rate") if points[0]["curve"].get("items") else ("speedup",))
    ]
    if not drawn:
        return
    columns = min(2, len(drawn))
    rows = -(-len(drawn) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.3 * rows + 0.9), squeeze=False)
    for panel in panels.flat[len(drawn) :]:
        panel.set_visible(False)
    for panel, (name, points, measure) in zip(panels.flat, drawn, strict=False):
        _draw_panel(panel, points, measure)
        panel.set_title(name, fontsize=10, color=INK, loc="left")
    figure.suptitle(table.title(record), fontsize=12, fontweight="bold", color=INK, x=0.01, ha="left")
    figure.text(0.01, 0.005, table.subtitle(record), fontsize=8.5, color=FAINT)
    figure.tight_layout(rect=(0, 0.02, 1, 0.98))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_panel(panel: Any, points: list[dict], measure: str) -> None:
    from matplotlib.ticker import NullLocator

    x = [point["curve"]["x"] for point in points]
    axis, baseline = points[0]["curve"]["axis"], points[0]["curve"]["baseline"]
    base = [_peer_time(point, baseline) for point in points]
    items = [point["curve"].get("items", 0) for point in points]
    peers = list(dict.fromkeys(peer for point in points for peer in point["peers"] if peer != baseline))

    def values(times: list[float]) -> list[float]:
        if measure == "time":
            return [1e3 * time for time in times]
        return [amount / time for amount, time in zip(base if measure == "speedup" else items, times, strict=True)]

    floor = values([point["floor"] for point in points])
    panel.plot(x, floor, color=FLOOR, linewidth=1.4, linestyle=(0, (4, 3)), label="floor")
    panel.plot(x, values(base), "-" if measure == "speedup" else "o-", color=FAINT, linewidth=1.0, ms=3, label=baseline)
    for color, peer in zip(PEERS * 9, peers, strict=False):
        panel.plot(x, values([_peer_time(point, peer) for point in points]), "o-", color=color, ms=3, label=peer)
    ours = values([point["time"]["median"] for point in points])
    panel.plot(x, ours, "o-", color=OURS, linewidth=2, ms=4, label="torch-kernels")
    panel.set_xscale("log", base=2)
    panel.set_xticks(x, [length(value) for value in x])
    panel.xaxis.set_minor_locator(NullLocator())
    if measure == "speedup":
        panel.set_ylim(0, 1.15 * max(value for value in ours + floor[:1] if value == value))
    else:
        panel.set_yscale("log")
    label = {"time": "milliseconds", "rate": f"{axis} per second", "speedup": f"times as fast as {baseline}"}[measure]
    panel.set_ylabel(label, fontsize=8.5, color=INK)
    panel.set_xlabel(axis, fontsize=9, color=INK)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#e6e6e6", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.legend(fontsize=7.5, frameon=False)


def _peer_time(case: dict, peer: str) -> float:
    return case["peers"].get(peer, {}).get("time", {}).get("median", float("nan"))


def _draw_bars(record: dict, cases: dict, path: Path) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.artist import Artist
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    peers = list(
        dict.fromkeys(peer for case in cases.values() for peer in case["peers"] if "ratio" in case["peers"][peer])
    )
    ratios = [
        case["peers"][p]["ratio"]["median"]
        for case in cases.values()
        for p in peers
        if "ratio" in case["peers"].get(p, {})
    ]
    # One slow peer must not squash the rest: longer bars are cut, their label tells the value.
    limit = max(1.5, min(max(ratios, default=1.5) * 1.05, 8.0))

    bar, gap = 1.0, 0.9
    bars = sum(1 + sum("ratio" in case["peers"].get(p, {}) for p in peers) for case in cases.values())
    height = bars * bar + len(cases) * gap
    figure, axes = plt.subplots(figsize=(10, 1.9 + 0.21 * height), layout="constrained")
    y, ticks = 0.0, []

    def add(value: float, color: str, text: str, text_from: float = 0) -> None:
        nonlocal y
        axes.barh(y, min(value, limit), bar * 0.86, color=color, align="edge")
        if value > limit:  # a cut across the end of the bar
            axes.plot(
                [limit * 0.975, limit * 0.985],
                [y - 0.05, y + bar * 0.9],
                color="white",
                linewidth=2.5,
                solid_capstyle="butt",
            )
        axes.text(
            max(min(value, limit), text_from) + limit * 0.008, y + bar * 0.43, text, va="center", fontsize=8, color=INK
        )
        y += bar

    for name, case in cases.items():
        top = y
        ours = case["time"]["median"]
        floor = case["floor"] / ours
        add(1.0, OURS, f"{duration(ours)}, {percent(case['percent_of_floor'])} of the floor", text_from=floor)
        for color, peer in zip(PEERS * 9, peers, strict=False):
            entry = case["peers"].get(peer, {})
            if "ratio" in entry:
                value = entry["ratio"]["median"]
                add(value, color, f"{significant(value)}x")
        axes.plot([floor, floor], [top - gap * 0.2, y + gap * 0.1], color=FLOOR, linewidth=1.6)
        ticks.append(((top + y) / 2, f"{name}\n{case['bound']}-bound"))
        y += gap
    axes.axvline(1.0, color=OURS, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.set_yticks([position for position, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes.set_ylim(y, -gap)
    axes.set_xlim(0, limit * 1.09)
    axes.set_xlabel("time relative to torch-kernels (shorter is faster)", fontsize=9, color=INK)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(table.title(record), fontsize=12, fontweight="bold", color=INK, loc="left", pad=20)
    axes.annotate(table.subtitle(record), (0, 1), (0, 6), "axes fraction", "offset points", fontsize=8.5, color=FAINT)
    handles: list[Artist] = [Patch(color=OURS, label="torch-kernels")]
    handles += [Patch(color=color, label=peer) for color, peer in zip(PEERS * 9, peers, strict=False)]
    handles += [Line2D([], [], color=FLOOR, linewidth=1.6, label="floor: memory or arithmetic at the measured ceiling")]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8.5, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
