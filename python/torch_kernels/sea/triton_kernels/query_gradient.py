# SPDX-License-Identifier: Apache-2.0
"""The gradients of queries, gates and the pooled context. A program walks the union of its rows' cells, as in the
forward pass: once for what grad_out has along the context, which the gates' gradients need too, once for the gradient.
"""

import triton
import triton.language as tl

from torch_kernels._triton_jit import LOG2E

from .cells import any_bits, boundary, cells_in_tile, cells_of_head, kept_columns, load_widths, lowest_bit
from .tiles import CLEAN, flag, load_gate, load_tile, lse_in_base_2, not_finite, products, split_special

# What a walk over columns is for: what grad_out has along the context, the gradient, or, where that is not finite, the
# gradient without what is not, and how much of that a row keeps.
ALONG, GRADIENT, SPECIAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


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
            key_tile = split_special(key_tile, kind)
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
    row_lse = lse_in_base_2(tl.load(lse + of_head + row, mask=exists, other=0.0))
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
    gain, share = load_gate(row_gain, row, exists), load_gate(mix, row, exists)
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
