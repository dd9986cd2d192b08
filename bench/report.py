# SPDX-License-Identifier: Apache-2.0
"""Numbers in documents come from here: tables and single values made from bench/results, written between markers.

    <!-- generated: bench/report.py tree_attention --machine nvidia-h200 --cases llama3 -->
    ...
    <!-- /generated -->

`--write` refreshes every marked place in README.md and docs/, `--check` says what is stale and which performance
numbers stand outside a marked place. bench/README.md states the rules.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from units import duration, percent, scaled, significant

ROOT = Path(__file__).resolve().parent.parent
NOTHING = "_Not measured yet._"

BLOCK = re.compile(
    r"(?P<open><!-- generated: bench/report\.py (?P<arguments>.*?) -->)(?P<body>.*?)(?P<close><!-- /generated -->)",
    re.DOTALL,
)
MARKER = re.compile(r"<!-- generated: bench/report\.py|<!-- /generated -->")
HEADING = re.compile(r"^(#+)\s+(.*?)\s*#*$")
EXEMPT_SECTIONS = ("published numbers", "what was tried")
NUMBER = r"\d[\d.,]*(?:\s*[-–]\s*\d[\d.,]*)?"
CLAIMS = [
    re.compile(rf"(?<![\w.]){NUMBER}\s*(?:{unit})", re.IGNORECASE)
    for unit in (
        r"(?:[kmgt]i?)?b/s\b|[kmgt]bps\b",  # bandwidth
        r"[kmgtp](?:fl)?op(?:s|/s)\b",  # arithmetic
        r"tok(?:en)?s?(?:/s\b| per second)",
        r"(?:[nµμu]s|ms)\b|(?:nano|micro|milli)?seconds? (?:per|a|each)\b",  # time
        r"(?:[x×]|times)\s*(?:as\s+)?(?:faster|slower|quicker|fast|slow|speed-?ups?|the speed)\b",
        r"(?:%|percent)\s+(?:faster|slower|quicker)\b",
        r"(?:%|percent)\s+of\s+(?:\S+\s+){0,3}?(?:floor|peak|ceiling|bandwidth|roofline)\b",
    )
]


class ReportError(Exception):
    pass


def load(machine: str, op: str, root: Path = ROOT) -> dict[str, Any]:
    path = root / "bench" / "results" / machine / f"{op}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"no results: {path.relative_to(root)}") from None


def render(arguments: str, root: Path = ROOT) -> str:
    """What belongs between a marker with these arguments and its end."""
    options = _options(arguments)
    if options.value:
        if not options.machine:
            raise ReportError("--value needs --machine")
        return value(load(options.machine, options.op, root), options.value)
    found = (
        [options.machine]
        if options.machine
        else sorted(p.parent.name for p in root.glob(f"bench/results/*/{options.op}.json"))
    )
    tables = [table(load(machine, options.op, root), options) for machine in found]
    return "\n\n".join(tables) if tables else NOTHING


def table(record: dict[str, Any], options: argparse.Namespace) -> str:
    wanted = options.cases.split(",")
    cases = {
        name: case for name, case in record["cases"].items() if "failed" not in case and any(w in name for w in wanted)
    }
    if not cases:
        raise ReportError(f"no case of {record['op']} on {record['machine']} matches {options.cases!r}")
    overhead = all("floor" not in case for case in cases.values())
    known = list(dict.fromkeys(peer for case in cases.values() for peer in case.get("peers", {})))
    peers = known if options.peers is None else [peer for peer in options.peers.split(",") if peer]
    if missing := set(peers) - set(known):
        raise ReportError(
            f"no peer {', '.join(sorted(missing))} in the results of {record['op']} on {record['machine']}"
        )
    lines = [_caption(record), ""]
    titles = ["case", "time"] + ([] if overhead else ["rate", "of the floor"]) + [f"{peer} takes" for peer in peers]
    lines += ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (len(titles) - 1)]
    for name, case in cases.items():
        cells = [name, duration(case["time"]["median"])]
        if not overhead:
            cells += [_rate(case), f"{percent(case['percent_of_floor'])} ({case['bound']})"]
        cells += [_ratio(case["peers"].get(peer)) for peer in peers]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def value(record: dict[str, Any], path: str) -> str:
    """One number: <case> <field> with field time, rate, floor, of-floor or ratio.<peer>; or ceiling <name>."""
    subject, _, field = path.partition(" ")
    if subject == "ceiling":
        if field not in record.get("ceilings", {}):
            raise ReportError(f"no ceiling {field!r} in the results of {record['op']} on {record['machine']}")
        ceiling = record["ceilings"][field]
        return scaled(ceiling["median"], ceiling["unit"])
    case = record["cases"].get(subject)
    if case is None or "failed" in case:
        raise ReportError(f"no case {subject!r} in the results of {record['op']} on {record['machine']}")
    kind, _, peer = field.partition(".")
    try:
        return {
            "time": lambda: duration(case["time"]["median"]),
            "rate": lambda: _rate(case),
            "floor": lambda: duration(case["floor"]),
            "of-floor": lambda: percent(case["percent_of_floor"]),
            "ratio": lambda: f"{significant(case['peers'][peer]['ratio']['median'])}x",
        }[kind]()
    except KeyError as missing:
        raise ReportError(f"case {subject!r} of {record['op']} on {record['machine']} has no {field!r}") from missing


def refresh(text: str, root: Path = ROOT) -> str:
    """The text with every marked place made anew."""

    def replace(match: re.Match[str]) -> str:
        body = render(match["arguments"], root)
        inline = "\n" not in match["body"] and "--value" in match["arguments"]
        return match["open"] + (body if inline else f"\n{body}\n") + match["close"]

    return BLOCK.sub(replace, text)


def documents(root: Path = ROOT) -> list[Path]:
    return [path for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))) if path.is_file()]


def check(root: Path = ROOT) -> list[str]:
    """Every complaint, as path:line: what is wrong."""
    complaints = []
    for path in documents(root):
        text, where = path.read_text(encoding="utf-8"), path.relative_to(root)
        matches = list(BLOCK.finditer(text))
        if len(MARKER.findall(text)) != 2 * len(matches):
            complaints.append(f"{where}: a generated marker is not closed, or closed twice")
        for match in matches:
            line = text.count("\n", 0, match.start()) + 1
            try:
                if refresh(match[0], root) != match[0]:
                    complaints.append(f"{where}:{line}: stale, run python bench/report.py --write")
            except ReportError as error:
                complaints.append(f"{where}:{line}: {error}")
        complaints += [
            f"{where}:{line}: {claim!r} is not generated from bench/results" for line, claim in loose_claims(text)
        ]
    return complaints


def loose_claims(text: str) -> Iterator[tuple[int, str]]:
    """Performance numbers outside marked places and outside the sections that quote others: (line, words)."""
    blanked = BLOCK.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    exempt, fenced = 0, False  # exempt: the level of the heading that opened an exempt section
    for number, line in enumerate(blanked.splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        heading = None if fenced else HEADING.match(line)
        if heading and not (exempt and len(heading[1]) > exempt):
            exempt = len(heading[1]) if heading[2].lower().startswith(EXEMPT_SECTIONS) else 0
        if not exempt:
            found = {match.start(): match[0] for pattern in CLAIMS for match in pattern.finditer(line)}
            yield from ((number, found[start]) for start in sorted(found))


def _rate(case: dict[str, Any]) -> str:
    return scaled(case["rate"], case["rate_unit"])


def _ratio(peer: dict[str, Any] | None) -> str:
    return f"{significant(peer['ratio']['median'])}x" if peer and "ratio" in peer else "–"


def _caption(record: dict[str, Any]) -> str:
    gpu, cpu = record["hardware"].get("gpu"), record["hardware"]["cpu"]
    where = gpu["name"] if gpu else f"{cpu['name']}, {record['settings']['threads']} threads"
    ceilings = ", ".join(f"{name} {scaled(c['median'], c['unit'])}" for name, c in record.get("ceilings", {}).items())
    measured = f" Measured ceilings: {ceilings}." if ceilings else ""
    return f"{where}, torch {record['versions']['torch']}, {record['date'][:10]}, commit {record['commit']}.{measured}"


def _options(arguments: str | Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/report.py", description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="?")
    parser.add_argument("--machine", help="a folder of bench/results; default: one table for each that has the op")
    parser.add_argument("--cases", default="", metavar="A,B", help="only cases whose name contains one of these")
    parser.add_argument("--peers", metavar="A,B", help="only these peers; '' for none")
    parser.add_argument(
        "--value", metavar="'CASE FIELD'", help="one number: time, rate, floor, of-floor, ratio.PEER; or 'ceiling NAME'"
    )
    parser.add_argument("--write", action="store_true", help="refresh every marked place in README.md and docs/")
    parser.add_argument(
        "--check", action="store_true", help="fail on stale marked places and on loose performance numbers"
    )
    if not isinstance(arguments, str):
        return parser.parse_args(arguments)
    try:
        options = parser.parse_args(shlex.split(arguments))
    except SystemExit:
        raise ReportError(f"cannot read the arguments {arguments!r}") from None
    if not options.op:
        raise ReportError(f"no op in the arguments {arguments!r}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _options(arguments)
    try:
        if options.write:
            for path in documents():
                text = path.read_text(encoding="utf-8")
                if (fresh := refresh(text)) != text:
                    path.write_text(fresh, encoding="utf-8")
                    print(f"refreshed {path.relative_to(ROOT)}")
        elif not options.check:
            print(render(shlex.join(arguments)))
    except ReportError as error:
        print(error, file=sys.stderr)
        return 1
    complaints = check() if options.check else []
    print(*complaints, sep="\n", end="\n" if complaints else "")
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
