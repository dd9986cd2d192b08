# SPDX-License-Identifier: Apache-2.0
"""The gradient of queries, by query tile, along the forward pass's walk.

The sum for a tile is kept as the current group of edges sees it: where the next group begins, it is turned by the
distance of the two, and in the end back to where the queries are.
"""

import triton
import triton.language as tl

from torch_kernels._triton_jit import LOG2E, load_tile

from .halves import finite, load_halves
from .rotation import pair_columns, store_turned, turn_of
from .schedule import (
    FULL_BEFORE,
    FULL_INDEX,
    FULL_KEY,
    GROUP_FIRST,
    LISTS,
    MAX_SPLITS,
    SEGMENT_FIELDS,
    TAIL_BEFORE,
    TAIL_INDEX,
    TAIL_KEY,
)
from .walk import SOURCES, group_range, load_segment, load_sources, own_keys, pick


@triton.jit
def query_gradient_step(
    q_a, q_b, grad, row_lse, row_delta, k_a, k_b, v, visible, grad_a, grad_b, scale, MASKED: tl.constexpr
):
    scores = tl.dot(q_a, tl.trans(k_a), input_precision="ieee")
    scores = tl.dot(q_b, tl.trans(k_b), scores, input_precision="ieee")
    weights = tl.exp2(scores * scale - row_lse[:, None])
    change = weights * (tl.dot(grad, tl.trans(v), input_precision="ieee") - row_delta[:, None])
    if MASKED:
        change = tl.where(visible, change, 0.0)
        k_a = finite(k_a)
        k_b = finite(k_b)
    change = change.to(k_a.dtype)
    grad_a = tl.dot(change, k_a, grad_a, input_precision="ieee")
    grad_b = tl.dot(change, k_b, grad_b, input_precision="ieee")
    return grad_a, grad_b


@triton.jit(do_not_specialize=["key_tokens", "list_stride", "tokens"])
def query_gradient_kernel(
    grad_q, grad_out, q, k, v, lse, delta, items, records, lists, turns, deltas, turned,
    scale, score_scale, tokens, key_tokens, list_stride, kv_heads,
    gq_stride_t, gq_stride_h, go_stride_t, go_stride_h, q_stride_t, q_stride_h, k_stride_t, k_stride_h,
    v_stride_t, v_stride_h,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (items * key/value heads); the walk is that of graph_attention_kernel, and so is `turned`."""
    item = tl.program_id(0) // kv_heads
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    if item >= tl.load(items):
        return
    segment = tl.load(items + 2 + item * 2).to(tl.int64)
    tile = tl.load(items + 3 + item * 2) // MAX_SPLITS
    record = records + segment * SEGMENT_FIELDS
    q_begin, q_len, groups, own_begin, own_len, own_segment, source_full, source_tail = load_segment(record)
    lists += tl.load(record + LISTS).to(tl.int64)
    if ROPE:
        deltas += tl.load(record + LISTS).to(tl.int64) * D
        turned += tl.program_id(0).to(tl.int64) * BLOCK_M * D

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // GROUP
    exists = token < q_len
    query_head = head * GROUP + row % GROUP
    q_offset = (q_begin + token) * q_stride_t + query_head * q_stride_h
    k += head * k_stride_h
    v += head * v_stride_h
    ahead, own_full, own_last = own_keys(tile, q_len, own_len, GROUP, BLOCK_M, BLOCK_N)
    all_full = source_full + own_full
    all_tail = source_tail + tl.cdiv(own_last - own_full * BLOCK_N, BLOCK_T)
    own_key = own_begin + own_full * BLOCK_N

    at = query_head * tokens + q_begin + token
    row_lse = tl.load(lse + at, mask=exists, other=float("inf")) * LOG2E
    row_lse = tl.where(row_lse == -float("inf"), float("inf"), row_lse)
    row_delta = tl.load(delta + at, mask=exists, other=0.0)
    go_offset = (q_begin + token) * go_stride_t + query_head * go_stride_h
    grad = load_tile(grad_out, go_offset, exists, DV, BLOCK_DV, True)
    grad_a = tl.zeros((BLOCK_M, BLOCK_D // 2), tl.float32)
    grad_b = tl.zeros((BLOCK_M, BLOCK_D // 2), tl.float32)
    column = tl.arange(0, BLOCK_N)
    tail_column = tl.arange(0, BLOCK_T)
    pair = tl.arange(0, BLOCK_D // 2)

    rounds = 1
    if ROPE:
        rounds = groups + 1
    for group in range(rounds):
        if ROPE:
            here = deltas + tl.cast(group, tl.int64) * D
            begin, end, source, source_end = group_range(lists, list_stride, group, groups, FULL_BEFORE, FULL_INDEX)
            t_begin, t_end, t_source, t_source_end = group_range(
                lists, list_stride, group, groups, TAIL_BEFORE, TAIL_INDEX
            )  # fmt: skip
            if group == groups:
                end = all_full
                t_end = all_tail
            if group > 0:
                c = tl.load(here + pair, mask=pair < D // 2, other=0.0)[None, :]
                s = tl.load(here + D // 2 + pair, mask=pair < D // 2, other=0.0)[None, :]
                c_before = tl.load(here - D + pair, mask=pair < D // 2, other=0.0)[None, :]
                s_before = tl.load(here - D + D // 2 + pair, mask=pair < D // 2, other=0.0)[None, :]
                by_c = c * c_before + s * s_before
                by_s = s * c_before - c * s_before
                new_a = grad_a * by_c - grad_b * by_s
                grad_b = grad_a * by_s + grad_b * by_c
                grad_a = new_a
        else:
            here = deltas
            edges = tl.load(lists + GROUP_FIRST * list_stride + groups)
            begin, end, source, source_end = 0, all_full, 0, tl.load(lists + FULL_INDEX * list_stride + edges)
            t_begin, t_end, t_source = 0, all_tail, 0
            t_source_end = tl.load(lists + TAIL_INDEX * list_stride + edges)
        if ROPE:
            # The rows again, from the tile as it is loaded here: they occupy no registers during the loops.
            mine = tl.load(items + 3 + item * 2) // MAX_SPLITS * BLOCK_M + tl.arange(0, BLOCK_M)
            store_turned(
                turned, q, (q_begin + mine // GROUP) * q_stride_t + (head * GROUP + mine % GROUP) * q_stride_h,
                mine // GROUP < q_len, mine // GROUP, turns, here, D, BLOCK_M, INTERLEAVED, False, True,
            )  # fmt: skip
            own_row = tl.arange(0, BLOCK_M) * D
            q_a, q_b = load_halves(turned, own_row, own_row >= 0, D, BLOCK_D, False, False)
        else:
            q_a, q_b = load_halves(q, q_offset, exists, D, BLOCK_D, INTERLEAVED, True)

        for block in range(0, tl.maximum(tl.cdiv(source_end - source, SOURCES), 1)):
            first_source = source + block * SOURCES
            first_key, _, first, until, _, from_, to = load_sources(
                lists, list_stride, first_source, source_end, begin, end, source_full, FULL_KEY
            )  # fmt: skip
            for step in tl.range(from_, to, num_stages=STAGES):
                key = pick(first_key, first, until, step) + step * BLOCK_N
                key = tl.where(step >= source_full, own_begin + (step - source_full) * BLOCK_N, key)
                key = tl.minimum(tl.maximum(key, 0), tl.maximum(key_tokens - BLOCK_N, 0))
                found = column >= 0
                k_a, k_b = load_halves(
                    k + key.to(tl.int64) * k_stride_t, column * k_stride_t, found, D, BLOCK_D, INTERLEAVED, False
                )  # fmt: skip
                v_tile = load_tile(v + key.to(tl.int64) * v_stride_t, column * v_stride_t, found, DV, BLOCK_DV, False)
                grad_a, grad_b = query_gradient_step(
                    q_a, q_b, grad, row_lse, row_delta, k_a, k_b, v_tile, found[None, :], grad_a, grad_b, scale, False
                )  # fmt: skip

        for block in range(0, tl.maximum(tl.cdiv(t_source_end - t_source, SOURCES), 1)):
            first_source = t_source + block * SOURCES
            first_key, _, first, until, key_end, from_, to = load_sources(
                lists, list_stride, first_source, t_source_end, t_begin, t_end, source_tail, TAIL_KEY
            )  # fmt: skip
            for step in tl.range(from_, to, num_stages=1):
                own = step >= source_tail
                key = pick(first_key, first, until, step) + step * BLOCK_T
                key = tl.where(own, own_key + (step - source_tail) * BLOCK_T, key)
                limit = tl.where(own, own_begin + own_last, pick(key_end, first, until, step))
                key_at = key + tail_column
                found = (key_at >= 0) & (key_at < tl.minimum(limit, key_tokens))
                k_a, k_b = load_halves(
                    k, key_at.to(tl.int64) * k_stride_t, found, D, BLOCK_D, INTERLEAVED, True
                )  # fmt: skip
                v_tile = load_tile(v, key_at.to(tl.int64) * v_stride_t, found, DV, BLOCK_DV, True)
                seen_until = tl.where(own, own_begin + token + ahead + 1, limit)
                visible = found[None, :] & (key_at[None, :] < seen_until[:, None])
                grad_a, grad_b = query_gradient_step(
                    q_a, q_b, grad, row_lse, row_delta, k_a, k_b, v_tile, visible, grad_a, grad_b, scale, True
                )  # fmt: skip

    # The rows again, loaded anew.
    tl.debug_barrier()
    row = tl.load(items + 3 + item * 2) // MAX_SPLITS * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // GROUP
    exists = token < q_len
    query_head = head * GROUP + row % GROUP
    if ROPE:
        c, s = turn_of(token, exists, turns, deltas + groups.to(tl.int64) * D, pair, D, False)
        new_a = grad_a * c + grad_b * s
        grad_b = grad_b * c - grad_a * s
        grad_a = new_a
    first, second = pair_columns(pair, D, INTERLEAVED)
    mask = exists[:, None] & (pair < D // 2)[None, :]
    to = grad_q + ((q_begin + token) * gq_stride_t + query_head * gq_stride_h)[:, None]
    tl.store(to + first[None, :], (grad_a * score_scale).to(grad_q.dtype.element_ty), mask=mask)
    tl.store(to + second[None, :], (grad_b * score_scale).to(grad_q.dtype.element_ty), mask=mask)
