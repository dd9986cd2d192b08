# SPDX-License-Identifier: Apache-2.0
"""Attention of a tile of rows to the columns that any of them keeps, on tensor cores.

Neighbouring rows of a head keep overlapping cells, and a cell is a run of columns. So a program walks the union of its
rows' cells, in tiles of columns that begin where the next cell does, and each row masks what it does not keep itself.
"""

import math

import torch
import triton
import triton.language as tl

from torch_kernels._triton import architecture, contiguous, in_batches, on_device
from torch_kernels._triton_jit import LN2, LOG2E, softmax_step

from ..heuristics import attention_tile
from .cells import any_bits, boundary, cells_in_tile, cells_of_head, clip_mode, kept_columns, load_widths, lowest_bit
from .tiles import (
    CLEAN,
    INFINITY,
    NAN,
    finite,
    flag,
    head_blocks,
    launch_options,
    load_tile,
    not_finite,
    products,
    strides,
)


@triton.jit
def _attend(
    q_tile, q, q_offset, exists, k, v, k_stride, v_stride, acc, peak, total, kept, start, keys, score_scale, kind,
    D: tl.constexpr, DV: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr, SPECIAL: tl.constexpr,
):  # fmt: skip
    """One step of online softmax over N columns. With SPECIAL, of the kind given."""
    column = start + tl.arange(0, N)
    present = column < keys
    at = column.to(tl.int64)
    scores = products(q_tile, q, q_offset, exists, k, at * k_stride, present, D, BLOCK_D, CHUNK)
    scores = tl.where(kept, scores * score_scale, -float("inf"))
    weights, decay, peak, total = softmax_step(scores, peak, total)
    values = load_tile(v, at * v_stride, present, tl.arange(0, BLOCK_DV), DV, BLOCK_DV)
    if SPECIAL:
        infinite = values == tl.where(kind == INFINITY, float("inf"), -float("inf"))
        marks = tl.where(kind == NAN, values != values, infinite).to(values.dtype)
        values = tl.where(kind == CLEAN, finite(values), marks)
        weights = tl.where(kind == CLEAN, weights, kept.to(tl.float32))
        decay = tl.where(kind == CLEAN, decay, 1.0)
    acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision="ieee")
    return acc, peak, total


@triton.jit
def _walk(
    q, q_offset, exists, k, v, k_stride, v_stride, words, head, width, keys, limit, score_scale, kind,
    CELLS: tl.constexpr, WORDS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CLIP: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr, SPECIAL: tl.constexpr,
):  # fmt: skip
    """Output before it is divided, maximum and sum of each row's softmax, in base 2."""
    q_tile = None
    if CHUNK == BLOCK_D:
        q_tile = load_tile(q, q_offset, exists, tl.arange(0, BLOCK_D), D, BLOCK_D)
    acc = tl.zeros((M, BLOCK_DV), tl.float32)
    peak = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    whole, rest = width // CELLS, width % CELLS
    sees = width > 0
    widest = tl.max(width, axis=0)
    narrowest = tl.min(tl.where(sees, width, keys), axis=0)
    cells = cells_in_tile(narrowest, CELLS, N)
    done = narrowest * 0  # columns before it are
    for first in range(0, CELLS, 32):
        union = any_bits(cells_of_head(words, head, first, sees, CELLS, WORDS))
        while union != 0:
            cell = first + lowest_bit(union)
            union = union & (union - 1)
            # Boundaries grow with the width.
            begin = tl.maximum(boundary(cell, narrowest // CELLS, narrowest % CELLS, CELLS), done)
            end = boundary(cell + 1, widest // CELLS, widest % CELLS, CELLS)
            for start in tl.range(begin, end, N, disable_licm=True):
                kept = kept_columns(
                    words, head, sees, width, whole, rest, start, cells, limit, CELLS, WORDS, CLIP, N
                )  # fmt: skip
                acc, peak, total = _attend(
                    q_tile, q, q_offset, exists, k, v, k_stride, v_stride, acc, peak, total, kept, start, keys,
                    score_scale, kind, D, DV, N, BLOCK_D, BLOCK_DV, CHUNK, SPECIAL,
                )  # fmt: skip
                done = start + N
    return acc, peak, total


@triton.jit(do_not_specialize=["rows", "keys", "limit", "pooled_stride_t"])
def attention_kernel(
    out, lse, alarms, q, k, v, cells, widths, row_gain, mix, pooled, scale, limit, rows, keys,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    pooled_stride_b, pooled_stride_t, pooled_stride_h,
    CELLS: tl.constexpr, WORDS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CLIP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr,
    CHUNK_V: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, heads, batch). out, lse, cells, widths and gates are contiguous."""
    if REPAIR:  # noqa: SIM102 (known at compile time, unlike the next)
        if tl.load(alarms + flag()) == 0:
            return
    head, heads = tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    # The last rows see most: they start first.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * M + tl.arange(0, M)
    exists = row < rows
    width = load_widths(widths + batch * rows, row, exists, keys)
    words = cells + (batch * rows + row) * WORDS
    q_offset = batch * q_stride_b + row.to(tl.int64) * q_stride_t + head.to(tl.int64) * q_stride_h
    k += batch * k_stride_b + head.to(tl.int64) * k_stride_h
    v += batch * v_stride_b + head.to(tl.int64) * v_stride_h
    score_scale = scale * LOG2E
    result = tl.zeros((M, BLOCK_DV), tl.float32)
    row_lse = tl.zeros((M,), tl.float32)
    for kind in tl.range(0, 4 if REPAIR else 1, disable_licm=True):
        acc, peak, total = _walk(
            q, q_offset, exists, k, v, k_stride_t, v_stride_t, words, head, width, keys, limit, score_scale, kind,
            CELLS, WORDS, D, DV, CLIP, M, N, BLOCK_D, BLOCK_DV, CHUNK, REPAIR,
        )  # fmt: skip
        # As `softmax_end`, in another order, in which float32 takes no stack memory to repair.
        empty = total == 0
        row_lse = tl.where(empty, -float("inf"), (peak + tl.log2(tl.where(empty, 1.0, total))) * LN2)
        without = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, total)[:, None])
        if REPAIR:
            value = tl.where(kind == NAN, float("nan"), tl.where(kind == INFINITY, float("inf"), -float("inf")))
            result = tl.where(kind == CLEAN, without, tl.where(acc > 0, result + value, result))
        else:
            result = without
            tl.store(alarms + flag(), not_finite(acc))

    at = (batch * heads + head) * rows + row
    tl.store(lse + at, row_lse, mask=exists)
    if row_gain is not None:
        result *= tl.load(row_gain + at, mask=exists, other=0.0).to(tl.float32)[:, None]
    column = tl.arange(0, BLOCK_DV)
    if mix is not None:
        share = tl.load(mix + at, mask=exists, other=0.0).to(tl.float32)[:, None]
        offset = batch * pooled_stride_b + row.to(tl.int64) * pooled_stride_t + head.to(tl.int64) * pooled_stride_h
        context = load_tile(pooled, offset, exists, column, DV, BLOCK_DV).to(tl.float32)
        result = share * result + (1 - share) * context
    target = out + ((batch * rows + row) * heads + head)[:, None] * DV + column[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=exists[:, None] & (column < DV)[None, :])


@in_batches()
def sea_attention(
    out, lse, q, k, v, cells, widths, num_cells, scale, max_columns_per_cell, row_gain, mix, pooled
):  # fmt: skip
    batch, rows, heads, size = q.shape
    value_size = v.shape[3]
    if out.numel() == 0:
        return
    cells, widths, row_gain, mix = contiguous(cells, widths, row_gain, mix)
    clip = clip_mode(k.shape[1], num_cells, max_columns_per_cell)
    tile = attention_tile(rows, max(size, value_size), q.element_size(), architecture(q.device), clip > 0)
    grid = triton.cdiv(rows, tile.rows), heads, batch
    alarms = torch.empty(math.prod(grid), dtype=torch.int32, device=q.device)
    with on_device(q):
        for repair in (False, True):
            attention_kernel[grid](
                out, lse, alarms, q, k, v, cells, widths, row_gain, mix, pooled,
                1.0 / math.sqrt(size) if scale is None else float(scale), min(max_columns_per_cell, 2**31 - 1), rows,
                k.shape[1], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides(pooled),
                CELLS=num_cells, WORDS=cells.shape[2], **head_blocks(size, value_size, q.element_size()), CLIP=clip,
                REPAIR=repair, **launch_options(tile),
            )  # fmt: skip
