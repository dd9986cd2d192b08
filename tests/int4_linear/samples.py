# SPDX-License-Identifier: Apache-2.0
"""Valid calls of every op of the family, as (positional, keyword) arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cases import Case, make

Sample = tuple[dict[str, Any], dict[str, Any]]


def packed_layout(backend: str, device: str) -> str:
    return "cpu" if backend == "cpu" or (backend == "reference" and device == "cpu") else "gpu"


def samples(device: str, backend: str = "cpu") -> dict[str, list[Sample]]:
    """For one backend, which decides the layout of the packed weight."""
    forward, backward = [], []
    for case in (
        Case(rows=(2, 3), in_features=50, group_size=16),
        Case(rows=(2, 3), in_features=50, group_size=16, zeros="int", bias="same", dtype=torch.float16),
        Case(rows=(5,), in_features=50, group_size=-1, zeros="float", bias="float32"),
        Case(rows=(5,), in_features=50, group_size=16, zeros="int", bias="float32", act_order="unequal"),
    ):
        call = make(case, device)
        packed = call.weight.pack(packed_layout(backend, device))
        weight: dict[str, Tensor | None] = {
            "weight": packed.weight, "scales": packed.scales, "zeros": packed.zeros, "perm": packed.perm
        }  # fmt: skip
        sizes = {"group_size": packed.group_size}
        options = {"out_features": case.out_features, **sizes}
        forward.append(({"x": call.x, **weight, "bias": call.bias}, options))
        grad = torch.ones(*case.rows, case.out_features, dtype=case.dtype, device=device)
        backward.append(({"grad": grad, **weight}, {"in_features": case.in_features, **sizes}))
    forward.append((forward[1][0], forward[1][1] | {"mode": "a8"}))
    return {"int4_linear": forward, "int4_linear_backward": backward}
