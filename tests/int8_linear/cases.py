# SPDX-License-Identifier: Apache-2.0
"""Layers to test: a small description, and the tensors made from its seed."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as _replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend
from ..strategies import lay_out, seeds

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
INT8_LAYOUTS = ("contiguous", "transposed", "sliced", "misaligned", "strided")
THRESHOLD = 6.0


def dtypes(backend: Backend) -> list[torch.dtype]:
    return [dtype for dtype in backend.dtypes if dtype != torch.float64]


@dataclass(frozen=True)
class Case:
    rows: int = 5
    inputs: int = 70
    outputs: int = 19
    dtype: torch.dtype = F32
    outliers: str | None = None  # none, one, four, all: columns at or above the threshold; None: threshold 0
    bias: torch.dtype | None = None
    static: bool = False
    layout: str = "contiguous"
    weight_layout: str = "contiguous"
    zeros: bool = False  # a row of zeros, and a feature whose weights are
    seed: int = 0

    def replace(self, **changes: Any) -> Case:
        return _replace(self, **changes)


def make(case: Case, device: str) -> dict[str, Any]:
    """The arguments of ``int8_linear``."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # Rows of very different magnitude; only planted values reach the threshold.
    x = normal(case.rows, case.inputs).clamp(-5, 5) * 10.0 ** -torch.randint(3, (case.rows, 1), generator=generator)
    if case.rows and case.inputs:
        count = {None: 0, "none": 0, "one": 1, "four": 4, "all": case.inputs}[case.outliers]
        columns = torch.randperm(case.inputs, generator=generator)[:count]
        hit = torch.randint(case.rows, (len(columns),), generator=generator)
        x[hit, columns] = (THRESHOLD + normal(len(columns)).abs() * 20) * normal(len(columns)).sign()
    weight = torch.randint(-128, 128, (case.outputs, case.inputs), dtype=torch.int8, generator=generator)
    weight_scale = normal(case.outputs).abs() * 10.0 ** torch.randint(-3, 1, (case.outputs,), generator=generator)
    if case.zeros:
        x[case.rows // 2 :][:1], weight[:1], weight_scale[:1] = 0, 0, 0
    arguments: dict[str, Any] = {
        "x": lay_out(x.to(case.dtype).to(device), case.layout),
        "weight": lay_out(weight.to(device), case.weight_layout),
        "weight_scale": weight_scale.to(device),
    }
    if case.bias is not None:
        arguments["bias"] = (normal(case.outputs) * 10).to(case.bias).to(device)
    if case.static:
        arguments["x_scale"] = torch.full((1,), 0.02, device=device)  # saturates from 2.54 on
    if case.outliers is not None:
        arguments["threshold"] = THRESHOLD
    return arguments


@st.composite
def cases(draw: st.DrawFn, backend: Backend, **fixed: Any) -> Case:
    slow = backend.slow
    rows = (0, 1, 2, 3, 5, 9, 17) if slow else (0, 1, 2, 3, 4, 5, 7, 16, 17, 33, 65, 130)
    inputs = (0, 1, 3, 31, 32, 33, 65, 130) if slow else (0, 1, 3, 15, 63, 64, 65, 128, 200, 257, 512, 1027)
    outputs = (0, 1, 2, 9, 17, 33) if slow else (0, 1, 2, 7, 15, 16, 17, 33, 64, 129, 260)
    dtype = draw(st.sampled_from(dtypes(backend)))
    kind = draw(st.sampled_from(["plain", "static", "none", "one", "four", "all"]))
    case = Case(
        rows=draw(st.sampled_from(rows)),
        inputs=draw(st.sampled_from(inputs)),
        outputs=draw(st.sampled_from(outputs)),
        dtype=dtype,
        outliers=None if kind in ("plain", "static") else kind,
        bias=draw(st.sampled_from([None, dtype, F32])),
        static=kind == "static",
        layout=draw(st.sampled_from([*INT8_LAYOUTS, "expanded"])),
        weight_layout=draw(st.sampled_from(INT8_LAYOUTS)),
        zeros=draw(st.booleans()),
        seed=draw(seeds),
    )
    if fixed.get("static"):
        fixed = {"outliers": None} | fixed
    if fixed.get("outliers"):
        fixed = {"static": False} | fixed
    return case.replace(**fixed)
