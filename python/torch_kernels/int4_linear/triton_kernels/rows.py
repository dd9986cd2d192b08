# SPDX-License-Identifier: Apache-2.0
"""What is done to the rows of x before the product: putting columns in the packed order, quantising, group sums."""

import torch
import triton
import triton.language as tl

from torch_kernels._triton_jit import round_to_even

BLOCK_M = 8


@triton.jit
def source_columns(perm, column, columns, limit, HAS_PERM: tl.constexpr):
    """Columns of x that packed columns stand for, and whether there is one; perm may hold anything."""
    source = column
    if HAS_PERM:
        source = tl.load(perm + column, mask=column < columns, other=-1)
    return source, (column < columns) & (source >= 0) & (source < limit)


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    out, scale, total, x, perm, rows, columns, in_features, x_stride, out_stride, groups,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Grid (row blocks, groups). Every output is optional: x in packed order, as int8 (then the 16 columns of each 16
    are in layout_gpu.INT8_ORDER) or unchanged; with int8 a scale per row and group; the sum of each group."""
    group = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = group * GROUP + tl.arange(0, GROUP)
    column = place
    if scale is not None:
        column = place // 16 * 16 + place % 16 // 4 * 2 + place % 4 // 2 + place % 2 * 8
    source, exists = source_columns(perm, column, columns, in_features, perm is not None)
    present = (row < rows)[:, None]
    values = tl.load(
        x + row[:, None].to(tl.int64) * x_stride + source[None, :], mask=present & exists[None, :], other=0.0
    )
    at = row.to(tl.int64) * groups + group
    if scale is not None:
        exact = values.to(tl.float32)
        finite = tl.abs(exact) < float("inf")
        peak = tl.max(tl.where(finite, tl.abs(exact), 0.0), axis=1)
        step = tl.div_rn(peak, tl.zeros_like(peak) + 127.0)
        divisor = tl.where(step > 0, step, 1.0)[:, None] + tl.zeros_like(exact)
        ratio = tl.div_rn(tl.where(finite, exact, 0.0), divisor)
        ratio = tl.minimum(tl.maximum(round_to_even(ratio), -127.0), 127.0)
        spoilt = tl.max((finite == 0).to(tl.int32), axis=1) > 0
        tl.store(scale + at, tl.where(spoilt, float("nan"), step), mask=row < rows)
        values = ratio.to(tl.int8)
    if total is not None:
        if scale is not None:
            group_sum = tl.sum(values.to(tl.int32), axis=1)
        else:
            group_sum = tl.sum(values.to(tl.float32), axis=1)
        tl.store(total + at, group_sum.to(tl.float32), mask=row < rows)
    if out is not None:
        tl.store(out + row[:, None].to(tl.int64) * out_stride + place[None, :], values, mask=present)


def prepare(x, perm, columns, group, step, quantise, sums):
    """x in packed order with whole steps of columns, its scales, and its group sums; None for what is not needed.

    ``columns`` is the packed K; the sums and scales are of ``group`` columns, rows have a multiple of ``step``.
    """
    rows, in_features = x.shape
    groups = triton.cdiv(columns, step) * step // group
    out = scale = total = None
    if quantise or perm is not None:
        out = torch.empty(rows, groups * group, dtype=torch.int8 if quantise else x.dtype, device=x.device)
    if quantise:
        scale = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    if sums:
        total = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    if out is not None or sums:
        rows_kernel[(triton.cdiv(rows, BLOCK_M), groups)](
            out, scale, total, x, perm, rows, columns, in_features, x.stride(0), groups * group, groups,
            GROUP=group, BLOCK_M=BLOCK_M,
        )  # fmt: skip
    return x if out is None else out, scale, total
