# SPDX-License-Identifier: Apache-2.0
"""Calls of int4_linear: a small description, the tensors it stands for, and the call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch_kernels
from hypothesis import strategies as st
from torch import Tensor
from torch_kernels import Int4Weight

from ..backends import Backend
from ..strategies import lay_out, seeds
from . import oracle

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
GROUP_SIZES = (-1, 16, 32, 64, 128, 256)
ACT_ORDERS = (None, "shuffled", "unequal", "absent")


@dataclass(frozen=True)
class Case:
    rows: tuple[int, ...] = (3,)
    out_features: int = 40
    in_features: int = 96
    group_size: int = 32
    dtype: torch.dtype = F32
    scale_dtype: torch.dtype = F16
    zeros: str | None = None  # None, "int" or "float"
    bias: str | None = None  # None, "same" or "float32"
    act_order: str | None = None
    layout: str = "contiguous"
    magnitude: float = 1.0  # of the scales
    seed: int = 0

    def replace(self, **changes: Any) -> Case:
        return replace(self, **changes)


@dataclass
class Call:
    x: Tensor
    weight: Int4Weight
    bias: Tensor | None
    dense: np.ndarray  # [N, K] float64, the truth


def make(case: Case, device: str = "cpu") -> Call:
    g = torch.Generator().manual_seed(case.seed)
    n, k = case.out_features, case.in_features
    groups = oracle.groups_of(k, case.group_size)
    count = 1 if case.group_size == -1 else -(-k // case.group_size)
    g_idx = None
    if case.act_order:
        count = max(count, 3)
        if case.act_order == "shuffled":
            g_idx = torch.from_numpy(groups)[torch.randperm(k, generator=g)]
        else:
            g_idx = (torch.rand(k, generator=g) ** 2 * count).long()  # the first groups are the largest
            if case.act_order == "absent":
                g_idx[g_idx == 1] = 0
        groups = g_idx.numpy()
    q = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
    scales = (torch.rand(count, n, generator=g) + 0.5) * torch.where(torch.rand(count, n, generator=g) < 0.5, -1, 1)
    scales = (scales * case.magnitude).to(case.scale_dtype)
    zeros = None
    if case.zeros == "int":
        zeros = torch.randint(0, 16, (count, n), generator=g, dtype=torch.uint8)
    elif case.zeros == "float":
        zeros = torch.rand(count, n, generator=g) * 18 - 1.5
    bias = None
    if case.bias:
        bias = torch.randn(n, generator=g).to(case.dtype if case.bias == "same" else F32) * case.magnitude
    x = lay_out(torch.randn(*case.rows, k, generator=g).to(case.dtype).to(device), case.layout)
    weight = Int4Weight(
        oracle.portable(q), scales, zeros, g_idx, in_features=k, group_size=case.group_size
    )  # fmt: skip
    dense = oracle.dense(q, scales, zeros, groups)
    return Call(x, weight.to(device), bias if bias is None else bias.to(device), dense)


def run(backend: Backend, call: Call, mode: str = "exact") -> Tensor:
    with backend.forced():
        return torch_kernels.int4_linear(call.x, call.weight, call.bias, mode)


def rounding(call: Call) -> float:
    """What sums in float32 may lose where zero points are applied to a group's sum, not to each weight."""
    if call.weight.zeros is None:
        return 0.0
    w = call.weight
    largest = float(w.scales.abs().max()) * 16 if w.scales.numel() else 0.0
    return float(np.finfo(np.float32).eps) * largest * float(call.x.detach().float().abs().sum(-1).max()) / 4


@st.composite
def cases(draw: st.DrawFn, backend: Backend, **fixed: Any) -> Case:
    sizes = (1, 7, 16, 33) if backend.slow else (1, 2, 7, 16, 31, 64, 65, 130)
    options: dict[str, Any] = {
        "rows": st.sampled_from([(1,), (2, 3), (5,)] if backend.slow else [(), (1,), (2, 3), (5,), (17,), (2, 1, 33)]),
        "out_features": st.sampled_from(sizes),
        "in_features": st.sampled_from((1, 15, 32, 65) if backend.slow else (1, 2, 15, 16, 63, 100, 128, 129, 300)),
        "group_size": st.sampled_from(GROUP_SIZES),
        "dtype": st.sampled_from(list(backend.dtypes)).filter(lambda dtype: dtype != torch.float64),
        "scale_dtype": st.sampled_from([F32, F16, BF16]),
        "zeros": st.sampled_from([None, "int", "float"]),
        "bias": st.sampled_from([None, "same", "float32"]),
        "act_order": st.sampled_from(ACT_ORDERS),
        "layout": st.sampled_from(["contiguous", "transposed", "sliced", "misaligned", "strided"]),
        "seed": seeds,
    }
    drawn = {name: draw(strategy) for name, strategy in options.items() if name not in fixed}
    return Case(**(drawn | fixed))
