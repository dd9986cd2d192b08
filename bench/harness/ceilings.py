# SPDX-License-Identifier: Apache-2.0
"""What the machine can do, measured next to every case: memory bandwidth and the arithmetic peak of each dtype in use.

A ceiling is the best of its sources. Torch supplies one for each. Where the native module exports `peak_bandwidth()`,
`peak_float32()` and so on (bytes or operations per second over torch's threads), that is a second one, because a BLAS
can fall short of what the registers do: MKL on AMD reaches less than half of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch

Source = Callable[[], float]  # bytes or operations per second

PROBE_SECONDS = 0.25
UNITS = {"bandwidth": "B/s"}  # the others are operations per second


class Ceilings:
    """Readings of the ceilings over a run."""

    def __init__(self, device: str, dtypes: Iterable[torch.dtype], last_level_cache: int):
        self.sources = {"bandwidth": _bandwidth_sources(device, last_level_cache)}
        for dtype in sorted(set(dtypes), key=str):
            self.sources[_key(dtype)] = _peak_sources(device, dtype)
        self.readings: dict[str, list[float]] = {key: [] for key in self.sources}
        self.best: dict[str, dict[str, float]] = {key: {} for key in self.sources}

    def measure(self) -> None:
        for key, sources in self.sources.items():
            reading = {name: source() for name, source in sources.items()}
            self.readings[key].append(max(reading.values()))
            for name, value in reading.items():
                self.best[key][name] = max(value, self.best[key].get(name, 0.0))

    def around(self) -> dict[str, float]:
        """The mean of the last two readings: those before and after a case."""
        return {key: statistics.mean(readings[-2:]) for key, readings in self.readings.items()}

    def floor(self, nbytes: int, flops: int, dtype: torch.dtype) -> tuple[float, str]:
        """Seconds that nothing can beat, and what sets them: memory or compute."""
        now = self.around()
        memory, compute = nbytes / now["bandwidth"], flops / now[_key(dtype)]
        return max((memory, "memory"), (compute, "compute"))

    def summary(self) -> dict[str, dict]:
        return {
            key: {
                "unit": UNITS.get(key, "FLOP/s"),
                "median": statistics.median(readings),
                "min": min(readings),
                "max": max(readings),
                "readings": len(readings),
                "best_by_source": self.best[key],
            }
            for key, readings in self.readings.items()
            if readings
        }


def _key(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bandwidth_sources(device: str, last_level_cache: int) -> dict[str, Source]:
    size = min(max(512 << 20, 2 * last_level_cache), 1 << 30) if device == "cpu" else 4 << 30
    buffer = torch.ones(size // 4, device=device)
    sources = {"sum": _rate(buffer.sum, size, device)}
    if device != "cpu":
        target = torch.empty_like(buffer)
        sources["copy"] = _rate(lambda: target.copy_(buffer), 2 * size, device)
    return sources | _native_source("bandwidth", device)


def _peak_sources(device: str, dtype: torch.dtype) -> dict[str, Source]:
    size = 8192 if device != "cpu" else 2048 if torch.get_num_threads() <= 8 else 4096
    size //= 4 if dtype == torch.float64 else 1
    if dtype.is_floating_point:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = lambda: a @ b  # noqa: E731
    else:
        a, b = (torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8) for _ in range(2))
        product = lambda: torch._int_mm(a, b.t())  # noqa: E731
    return {"matmul": _rate(product, 2 * size**3, device)} | _native_source(_key(dtype), device)


def _native_source(key: str, device: str) -> dict[str, Source]:
    from torch_kernels import _native

    source = getattr(_native.cpu if device == "cpu" else _native.cuda(), f"peak_{key}", None)
    return {"native": source} if source else {}


def _rate(call: Callable[[], object], work: int, device: str) -> Source:
    """Work over the shortest of several calls."""

    def cpu_seconds() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def cuda_seconds() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    seconds = cpu_seconds if device == "cpu" else cuda_seconds
    patience = PROBE_SECONDS / (1 if device == "cpu" else 5)  # a GPU's calls take milliseconds

    def source() -> float:
        seconds()
        best, deadline = seconds(), time.perf_counter() + patience
        while time.perf_counter() < deadline:
            best = min(best, seconds())
        return work / best

    return source
