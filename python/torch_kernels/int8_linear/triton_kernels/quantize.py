# SPDX-License-Identifier: Apache-2.0
"""Rows of floating-point numbers as int8.

Which columns hold outliers depends on all rows, so it is found first, by a kernel of its own; then each program
quantises a few rows, and one more program lists the outlier columns for those who add them up later.
"""

import math

import torch
import triton
import triton.language as tl

from torch_kernels._triton import architecture, multiprocessors, on_device, power_of_two
from torch_kernels._triton_jit import round_to_even

from ..heuristics import Device, outlier_row_splits

# Numbers a program holds in registers at a time.
TILE = 8192
OUTLIER_ROWS, OUTLIER_COLUMNS = 16, 128


def as_rows(x):
    """[.., K] as [M, K], without a copy where the leading dimensions lie at one distance."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def device_of(device: torch.device) -> Device:
    return Device(architecture(device), multiprocessors(device))


@triton.jit
def magnitude(x):
    """|x| of float32 as an integer that orders alike, and NaN above infinity: a maximum of these keeps NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest, limit):
    """The scale at which the largest magnitude of a row, as above, becomes `limit`."""
    absmax = largest.to(tl.float32, bitcast=True)
    return tl.div_rn(absmax, tl.zeros_like(absmax) + limit)


@triton.jit
def static_scale(largest, x_scale):
    """x_scale for every row; NaN for rows that are not finite, which saturation would hide."""
    return tl.where(largest < 0x7F800000, tl.load(x_scale), float("nan"))


@triton.jit
def to_int8(x, scale, limit):
    """x / scale rounded half to even, within +-limit; 0 in rows whose scale is 0 or not finite."""
    usable = (scale != 0) & (tl.abs(scale) < float("inf"))
    steps = tl.div_rn(x, tl.zeros_like(x) + tl.where(usable, scale, 1.0)[:, None])
    steps = tl.minimum(tl.maximum(steps, -limit), limit)
    steps = round_to_even(steps)
    return tl.where(usable[:, None], steps, 0.0).to(tl.int8)


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def outlier_kernel(
    outliers, x, threshold, rows, rows_per_program, columns, x_stride, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Grid (column tiles, row splits). With several splits `outliers` is zero before, and only ones are written."""
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin = tl.program_id(1) * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    found = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    for first in range(begin, end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        inside = (row < end)[:, None] & (column < columns)[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
        found = found | (inside & (tl.abs(value.to(tl.float32)) >= threshold)).to(tl.int32)
    flag = tl.max(found, axis=0)
    least = tl.minimum(tl.num_programs(1) - 1, 1)
    tl.store(outliers + column, flag.to(tl.uint8), mask=(column < columns) & (flag >= least))


@triton.jit
def _list_outliers(listed, count, outliers, columns, BLOCK: tl.constexpr):
    """The columns whose flag is set, in ascending order, and their number."""
    found = 0
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        flag = tl.load(outliers + column, mask=column < columns, other=0).to(tl.int32)
        tl.store(listed + found + tl.cumsum(flag, axis=0) - 1, column, mask=flag > 0)
        found += tl.sum(flag, axis=0)
    tl.store(count, found)


@triton.jit
def _load(x, row_offset, column, inside, smooth, columns):
    value = tl.load(x + row_offset[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if smooth is not None:
        factor = tl.load(smooth + column, mask=column < columns, other=1.0)
        value = tl.div_rn(value, tl.zeros_like(value) + factor[None, :])
    return value


@triton.jit
def _largest(value, threshold):
    """The largest magnitude in each row; numbers that reach the threshold do not count, NaN does."""
    bits = magnitude(value)
    if threshold is not None:
        bits = tl.where(tl.abs(value) >= threshold, 0, bits)
    return tl.max(bits, axis=1)


@triton.jit
def _store(q, row_offset, column, inside, value, scale, limit, outliers, columns):
    steps = to_int8(value, scale, limit)
    if outliers is not None:
        flag = tl.load(outliers + column, mask=column < columns, other=0)
        steps = tl.where((flag > 0)[None, :], 0, steps).to(tl.int8)
    tl.store(q + row_offset[:, None] + column[None, :], steps, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def quantize_kernel(
    q, scale, listed, count, x, smooth, x_scale, outliers, threshold, limit, rows, columns, q_stride, x_stride,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles), and one program more if outlier columns are listed. WHOLE: a tile holds whole rows."""
    if listed is not None:
        if tl.program_id(0) == tl.num_programs(0) - 1:
            _list_outliers(listed, count, outliers, columns, 1024)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_offset = row.to(tl.int64) * x_stride
    q_offset = row.to(tl.int64) * q_stride
    column = tl.arange(0, BLOCK_K)
    if WHOLE:
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        value = _load(x, x_offset, column, inside, smooth, columns)
        largest = _largest(value, threshold)
    else:
        largest = tl.zeros((BLOCK_M,), tl.int32)
        for first in range(0, columns, BLOCK_K):
            inside = (row < rows)[:, None] & (first + column < columns)[None, :]
            value = _load(x, x_offset, first + column, inside, smooth, columns)
            largest = tl.maximum(largest, _largest(value, threshold))
    row_scale = scale_of(largest, limit) if x_scale is None else static_scale(largest, x_scale)
    tl.store(scale + row, row_scale, mask=row < rows)
    if WHOLE:
        _store(q, q_offset, column, inside, value, row_scale, limit, outliers, columns)
    else:
        for first in range(0, columns, BLOCK_K):
            inside = (row < rows)[:, None] & (first + column < columns)[None, :]
            value = _load(x, x_offset, first + column, inside, smooth, columns)
            _store(q, q_offset, first + column, inside, value, row_scale, limit, outliers, columns)


def find_outliers(outliers, x, threshold):
    """outliers [K] uint8 of x [M, K]."""
    rows, columns = x.shape
    tiles = triton.cdiv(columns, OUTLIER_COLUMNS)
    splits = outlier_row_splits(rows, tiles, OUTLIER_ROWS, device_of(x.device))
    if splits > 1:
        outliers.zero_()
    outlier_kernel[(tiles, splits)](
        outliers, x, threshold, rows, triton.cdiv(rows, splits), columns, x.stride(0),
        BLOCK_M=OUTLIER_ROWS, BLOCK_K=OUTLIER_COLUMNS,
    )  # fmt: skip


def quantize_tile(columns):
    """Rows and columns of a program's tile; rows are whole where they fit."""
    block_k = min(power_of_two(columns), TILE)
    return max(TILE // 2 // block_k, 1), block_k


def quantize_rows(q, scale, x, *, limit=127, smooth=None, x_scale=None, outliers=None, threshold=None, listed=None):
    """q and scale of x [M, K]. `listed` = (columns, count) is where to list the columns flagged in outliers."""
    rows, columns = x.shape
    block_m, block_k = quantize_tile(columns)
    grid = (triton.cdiv(rows, block_m) + (listed is not None),)
    quantize_kernel[grid](
        q, scale, *(listed or (None, None)), x, smooth, x_scale, outliers, threshold, float(limit), rows, columns,
        q.stride(0), x.stride(0), WHOLE=columns <= block_k, BLOCK_M=block_m, BLOCK_K=block_k, num_warps=8,
    )  # fmt: skip


def int8_quantize(q, scale, outliers, x, threshold):
    q, x, flags = as_rows(q), as_rows(x), outliers.view(torch.uint8)
    if threshold == 0 or x.numel() == 0:
        outliers.zero_()
    if x.shape[1] == 0:
        scale.zero_()
    if x.numel() == 0:
        return
    with on_device(x):
        if threshold > 0:
            find_outliers(flags, x, threshold)
            quantize_rows(q, scale, x, outliers=flags, threshold=threshold)
        else:
            quantize_rows(q, scale, x)
