# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by all ops. They look at shape, dtype and device alone, so fake tensors pass too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDEX = (torch.int32, torch.int64)
MAX_RANK = 5  # of tensors that kernels see


def fail(op: str, argument: str, expected: str, got: Any, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{op}: {argument} must be {expected}, got {got}")


def is_tensor(op: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            fail(op, name, "a tensor", type(value).__name__, TypeError)


def dtype(op: str, allowed: Sequence[torch.dtype], **arguments: Tensor | None) -> None:
    for name, value in arguments.items():
        if value is not None and value.dtype not in allowed:
            fail(op, name, " or ".join(str(d).removeprefix("torch.") for d in allowed), value.dtype, TypeError)


def shape(op: str, dimensions: dict[str, int], **arguments: tuple[Tensor | None, str]) -> None:
    """Matches shapes such as ``(q, "B T Hq D")``. A dimension named before must agree, a number must be that number."""
    for name, (value, pattern) in arguments.items():
        if value is None:
            continue
        names = pattern.split()
        sizes = value.shape
        if len(sizes) != len(names):
            fail(op, name, f"[{', '.join(names)}]", f"shape {list(sizes)}")
        for dimension, size in zip(names, sizes):
            wanted = int(dimension) if dimension.isdigit() else dimensions.setdefault(dimension, size)
            if size != wanted:
                known = ", ".join(d if d.isdigit() else f"{d}={dimensions.get(d, '?')}" for d in names)
                fail(op, name, f"[{known}]", f"shape {list(sizes)}")


def same_device(op: str, reference: Tensor, **arguments: Tensor | None) -> None:
    for name, value in arguments.items():
        if value is not None and value.device != reference.device:
            fail(op, name, f"on {reference.device}", f"a tensor on {value.device}")
