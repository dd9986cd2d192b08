# SPDX-License-Identifier: Apache-2.0
"""Gradients of attention to kept columns, from probabilities computed again.

For grad_q a program walks the union of its rows' cells, as in the forward pass: once for what grad_out has along the
context, which the gates' gradients need too, once for the gradient. For grad_k and grad_v a program has a tile of
columns and takes the tiles of rows that may keep any of them, in order, so sums have one order. Which those are, a
summary of each row tile's cells tells: how many of them come before each cell.
"""

import math

import torch
import triton
import triton.language as tl

from torch_kernels._triton import architecture, on_device

from ..heuristics import key_gradient_tile, query_gradient_tile
from .attention import (
    CLEAN,
    LOG2E,
    contiguous,
    finite,
    flag,
    head_blocks,
    launch_options,
    load_tile,
    not_finite,
    products,
    strides,
)
from .cells import (
    any_bits,
    boundary,
    cells_in_tile,
    cells_of_head,
    clip_mode,
    kept_columns,
    load_widths,
    lowest_bit,
    near_cell,
)

# What a walk over columns is for: what grad_out has along the context, the gradient, or, where that is not finite, the
# gradient without what is not, and how much of that a row keeps.
ALONG, GRADIENT, SPECIAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _special(x, kind):
    """x without what is not finite (CLEAN), or where that is."""
    return tl.where(kind == CLEAN, finite(x), (~(tl.abs(x) < float("inf"))).to(x.dtype))


@triton.jit
def _probabilities(scores, kept, score_scale, row_lse):
    """In base 2; zero for what a row does not keep."""
    return tl.where(kept, tl.exp2(scores * score_scale - row_lse), 0.0)


@triton.jit
def _query_step(
    q_tile, g_tile, q, q_offset, g, g_offset, exists, k, v, k_stride, v_stride, acc, along, row_lse, kept, start, keys,
    score_scale, kind,
    D: tl.constexpr, DV: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """What N columns give: to `along` or, in other modes, to `acc`."""
    column = start + tl.arange(0, N)
    present = column < keys
    at = column.to(tl.int64)
    scores = products(q_tile, q, q_offset, exists, k, at * k_stride, present, D, BLOCK_D, CHUNK)
    p = _probabilities(scores, kept, score_scale, row_lse[:, None])
    of_p = products(g_tile, g, g_offset, exists, v, at * v_stride, present, DV, BLOCK_DV, CHUNK_V)
    if MODE == ALONG:
        along += tl.sum(tl.where(kept, p * of_p, 0.0), axis=1)
    else:
        grad = tl.where(kept, p * (of_p - along[:, None]), 0.0)
        key_tile = load_tile(k, at * k_stride, present, tl.arange(0, BLOCK_D), D, BLOCK_D)
        if MODE == SPECIAL:
            key_tile = _special(key_tile, kind)
            grad = tl.where(kind == CLEAN, grad, kept.to(tl.float32))
        acc = tl.dot(grad.to(key_tile.dtype), key_tile, acc, input_precision="ieee")
    return acc, along


@triton.jit
def _query_walk(
    q, q_offset, g, g_offset, exists, k, v, k_stride, v_stride, words, head, width, along, row_lse, keys, limit,
    score_scale, kind,
    CELLS: tl.constexpr, WORDS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CLIP: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """The walk of the forward pass. Returns the gradient of q before it is scaled, and `along`."""
    q_tile, g_tile = None, None
    if CHUNK == BLOCK_D:
        q_tile = load_tile(q, q_offset, exists, tl.arange(0, BLOCK_D), D, BLOCK_D)
    if CHUNK_V == BLOCK_DV:
        g_tile = load_tile(g, g_offset, exists, tl.arange(0, BLOCK_DV), DV, BLOCK_DV)
    acc = tl.zeros((M, 1 if MODE == ALONG else BLOCK_D), tl.float32)
    whole, rest = width // CELLS, width % CELLS
    sees = width > 0
    widest = tl.max(width, axis=0)
    narrowest = tl.min(tl.where(sees, width, keys), axis=0)
    cells = cells_in_tile(narrowest, CELLS, N)
    done = narrowest * 0
    for first in range(0, CELLS, 32):
        union = any_bits(cells_of_head(words, head, first, sees, CELLS, WORDS))
        while union != 0:
            cell = first + lowest_bit(union)
            union = union & (union - 1)
            begin = tl.maximum(boundary(cell, narrowest // CELLS, narrowest % CELLS, CELLS), done)
            end = boundary(cell + 1, widest // CELLS, widest % CELLS, CELLS)
            for start in tl.range(begin, end, N, disable_licm=True):
                kept = kept_columns(
                    words, head, sees, width, whole, rest, start, cells, limit, CELLS, WORDS, CLIP, N
                )  # fmt: skip
                acc, along = _query_step(
                    q_tile, g_tile, q, q_offset, g, g_offset, exists, k, v, k_stride, v_stride, acc, along, row_lse,
                    kept, start, keys, score_scale, kind, D, DV, N, BLOCK_D, BLOCK_DV, CHUNK, CHUNK_V, MODE,
                )  # fmt: skip
                done = start + N
    return acc, along


@triton.jit
def _in_base_2(lse):
    """A row that keeps nothing, or nothing but -inf, has no probabilities; those of one with +inf are NaN."""
    finite = tl.where(lse == -float("inf"), 0.0, lse * LOG2E)
    return tl.where(lse == float("inf"), float("nan"), finite)


@triton.jit
def _load_gate(gate, row, exists):
    if gate is None:
        value = exists.to(tl.float32)
    else:
        value = tl.load(gate + row, mask=exists, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["rows", "keys", "limit"])
def query_gradient_kernel(
    grad_q, grad_row_gain, grad_mix, grad_pooled, along, alarms, g, q, k, v, lse, cells, widths, row_gain, mix, pooled,
    scale, limit, rows, keys,
    g_stride_b, g_stride_t, g_stride_h, q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, pooled_stride_b, pooled_stride_t, pooled_stride_h,
    CELLS: tl.constexpr, WORDS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CLIP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr,
    CHUNK_V: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, heads, batch). along [B, H, Tq]: grad_out times the context."""
    if REPAIR:  # noqa: SIM102 (known at compile time, unlike the next)
        if tl.load(alarms + flag()) == 0:
            return
    head, heads = tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * M + tl.arange(0, M)
    exists = row < rows
    width = load_widths(widths + batch * rows, row, exists, keys)
    words = cells + (batch * rows + row) * WORDS
    q_offset = batch * q_stride_b + row.to(tl.int64) * q_stride_t + head.to(tl.int64) * q_stride_h
    g_offset = batch * g_stride_b + row.to(tl.int64) * g_stride_t + head.to(tl.int64) * g_stride_h
    k += batch * k_stride_b + head.to(tl.int64) * k_stride_h
    v += batch * v_stride_b + head.to(tl.int64) * v_stride_h
    of_head = (batch * heads + head) * rows
    row_lse = _in_base_2(tl.load(lse + of_head + row, mask=exists, other=0.0))
    if REPAIR:
        row_along = tl.load(along + of_head + row, mask=exists, other=0.0)
        acc = tl.zeros((M, BLOCK_D), tl.float32)
        for kind in tl.range(0, 2, disable_licm=True):
            other, _ = _query_walk(
                q, q_offset, g, g_offset, exists, k, v, k_stride_t, v_stride_t, words, head, width, row_along, row_lse,
                keys, limit, scale * LOG2E, kind,
                CELLS, WORDS, D, DV, CLIP, M, N, BLOCK_D, BLOCK_DV, CHUNK, CHUNK_V, SPECIAL,
            )  # fmt: skip
            acc = tl.where(kind == CLEAN, other, tl.where(other > 0, float("nan"), acc))
    else:
        _, row_along = _query_walk(
            q, q_offset, g, g_offset, exists, k, v, k_stride_t, v_stride_t, words, head, width,
            tl.zeros((M,), tl.float32), row_lse, keys, limit, scale * LOG2E, 0,
            CELLS, WORDS, D, DV, CLIP, M, N, BLOCK_D, BLOCK_DV, CHUNK, CHUNK_V, ALONG,
        )  # fmt: skip
        tl.store(along + of_head + row, row_along, mask=exists)
        acc, _ = _query_walk(
            q, q_offset, g, g_offset, exists, k, v, k_stride_t, v_stride_t, words, head, width, row_along, row_lse,
            keys, limit, scale * LOG2E, 0,
            CELLS, WORDS, D, DV, CLIP, M, N, BLOCK_D, BLOCK_DV, CHUNK, CHUNK_V, GRADIENT,
        )  # fmt: skip
        tl.store(alarms + flag(), not_finite(acc))
    if row_gain is not None:
        row_gain += of_head
    if mix is not None:
        mix += of_head
    gain, share = _load_gate(row_gain, row, exists), _load_gate(mix, row, exists)
    d = tl.arange(0, BLOCK_D)
    target = grad_q + ((batch * rows + row) * heads + head)[:, None] * D + d[None, :]
    result = acc * (scale * gain * share)[:, None]
    tl.store(target, result.to(grad_q.dtype.element_ty), mask=exists[:, None] & (d < D)[None, :])
    if row_gain is not None:
        tl.store(
            grad_row_gain + of_head + row, (share * row_along).to(grad_row_gain.dtype.element_ty), mask=exists
        )  # fmt: skip
    if mix is not None:
        column = tl.arange(0, BLOCK_DV)
        grad = load_tile(g, g_offset, exists, column, DV, BLOCK_DV).to(tl.float32)
        offset = batch * pooled_stride_b + row.to(tl.int64) * pooled_stride_t + head.to(tl.int64) * pooled_stride_h
        context = load_tile(pooled, offset, exists, column, DV, BLOCK_DV).to(tl.float32)
        of_mix = gain * row_along - tl.sum(grad * context, axis=1)
        tl.store(grad_mix + of_head + row, of_mix.to(grad_mix.dtype.element_ty), mask=exists)
        if grad_pooled is not None:
            target = grad_pooled + ((batch * rows + row) * heads + head)[:, None] * DV + column[None, :]
            of_pooled = (1 - share)[:, None] * grad
            tl.store(
                target, of_pooled.to(grad_pooled.dtype.element_ty), mask=exists[:, None] & (column < DV)[None, :]
            )  # fmt: skip


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
    CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Adds what M rows give to the gradients of N columns. Everything is transposed: [columns, rows]."""
    q_offset, g_offset = row.to(tl.int64) * q_stride, row.to(tl.int64) * g_stride
    scores = products(k_tile, k, k_offset, present, q, q_offset, exists, D, BLOCK_D, CHUNK)
    row_lse = _in_base_2(tl.load(lse + row, mask=exists, other=0.0))
    p = tl.where(kept, tl.exp2(scores * score_scale - row_lse[None, :]) * factor[None, :], 0.0)
    of_p = products(v_tile, v, v_offset, present, g, g_offset, exists, DV, BLOCK_DV, CHUNK_V)
    of_score = tl.where(kept, p * (of_p - tl.load(along + row, mask=exists, other=0.0)[None, :]), 0.0)
    query_tile = load_tile(q, q_offset, exists, tl.arange(0, BLOCK_D), D, BLOCK_D)
    grad_tile = load_tile(g, g_offset, exists, tl.arange(0, BLOCK_DV), DV, BLOCK_DV)
    if MODE == SPECIAL:
        query_tile, grad_tile = _special(query_tile, kind), _special(grad_tile, kind)
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
    MODE: tl.constexpr,
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
            factor = _load_gate(row_gain, row, exists) * _load_gate(mix, row, exists)
            acc_k, acc_v = _key_step(
                k_tile, v_tile, acc_k, acc_v, k, v, k_offset, v_offset, present, q, g, q_stride, g_stride, row, exists,
                lse, along, factor, tl.trans(kept), score_scale, kind,
                D, DV, M, BLOCK_D, BLOCK_DV, CHUNK, CHUNK_V, MODE,
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
            CELLS, WORDS, D, DV, CLIP, M, N, BLOCK_D, BLOCK_DV, CHUNK, CHUNK_V, SPECIAL if REPAIR else GRADIENT,
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


def sea_attention_backward(
    grad_q, grad_k, grad_v, grad_row_gain, grad_mix, grad_pooled,
    grad_out, q, k, v, out, lse, cells, widths, num_cells, scale, max_columns_per_cell, row_gain, mix, pooled,
):  # fmt: skip
    batch, rows, heads, size = q.shape
    keys, value_size, device = k.shape[1], v.shape[3], q.device
    if grad_q.numel() == 0:
        for grad in (grad_k, grad_v, grad_pooled):
            grad.zero_()
        return
    lse, cells, widths, row_gain, mix = contiguous(lse, cells, widths, row_gain, mix)
    clip = clip_mode(keys, num_cells, max_columns_per_cell)
    arguments = max(size, value_size), q.element_size(), architecture(device), clip > 0
    query_tile, key_tile = query_gradient_tile(*arguments), key_gradient_tile(*arguments)
    row_tiles = triton.cdiv(rows, key_tile.rows)
    scale = 1.0 / math.sqrt(size) if scale is None else float(scale)
    limit = min(max_columns_per_cell, 2**31 - 1)
    along = torch.empty(batch, heads, rows, dtype=torch.float32, device=device)
    counts = torch.empty(batch, heads, row_tiles, num_cells + 1, dtype=torch.int32, device=device)
    extents = torch.empty(batch, row_tiles, 2, dtype=torch.int32, device=device)
    shared = mix is not None and pooled.shape[1] == 1
    tensor_strides = [x.stride(i) for x in (grad_out, q, k, v) for i in range(3)]
    cell_sizes = {"CELLS": num_cells, "WORDS": cells.shape[2]}
    sizes = cell_sizes | head_blocks(size, value_size, q.element_size()) | {"CLIP": clip}
    query_grid = triton.cdiv(rows, query_tile.rows), heads, batch
    key_grid = triton.cdiv(keys, key_tile.columns), heads, batch
    alarms = torch.empty(max(math.prod(query_grid), math.prod(key_grid)), dtype=torch.int32, device=device)
    with on_device(q):
        for repair in (False, True):
            query_gradient_kernel[query_grid](
                grad_q, grad_row_gain, grad_mix, None if shared else grad_pooled, along, alarms, grad_out, q, k, v, lse,
                cells, widths, row_gain, mix, pooled, scale, limit, rows, keys, *tensor_strides, *strides(pooled),
                **sizes, REPAIR=repair, **launch_options(query_tile),
            )  # fmt: skip
        if keys:
            summary_kernel[(row_tiles, heads, batch)](
                counts, extents, cells, widths, rows, keys, row_tiles, **cell_sizes, M=key_tile.rows
            )
            for repair in (False, True):
                key_gradient_kernel[key_grid](
                    grad_k, grad_v, alarms, grad_out, q, k, v, lse, along, row_gain, mix, cells, widths, counts,
                    extents, scale, limit, rows, keys, row_tiles, *tensor_strides,
                    **sizes, REPAIR=repair, **launch_options(key_tile),
                )  # fmt: skip
        if shared:
            rest = (1 - mix.float()).transpose(1, 2)[..., None]
            grad_pooled.copy_((rest * grad_out).sum(1, keepdim=True))
