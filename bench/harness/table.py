# SPDX-License-Identifier: Apache-2.0
"""The table that a benchmark prints: Markdown, aligned for a terminal, one row as each case ends."""

from __future__ import annotations

from collections.abc import Sequence

from units import duration, percent, scaled, significant

from .case import Case

FIXED = (("time (p20–p80)", 26), ("rate", 14), ("floor", 9), ("of floor", 8), ("error", 7))


def title(record: dict) -> str:
    gpu, cpu = record["hardware"].get("gpu"), record["hardware"]["cpu"]
    return f"{record['op']} on " + (gpu["name"] if gpu else f"{cpu['name']}, {record['settings']['threads']} threads")


def subtitle(record: dict) -> str:
    return f"torch {record['versions']['torch']}, {source(record)}, {record['date'][:10]}"


def source(record: dict) -> str:
    """What was measured: a commit, or of an installed package its version."""
    if record["commit"] != "unknown":
        return f"commit {record['commit']}"
    return f"torch-kernels {record['versions'].get('torch-kernels', 'of unknown version')}"


def heading(record: dict) -> str:
    settings = record["settings"]
    rotation, cache = settings["rotation_times_cache"], settings["last_level_cache_bytes"] / 2**20
    if rotation:
        budget = settings["memory_budget_bytes"] / 1e9
        inputs = f"inputs rotate over {rotation:g}x the last-level cache ({cache:.0f} MB) where {budget:g} GB suffice"
    else:
        inputs = "hot: one copy of the inputs, which may stay in the cache"
    return "\n# ".join(
        [
            f"# {title(record)}: {subtitle(record)}",
            inputs,
            "ratio: the peer's time over ours, median over rounds in which both ran",
        ]
    )


def header(cases: Sequence[Case], peers: Sequence[str]) -> str:
    width = _name_width(cases)
    titles = (
        [f"{'case':<{width}}"]
        + [f"{title:>{size}}" for title, size in FIXED]
        + [f"{p:>{_peer_width(p)}}" for p in peers]
    )
    rules = (
        ["-" * width]
        + ["-" * (size - 1) + ":" for _, size in FIXED]
        + ["-" * (_peer_width(p) - 1) + ":" for p in peers]
    )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (titles, rules))


def row(name: str, result: dict, cases: Sequence[Case], peers: Sequence[str]) -> str:
    width = _name_width(cases)
    if "failed" in result:
        return f"| {name:<{width}} | failed: {result['failed']} |"
    values = [
        duration_spread(result["time"]),
        scaled(result["rate"], result["rate_unit"]),
        duration(result["floor"]),
        percent(result["percent_of_floor"]),
        f"{result['error']:.0e}" if result["error"] else "0",
    ]
    cells = [f"{name:<{width}}"] + [f"{value:>{size}}" for value, (_, size) in zip(values, FIXED, strict=True)]
    cells += [f"{ratio(result['peers'].get(peer)):>{_peer_width(peer)}}" for peer in peers]
    return "| " + " | ".join(cells) + " |"


def footer(record: dict) -> str:
    lines = ["", "Ceilings, median (min–max) of the readings around the cases:"]
    for key, ceiling in record["ceilings"].items():
        source = max(ceiling["best_by_source"], key=ceiling["best_by_source"].__getitem__)
        low, middle, high = (significant(ceiling[part] / 1e9) for part in ("min", "median", "max"))
        lines.append(f"  {key:<10} {middle} ({low}–{high}) G{ceiling['unit']}, best source: {source}")
    results = {name: result for name, result in record["cases"].items() if "failed" not in result}
    wanted = record["settings"]["rotation_times_cache"]
    short = [
        f"{name} {r['rotated_times_cache']:.2g}x"
        for name, r in results.items()
        if r["rotated_times_cache"] < 0.99 * wanted
    ]
    if short:
        lines.append(f"Useful inputs span less than {wanted:g}x the last-level cache in: " + ", ".join(short))
    if extra := {name: result["extra_bytes"] for name, result in results.items() if "extra_bytes" in result}:
        lines.append(
            "Memory beyond inputs and outputs, MB: " + ", ".join(f"{n} {b / 1e6:.3g}" for n, b in extra.items())
        )
    for name, result in results.items():
        lines += [f"{name}: {note}" for note in result["notes"]]
        lines += [
            f"{name}: {peer} refused: {entry['refused']}"
            for peer, entry in result["peers"].items()
            if "refused" in entry
        ]
        eager = [peer for peer, entry in ({"ours": result} | result["peers"]).items() if entry.get("mode") == "eager"]
        lines += [f"{name}: {peer} cannot be captured in a CUDA graph and is timed call by call" for peer in eager]
    return "\n".join(lines)


def ratio(peer: dict | None) -> str:
    if peer is None:
        return ""
    return "refused" if "refused" in peer else f"{significant(peer['ratio']['median'])}x"


def duration_spread(values: dict) -> str:
    """12.3 ms (12.1–12.9), all in the unit of the median."""
    median = duration(values["median"])
    scale = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}[median.split()[1]]
    return f"{median} ({significant(values['p20'] / scale)}–{significant(values['p80'] / scale)})"


def _name_width(cases: Sequence[Case]) -> int:
    return max(len(case.name) for case in cases)


def _peer_width(peer: str) -> int:
    return max(len(peer), 7)
