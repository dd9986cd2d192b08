# SPDX-License-Identifier: Apache-2.0
"""The gradients of keys and values. A program has a tile of columns and takes the tiles of rows that may keep any of
them, in order, so sums have one order. Which those are, a summary of each row tile's cells tells: how many of them come
before each cell.
"""

import triton
import triton.language as tl

from torch_kernels._triton_jit import LOG2E

from .cells import any_bits, cells_in_tile, cells_of_head, kept_columns, load_widths, lowest_bit, near_cell
from .tiles import CLEAN, flag, load_gate, load_tile, lse_in_base_2, not_finite, products, split_special


@triton.jit(do_not_specialize=["rows", "keys", "row_tiles"])
def summary_kernel(
    counts, extents, cells, widths, rows, keys, row_tiles, CELLS: tl.constexpr, WORDS: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """counts [B, H, row tiles, K + 1]: how many cells before each a row tile keeps. extents [B, row tiles, 2]: the
    least width of its rows that see anything, and the greatest. Grid (row tiles, heads, batch)."""
    tile, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tile * M + tl.arange(0, M)
    width = load_widths(widths + batch * rows, row, row < rows, keys)
    sees = width > 0
    if head == 0:
        extent = extents + (batch * row_tiles + tile) * 2
        tl.store(extent, tl.min(tl.where(sees, width, keys), axis=0))
        tl.store(extent + 1, tl.max(width, axis=0))
    words = cells + (batch * rows + row) * WORDS
    counts += ((batch * heads + head) * row_tiles + tile) * (CELLS + 1)
    place = tl.arange(0, 32)
    before = head * 0
    for first in range(0, CELLS, 32):
        union = any_bits(cells_of_head(words, head, first, sees, CELLS, WORDS))
        bits = ((union >> place.to(tl.uint32)) & 1).to(tl.int32)
        tl.store(counts + first + place, before + tl.cumsum(bits, axis=0) - bits, mask=first + place < CELLS)
        before += tl.sum(bits, axis=0)
    tl.store(counts + CELLS, before)


@triton.jit
def _key_step(
    k_tile, v_tile, acc_k, acc_v, k, v, k_offset, v_offset, present, q, g, q_stride, g_stride, row, exists, lse, along,
    factor, kept, score_scale, kind,
    D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """Adds what M rows give to the gradients of N columns. Everything is transposed: [columns, rows]."""
    q_offset, g_offset = row.to(tl.int64) * q_stride, row.to(tl.int64) * g_stride
    scores = products(k_tile, k, k_offset, present, q, q_offset, exists, D, BLOCK_D, CHUNK)
    row_lse = lse_in_base_2(tl.load(lse + row, mask=exists, other=0.0))
    p = tl.where(kept, tl.exp2(scores * score_scale - row_lse[None, :]) * factor[None, :], 0.0)
    of_p = products(v_tile, v, v_offset, present, g, g_offset, exists, DV, BLOCK_DV, CHUNK_V)
    of_score = tl.where(kept, p * (of_p - tl.load(along + row, mask=exists, other=0.0)[None, :]), 0.0)
    query_tile = load_tile(q, q_offset, exists, tl.arange(0, BLOCK_D), D, BLOCK_D)
    grad_tile = load_tile(g, g_offset, exists, tl.arange(0, BLOCK_DV), DV, BLOCK_DV)
    if REPAIR:
        query_tile, grad_tile = split_special(query_tile, kind), split_special(grad_tile, kind)
        p = tl.where(kind == CLEAN, p, kept.to(tl.float32))
        of_score = tl.where(kind == CLEAN, of_score, kept.to(tl.float32))
    acc_v = tl.dot(p.to(grad_tile.dtype), grad_tile, acc_v, input_precision="ieee")
    acc_k = tl.dot(of_score.to(query_tile.dtype), query_tile, acc_k, input_precision="ieee")
    return acc_k, acc_v


@triton.jit
def _key_walk(
    k, v, k_offset, v_offset, present, first_column, q, g, q_stride, g_stride, lse, along, row_gain, mix, cells, widths,
    counts, extents, head, limit, rows, keys, row_tiles, score_scale, kind,
    CELLS: tl.constexpr, WORDS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CLIP: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr,
    REPAIR: tl.constexpr,
):  # fmt: skip
    """Takes the row tiles that may keep any of the columns."""
    k_tile, v_tile = None, None
    if CHUNK == BLOCK_D:
        k_tile = load_tile(k, k_offset, present, tl.arange(0, BLOCK_D), D, BLOCK_D)
    if CHUNK_V == BLOCK_DV:
        v_tile = load_tile(v, v_offset, present, tl.arange(0, BLOCK_DV), DV, BLOCK_DV)
    acc_k = tl.zeros((N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((N, BLOCK_DV), tl.float32)
    place = tl.arange(0, 32)
    for first in range(0, row_tiles, 32):
        candidate = first + place
        there = candidate < row_tiles
        narrowest = tl.load(extents + candidate * 2, mask=there, other=1)
        widest = tl.load(extents + candidate * 2 + 1, mask=there, other=0)
        low = tl.maximum(near_cell(first_column, widest, CELLS) - 0.25, 0.0)
        high = tl.minimum(near_cell(first_column + N - 1, narrowest, CELLS) + 0.25, CELLS - 1)
        there = there & (first_column < widest)
        count = counts + candidate.to(tl.int64) * (CELLS + 1)
        before = tl.load(count + tl.minimum(low, CELLS).to(tl.int32), mask=there, other=0)
        after = tl.load(count + high.to(tl.int32) + 1, mask=there, other=0)
        active = tl.sum(tl.where(after > before, tl.full((), 1, tl.int64) << place.to(tl.int64), 0), axis=0)
        tiles = active.to(tl.uint32)
        while tiles != 0:
            row = (first + lowest_bit(tiles)) * M + tl.arange(0, M)
            tiles = tiles & (tiles - 1)
            exists = row < rows
            width = load_widths(widths, row, exists, keys)
            sees = width > 0
            within = cells_in_tile(tl.min(tl.where(sees, width, keys), axis=0), CELLS, N)
            kept = kept_columns(
                cells + row.to(tl.int64) * WORDS, head, sees, width, width // CELLS, width % CELLS, first_column,
                within, limit, CELLS, WORDS, CLIP, N,
            )  # fmt: skip
            factor = load_gate(row_gain, row, exists) * load_gate(mix, row, exists)
            acc_k, acc_v = _key_step(
                k_tile, v_tile, acc_k, acc_v, k, v, k_offset, v_offset, present, q, g, q_stride, g_stride, row, exists,
                lse, along, factor, tl.trans(kept), score_scale, kind,
                D, DV, M, BLOCK_D, BLOCK_DV, CHUNK, CHUNK_V, REPAIR,
            )  # fmt: skip
    return acc_k, acc_v


@triton.jit(do_not_specialize=["rows", "keys", "limit", "row_tiles"])
def key_gradient_kernel(
    grad_k, grad_v, alarms, g, q, k, v, lse, along, row_gain, mix, cells, widths, counts, extents, scale, limit, rows,
    keys, row_tiles,
    g_stride_b, g_stride_t, g_stride_h, q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h,
    CELLS: tl.constexpr, WORDS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CLIP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr,
    CHUNK_V: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """Grid (column tiles, heads, batch)."""
    if REPAIR:  # noqa: SIM102 (known at compile time, unlike the next)
        if tl.load(alarms + flag()) == 0:
            return
    head, heads = tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * N + tl.arange(0, N)
    present = column < keys
    k_offset = batch * k_stride_b + column.to(tl.int64) * k_stride_t + head.to(tl.int64) * k_stride_h
    v_offset = batch * v_stride_b + column.to(tl.int64) * v_stride_t + head.to(tl.int64) * v_stride_h
    q += batch * q_stride_b + head.to(tl.int64) * q_stride_h
    g += batch * g_stride_b + head.to(tl.int64) * g_stride_h
    of_head = (batch * heads + head) * rows
    lse += of_head
    along += of_head
    if row_gain is not None:
        row_gain += of_head
    if mix is not None:
        mix += of_head
    cells += batch * rows * WORDS
    widths += batch * rows
    counts += (batch * heads + head) * row_tiles * (CELLS + 1)
    extents += batch * row_tiles * 2
    acc_k = tl.zeros((N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((N, BLOCK_DV), tl.float32)
    for kind in tl.range(0, 2 if REPAIR else 1, disable_licm=True):
        of_k, of_v = _key_walk(
            k, v, k_offset, v_offset, present, tl.program_id(0) * N, q, g, q_stride_t, g_stride_t, lse, along,
            row_gain, mix, cells, widths, counts, extents, head, limit, rows, keys, row_tiles, scale * LOG2E, kind,
            CELLS, WORDS, D, DV, CLIP, M, N, BLOCK_D, BLOCK_DV, CHUNK, CHUNK_V, REPAIR,
        )  # fmt: skip
        if REPAIR:
            acc_k = tl.where(kind == CLEAN, of_k, tl.where(of_k > 0, float("nan"), acc_k))
            acc_v = tl.where(kind == CLEAN, of_v, tl.where(of_v > 0, float("nan"), acc_v))
        else:
            acc_k, acc_v = of_k, of_v
            tl.store(alarms + flag(), not_finite(acc_k) | not_finite(acc_v))
    at = ((batch * keys + column) * heads + head)[:, None]
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    target = grad_k + at * D + d[None, :]
    tl.store(target, (acc_k * scale).to(grad_k.dtype.element_ty), mask=present[:, None] & (d < D)[None, :])
    target = grad_v + at * DV + dv[None, :]
    tl.store(target, acc_v.to(grad_v.dtype.element_ty), mask=present[:, None] & (dv < DV)[None, :])
