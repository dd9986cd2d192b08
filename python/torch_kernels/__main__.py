# SPDX-License-Identifier: Apache-2.0
"""``python -m torch_kernels info``, ``selftest`` and ``bench``."""

from __future__ import annotations

import argparse
import platform
import runpy
import sys
import textwrap
from pathlib import Path

import torch

import torch_kernels
from torch_kernels import _device, _native, _registry, _selftest


def info() -> int:
    triton = _registry.triton_version() or "not installed"
    print(f"torch-kernels {torch_kernels.__version__}, torch {torch.__version__}, triton {triton}")
    print(f"Python {platform.python_version()} on {platform.platform()}")
    print(_device.describe())
    supported = ", ".join(_native.cpu.instruction_sets())
    print(f"CPU kernels: {_native.cpu.instruction_set()} (built and supported here: {supported})")
    cuda = _native.cuda()
    missing = _native.cuda_missing()
    built = f"{cuda.architectures} (CUDA {cuda.cuda_version})" if cuda else ""
    print(f"CUDA kernels: {'; '.join(filter(None, (built, missing)))}")
    print()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        print(f"Which backend serves an op on {device}, and why not another:")
        alike: dict[tuple[str, ...], list[str]] = {}
        for op in _registry.OPS.values():
            serving, reasons = op.service(torch.device(device))
            alike.setdefault((serving, *(f"{name}: {why}" for name, why in reasons.items())), []).append(op.name)
        for (serving, *others), names in alike.items():
            print(f"  {serving} ({'; '.join(others)})" if others else f"  {serving}")
            print(textwrap.fill(", ".join(names), 100, initial_indent="    ", subsequent_indent="    "))
    return 0


def bench(arguments: list[str]) -> None:
    """Runs the folder of benchmarks, which ends the process. A wheel has it beside this file, a checkout at its top."""
    here = Path(__file__).resolve().parent
    folder = here / "bench"
    if not folder.is_dir():
        folder = here.parents[1] / "bench"
    sys.argv[1:] = arguments
    runpy.run_path(str(folder), run_name="__main__")


def main() -> int:
    if sys.argv[1:2] == ["bench"]:  # it has a command line of its own
        bench(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m torch_kernels", description=torch_kernels.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, and which backend serves which op here")
    commands.add_parser("selftest", help="every op against its float64 meaning on this machine, in about ten seconds")
    commands.add_parser(
        "bench", help="measures ops on this machine; alone it lists them and its presets", add_help=False
    )
    arguments = parser.parse_args()
    return info() if arguments.command == "info" else _selftest.main()


if __name__ == "__main__":
    sys.exit(main())
