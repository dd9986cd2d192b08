# SPDX-License-Identifier: Apache-2.0
"""Gradients of Graph-KV attention. Queries' by query tile, along the forward pass's walk; keys' and values' by key
tile, along the list of query segments that read it. Nothing is added up by two programs.

A head's columns are taken in two halves, the first and the second elements of the pairs that rotate together. The sum
for a query tile is kept as the current group of edges sees it: where the next group begins, it is turned by the
distance of the two, and in the end back to where the queries are.
"""

import math

import torch
import triton
import triton.language as tl

from torch_kernels._triton import architecture, on_device
from torch_kernels.graph_attention import heuristics

from .attention import (
    LOG2E,
    SOURCES,
    Schedule,
    block_begin,
    group_range,
    last_stride_one,
    load_keys,
    load_sources,
    pick,
)  # fmt: skip
from .rotation import pair_columns, store_turned, tables, turn_of
from .schedule import (
    EDGE_READERS,
    FULL_BEFORE,
    FULL_INDEX,
    FULL_KEY,
    FULL_TILES,
    GROUP_FIRST,
    GROUPS,
    KEY_BEGIN,
    KEY_LEN,
    LISTS,
    MAX_SPLITS,
    OWN_BEGIN,
    OWN_LEN,
    OWN_READERS,
    Q_BEGIN,
    Q_LEN,
    READERS,
    SEGMENT_FIELDS,
    TAIL_BEFORE,
    TAIL_END,
    TAIL_INDEX,
    TAIL_KEY,
    TAIL_TILES,
    readers_kernel,
    schedule_kernel,
    uncovered_kernel,
)  # fmt: skip

DELTA_ROWS = 32


@triton.jit(do_not_specialize=["tokens", "heads"])
def delta_kernel(
    delta, out, grad_out, tokens, heads, out_stride_t, out_stride_h, grad_stride_t, grad_stride_h,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta [Hq, Tq]: products of each row of out with its gradient. Grid (blocks of rows)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row // heads
    head = row % heads
    d = tl.arange(0, BLOCK_DV)
    mask = (token < tokens)[:, None] & (d < DV)[None, :]
    a = tl.load(out + (token * out_stride_t + head * out_stride_h)[:, None] + d[None, :], mask=mask, other=0.0)
    b = tl.load(grad_out + (token * grad_stride_t + head * grad_stride_h)[:, None] + d[None, :], mask=mask, other=0.0)
    total = tl.sum(a.to(tl.float32) * b.to(tl.float32), axis=1)
    tl.store(delta + head * tokens + token, total, mask=token < tokens)


@triton.jit
def load_halves(
    q, offset, exists, token, turns, delta,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The halves of a tile of queries, turned where ROPE, rounded once."""
    pair = tl.arange(0, BLOCK // 2)
    first, second = pair_columns(pair, SIZE, INTERLEAVED)
    mask = exists[:, None] & (pair < SIZE // 2)[None, :]
    a = tl.load(q + offset[:, None] + first[None, :], mask=mask, other=0.0)
    b = tl.load(q + offset[:, None] + second[None, :], mask=mask, other=0.0)
    if ROPE:
        c, s = turn_of(token, exists, turns, delta, pair, SIZE, True)
        x = (a * c - b * s).to(a.dtype)
        b = (a * s + b * c).to(a.dtype)
        a = x
    return a, b


@triton.jit
def zero_strange(x):
    """x with 0 for NaN and infinities: 0 times them would reach what they must not."""
    return tl.where((x != x) | (tl.abs(x) == float("inf")), 0.0, x).to(x.dtype)


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
        k_a = zero_strange(k_a)
        k_b = zero_strange(k_b)
    change = change.to(k_a.dtype)
    grad_a = tl.dot(change, k_a, grad_a, input_precision="ieee")
    grad_b = tl.dot(change, k_b, grad_b, input_precision="ieee")
    return grad_a, grad_b


@triton.jit
def load_key_halves(
    k, offset, exists, SIZE: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr
):
    pair = tl.arange(0, BLOCK // 2)
    first, second = pair_columns(pair, SIZE, INTERLEAVED)
    if MASKED or SIZE < BLOCK:
        mask = exists[:, None] & (pair < SIZE // 2)[None, :]
        a = tl.load(k + offset[:, None] + first[None, :], mask=mask, other=0.0)
        b = tl.load(k + offset[:, None] + second[None, :], mask=mask, other=0.0)
    else:
        a = tl.load(k + offset[:, None] + first[None, :])
        b = tl.load(k + offset[:, None] + second[None, :])
    return a, b


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
    q_begin = tl.load(record + Q_BEGIN).to(tl.int64)
    q_len = tl.load(record + Q_LEN)
    groups = tl.load(record + GROUPS)
    own_begin = tl.load(record + OWN_BEGIN)
    own_len = tl.load(record + OWN_LEN)
    source_full = tl.load(record + FULL_TILES)
    source_tail = tl.load(record + TAIL_TILES)
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
    ahead = own_len - q_len
    own_first = tl.minimum(tl.maximum(tile * BLOCK_M // GROUP + ahead + 1, 0), own_len)
    last_token = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, q_len - 1)
    own_last = tl.minimum(tl.maximum(last_token + ahead + 1, 0), own_len)
    own_full = own_first // BLOCK_N
    all_full = source_full + own_full
    all_tail = source_tail + tl.cdiv(own_last - own_full * BLOCK_N, BLOCK_T)
    own_key = own_begin + own_full * BLOCK_N

    at = query_head * tokens + q_begin + token
    row_lse = tl.load(lse + at, mask=exists, other=float("inf")) * LOG2E
    row_lse = tl.where(row_lse == -float("inf"), float("inf"), row_lse)
    row_delta = tl.load(delta + at, mask=exists, other=0.0)
    go_offset = (q_begin + token) * go_stride_t + query_head * go_stride_h
    grad = load_keys(grad_out, go_offset, exists, DV, BLOCK_DV, True)
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
            q_a, q_b = load_key_halves(turned, own_row, own_row >= 0, D, BLOCK_D, False, False)
        else:
            q_a, q_b = load_key_halves(q, q_offset, exists, D, BLOCK_D, INTERLEAVED, True)

        for block in range(0, tl.maximum(tl.cdiv(source_end - source, SOURCES), 1)):
            first_source = source + block * SOURCES
            first_key, _, first, until = load_sources(lists, list_stride, first_source, source_end, FULL_KEY)
            from_ = tl.maximum(begin, block_begin(first, first_source, source_end, source_full))
            to = end
            if first_source + SOURCES < source_end:
                to = tl.minimum(end, tl.max(until, axis=0))
            for step in tl.range(from_, to, num_stages=STAGES):
                key = pick(first_key, first, until, step) + step * BLOCK_N
                key = tl.where(step >= source_full, own_begin + (step - source_full) * BLOCK_N, key)
                key = tl.minimum(tl.maximum(key, 0), tl.maximum(key_tokens - BLOCK_N, 0))
                found = column >= 0
                k_a, k_b = load_key_halves(
                    k + key.to(tl.int64) * k_stride_t, column * k_stride_t, found, D, BLOCK_D, INTERLEAVED, False
                )  # fmt: skip
                v_tile = load_keys(v + key.to(tl.int64) * v_stride_t, column * v_stride_t, found, DV, BLOCK_DV, False)
                grad_a, grad_b = query_gradient_step(
                    q_a, q_b, grad, row_lse, row_delta, k_a, k_b, v_tile, found[None, :], grad_a, grad_b, scale, False
                )  # fmt: skip

        for block in range(0, tl.maximum(tl.cdiv(t_source_end - t_source, SOURCES), 1)):
            first_source = t_source + block * SOURCES
            first_key, _, first, until = load_sources(lists, list_stride, first_source, t_source_end, TAIL_KEY)
            ends = tl.load(
                lists + TAIL_END * list_stride + first_source + tl.arange(0, SOURCES),
                mask=first_source + tl.arange(0, SOURCES) < t_source_end, other=0,
            )  # fmt: skip
            from_ = tl.maximum(t_begin, block_begin(first, first_source, t_source_end, source_tail))
            to = t_end
            if first_source + SOURCES < t_source_end:
                to = tl.minimum(t_end, tl.max(until, axis=0))
            for step in tl.range(from_, to, num_stages=1):
                own = step >= source_tail
                key = pick(first_key, first, until, step) + step * BLOCK_T
                key = tl.where(own, own_key + (step - source_tail) * BLOCK_T, key)
                limit = tl.where(own, own_begin + own_last, pick(ends, first, until, step))
                key_at = key + tail_column
                found = (key_at >= 0) & (key_at < tl.minimum(limit, key_tokens))
                k_a, k_b = load_key_halves(
                    k, key_at.to(tl.int64) * k_stride_t, found, D, BLOCK_D, INTERLEAVED, True
                )  # fmt: skip
                v_tile = load_keys(v, key_at.to(tl.int64) * v_stride_t, found, DV, BLOCK_DV, True)
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


@triton.jit(do_not_specialize=["tokens"])
def key_gradient_kernel(
    grad_k, grad_v, grad_out, q, k, v, lse, delta, items, key_records, readers, records, turns, deltas,
    scale, score_scale, tokens, kv_heads,
    gk_stride_t, gk_stride_h, gv_stride_t, gv_stride_h, go_stride_t, go_stride_h, q_stride_t, q_stride_h,
    k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
    OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (items * key/value heads): a tile of BLOCK_K keys, and all rows that read it, BLOCK_M at a time. Gives the
    gradients of keys, of values, or both."""
    item = tl.program_id(0) // kv_heads
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    if item >= tl.load(items):
        return
    record = key_records + tl.load(items + 2 + item * 2).to(tl.int64) * SEGMENT_FIELDS
    first_key = tl.load(items + 3 + item * 2) // MAX_SPLITS * BLOCK_K
    key_len = tl.load(record + KEY_LEN)
    edge_readers = tl.load(record + EDGE_READERS)
    all_readers = edge_readers + tl.load(record + OWN_READERS)
    readers += tl.load(record + READERS).to(tl.int64) * 2

    key = first_key + tl.arange(0, BLOCK_K)
    present = key < key_len
    position = tl.load(record + KEY_BEGIN).to(tl.int64) + key
    k_a, k_b = load_key_halves(
        k + head * k_stride_h, position * k_stride_t, present, D, BLOCK_D, INTERLEAVED, True
    )  # fmt: skip
    if OF_KEYS:
        v_tile = load_keys(v + head * v_stride_h, position * v_stride_t, present, DV, BLOCK_DV, True)
        grad_a = tl.zeros((BLOCK_K, BLOCK_D // 2), tl.float32)
        grad_b = tl.zeros((BLOCK_K, BLOCK_D // 2), tl.float32)
    if OF_VALUES:
        value_grad = tl.zeros((BLOCK_K, BLOCK_DV), tl.float32)
    for reader in range(0, all_readers):
        query_record = records + tl.load(readers + reader * 2).to(tl.int64) * SEGMENT_FIELDS
        q_begin = tl.load(query_record + Q_BEGIN).to(tl.int64)
        q_len = tl.load(query_record + Q_LEN)
        here = deltas
        if ROPE:
            here += tl.load(readers + reader * 2 + 1).to(tl.int64) * D
        own = reader >= edge_readers
        ahead = tl.where(own, key_len - q_len, key_len)
        # The first row that sees any key of the tile.
        first_row = tl.maximum(first_key - ahead, 0) * GROUP // BLOCK_M * BLOCK_M
        for row0 in tl.range(first_row, q_len * GROUP, BLOCK_M, num_stages=STAGES):
            row = row0 + tl.arange(0, BLOCK_M)
            token = row // GROUP
            exists = token < q_len
            query_head = head * GROUP + row % GROUP
            at = query_head * tokens + q_begin + token
            q_offset = (q_begin + token) * q_stride_t + query_head * q_stride_h
            go_offset = (q_begin + token) * go_stride_t + query_head * go_stride_h
            q_a, q_b = load_halves(q, q_offset, exists, token, turns, here, D, BLOCK_D, ROPE, INTERLEAVED)
            grad = load_keys(grad_out, go_offset, exists, DV, BLOCK_DV, True)
            row_lse = tl.load(lse + at, mask=exists, other=float("inf")) * LOG2E
            row_lse = tl.where(row_lse == -float("inf"), float("inf"), row_lse)
            scores = tl.dot(k_a, tl.trans(q_a), input_precision="ieee")
            scores = tl.dot(k_b, tl.trans(q_b), scores, input_precision="ieee")
            weights = tl.exp2(scores * scale - row_lse[None, :])
            visible = key[:, None] <= (token + ahead)[None, :]
            if OF_KEYS:
                row_delta = tl.load(delta + at, mask=exists, other=0.0)
                change = tl.dot(v_tile, tl.trans(grad), input_precision="ieee") - row_delta[None, :]
                change = tl.where(visible, weights * change, 0.0).to(q_a.dtype)
                if own:
                    # NaN and infinities of a row must not reach keys that it does not see; those it sees get NaN.
                    q_a = zero_strange(q_a)
                    q_b = zero_strange(q_b)
                grad_a = tl.dot(change, q_a, grad_a, input_precision="ieee")
                grad_b = tl.dot(change, q_b, grad_b, input_precision="ieee")
            if OF_VALUES:
                weights = tl.where(visible, weights, 0.0)
                if own:
                    strange = tl.max(((grad != grad) | (tl.abs(grad) == float("inf"))).to(tl.int32), axis=1) > 0
                    weights = tl.where(visible & strange[None, :], float("nan"), weights)
                    grad = zero_strange(grad)
                value_grad = tl.dot(weights.to(grad.dtype), grad, value_grad, input_precision="ieee")

    # The keys again, loaded anew: they occupy no registers during the loops.
    tl.debug_barrier()
    record = key_records + tl.load(items + 2 + item * 2).to(tl.int64) * SEGMENT_FIELDS
    key = tl.load(items + 3 + item * 2) // MAX_SPLITS * BLOCK_K + tl.arange(0, BLOCK_K)
    present = key < tl.load(record + KEY_LEN)
    position = tl.load(record + KEY_BEGIN).to(tl.int64) + key
    if OF_KEYS:
        pair = tl.arange(0, BLOCK_D // 2)
        first, second = pair_columns(pair, D, INTERLEAVED)
        mask = present[:, None] & (pair < D // 2)[None, :]
        to = grad_k + (position * gk_stride_t + head * gk_stride_h)[:, None]
        tl.store(to + first[None, :], (grad_a * score_scale).to(grad_k.dtype.element_ty), mask=mask)
        tl.store(to + second[None, :], (grad_b * score_scale).to(grad_k.dtype.element_ty), mask=mask)
    if OF_VALUES:
        d = tl.arange(0, BLOCK_DV)
        to = grad_v + (position * gv_stride_t + head * gv_stride_h)[:, None] + d[None, :]
        tl.store(to, value_grad.to(grad_v.dtype.element_ty), mask=present[:, None] & (d < DV)[None, :])


def graph_attention_backward(
    grad_q, grad_k, grad_v, grad_out, q, k, v, out, lse, q_offsets, kv_offsets, edge_offsets, edge_sources,
    own_segment, scale, inv_freq, q_start, edge_start, own_start, interleaved, config=None, key_config=None,
):  # fmt: skip
    tokens, query_heads, size = q.shape
    key_tokens, kv_heads, value_size = v.shape
    group = query_heads // kv_heads
    segments, key_segments = own_segment.shape[0], kv_offsets.shape[0] - 1
    scale = 1.0 / math.sqrt(size) if scale is None else float(scale)
    choice = heuristics.backward_configs(
        size, value_size, q.element_size(), inv_freq is not None, architecture(q.device)
    )
    config, key_config = config or choice[0], key_config or choice[1]
    grad_out, q, k, v, out, lse = map(last_stride_one, (grad_out, q, k, v, out, lse))
    lse = lse.contiguous()
    indices = (q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment, q_start, edge_start, own_start)
    q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment, q_start, edge_start, own_start = (
        x if x is None else x.contiguous() for x in indices
    )
    device = q.device
    rope = inv_freq is not None
    constants = {
        "GROUP": group, "D": size, "DV": value_size, "ROPE": rope, "INTERLEAVED": interleaved,
        "BLOCK_D": heuristics.block(size), "BLOCK_DV": heuristics.block(value_size),
    }  # fmt: skip
    with on_device(q):
        if tokens > 0:
            uncovered_kernel[(triton.cdiv(tokens, 256),)](
                grad_q, grad_q, q_offsets, segments, tokens, query_heads * size, 0, grad_q.stride(0), 1, 0, 0,
                VALUE_2=0.0, BLOCK=256, num_warps=4,
            )  # fmt: skip
        if key_tokens > 0:
            uncovered_kernel[(triton.cdiv(key_tokens, 256),)](
                grad_k, grad_v, kv_offsets, key_segments, key_tokens, kv_heads * size, kv_heads * value_size,
                grad_k.stride(0), 1, grad_v.stride(0), 1, VALUE_2=0.0, BLOCK=256, num_warps=4,
            )  # fmt: skip
        if segments == 0 or tokens == 0 or query_heads == 0:
            grad_k.zero_(), grad_v.zero_()
            return
        plan = Schedule(
            q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment, edge_start, tokens, key_tokens, False,
            group, kv_heads, value_size, config, True,
        )  # fmt: skip
        turns = deltas = turned = None
        if rope:
            turned = torch.empty(plan.capacity * kv_heads, config.block_m, size, dtype=q.dtype, device=device)
            turns, deltas = tables(
                plan.records, plan.lists, inv_freq.contiguous(), q_start, edge_start, own_start, tokens, plan.edges,
                size,
            )  # fmt: skip
        delta = torch.empty(query_heads, tokens, dtype=torch.float32, device=device)
        delta_kernel[(triton.cdiv(tokens * query_heads, DELTA_ROWS),)](
            delta, out, grad_out, tokens, query_heads, *out.stride()[:2], *grad_out.stride()[:2],
            DV=value_size, BLOCK_DV=heuristics.block(value_size), ROWS=DELTA_ROWS, num_warps=4,
        )  # fmt: skip
        query_gradient_kernel[(plan.capacity * kv_heads,)](
            grad_q, grad_out, q, k, v, lse, delta, plan.items, plan.records, plan.lists, turns, deltas, turned,
            scale * LOG2E.value, scale, tokens, key_tokens, plan.list_stride, kv_heads,
            *grad_q.stride()[:2], *grad_out.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            **constants, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_T=config.block_t,
            STAGES=config.num_stages, num_warps=config.num_warps,
        )  # fmt: skip
        if key_tokens == 0 or key_segments == 0:
            return
        key_records = torch.empty(key_segments, SEGMENT_FIELDS.value, dtype=torch.int32, device=device)
        readers = torch.empty(plan.edges + segments, 2, dtype=torch.int32, device=device)
        capacity = key_tokens // key_config.block_n + min(key_segments, key_tokens)
        items = torch.empty(2 + 2 * capacity, dtype=torch.int32, device=device)
        readers_kernel[(key_segments,)](
            key_records, readers, plan.records, plan.targets, kv_offsets, edge_sources, own_segment, key_tokens,
            segments, plan.edges, BLOCK_K=key_config.block_n, num_warps=4,
        )  # fmt: skip
        schedule_kernel[(key_segments,)](items, key_records, key_segments, capacity, 0, BLOCK_M=1, num_warps=4)
        for of_keys, of_values in gradients_together(size, value_size):
            key_gradient_kernel[(capacity * kv_heads,)](
                grad_k, grad_v, grad_out, q, k, v, lse, delta, items, key_records, readers, plan.records, turns,
                deltas, scale * LOG2E.value, scale, tokens, kv_heads,
                *grad_k.stride()[:2], *grad_v.stride()[:2], *grad_out.stride()[:2], *q.stride()[:2],
                *k.stride()[:2], *v.stride()[:2], **constants, OF_KEYS=of_keys, OF_VALUES=of_values,
                BLOCK_M=key_config.block_m, BLOCK_K=key_config.block_n, STAGES=key_config.num_stages,
                num_warps=key_config.num_warps,
            )  # fmt: skip


def gradients_together(size, value_size):
    """Pairs (of keys, of values): the gradients that a launch computes. Large heads have registers for one of them."""
    both = max(heuristics.block(size), heuristics.block(value_size)) <= 128
    return [(True, True)] if both else [(True, False), (False, True)]


def _aot_case(kernel, name, arch, *, dtype, size, group=4, rope=False, gradients=None, config=None):
    which = 0 if kernel is query_gradient_kernel else 1
    config = config or heuristics.backward_configs(size, size, 4 if dtype == "*fp32" else 2, rope, arch)[which]
    tiles = {"BLOCK_N": config.block_n, "BLOCK_T": config.block_t} if which == 0 else {"BLOCK_K": config.block_n}
    if gradients:
        tiles |= {"OF_KEYS": gradients[0], "OF_VALUES": gradients[1]}
    constants = {
        "GROUP": group, "D": size, "DV": size, "ROPE": rope, "INTERLEAVED": False, "BLOCK_M": config.block_m,
        "BLOCK_D": heuristics.block(size), "BLOCK_DV": heuristics.block(size), "STAGES": config.num_stages,
    } | tiles  # fmt: skip
    signature = dict.fromkeys(kernel.arg_names, "i32")
    pointers = {name: dtype for name in ("grad_q", "grad_k", "grad_v", "grad_out", "q", "k", "v", "turned")}
    pointers |= dict.fromkeys(("lse", "delta", "turns", "deltas"), "*fp32")
    pointers |= dict.fromkeys(("items", "records", "lists", "key_records", "readers"), "*i32")
    signature |= {name: kind for name, kind in pointers.items() if name in signature}
    signature |= {"scale": "fp32", "score_scale": "fp32"}
    if not rope:
        constants |= {name: None for name in ("turns", "deltas", "turned") if name in signature}
    signature = {argument: kind for argument, kind in signature.items() if argument not in constants}
    return name, kernel, signature, constants, {"num_warps": config.num_warps, "num_stages": config.num_stages}


def aot_cases(arch: str):
    cases = []
    for name, dtype, size, rope in (
        ("bf16_d128", "*bf16", 128, False),
        ("bf16_d128_rope", "*bf16", 128, True),
        ("fp16_d64_rope", "*fp16", 64, True),
        ("bf16_d256_rope", "*bf16", 256, True),
        ("fp32_d128_rope", "*fp32", 128, True),
    ):
        kind = {"dtype": dtype, "size": size, "rope": rope}
        cases.append(_aot_case(query_gradient_kernel, f"query_gradient_{name}", arch, **kind))
        for gradients in gradients_together(size, size):
            of = {(True, True): "key", (True, False): "key_only", (False, True): "value"}[gradients]
            cases.append(_aot_case(key_gradient_kernel, f"{of}_gradient_{name}", arch, gradients=gradients, **kind))
    return cases
