# SPDX-License-Identifier: Apache-2.0
"""Attention of query segments to their source segments and, causally, to their own keys.

The rows that share a key/value head (tokens times G query heads) are packed into tiles of BLOCK_M. A program handles
one such tile, or one of several splits of its keys. It walks the groups of edges that share a rotation, then its own
segment, in one online softmax: first all whole tiles of BLOCK_N keys of a group, one after the other whatever source
they belong to, without a mask; then what remains of the group's sources, in tiles of BLOCK_T. A second kernel joins
splits. Splits follow from the segment's own size.
"""

import math

import torch
import triton
import triton.language as tl

from torch_kernels._triton import architecture, contiguous, last_stride_one, on_device, power_of_two, rows_nearby
from torch_kernels._triton_jit import LN2, LOG2E, is_special, join_splits, load_tile, locate, softmax_end

from .. import heuristics
from .rotation import pair_columns, store_turned, tables, turn_of
from .schedule import (
    FULL_BEFORE,
    FULL_INDEX,
    FULL_KEY,
    GROUP_FIRST,
    LISTS,
    MAX_SPLITS,
    PARTIALS,
    Q_BEGIN,
    Q_LEN,
    SEGMENT_FIELDS,
    SPLITS,
    TAIL_BEFORE,
    TAIL_INDEX,
    TAIL_KEY,
    TILES,
    Schedule,
    uncovered_kernel,
)
from .walk import SOURCES, group_range, load_segment, load_sources, own_keys, pick

COMBINE_ROWS = tl.constexpr(16)


@triton.jit
def dot_in_chunks(
    q, q_offset, q_exists, token, turns, delta, k, offset, exists,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, NEGATE: tl.constexpr,
):  # fmt: skip
    """float32 products of queries and keys on ordinary cores, a few columns at a time to spare registers."""
    scores = tl.zeros((q_offset.shape[0], offset.shape[0]), tl.float32)
    for low in range(0, SIZE // 2, CHUNK):
        pair = low + tl.arange(0, CHUNK)
        inside = (pair < SIZE // 2)[None, :]
        first, second = pair_columns(pair, SIZE, INTERLEAVED)
        a = tl.load(q + q_offset[:, None] + first[None, :], mask=q_exists[:, None] & inside, other=0.0)
        b = tl.load(q + q_offset[:, None] + second[None, :], mask=q_exists[:, None] & inside, other=0.0)
        if ROPE:
            c, s = turn_of(token, q_exists, turns, delta, pair, SIZE, False)
            x = a * c - b * s
            b = a * s + b * c
            a = x
        if NEGATE:
            a = -a
            b = -b
        k_a = tl.load(k + offset[:, None] + first[None, :], mask=exists[:, None] & inside, other=0.0)
        k_b = tl.load(k + offset[:, None] + second[None, :], mask=exists[:, None] & inside, other=0.0)
        scores = tl.dot(a, tl.trans(k_a), scores, input_precision="ieee")
        scores = tl.dot(b, tl.trans(k_b), scores, input_precision="ieee")
    return scores


@triton.jit
def attend(scores, v, visible, acc, peak, total, scale, MASKED: tl.constexpr):
    """One step of online softmax, in base 2; scale includes log2(e) and is positive. Unlike in `softmax_step`, scaling
    and the difference to the peak are one instruction."""
    if MASKED:
        scores = tl.where(visible, scores, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale)
    anchor = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weights = tl.exp2(scores * scale - anchor[:, None])
    decay = tl.exp2(peak - anchor)
    total = total * decay + tl.sum(weights, axis=1)
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return acc, new_peak, total


@triton.jit(
    do_not_specialize=["capacity", "key_tokens", "pages", "list_stride", "table_stride", "partial_capacity", "tokens"]
)
def graph_attention_kernel(
    out, lse, partial_out, partial_lse, q, k, v, items, records, lists, turns, deltas, turned, block_table,
    scale, tokens, key_tokens, pages, list_stride, table_stride, partial_capacity, kv_heads,
    out_stride_t, out_stride_h, q_stride_t, q_stride_h, k_stride_p, k_stride_t, k_stride_h,
    v_stride_p, v_stride_t, v_stride_h,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr, NEGATE: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr, TAIL_STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (items * key/value heads). PAGE = 0: keys are packed. CHUNK = 0: the whole head size in one product; then
    `turned` has room for each program's queries."""
    item = tl.program_id(0) // kv_heads
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    if item >= tl.load(items):
        return
    segment = tl.load(items + 2 + item * 2).to(tl.int64)
    code = tl.load(items + 3 + item * 2)
    record = records + segment * SEGMENT_FIELDS
    q_begin, q_len, groups, own_begin, own_len, own_segment, source_full, source_tail = load_segment(record)
    lists += tl.load(record + LISTS).to(tl.int64)
    deltas_row = tl.load(record + LISTS).to(tl.int64) * D
    splits = tl.load(record + SPLITS)
    split = code % MAX_SPLITS
    tile = code // MAX_SPLITS

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // GROUP
    exists = token < q_len
    q_offset = (q_begin + token) * q_stride_t + (head * GROUP + row % GROUP) * q_stride_h
    k += head * k_stride_h
    v += head * v_stride_h
    ahead, own_full, own_last = own_keys(tile, q_len, own_len, GROUP, BLOCK_M, BLOCK_N)
    all_full = source_full + own_full
    all_tail = source_tail + tl.cdiv(own_last - own_full * BLOCK_N, BLOCK_T)
    full_begin = (all_full.to(tl.int64) * split // splits).to(tl.int32)
    full_end = (all_full.to(tl.int64) * (split + 1) // splits).to(tl.int32)
    tail_begin = (all_tail.to(tl.int64) * split // splits).to(tl.int32)
    tail_end = (all_tail.to(tl.int64) * (split + 1) // splits).to(tl.int32)

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    special = 0
    OWN_ROWS: tl.constexpr = ROPE and CHUNK == 0
    if OWN_ROWS:
        turned += tl.program_id(0).to(tl.int64) * BLOCK_M * D
    column = tl.arange(0, BLOCK_N)
    tail_column = tl.arange(0, BLOCK_T)

    rounds = 1
    if ROPE:
        rounds = groups + 1
    for group in range(rounds):
        # Of a group, its whole tiles and sources that have any, then its other tiles.
        if ROPE:
            delta = deltas + deltas_row + tl.cast(group, tl.int64) * D
            begin, end, source, source_end = group_range(lists, list_stride, group, groups, FULL_BEFORE, FULL_INDEX)
            t_begin, t_end, t_source, t_source_end = group_range(
                lists, list_stride, group, groups, TAIL_BEFORE, TAIL_INDEX
            )  # fmt: skip
            if group == groups:
                end = all_full
                t_end = all_tail
            begin = tl.maximum(begin, full_begin)
            end = tl.minimum(end, full_end)
            t_begin = tl.maximum(t_begin, tail_begin)
            t_end = tl.minimum(t_end, tail_end)
        else:
            delta = deltas
            edges = tl.load(lists + GROUP_FIRST * list_stride + groups)
            begin, end, source, source_end = full_begin, full_end, 0, tl.load(lists + FULL_INDEX * list_stride + edges)
            t_begin, t_end, t_source = tail_begin, tail_end, 0
            t_source_end = tl.load(lists + TAIL_INDEX * list_stride + edges)
        if CHUNK == 0:
            if ROPE:
                # The rows again, from the tile as it is loaded here: they occupy no registers during the loops.
                mine = tl.load(items + 3 + item * 2) // MAX_SPLITS * BLOCK_M + tl.arange(0, BLOCK_M)
                store_turned(
                    turned, q, (q_begin + mine // GROUP) * q_stride_t + (head * GROUP + mine % GROUP) * q_stride_h,
                    mine // GROUP < q_len, mine // GROUP, turns, delta, D, BLOCK_M, INTERLEAVED, NEGATE, False,
                )  # fmt: skip
                own_row = tl.arange(0, BLOCK_M) * D
                q_tile = load_tile(turned, own_row, own_row >= 0, D, BLOCK_D, False)
            else:
                q_tile = load_tile(q, q_offset, exists, D, BLOCK_D, True)
                if NEGATE:
                    q_tile = -q_tile

        # Whole tiles, those of SOURCES sources at a time; the last of them are the own segment's.
        for block in range(0, tl.maximum(tl.cdiv(source_end - source, SOURCES), 1)):
            first_source = source + block * SOURCES
            first_key, in_segment, first, until, _, from_, to = load_sources(
                lists, list_stride, first_source, source_end, begin, end, source_full, FULL_KEY
            )  # fmt: skip
            for step in tl.range(from_, to, num_stages=STAGES):
                own = step >= source_full
                key = pick(first_key, first, until, step) + step * BLOCK_N
                key = tl.where(own, own_begin + (step - source_full) * BLOCK_N, key)
                if PAGE > 0:
                    at_segment = tl.where(own, own_segment, pick(in_segment, first, until, step))
                    table = block_table + at_segment.to(tl.int64) * table_stride
                    at = key + column
                    k_offset, found = locate(at, at < key_tokens, table, pages, k_stride_p, k_stride_t, PAGE)
                    v_offset, found = locate(at, at < key_tokens, table, pages, v_stride_p, v_stride_t, PAGE)
                    k_base = k
                    v_base = v
                else:
                    # Always within, unless offsets are garbage.
                    key = tl.minimum(tl.maximum(key, 0), tl.maximum(key_tokens - BLOCK_N, 0))
                    found = column >= 0
                    k_base = k + key.to(tl.int64) * k_stride_t
                    v_base = v + key.to(tl.int64) * v_stride_t
                    k_offset = column * k_stride_t
                    v_offset = column * v_stride_t
                if CHUNK == 0:
                    k_tile = load_tile(k_base, k_offset, found, D, BLOCK_D, PAGE > 0)
                    scores = tl.dot(q_tile, tl.trans(k_tile))
                else:
                    scores = dot_in_chunks(
                        q, q_offset, exists, token, turns, delta, k_base, k_offset, found, D, CHUNK, ROPE, INTERLEAVED,
                        NEGATE,
                    )  # fmt: skip
                v_tile = load_tile(v_base, v_offset, found, DV, BLOCK_DV, PAGE > 0)
                acc, peak, total = attend(scores, v_tile, found[None, :], acc, peak, total, scale, PAGE > 0)

        # What remains of the sources, then of the own segment, where each row sees another number of keys.
        own_key = own_begin + own_full * BLOCK_N
        for block in range(0, tl.maximum(tl.cdiv(t_source_end - t_source, SOURCES), 1)):
            first_source = t_source + block * SOURCES
            first_key, in_segment, first, until, key_end, from_, to = load_sources(
                lists, list_stride, first_source, t_source_end, t_begin, t_end, source_tail, TAIL_KEY
            )  # fmt: skip
            for step in tl.range(from_, to, num_stages=TAIL_STAGES):
                own = step >= source_tail
                key = pick(first_key, first, until, step) + step * BLOCK_T
                key = tl.where(own, own_key + (step - source_tail) * BLOCK_T, key)
                limit = tl.where(own, own_begin + own_last, pick(key_end, first, until, step))
                table = block_table
                if PAGE > 0:
                    at_segment = tl.where(own, own_segment, pick(in_segment, first, until, step))
                    table += at_segment.to(tl.int64) * table_stride
                at = key + tail_column
                wanted = (at >= 0) & (at < tl.minimum(limit, key_tokens))
                k_offset, found = locate(at, wanted, table, pages, k_stride_p, k_stride_t, PAGE)
                v_offset, found = locate(at, wanted, table, pages, v_stride_p, v_stride_t, PAGE)
                if CHUNK == 0:
                    k_tile = load_tile(k, k_offset, found, D, BLOCK_D, True)
                    scores = tl.dot(q_tile, tl.trans(k_tile))
                else:
                    scores = dot_in_chunks(
                        q, q_offset, exists, token, turns, delta, k, k_offset, found, D, CHUNK, ROPE, INTERLEAVED,
                        NEGATE,
                    )  # fmt: skip
                v_tile = load_tile(v, v_offset, found, DV, BLOCK_DV, True)
                # NaN and infinities are added at the end.
                left_out = is_special(v_tile) & own
                special = tl.maximum(special, tl.max(tl.max(left_out.to(tl.int32), axis=1), axis=0))
                v_tile = tl.where(left_out, 0.0, v_tile).to(v.dtype.element_ty)
                seen_until = tl.where(own, own_begin + token + ahead + 1, limit)
                visible = found[None, :] & (at[None, :] < seen_until[:, None])
                acc, peak, total = attend(scores, v_tile, visible, acc, peak, total, scale, True)

    result, row_lse = softmax_end(acc, peak, total)
    # The rows again: computed anew, in other words than above, they occupy no registers during the loops.
    local = tl.arange(0, BLOCK_M)
    token = (tile * BLOCK_M + local) // GROUP
    query_head = head * GROUP + (tile * BLOCK_M + local) % GROUP
    d = tl.arange(0, BLOCK_DV)
    # Rows of this program in out, or else in partial_out.
    rows = q_len
    if SPLIT:
        rows = tl.where(splits > 1, 0, q_len)
        divided = token < tl.where(splits > 1, q_len, 0)
        at = head * partial_capacity + tl.load(record + PARTIALS)
        at += (split * tl.load(record + TILES) + tile) * BLOCK_M + local
        tl.store(partial_lse + at, row_lse, mask=divided)
        tl.store(partial_out + at[:, None] * DV + d[None, :], result, mask=divided[:, None] & (d < DV)[None, :])
    offset = (q_begin + token) * out_stride_t + query_head * out_stride_h
    inside = (token < rows)[:, None] & (d < DV)[None, :]
    tl.store(lse + query_head * tokens + q_begin + token, row_lse * LN2, mask=token < rows)
    tl.store(out + offset[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=inside)

    # Rare: add the NaN and infinities that were taken out, key by key, to the rows that see the key.
    if special > 0:
        tl.debug_barrier()
        table = block_table
        if PAGE > 0:
            table += own_segment.to(tl.int64) * table_stride
        for i in range(own_full * BLOCK_N, own_last):
            key_at = own_begin + i + d * 0
            v_offset, found = locate(key_at, key_at < key_tokens, table, pages, v_stride_p, v_stride_t, PAGE)
            value = tl.load(v + v_offset + d, mask=found & (d < DV), other=0.0).to(tl.float32)
            left_out = is_special(value)
            seen = i <= token + ahead
            if SPLIT:
                # The split that met the key adds it.
                step = source_tail + (i - own_full * BLOCK_N) // BLOCK_T
                seen = seen & (tail_begin <= step + token * 0) & (step + token * 0 < tail_end)
                mask = (seen & divided)[:, None] & (left_out & (d < DV))[None, :]
                target = partial_out + at[:, None] * DV + d[None, :]
                tl.store(target, tl.load(target, mask=mask, other=0.0) + value[None, :], mask=mask)
            mask = (seen & (token < rows))[:, None] & (left_out & (d < DV))[None, :]
            target = out + offset[:, None] + d[None, :]
            changed = tl.load(target, mask=mask, other=0.0).to(tl.float32) + value[None, :]
            tl.store(target, changed.to(out.dtype.element_ty), mask=mask)
            tl.debug_barrier()  # another thread may load for the next key what this one has stored


@triton.jit(do_not_specialize=["tokens", "partial_capacity", "kv_heads"])
def combine_kernel(
    out, lse, partial_out, partial_lse, items, records, tokens, partial_capacity, kv_heads, out_stride_t, out_stride_h,
    GROUP: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Joins the splits of a tile, in order. Grid as before: the programs of a tile's splits share its rows."""
    item = tl.program_id(0) // kv_heads
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    if item >= tl.load(items):
        return
    segment = tl.load(items + 2 + item * 2).to(tl.int64)
    code = tl.load(items + 3 + item * 2)
    record = records + segment * SEGMENT_FIELDS
    splits = tl.load(record + SPLITS)
    if splits == 1:
        return
    tile = code // MAX_SPLITS
    q_len = tl.load(record + Q_LEN)
    stride = tl.load(record + TILES).to(tl.int64) * BLOCK_M
    d = tl.arange(0, BLOCK_DV)
    for block in range(code % MAX_SPLITS, BLOCK_M // COMBINE_ROWS, splits):
        row = tile * BLOCK_M + block * COMBINE_ROWS + tl.arange(0, COMBINE_ROWS)
        token = row // GROUP
        exists = token < q_len
        inside = exists[:, None] & (d < DV)[None, :]
        at = head * partial_capacity + tl.load(record + PARTIALS) + row
        result, row_lse = join_splits(
            partial_out, partial_lse, at, stride, splits, exists, DV, COMBINE_ROWS, BLOCK_DV
        )  # fmt: skip
        query_head = head * GROUP + row % GROUP
        q_begin = tl.load(record + Q_BEGIN).to(tl.int64)
        offset = (q_begin + token) * out_stride_t + query_head * out_stride_h
        tl.store(out + offset[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=inside)
        tl.store(lse + query_head * tokens + q_begin + token, row_lse * LN2, mask=exists)


def graph_attention(
    out, lse, q, k, v, q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment, scale, block_table, inv_freq,
    q_start, edge_start, own_start, interleaved, config=None,
):  # fmt: skip
    tokens, query_heads, size = q.shape
    kv_heads, value_size = v.shape[-2:]
    if out.numel() == 0 and lse.numel() == 0:
        return
    group = query_heads // kv_heads
    paged = block_table is not None
    page = k.shape[1] if paged else 0
    key_tokens = min(block_table.shape[1] * page, 2**31 - 1024) if paged else k.shape[0]
    config = config or heuristics.attention_config(
        size, value_size, q.element_size(), inv_freq is not None, architecture(q.device)
    )
    scale = 1.0 / math.sqrt(size) if scale is None else float(scale)
    q, k, v = last_stride_one(q, k, v)
    k, v = (k, v) if paged else rows_nearby(k, v)
    q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment = contiguous(
        q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment
    )  # fmt: skip
    inv_freq, q_start, edge_start, own_start, table = contiguous(inv_freq, q_start, edge_start, own_start, block_table)
    key_strides = (*k.stride()[:3], *v.stride()[:3]) if paged else (0, *k.stride()[:2], 0, *v.stride()[:2])
    segments = own_segment.shape[0]
    with on_device(q):
        uncovered_kernel[(triton.cdiv(tokens, 256),)](
            out, lse, q_offsets, segments, tokens, query_heads * value_size, query_heads, out.stride(0), 1, 1, tokens,
            VALUE_2=-math.inf, BLOCK=256, num_warps=4,
        )  # fmt: skip
        if segments == 0:
            return
        plan = Schedule(
            q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment, edge_start, tokens, key_tokens, paged,
            group, kv_heads, value_size, config,
        )  # fmt: skip
        turns = deltas = turned = None
        if inv_freq is not None:
            if config.chunk == 0:
                turned = torch.empty(plan.capacity * kv_heads, config.block_m, size, dtype=q.dtype, device=q.device)
            turns, deltas = tables(
                plan.records, plan.lists, inv_freq, q_start, edge_start, own_start, tokens, plan.edges,
                size,
            )  # fmt: skip
        split = plan.partial_capacity > 0
        partial_out = partial_lse = None
        if split:
            partial_out = torch.empty(kv_heads, plan.partial_capacity, value_size, dtype=torch.float32, device=q.device)
            partial_lse = torch.empty(kv_heads, plan.partial_capacity, dtype=torch.float32, device=q.device)
        graph_attention_kernel[(plan.capacity * kv_heads,)](
            out, lse, partial_out, partial_lse, q, k, v, plan.items, plan.records, plan.lists, turns, deltas, turned,
            table,
            max(abs(scale) * LOG2E.value, 1e-30),  # with a scale of 0, -inf must stay -inf
            tokens, key_tokens, k.shape[0], plan.list_stride, table.stride(0) if paged else 0, plan.partial_capacity,
            kv_heads, *out.stride()[:2], *q.stride()[:2], *key_strides,
            GROUP=group, D=size, DV=value_size, PAGE=page, ROPE=inv_freq is not None, INTERLEAVED=interleaved,
            NEGATE=scale < 0, SPLIT=split, CHUNK=config.chunk,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_T=config.block_t,
            BLOCK_D=power_of_two(size), BLOCK_DV=power_of_two(value_size),
            STAGES=config.num_stages, TAIL_STAGES=min(config.num_stages, 2), num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip
        if split:
            combine_kernel[(plan.capacity * kv_heads,)](
                out, lse, partial_out, partial_lse, plan.items, plan.records, tokens, plan.partial_capacity, kv_heads,
                *out.stride()[:2], GROUP=group, DV=value_size, BLOCK_M=config.block_m,
                BLOCK_DV=power_of_two(value_size), num_warps=4,
            )  # fmt: skip
