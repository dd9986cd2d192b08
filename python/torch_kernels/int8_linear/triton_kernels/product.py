# SPDX-License-Identifier: Apache-2.0
"""Integer products [M, K] x [N, K] -> [M, N], and the linear layer around them.

Integer sums are exact in any order, so K may be split among programs as it suits M, N and the GPU, and a row has the
same bits in every batch. What follows the sum is one function of its element, in one order, whichever kernel calls it.
"""

import torch
import triton
import triton.language as tl

from torch_kernels._triton import on_device

from ..heuristics import product_plans
from .quantize import as_rows, device_of, find_outliers, quantize_rows

# Row tiles that share a stretch of column tiles while those are in the L2 cache.
GROUP = 8
# Outlier columns added at a time.
CHUNK = tl.constexpr(16)
JOIN_ROWS, JOIN_COLUMNS = 64, 64


@triton.jit
def _add_outliers(y, row, column, x, weight, listed, count, x_stride, weight_stride):
    """y += x[:, j] * weight[:, j] for outlier columns j, CHUNK at a time in ascending order for every tile."""
    x += row.to(tl.int64)[:, None] * x_stride
    weight += column.to(tl.int64)[None, :] * weight_stride
    found = tl.load(count)
    for first in tl.range(0, found, CHUNK, num_stages=1):
        at = first + tl.arange(0, CHUNK)
        j = tl.load(listed + at, mask=at < found, other=0)
        left = tl.load(x + j[None, :], mask=(at < found)[None, :], other=0.0)
        right = tl.load(weight + j[:, None], mask=(at < found)[:, None], other=0)
        y = tl.dot(left, right.to(left.dtype), y, input_precision="ieee")
    return y


@triton.jit
def _finish(total, row, column, row_scale, weight_scale, bias, x, weight, listed, count, x_stride, weight_stride):
    """The layer's output from the integer sums; the sums themselves where row_scale is None."""
    if row_scale is None:
        y = total
    else:
        y = total.to(tl.float32) * tl.load(row_scale + row)[:, None]
        if listed is not None:
            y = _add_outliers(y, row, column, x, weight, listed, count, x_stride, weight_stride)
        y = y * tl.load(weight_scale + column)[None, :]
        if bias is not None:
            y += tl.load(bias + column).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    out, a, b, row_scale, weight_scale, bias, x, listed, count, rows, columns, size, depth,
    a_stride, b_stride, x_stride,
    EVEN: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, splits of K). Several splits write their sums to out [splits, rows, columns]."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    group = tl.program_id(0) // (GROUP_M * tl.cdiv(columns, BLOCK_N))
    inside_group = tl.program_id(0) % (GROUP_M * tl.cdiv(columns, BLOCK_N))
    group_rows = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + inside_group % group_rows
    tile_n = inside_group // group_rows
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end read the last one, which costs no mask.
    near_row = tl.minimum(row, rows - 1)
    near_column = tl.minimum(column, columns - 1)

    begin = tl.multiple_of(tl.program_id(1) * depth, BLOCK_K)
    end = tl.minimum(begin + depth, size)
    offset = tl.arange(0, BLOCK_K)
    a_tile = a + near_row.to(tl.int64)[:, None] * a_stride + begin + offset[None, :]
    b_tile = b + near_column.to(tl.int64)[None, :] * b_stride + begin + offset[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for first in range(begin, end, BLOCK_K):
        if EVEN:
            left = tl.load(a_tile)
            right = tl.load(b_tile)
        else:
            left = tl.load(a_tile, mask=(offset < size - first)[None, :], other=0)
            right = tl.load(b_tile, mask=(offset < size - first)[:, None], other=0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
        a_tile += BLOCK_K
        b_tile += BLOCK_K

    y = _finish(
        total, near_row, near_column, row_scale, weight_scale, bias, x, b, listed, count, x_stride, b_stride
    )  # fmt: skip
    # 64 bits to the tile, 32 inside it.
    out += (tl.program_id(1).to(tl.int64) * rows + tile_m * BLOCK_M) * columns + tile_n * BLOCK_N
    target = tl.arange(0, BLOCK_M)[:, None] * columns + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out + target, y.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["rows", "splits"])
def join_kernel(
    out, partial, row_scale, weight_scale, bias, x, weight, listed, count, rows, columns, splits, x_stride,
    weight_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds up the splits. Grid (column tiles, row tiles)."""
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    target = row.to(tl.int64)[:, None] * columns + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for split in range(splits):
        total += tl.load(partial + tl.cast(split, tl.int64) * rows * columns + target, mask=inside, other=0)
    y = _finish(
        total, tl.minimum(row, rows - 1), tl.minimum(column, columns - 1), row_scale, weight_scale, bias, x, weight,
        listed, count, x_stride, weight_stride,
    )  # fmt: skip
    tl.store(out + target, y.to(out.dtype.element_ty), mask=inside)


def _product(out, a, b, row_scale=None, weight_scale=None, bias=None, x=None, outliers=(None, None)):
    """out [M, N], contiguous. Without row_scale the integer sums; else the linear layer's output.

    With x and outliers = (columns, count) these columns of x are added in floating point.
    """
    (rows, size), columns = a.shape, b.shape[0]
    aligned = size % 16 == 0 and a.stride(0) % 16 == 0 and b.stride(0) % 16 == 0
    bytes_of_outliers = 0 if x is None else x.element_size()
    device = device_of(a.device)
    for plan in product_plans(rows, columns, size, device, aligned=aligned, outliers=bytes_of_outliers):
        part = slice(plan.first, plan.first + plan.rows)
        scale, x_part = (None if tensor is None else tensor[part] for tensor in (row_scale, x))
        _launch(plan, out[part], a[part], b, (scale, weight_scale, bias, x_part), outliers)


def _launch(plan, out, a, b, layer, outliers):
    rows, columns = out.shape
    x_stride = 0 if layer[3] is None else layer[3].stride(0)
    target, finish = out, (*layer, *outliers)
    if plan.splits > 1:
        target = torch.empty(plan.splits, rows, columns, dtype=torch.int32, device=out.device)
        finish = (None,) * 6
    tile = plan.tile
    # A fused multiply-add in one kernel and not in the other would let bits depend on the split.
    product_kernel[(triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n), plan.splits)](
        target, a, b, *finish, rows, columns, a.shape[1], plan.depth, a.stride(0), b.stride(0), x_stride,
        EVEN=a.shape[1] % tile.k == 0, GROUP_M=GROUP, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    if plan.splits > 1:
        join_kernel[(triton.cdiv(columns, JOIN_COLUMNS), triton.cdiv(rows, JOIN_ROWS))](
            out, target, *layer, b, *outliers, rows, columns, plan.splits, x_stride, b.stride(0),
            BLOCK_M=JOIN_ROWS, BLOCK_N=JOIN_COLUMNS, enable_fp_fusion=False,
        )  # fmt: skip


def int8_mm(out, a, b):
    if out.numel():
        with on_device(a):
            _product(out, a, b)


def int8_linear(out, x, weight, weight_scale, bias, x_scale, threshold):
    if out.numel() == 0:
        return
    out, x = as_rows(out), as_rows(x)
    rows, size = x.shape
    # Rows begin at multiples of 16 bytes, so that whatever K is they are loaded in wide pieces.
    q = torch.empty(rows, -(-size // 16) * 16, dtype=torch.int8, device=x.device)[:, :size]
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    with on_device(x):
        if threshold > 0 and size > 0:
            flags = torch.empty(size, dtype=torch.uint8, device=x.device)
            listed = torch.empty(size, dtype=torch.int32, device=x.device)
            count = torch.empty(1, dtype=torch.int32, device=x.device)
            find_outliers(flags, x, threshold)
            quantize_rows(q, scale, x, outliers=flags, threshold=threshold, listed=(listed, count))
            _product(out, q, weight, scale, weight_scale, bias, x, (listed, count))
        else:
            quantize_rows(q, scale, x, x_scale=x_scale)
            _product(out, q, weight, scale, weight_scale, bias)
