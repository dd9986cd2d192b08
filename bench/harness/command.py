# SPDX-License-Identifier: Apache-2.0
"""The command line over all benchmarks: ops, presets of models, results as JSON and as one report."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from presets import MODELS, find

from . import cli, html, record
from .case import Case

HERE = Path(__file__).resolve().parents[1]
# A benchmark of an op makes cases.
OPS = tuple(sorted(f.stem for f in HERE.glob("*.py") if "\ndef cases()" in f.read_text(encoding="utf-8")))
PROGRAM = "python -m torch_kernels bench"
EXAMPLES = f"""\
examples:
  {PROGRAM} int4_linear --preset llama3-8b --quick
  {PROGRAM} all --peers all --json results --html report.html
  {PROGRAM} --from results --html report.html
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 when a case of ours was wrong or failed, or when nothing could be measured."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.saved:
        return _report_saved(parser, options)
    if not options.ops:
        print(listing())
        return 0
    if unknown := [op for op in options.ops if op not in (*OPS, "all")]:
        parser.error(f"no benchmark of {', '.join(unknown)}; there are {', '.join(OPS)}")
    ops = OPS if "all" in options.ops else tuple(dict.fromkeys(options.ops))
    if options.json and options.json.suffix == ".json" and len(ops) > 1:
        parser.error("--json needs a folder for several ops")
    try:
        presets = [find(name) for name in (options.preset or "").split(",") if name]
    except KeyError as unknown_preset:
        parser.error(unknown_preset.args[0])
    if not options.repro:
        _require_writable(parser, "--json", options.json, folder=options.json and options.json.suffix != ".json")
        _require_writable(parser, "--html", options.html)

    runs: list[dict[str, Any]] = []
    code = 0
    for op in ops:
        command = record.repro(f"{PROGRAM} {op}", options)
        if options.repro:
            print(command)
            continue
        serving = [name for name in presets if op in MODELS[name].ops]
        if presets and not serving:
            print(f"{op}: nothing to measure for {', '.join(presets)}", file=sys.stderr)
            continue
        run = cli.measure(op, _cases(op, serving), options, command)
        if run is None:
            continue
        print()
        runs.append(run)
        code |= cli.failed(run)
        # After each op, so that a long run that is interrupted has something to show.
        if options.json:
            record.write(run, options.json if options.json.suffix == ".json" else options.json / f"{op}.json")
        if options.html:
            _write_report(runs, options.html)
    if options.html and runs:
        print(f"report: {options.html}")
    return code if runs or options.repro else 1


def listing() -> str:
    """The ops with what they measure, and the presets with the ops that they have work for."""
    width = max(map(len, (*OPS, *MODELS))) + 2
    lines = ["Ops (or all):"]
    lines += [f"  {op:<{width}}{_subject(_module(op))}" for op in OPS]
    lines += ["", "Presets, with the shapes of published models:"]
    lines += [f"  {name:<{width}}{model.repository} ({', '.join(model.ops)})" for name, model in MODELS.items()]
    return "\n".join([*lines, "", EXAMPLES + f"\n{PROGRAM} --help tells the options."])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage="%(prog)s [op ...] [options]",
        description="Measures ops against their floor on this machine and against what else does the same.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ops", nargs="*", metavar="op", help="ops to measure, or all; without any they are listed")
    parser.add_argument(
        "--preset", metavar="A,B", help="cases with the shapes of these models instead of the usual ones"
    )
    cli.add_options(parser)
    parser.add_argument(
        "--json", nargs="?", type=Path, const=Path("."), metavar="PATH",
        help="write results: a .json file, or a folder for one file per op (alone: the current one)",
    )  # fmt: skip
    parser.add_argument(
        "--html", nargs="?", type=Path, const=Path("torch-kernels-bench.html"), metavar="PATH",
        help="write a report, one file that needs no other (alone: torch-kernels-bench.html)",
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="saved", nargs="+", type=Path, metavar="PATH",
        help="measure nothing: report the results in these files and folders (with --html)",
    )  # fmt: skip
    return parser


def _require_writable(parser: argparse.ArgumentParser, option: str, path: Path | None, folder: bool = False) -> None:
    """Makes the folder of what will be written, so that no long run ends in vain."""
    if path is None:
        return
    place = path if folder else path.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        parser.error(f"{option}: {place} cannot be made: {problem.strerror}")
    if not folder and path.is_dir():
        parser.error(f"{option}: {path} is a folder")
    if not os.access(place, os.W_OK):
        parser.error(f"{option}: no permission to write into {place}")


def _report_saved(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if options.ops or not options.html:
        parser.error("--from takes --html and no ops")
    files = [file for path in options.saved for file in (sorted(path.rglob("*.json")) if path.is_dir() else [path])]
    try:
        runs = [run for run in map(_load, files) if run]
    except OSError as problem:
        parser.error(f"{problem.filename}: {problem.strerror}")
    except ValueError as problem:
        parser.error(str(problem))
    if not runs:
        parser.error(f"no results in {', '.join(map(str, options.saved))}")
    _require_writable(parser, "--html", options.html)
    _write_report(runs, options.html)
    print(f"report: {options.html}")
    return 0


def _load(path: Path) -> dict[str, Any] | None:
    """None where a JSON file holds something else."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{path} is no JSON: {problem}") from problem
    return run if isinstance(run, dict) and run.get("format") == record.FORMAT and "cases" in run else None


def _write_report(runs: list[dict[str, Any]], path: Path) -> None:
    path.write_text(html.render(runs), encoding="utf-8")


def _cases(op: str, presets: Sequence[str]) -> list[Case]:
    module = _module(op)
    return [case for name in presets for case in module.preset(name, MODELS[name])] if presets else module.cases()


def _module(op: str) -> ModuleType:
    return importlib.import_module(op)


def _subject(module: ModuleType) -> str:
    """The first sentence of its documentation."""
    paragraph = " ".join((module.__doc__ or "").strip().partition("\n\n")[0].split())
    return textwrap.shorten(paragraph.partition(". ")[0].partition(": ")[0].rstrip("."), 90, placeholder=" …")
