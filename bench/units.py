# SPDX-License-Identifier: Apache-2.0
"""How numbers are spelled, in terminal tables and in documents alike."""

from __future__ import annotations


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{significant(seconds / scale)} {unit}"
    return f"{significant(seconds / 1e-9)} ns"


def percent(number: float) -> str:
    return f"{number:.0f} %" if number >= 9.5 else f"{number:.1f} %"


def significant(number: float) -> str:
    """Three significant digits, without exponents."""
    return f"{number:.0f}" if number >= 99.95 else f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"


def scaled(number: float, unit: str) -> str:
    """4.31e12, B/s -> 4.31 TB/s."""
    for prefix, scale in (("T", 1e12), ("G", 1e9)):
        if number >= scale:
            return f"{significant(number / scale)} {prefix}{unit}"
    return f"{significant(number / 1e6)} M{unit}"


def length(tokens: float) -> str:
    """65536 as 64k, 1048576 as 1M: lengths are powers of two."""
    for suffix, scale in (("M", 1 << 20), ("k", 1 << 10)):
        if tokens >= scale and tokens % scale == 0:
            return f"{tokens / scale:g}{suffix}"
    return f"{tokens:g}"
