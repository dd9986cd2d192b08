# SPDX-License-Identifier: Apache-2.0
"""Memory that a call takes beyond its inputs and outputs, at its peak."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import torch

from .case import Call

PROCESS = Path("/proc/self")


def measured(call: Call, device: str) -> tuple[Any, int | None]:
    """What the call gives, and the bytes; None where the system does not tell. A first call includes what stays."""
    if device == "cpu":
        before = _reset_peak()
        output = call()
        return output, None if before is None else max(0, _resident("VmHWM") - before - _bytes(output))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = call()
    torch.cuda.synchronize()
    return output, torch.cuda.max_memory_allocated() - before - _bytes(output)


def _bytes(output: Any) -> int:
    return sum(part.nbytes for part in (output if isinstance(output, tuple) else (output,)))


def _reset_peak() -> int | None:
    """Resident bytes, from which a new peak is counted. Free heap goes back first, or it would hide new memory."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")
        return _resident("VmRSS")
    except (OSError, AttributeError):
        return None


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB", (PROCESS / "status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
