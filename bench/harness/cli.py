# SPDX-License-Identifier: Apache-2.0
"""The command line of a benchmark: picks cases and peers, checks, times, prints, writes."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from . import plot, table
from .case import Case, Inputs, Prepare, copy_inputs, error, input_bytes
from .ceilings import Ceilings
from .timing import cpu_sampler, cuda_sampler, interleave, spread

RESULTS = Path(__file__).resolve().parent.parent / "results"
FORMAT = 1
DEFAULT = "default"  # --json and --plot without a path


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
    options = _parse(op, argv)
    if options.repro:
        print(_repro(op, sys.argv[1:] if argv is None else argv))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    from torch_kernels import _device  # after the option parser, so that --help needs nothing built

    settings = Settings(
        device=options.device,
        seconds=options.time if options.time is not None else 0.5 if options.quick else 4.0,
        least=5 if options.quick else 15,
        most=300,
        past_cache=0.0 if options.hot else 1.5 if options.device == "cpu" else 3.0,
        memory=int(options.memory * 1e9),
        last_level_cache=_last_level_cache(options.device),
        peers=tuple(options.peers.split(",")) if options.peers is not None else None,
    )
    kind = options.device.partition(":")[0]
    cases = [case for case in cases if kind in case.devices and any(part in case.name for part in options.cases.split(","))]
    if not cases:
        print(f"no case matches {options.cases!r} on {options.device}", file=sys.stderr)
        return 1

    machine = _device.machine_name(options.device)
    record = {
        "format": FORMAT,
        "op": op,
        "machine": machine,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": _repro(op, sys.argv[1:] if argv is None else argv),
        "hardware": _hardware(options.device),
        "versions": _versions(),
        "settings": {
            "device": options.device,
            "threads": torch.get_num_threads(),
            "seconds_per_case": settings.seconds,
            "last_level_cache_bytes": settings.last_level_cache,
            "rotation_times_cache": settings.past_cache,
            "memory_budget_bytes": settings.memory,
        },
    }
    ceilings = Ceilings(options.device, (case.dtype for case in cases), settings.last_level_cache)
    ceilings.measure()
    peers = list(dict.fromkeys(name for case in cases for name in _peers_of(case, settings)))
    print(table.heading(record), table.header(cases, peers), sep="\n", flush=True)

    results: dict[str, dict] = {}
    with Progress(len(cases)) as progress:
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
            progress.write(table.row(case.name, result, cases, peers))
            gc.collect()
            if kind == "cuda":
                torch.cuda.empty_cache()
    record |= {"ceilings": ceilings.summary(), "cases": results}
    print(table.footer(record), flush=True)
    if options.json:
        path = RESULTS / machine / f"{op}.json" if options.json == DEFAULT else Path(options.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_rounded(record), indent=1) + "\n")
    if options.plot:
        path = RESULTS / machine / f"{op}.png" if options.plot == DEFAULT else Path(options.plot)
        path.parent.mkdir(parents=True, exist_ok=True)
        plot.draw(_rounded(record), path)
    return int(any("failed" in result for result in results.values()))


def _run_case(case: Case, settings: Settings, progress: Progress) -> dict:
    prepared: dict[str, Prepare] = {"ours": case.run} | {name: case.peers[name] for name in _peers_of(case, settings)}
    inputs = case.make_inputs(0, settings.device)
    errors, refused, notes = _check(case, prepared, inputs)
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
    }


def _check(case: Case, prepared: dict[str, Prepare], inputs: Inputs) -> tuple[dict[str, float], dict[str, str], list[str]]:
    """Errors of those that are right, reasons of those that are not. Raises when ours is wrong. `run` must not change inputs."""
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    truth = None if case.truth is None else case.select(inputs, case.truth(inputs))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = case.select(inputs, prepared["ours"](inputs)()).clone()
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
        if wrong <= case.allowed_error():
            errors[name] = wrong
        else:
            refused[name] = f"wrong: error {wrong:.2g}, allowed {case.allowed_error():.2g}"
    return errors, refused, notes


def _judge(case: Case, result: dict, ceilings: Ceilings) -> dict:
    seconds, bound = ceilings.floor(case.bytes, case.flops, case.dtype)
    median = result["time"]["median"]
    work, unit = (case.bytes, "GB/s") if bound == "memory" else (case.flops, "GFLOP/s")
    return {
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes": case.bytes,
        "flops": case.flops,
        "bound": bound,
        "floor": seconds,
        "percent_of_floor": 100 * seconds / median,
        "rate": work / median / 1e9,
        "rate_unit": unit,
        "allowed_error": case.allowed_error(),
    }


def _peers_of(case: Case, settings: Settings) -> list[str]:
    if settings.peers is None:
        return [name for name in case.peers if name not in case.slow_peers]
    return [name for name in case.peers if name in settings.peers or "all" in settings.peers]


def _copies(case: Case, inputs: Inputs, contenders: int, settings: Settings) -> int:
    """How many copies of the inputs to rotate over. A contender may keep the inputs in a layout of its own: all are counted."""
    wanted = -(-int(settings.past_cache * settings.last_level_cache) // max(case.bytes, 1))
    affordable = settings.memory // (contenders * max(input_bytes(inputs), 1))
    return max(1, min(wanted, affordable, 1000))


def _last_level_cache(device: str) -> int:
    from torch_kernels import _device

    if device == "cpu":
        return _device.cpu().last_level_cache_bytes
    return torch.cuda.get_device_properties(device).L2_cache_size


def _hardware(device: str) -> dict:
    from torch_kernels import _device

    hardware: dict = {"cpu": asdict(_device.cpu())}
    if device != "cpu":
        gpu = _device.gpus()[int(device.partition(":")[2] or 0)]
        hardware["gpu"] = asdict(gpu) | {"bandwidth_gb_s": gpu.bandwidth_gb_s}
    return hardware


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    for package in ("torch", "triton", "torch-kernels", "flashinfer-python", "torchao", "bitsandbytes", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions | {"torch": torch.__version__}


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True, check=False).stdout.strip()

    try:
        # Results and documents do not change what was measured.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../csrc", "../python", "../bench/*.py", "../CMakeLists.txt")
        return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if changed else "")
    except OSError:
        return "unknown"


def _repro(op: str, argv: Sequence[str]) -> str:
    prefixes = ("OMP_", "GOMP_", "MKL_", "ONEDNN_", "DNNL_", "TORCH_", "TORCHINDUCTOR_", "TRITON_", "CUDA_VISIBLE")
    environment = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(prefixes)]
    arguments = [word for word in argv if word != "--repro"]
    return " ".join([*environment, "python", f"bench/{op}.py", *arguments])


def _rounded(value):
    """Six significant digits are more than any timing holds, and keep the files readable."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _parse(op: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"bench/{op}.py", description=f"Measures {op} against its floor and its peers.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda[:index]")
    parser.add_argument("--cases", default="", metavar="A,B", help="only cases whose name contains one of these")
    parser.add_argument("--peers", metavar="A,B", help="only these peers; 'all' adds the slow ones, '' runs none")
    parser.add_argument("--time", type=float, metavar="S", help="seconds per case, all contenders together (default 4)")
    parser.add_argument("--quick", action="store_true", help="half a second and at least 5 rounds per case: for trying, not for keeping")
    parser.add_argument("--hot", action="store_true", help="one copy of the inputs: they may stay in the cache")
    parser.add_argument("--memory", type=float, default=2.0, metavar="GB", help="budget for rotated inputs (default 2)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", nargs="?", const=DEFAULT, metavar="PATH", help="write results; alone: bench/results/<machine>/")
    parser.add_argument("--plot", nargs="?", const=DEFAULT, metavar="PATH", help="draw a PNG (needs matplotlib); alone: as --json")
    parser.add_argument("--repro", action="store_true", help="print the command and environment that repeat this run, and stop")
    return parser.parse_args(argv)


class Progress:
    """tqdm where it is installed, else one line on stderr; silent when stderr is not a terminal."""

    def __init__(self, cases: int):
        self.cases, self.done, self.name = cases, -1, ""
        self.bar = None
        self.shown = sys.stderr.isatty()
        if self.shown:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=cases, leave=False, bar_format="{l_bar}{bar}| {desc} {elapsed}<{remaining}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.close()
        else:
            self._line("")

    def start(self, name: str) -> None:
        self.done, self.name = self.done + 1, name
        self.update(0.0)

    def update(self, part: float) -> None:
        if self.bar:
            self.bar.n = round(self.done + part, 2)
            self.bar.set_description_str(self.name, refresh=True)
        else:
            self._line(f"{self.done + 1}/{self.cases} {self.name} {part:.0%}")

    def write(self, text: str) -> None:
        """A line of output that the progress line does not run into."""
        if self.bar:
            self.bar.clear()
        else:
            self._line("")
        print(text, flush=True)

    def _line(self, text: str) -> None:
        if self.shown:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
