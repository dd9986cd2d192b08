# SPDX-License-Identifier: Apache-2.0
"""Bad arguments raise ValueError or TypeError that name op and argument, before anything is written."""

from __future__ import annotations

import pytest
import torch
import torch_kernels

from ..backends import Backend
from ..calls import Wrong, assert_refused, call, cast, fewer, flat, name_of, narrower, repeated, sample, shorter

F32, F16, F64, I32, I64 = torch.float32, torch.float16, torch.float64, torch.int32, torch.int64


QKV = ("q", "k", "v")
ATTENTION = ("sea_attention", "sea_attention_backward")
WITH_WIDTHS = (*ATTENTION, "sea_stretch", "sea_stretch_backward")
LINEAR = ("linear_attention", "linear_attention_backward")

WRONG: list[Wrong] = [
    *[("favor_features", 1, "x", change, "x|proj") for change in (flat, cast(I32))],
    *[("favor_features", 1, "proj", change, "proj|m") for change in (flat, shorter, cast(F16), lambda x: x[:0])],
    *[("favor_features", 1, "shift", change, "shift") for change in (cast(F16), repeated(1, 2, 1, 1))],
    ("favor_features", 1, "kind", "relu", "shift"),
    ("favor_features", 0, "kind", "elu", "kind"),
    ("favor_features", 0, "eps", float("nan"), "eps"),
    *[(op, 1, name, change, "q|k|v|m") for op in LINEAR for name in QKV for change in (flat, fewer, cast(F16))],
    *[(op, 1, name, change, "initial_state|initial_norm") for op in LINEAR for name in ("initial_state", "initial_norm")
      for change in (shorter, fewer, cast(F64), None)],
    *[(op, 1, "eps", float("inf"), "eps") for op in LINEAR],
    *[("linear_attention_backward", 1, name, change, name) for name in ("grad_state", "grad_norm", "grad_out")
      for change in (shorter, fewer, cast(F16))],
    *[("sea_select", 0, "scores", change, "scores|H|K|widths") for change in (flat, cast(I32), lambda x: x[..., :0],
                                                                       lambda x: x[:, :0])],
    *[("sea_select", 0, "widths", change, "widths") for change in (flat, shorter, fewer, cast(F32))],
    *[("sea_select", 0, "k", x, "k") for x in (-1.0, float("nan"), float("inf"))],
    *[(op, 1, name, change, "q|k|v|cells") for op in ATTENTION for name in QKV for change in (flat, cast(F16))],
    *[(op, 1, "k", narrower(1), "k|v") for op in ATTENTION],
    *[(op, 1, "cells", change, "cells") for op in ATTENTION for change in (shorter, fewer, cast(I64))],
    *[(op, 1, "widths", change, "widths") for op in ATTENTION for change in (shorter, fewer, cast(F32))],
    *[(op, 1, "num_cells", x, "num_cells|cells") for op in ATTENTION for x in (0, -1, 40, 1 << 21)],
    *[(op, 1, "max_columns_per_cell", -1, "max_columns_per_cell") for op in ATTENTION],
    *[(op, 1, name, change, name) for op in ATTENTION for name in ("row_gain", "mix", "pooled")
      for change in (shorter, fewer, cast(F16), cast(F64))],
    *[(op, 1, name, None, "mix|pooled") for op in ATTENTION for name in ("mix", "pooled")],
    *[("sea_attention_backward", 1, name, change, name) for name in ("grad_out", "out", "lse")
      for change in (shorter, fewer, cast(F16))],
    *[("sea_stretch", 0, "x", change, "x|widths") for change in (flat, cast(I32), fewer)],
    *[("sea_stretch", 0, "widths", change, "widths") for change in (shorter, cast(F32))],
    ("sea_stretch", 0, "length", -1, "length"),
    ("sea_stretch_backward", 0, "grad_out", flat, "grad_out"),
    ("sea_stretch_backward", 0, "num_cells", 0, "num_cells"),
    *[("sea_csr", 0, name, change, "cells|widths") for name in ("cells", "widths")
      for change in (flat, shorter, fewer)],
    *[("sea_csr", 0, name, 0, f"{name}|cells") for name in ("num_heads", "num_cells")],
    *[("running_mean", 1, "v", change, "v|sum") for change in (flat, fewer, cast(I32))],
    *[("running_mean", 1, name, change, "sum|count") for name in ("sum", "count")
      for change in (fewer, cast(F32), None)],
    *[(op, 0, "widths", lambda x: x + 2, "widths") for op in WITH_WIDTHS],
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=name_of)
def test_wrong_argument(any_backend: Backend, wrong: Wrong) -> None:
    assert_refused(any_backend, wrong)


@pytest.mark.parametrize("op", WITH_WIDTHS)
def test_rows_that_see_nothing_are_no_mistake(any_backend: Backend, op: str) -> None:
    torch_kernels.set_validation(True)
    try:
        call(any_backend, op, 0, widths=lambda x: x - 100)
    finally:
        torch_kernels.set_validation(False)


def test_head_sizes(any_backend: Backend) -> None:
    for size in (4, 12, 264):
        positional, keywords = sample(any_backend, "sea_attention", 0)
        for name in ("q", "k"):
            x = positional[name]
            positional[name] = x.new_zeros((*x.shape[:3], size))
        with any_backend.forced(), pytest.raises(ValueError, match="sea_attention: head size D"):
            torch_kernels.sea_attention(**positional, **keywords)
