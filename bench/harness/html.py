# SPDX-License-Identifier: Apache-2.0
"""The report: one HTML file of results, that asks for nothing else and has no script. Its look is in report.html."""

from __future__ import annotations

import functools
import math
import statistics
from pathlib import Path
from typing import Any

import jinja2  # torch needs it too
from units import duration, percent, scaled, significant

from . import table
from .curves import Line, panel

TEMPLATE = Path(__file__).parent / "report.html"
COLOURS = 8  # of peers, in the style sheet
MOST = 8.0  # longest bar, in times of ours: one slow peer must not squash the rest

Run = dict[str, Any]  # as written in a results file
Result = dict[str, Any]  # of a case


def render(runs: list[Run]) -> str:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    machines = {run["machine"]: run for run in runs}
    return template.render(
        machines=[_machine(run) for run in machines.values()],
        sections=[_section(run, f"{run['op']}-{index}", len(machines) > 1) for index, run in enumerate(runs)],
    )


def _machine(run: Run) -> dict[str, Any]:
    """What is known of a machine, in pairs."""
    cpu, gpu, settings = run["hardware"]["cpu"], run["hardware"].get("gpu"), run["settings"]
    facts = {}
    if gpu:
        facts["GPU"] = f"{gpu['name']}, compute capability {'.'.join(map(str, gpu['compute_capability']))}"
        facts["GPU memory"] = f"{_size(gpu['memory_bytes'])}, L2 {_size(gpu['l2_bytes'])}"
        if "driver" in gpu:
            facts["Driver"] = f"{gpu['driver']}, CUDA up to {gpu['cuda']}"
    facts["CPU"] = f"{cpu['name']} ({cpu['architecture']}), {cpu['cores']} cores, {settings['threads']} threads used"
    facts["Caches"] = ", ".join(f"{level} {_size(size)}" for level, size in cpu["caches"].items()) or "unknown"
    if cpu["memory_bytes"]:
        facts["Memory"] = _size(cpu["memory_bytes"])
    facts["Instructions"] = " ".join(cpu["features"]) or "no vector extension that a kernel asks for"
    facts["Software"] = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return {"name": run["machine"], "facts": facts}


def _section(run: Run, anchor: str, several_machines: bool) -> dict[str, Any]:
    results = {name: result for name, result in run["cases"].items() if "failed" not in result}
    measured = {name: result for name, result in results.items() if "floor" in result}
    peers = list(dict.fromkeys(peer for result in results.values() for peer in result.get("peers", {})))
    styles = {peer: f"peer{index % COLOURS}" for index, peer in enumerate(peers)}
    timed = [p for p in peers if any("ratio" in result["peers"].get(p, {}) for result in measured.values())]
    panels, drawn = _panels(measured, styles)
    parts = [result["percent_of_floor"] for result in measured.values()]
    return {
        "anchor": anchor,
        "title": run["op"],
        "machine": run["machine"] if several_machines else "",
        "subtitle": table.subtitle(run),
        "inputs": _inputs(run["settings"]),
        "command": run["command"],
        "count": len(run["cases"]),
        "failed": len(run["cases"]) - len(results),
        "of_floor": f"{percent(statistics.median(parts))} ({percent(min(parts))}–{percent(max(parts))})"
        if parts
        else "–",
        "ceilings": [_ceiling(*item) for item in run.get("ceilings", {}).items()],
        "peers": timed,
        "styles": styles,
        "memory": any("extra_bytes" in result for result in measured.values()),
        "rows": [_row(name, result, timed) for name, result in run["cases"].items()],
        "simple": not measured,
        "bars": [_bars(name, result, styles) for name, result in measured.items() if name not in drawn],
        "panels": panels,
        "notes": [note for name, result in results.items() for note in _notes(name, result)],
    }


def _inputs(settings: dict[str, Any]) -> str:
    if not settings.get("rotation_times_cache"):
        return "hot: inputs may stay in the cache" if "rotation_times_cache" in settings else ""
    return f"inputs rotate over {settings['rotation_times_cache']:g}x the last-level cache where memory suffices"


def _ceiling(name: str, ceiling: dict[str, Any]) -> dict[str, str]:
    best = ceiling["best_by_source"]
    return {
        "name": name,
        "median": scaled(ceiling["median"], ceiling["unit"]),
        "spread": f"{scaled(ceiling['min'], ceiling['unit'])} – {scaled(ceiling['max'], ceiling['unit'])}",
        "source": max(best, key=best.__getitem__),
    }


def _row(name: str, result: Result, peers: list[str]) -> dict[str, Any]:
    if "failed" in result:
        return {"name": name, "failed": result["failed"]}
    row: dict[str, Any] = {"name": name, "time": table.duration_spread(result["time"])}
    if "floor" in result:
        row |= {
            "floor": duration(result["floor"]),
            "percent": min(100.0, result["percent_of_floor"]),
            "of_floor": percent(result["percent_of_floor"]),
            "bound": result["bound"],
            "rate": scaled(result["rate"], result["rate_unit"]),
            "error": f"{result['error']:.0e}" if result["error"] else "0",
            "extra": f"{result['extra_bytes'] / 1e6:.3g} MB" if "extra_bytes" in result else "",
            "ratios": [_ratio(result, peer) for peer in peers],
        }
    return row


def _ratio(result: Result, peer: str) -> dict[str, str]:
    """A verdict only where most rounds agree on it."""
    entry = result["peers"].get(peer, {})
    if "ratio" not in entry:
        return {"text": "refused" if "refused" in entry else "", "style": "muted", "tip": entry.get("refused", "")}
    ratio = entry["ratio"]
    verdict = "ahead" if ratio["p20"] > 1 else "behind" if ratio["p80"] < 1 else "even"
    other = entry["error"] > result["allowed_error"]
    span = f"{significant(ratio['p20'])}–{significant(ratio['p80'])}"
    tip = f"{peer} takes {duration(entry['time']['median'])}; ratio {span}"
    tip += f"; computes something else or coarser, error {entry['error']:.0e}" if other else ""
    return {"text": f"{significant(ratio['median'])}x" + ("*" if other else ""), "style": verdict, "tip": tip}


def _bars(name: str, result: Result, styles: dict[str, str]) -> dict[str, Any]:
    """Times over ours; the longest is cut at MOST."""
    ratios = {peer: entry["ratio"]["median"] for peer, entry in result["peers"].items() if "ratio" in entry}
    longest = min(MOST, max([1.0, *ratios.values()]))
    ours = duration(result["time"]["median"])
    bars = [{"label": "torch-kernels", "style": "ours", "width": 100 / longest, "cut": False, "text": ours}]
    for peer, ratio in ratios.items():
        width = 100 * min(ratio, longest) / longest
        text = f"{significant(ratio)}x, {duration(result['peers'][peer]['time']['median'])}"
        bars.append({"label": peer, "style": styles[peer], "width": width, "cut": ratio > longest, "text": text})
    floor = min(1.0, result["percent_of_floor"] / 100) * 100 / longest
    caption = f"{percent(result['percent_of_floor'])} of the floor, {result['bound']}-bound"
    return {"name": name, "caption": caption, "bars": bars, "floor": floor}


def _panels(results: dict[str, Result], styles: dict[str, str]) -> tuple[list[dict[str, Any]], set[str]]:
    """A panel for each series, and the cases that are drawn in one."""
    series: dict[str, dict[str, Result]] = {}
    for name, result in results.items():
        if "curve" in result:
            series.setdefault(result["curve"]["series"], {})[name] = result
    panels: list[dict[str, Any]] = []
    drawn: set[str] = set()
    for title, members in series.items():
        points = sorted(members.values(), key=lambda result: result["curve"]["x"])
        if points[0]["curve"]["x"] == points[-1]["curve"]["x"]:
            continue  # nothing to draw a line over
        drawn |= members.keys()
        measures = ("time", "rate") if points[0]["curve"].get("items") else ("speedup",)
        panels += [_panel(title, points, measure, styles) for measure in measures]
    return panels, drawn


def _panel(title: str, points: list[Result], measure: str, styles: dict[str, str]) -> dict[str, Any]:
    axis, baseline = points[0]["curve"]["axis"], points[0]["curve"]["baseline"]
    if measure == "speedup" and not all("time" in point["peers"].get(baseline, {}) for point in points):
        measure = "time"  # nothing to be faster than

    def value(result: Result, seconds: float) -> float:
        if measure == "time":
            return 1e3 * seconds
        done = result["curve"]["items"] if measure == "rate" else result["peers"][baseline]["time"]["median"]
        return done / seconds

    def line(label: str, style: str, seconds: Any) -> Line:
        found = ((result, seconds(result)) for result in points)
        return Line(label, style, [(r["curve"]["x"], value(r, time)) for r, time in found if time is not None])

    def of_peer(peer: str, result: Result) -> float | None:
        return result["peers"].get(peer, {}).get("time", {}).get("median")

    lines = [line("floor", "floor", lambda result: result["floor"])]
    lines += [line(peer, style, functools.partial(of_peer, peer)) for peer, style in styles.items()]
    lines += [line("torch-kernels", "ours", lambda result: result["time"]["median"])]
    lines = [each for each in lines if each.points and all(math.isfinite(y) and y > 0 for _, y in each.points)]
    label = {"time": "milliseconds", "rate": f"{axis} per second", "speedup": f"times as fast as {baseline}"}[measure]
    return {
        "title": title,
        "label": label,
        "legend": [(each.label, each.style) for each in reversed(lines)],
        "svg": panel(title, axis, label, lines, 2 if measure == "speedup" else 10),
    }


def _notes(name: str, result: Result) -> list[str]:
    refused = [
        f"{name}: {peer} refused: {entry['refused']}"
        for peer, entry in result.get("peers", {}).items()
        if "refused" in entry
    ]
    return [f"{name}: {note}" for note in result.get("notes", [])] + refused


def _size(count: int) -> str:
    for unit, scale in (("GB", 2**30), ("MB", 2**20)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 2**10:.3g} KB"
