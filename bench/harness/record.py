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
        gpu = _device.gpus()[int(device.partition(":")[2] or 0)]
        hardware["gpu"] = asdict(gpu) | {"bandwidth_gb_s": gpu.bandwidth_gb_s}
    return hardware


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "system": platform.system()}
    for package in ("torch", "triton", "torch-kernels", "flashinfer-python", "torchao", "bitsandbytes", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions | {"torch": torch.__version__}


def _commit() -> str:
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


def repro(op: str, options: argparse.Namespace) -> str:
    """The command that repeats a run, with the environment variables that change it, without what it writes."""
    prefixes = ("OMP_", "GOMP_", "MKL_", "ONEDNN_", "DNNL_", "TORCH_", "TRITON_", "CUDA_VISIBLE")
    words = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(prefixes) and "/" not in value
    ]
    words += ["python", f"bench/{op}.py"]
    for name, value in vars(options).items():
        if name not in ("json", "plot", "repro") and value not in (None, False, ""):
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(words)


def rounded(value: Any) -> Any:
    """Six significant digits are more than any timing holds, and keep the files readable."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
