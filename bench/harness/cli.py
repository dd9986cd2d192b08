# SPDX-License-Identifier: Apache-2.0
"""The command line of a benchmark: picks cases and peers, checks, times, prints, writes."""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import plot, record, table
from .case import Case, Inputs, Prepare, copy_inputs, error, input_bytes
from .ceilings import Ceilings
from .memory import measured
from .progress import Progress
from .timing import cpu_sampler, cuda_sampler, interleave, spread


@dataclass
class Settings:
    device: str
    seconds: float
    least: int  # rounds
    most: int
    past_cache: float  # inputs rotate over this many times the last-level cache ...
    memory: int  # ... within this many bytes
    last_level_cache: int
    peers: tuple[str, ...] | None


def main(op: str, cases: Iterable[Case], argv: Sequence[str] | None = None) -> int:
    """Runs a benchmark from its command line. Returns the exit code: 1 when a case of ours was wrong or failed."""
    parser = argparse.ArgumentParser(
        prog=f"bench/{op}.py", description=f"Measures {op} against its floor and its peers."
    )
    add_options(parser)
    for name, kind in (("json", "write results"), ("plot", "draw a PNG (needs matplotlib)")):
        parser.add_argument(
            f"--{name}",
            nargs="?",
            const=record.DEFAULT,
            metavar="PATH",
            help=f"{kind}; alone: bench/results/<machine>/",
        )
    options = parser.parse_args(argv)
    command = record.repro(f"python bench/{op}.py", options)
    if options.repro:
        print(command)
        return 0
    run = measure(op, cases, options, command)
    if run is None:
        return 1
    if options.json:
        record.write(run, record.path_for(options.json, run, "json"))
    if options.plot:
        plot.draw(run, record.path_for(options.plot, run, "png"))
    return int(failed(run))


def failed(run: dict[str, Any]) -> bool:
    return run["interrupted"] or any("failed" in result for result in run["cases"].values())


def measure(op: str, cases: Iterable[Case], options: argparse.Namespace, command: str) -> dict[str, Any] | None:
    """Checks and times the cases that the options ask for, and prints the table. None when there is no such case."""
    if options.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(options.device).index or 0)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(
        device=options.device,
        seconds=options.time if options.time is not None else 0.5 if options.quick else 4.0,
        least=5 if options.quick else 15,
        most=300,
        past_cache=0.0 if options.hot else 1.5 if options.device == "cpu" else 3.0,
        memory=int(options.memory * 1e9),
        last_level_cache=record.last_level_cache(options.device),
        peers=tuple(options.peers.split(",")) if options.peers is not None else None,
    )
    kind = options.device.partition(":")[0]
    cases = [case for case in cases if kind in case.devices]
    names = ", ".join(case.name for case in cases) or "none"
    cases = [case for case in cases if any(part in case.name for part in options.cases.split(","))]
    if not cases:
        print(f"{op}: no case matches {options.cases!r} on {options.device}; there are {names}", file=sys.stderr)
        return None
    offered = list(dict.fromkeys(name for case in cases for name in case.peers))
    if unknown := [name for name in settings.peers or () if name and name not in ("all", *offered)]:
        peers_offered = ", ".join(offered) or "none"
        print(f"{op}: no peer {', '.join(unknown)} in these cases; there are {peers_offered}", file=sys.stderr)

    run = record.describe(
        op,
        options.device,
        command,
        {
            "seconds_per_case": settings.seconds,
            "last_level_cache_bytes": settings.last_level_cache,
            "rotation_times_cache": settings.past_cache,
            "memory_budget_bytes": settings.memory,
        },
    )
    ceilings = Ceilings(options.device, (case.dtype for case in cases), settings.last_level_cache)
    ceilings.measure()
    peers = list(dict.fromkeys(name for case in cases for name in _peers_of(case, settings)))
    print(table.heading(run), table.header(cases, peers), sep="\n", flush=True)

    results: dict[str, dict] = {}
    with contextlib.suppress(KeyboardInterrupt), Progress(len(cases)) as progress:  # what was measured is kept
        for case in cases:
            progress.start(case.name)
            try:
                result = _run_case(case, settings, progress)
            except Exception as failure:  # one case that does not fit or is not served must not lose the others
                result = {"failed": f"{type(failure).__name__}: {failure}".splitlines()[0]}
            ceilings.measure()
            if "failed" not in result:
                result |= _judge(case, result, ceilings)
            results[case.name] = result
            progress.write(table.row(case.name, record.rounded(result), cases, peers))
            gc.collect()
            if kind == "cuda":
                torch.cuda.empty_cache()
    run |= {"ceilings": ceilings.summary(), "cases": results, "interrupted": len(results) < len(cases)}
    print(table.footer(run), flush=True)
    return run


def _run_case(case: Case, settings: Settings, progress: Progress) -> dict:
    prepared: dict[str, Prepare] = {"ours": case.run} | {name: case.peers[name] for name in _peers_of(case, settings)}
    inputs = case.make_inputs(0, settings.device)
    errors, refused, notes, extra = _check(case, prepared, inputs, settings.device)
    copies = _copies(case, inputs, len(errors), settings)
    all_inputs = [inputs] + [copy_inputs(inputs) for _ in range(copies - 1)]
    samplers, modes = {}, {}
    for name in errors:
        calls = [prepared[name](each) for each in all_inputs]
        if settings.device == "cpu":
            samplers[name], modes[name] = cpu_sampler(calls), "loop"
        else:
            samplers[name], modes[name] = cuda_sampler(calls)
    samples = interleave(samplers, settings.seconds, settings.least, settings.most, progress.update)
    ours = samples.pop("ours")
    return {
        "time": spread(ours),
        "mode": modes["ours"],
        "error": errors["ours"],
        "copies": copies,
        "rotated_times_cache": copies * case.bytes / settings.last_level_cache,
        "peers": {
            name: {
                "time": spread(theirs),
                "ratio": spread([t / o for t, o in zip(theirs, ours, strict=True)]),
                "mode": modes[name],
                "error": errors[name],
            }
            for name, theirs in samples.items()
        }
        | {name: {"refused": reason} for name, reason in refused.items()},
        "notes": notes,
    } | ({} if extra is None else {"extra_bytes": extra})


def _check(
    case: Case, prepared: dict[str, Prepare], inputs: Inputs, device: str
) -> tuple[dict[str, float], dict[str, str], list[str], int | None]:
    """Errors of those that are right, reasons of those that are not, and ours' extra memory if it is to be measured.
    Raises when ours is wrong."""
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    truth = None if case.truth is None else case.select(inputs, case.truth(inputs))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call = prepared["ours"](inputs)
        output, extra = measured(call, device) if case.memory else (call(), None)
        ours = case.select(inputs, output).clone()
        del call, output
    notes = sorted({str(w.message) for w in caught if w.category.__name__ == "SlowPathWarning"})
    truth = ours if truth is None else truth
    errors["ours"] = error(ours, truth)
    if not errors["ours"] <= case.allowed_error():
        raise ArithmeticError(f"wrong: error {errors['ours']:.2g}, allowed {case.allowed_error():.2g}")
    for name in list(prepared)[1:]:
        try:
            wrong = error(case.select(inputs, prepared[name](inputs)()), truth)
        except Exception as failure:  # a peer that is not installed, does not support the case or does not fit
            refused[name] = f"{type(failure).__name__}: {failure}".splitlines()[0]
            continue
        if wrong <= case.allowed_error() or name in case.inexact_peers:
            errors[name] = wrong
        else:
            refused[name] = f"wrong: error {wrong:.2g}, allowed {case.allowed_error():.2g}"
    return errors, refused, notes, extra


def _judge(case: Case, result: dict, ceilings: Ceilings) -> dict:
    seconds, bound = ceilings.floor(case.bytes, case.flops, case.dtype)
    median = result["time"]["median"]
    work, unit = (case.bytes, "B/s") if bound == "memory" else (case.flops, "FLOP/s")
    return {
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes": case.bytes,
        "flops": case.flops,
        "bound": bound,
        "floor": seconds,
        "percent_of_floor": 100 * seconds / median,
        "rate": work / median,
        "rate_unit": unit,
        "allowed_error": case.allowed_error(),
    } | ({"curve": asdict(case.curve)} if case.curve else {})


def _peers_of(case: Case, settings: Settings) -> list[str]:
    if settings.peers is None:
        return [name for name in case.peers if name not in case.slow_peers]
    return [name for name in case.peers if name in settings.peers or "all" in settings.peers]


def _copies(case: Case, inputs: Inputs, contenders: int, settings: Settings) -> int:
    """How many copies of the inputs to rotate over. Each contender may keep its own layout of them: all are counted."""
    wanted = -(-int(settings.past_cache * settings.last_level_cache) // max(case.bytes, 1))
    affordable = settings.memory // (contenders * max(input_bytes(inputs), 1))
    return max(1, min(wanted, affordable, 1000))


def device(text: str) -> str:
    """For argparse: a device that is there."""
    kind, colon, index = text.partition(":")
    if text == "cpu":
        return text
    if kind != "cuda" or bool(colon) != index.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda[:index]")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise argparse.ArgumentTypeError(f"torch {torch.__version__} sees {count or 'no'} GPU{'s' * (count > 1)}")
    return text


def positive(kind: type) -> Callable[[str], Any]:
    """For argparse: a number above 0."""

    def number(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    number.__name__ = kind.__name__  # argparse says "invalid int value"
    return number


def add_options(parser: argparse.ArgumentParser) -> None:
    """What to measure, and how."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=here, help="cpu or cuda[:index]")
    parser.add_argument("--cases", default="", metavar="A,B", help="only cases whose name contains one of these")
    parser.add_argument("--peers", metavar="A,B", help="only these peers; 'all' adds the slow ones, '' runs none")
    parser.add_argument(
        "--time", type=positive(float), metavar="S", help="seconds per case, all contenders together (default 4)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="half a second and at least 5 rounds per case: for trying, not for keeping"
    )
    parser.add_argument("--hot", action="store_true", help="one copy of the inputs: they may stay in the cache")
    parser.add_argument(
        "--memory", type=positive(float), default=2.0, metavar="GB", help="budget for rotated inputs (default 2)"
    )
    parser.add_argument("--threads", type=positive(int), metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--repro", action="store_true", help="print the command and environment that repeat this run, and stop"
    )
