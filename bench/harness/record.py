# SPDX-License-Identifier: Apache-2.0
"""What a results file says besides the numbers: machine, versions, commit, command."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent.parent / "results"
FORMAT = 1
DEFAULT = "default"  # --json and --plot without a path
NOT_REPEATED = ("json", "plot", "html", "repro", "ops", "saved")  # options that do not change what is measured


def describe(op: str, device: str, command: str, settings: dict[str, Any]) -> dict[str, Any]:
    from torch_kernels import _device

    return {
        "format": FORMAT,
        "op": op,
        "machine": _device.machine_name(device),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": command,
        "hardware": _hardware(device),
        "versions": _versions(),
        "settings": {"device": device, "threads": torch.get_num_threads()} | settings,
    }


def path_for(choice: str, record: dict[str, Any], suffix: str) -> Path:
    """The file to write: the one that was named, or the committed place."""
    path = RESULTS / record["machine"] / f"{record['op']}.{suffix}" if choice == DEFAULT else Path(choice)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write(record: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(rounded(record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def last_level_cache(device: str) -> int:
    from torch_kernels import _device

    if device == "cpu":
        return _device.cpu().last_level_cache_bytes
    return torch.cuda.get_device_properties(device).L2_cache_size


def _hardware(device: str) -> dict:
    from torch_kernels import _device

    hardware: dict = {"cpu": asdict(_device.cpu())}
    if device != "cpu":
        hardware["gpu"] = _gpu(int(device.partition(":")[2] or 0))
    return hardware


def _gpu(index: int) -> dict:
    """As its driver describes it; without cuda-python what torch tells."""
    from torch_kernels import _device

    try:
        gpu = _device.gpus()[index]
    except _device.GpuUnavailable:
        seen = torch.cuda.get_device_properties(index)
        return {
            "index": index,
            "name": seen.name,
            "compute_capability": (seen.major, seen.minor),
            "multiprocessors": seen.multi_processor_count,
            "l2_bytes": seen.L2_cache_size,
            "memory_bytes": seen.total_memory,
        }
    return asdict(gpu) | {"bandwidth_gb_s": gpu.bandwidth_gb_s}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "system": platform.system()}
    for package in ("torch", "triton", "torch-kernels", "flashinfer-python", "torchao", "bitsandbytes", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions | {"torch": torch.__version__}


def _commit() -> str:
    if not RESULTS.is_dir():  # installed: the package's version says what was measured
        return "unknown"

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=RESULTS.parent, capture_output=True, text=True, check=False
        ).stdout.strip()

    try:
        # Results and documents do not change what was measured.
        changed = git(
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            "../csrc",
            "../python",
            "../bench/*.py",
            "../CMakeLists.txt",
        )
        return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if changed else "")
    except OSError:
        return "unknown"


def repro(program: str, options: argparse.Namespace) -> str:
    """The command that repeats a run, with the environment variables that change it, without what it writes."""
    prefixes = ("OMP_", "GOMP_", "MKL_", "ONEDNN_", "DNNL_", "TORCH_", "TRITON_", "CUDA_VISIBLE")
    words = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(prefixes) and "/" not in value
    ]
    words += program.split()
    for name, value in vars(options).items():
        if name not in NOT_REPEATED and value not in (None, False, ""):
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(words)


def rounded(value: Any) -> Any:
    """Six significant digits are more than any timing holds, and keep the files readable."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
