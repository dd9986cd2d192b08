# SPDX-License-Identifier: Apache-2.0
"""Every op against its reference on this machine: to attach to a bug report, or to trust an installation."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_kernels import _registry

FAMILIES = sorted(file.parent.name for file in Path(__file__).parent.glob("*/selftest.py"))


@dataclass(frozen=True)
class Case:
    """One call. ``run(device)`` returns its result and the truth (tensors in float64, or exact), both as tuples. It is
    ``partial(function, op, arguments, ..)``: tests take the arguments, by name, from there."""

    op: str
    description: str
    run: Callable[[torch.device], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
    tolerance: float = 0.0  # allowed max error; 0 means equal


def error_of(got: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """The largest difference; infinite where one is NaN or infinite and the other is not."""
    worst = 0.0
    for a, b in zip(got, truth, strict=True):
        a, b = a.cpu().double(), b.cpu().double()
        same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(same, 0.0, (a - b).abs()).nan_to_num(float("inf"))
        worst = max(worst, float(difference.max()) if difference.numel() else 0.0)
    return worst


def cases() -> Iterator[Case]:
    for family in FAMILIES:
        for arguments in importlib.import_module(f"torch_kernels.{family}.selftest").cases():
            yield Case(*arguments)


def main() -> int:
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    failed = passed = 0
    start = time.perf_counter()
    for device in devices:
        for case in cases():
            for backend in _registry.OPS[case.op].serving(device):
                if backend == "reference":
                    continue
                name = f"{device.type:5} {backend:9} {case.op:24} {case.description}"
                try:
                    with _registry.use_backend(backend):
                        error: Any = error_of(*case.run(device))
                except _registry.CannotServe:
                    continue
                except Exception as exception:  # a report of everything is worth more than the first failure
                    error, ok = exception, False
                else:
                    ok = error <= case.tolerance
                passed, failed = passed + ok, failed + (not ok)
                print(f"{'ok  ' if ok else 'FAIL'} {name}: {f'{error:.1e}' if isinstance(error, float) else error}")
    print(f"{passed} passed, {failed} failed in {time.perf_counter() - start:.1f} s")
    return 1 if failed else 0
