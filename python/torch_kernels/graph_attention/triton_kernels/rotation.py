# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding. Token t of a segment is turned by t + delta positions for the keys of one group of edges, where
delta is the distance of the two segments' starts. Tables hold cosines and sines of t and of delta; a query tile joins
them by the addition theorems. Their angles are reduced in float64."""

import torch
import triton
import triton.language as tl

from torch_kernels._triton import last_stride_one, on_device, power_of_two

from .schedule import GROUP_FIRST, GROUPS, LISTS, OWN_LEN, Q_LEN, SEGMENT_FIELDS, SEGMENTS


@triton.jit
def cosine_sine(turns):
    """Of 2 pi * turns, a float64, in float32: to 1e-7."""
    quarters = tl.floor(4 * turns + 0.5)
    x = ((turns - quarters * 0.25) * 6.283185307179586).to(tl.float32)
    quarter = quarters.to(tl.int64) & 3
    square = x * x
    sine = x * (1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880)))))
    cosine = 1 + square * (-0.5 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320))))
    swap = (quarter & 1) == 1
    c = tl.where(swap, sine, cosine)
    s = tl.where(swap, cosine, sine)
    return tl.where((quarter == 1) | (quarter == 2), -c, c), tl.where(quarter >= 2, -s, s)


@triton.jit
def frequency(inv_freq, pair, inside):
    """In turns per position, float64."""
    return tl.load(inv_freq + pair, mask=inside, other=0).to(tl.float64) * 0.15915494309189535


@triton.jit
def pair_columns(pair, SIZE: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        first = pair * 2
        second = first + 1
    else:
        first = pair
        second = pair + SIZE // 2
    return first, second


@triton.jit
def turn_of(token, exists, turns, delta, pair, SIZE: tl.constexpr, LATE: tl.constexpr):
    """Cosines and sines for the tokens (rows) and pairs of columns; `delta` is a row of the table of deltas. LATE: it
    is loaded where it is needed, not ahead of a loop, throughout which it would occupy registers."""
    inside = pair < SIZE // 2
    mask = exists[:, None] & inside[None, :]
    lowest = tl.min(token, axis=0)
    turns += lowest.to(tl.int64) * SIZE
    at = (token - lowest)[:, None] * SIZE + pair[None, :]
    c = tl.load(turns + at, mask=mask, other=0.0)
    s = tl.load(turns + at + SIZE // 2, mask=mask, other=0.0)
    delta_c = tl.load(delta + pair, mask=inside, other=0.0, volatile=LATE)[None, :]
    delta_s = tl.load(delta + SIZE // 2 + pair, mask=inside, other=0.0, volatile=LATE)[None, :]
    return c * delta_c - s * delta_s, s * delta_c + c * delta_s


TURNED_PAIRS = tl.constexpr(16)  # at a time


@triton.jit
def store_turned(
    turned, q, offset, exists, token, turns, delta,
    SIZE: tl.constexpr, ROWS: tl.constexpr, INTERLEAVED: tl.constexpr, NEGATE: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Writes a tile of queries, turned and rounded once, to rows of SIZE elements that only this program uses: a few
    columns at a time, for want of registers. APART: the first elements of all pairs, then the second."""
    tl.debug_barrier()  # what was there has been read
    to = turned + (tl.arange(0, ROWS) * SIZE)[:, None]
    # The grid has one dimension: an end that the compiler does not know, lest it unrolls and loads all at once.
    for low in tl.range(0, SIZE // 2 + tl.program_id(1), TURNED_PAIRS, num_stages=1):
        pair = low + tl.arange(0, TURNED_PAIRS)
        inside = (pair < SIZE // 2)[None, :]
        first, second = pair_columns(pair, SIZE, INTERLEAVED)
        a = tl.load(q + offset[:, None] + first[None, :], mask=exists[:, None] & inside, other=0.0).to(tl.float32)
        b = tl.load(q + offset[:, None] + second[None, :], mask=exists[:, None] & inside, other=0.0).to(tl.float32)
        c, s = turn_of(token, exists, turns, delta, pair, SIZE, SIZE <= 128)
        x = a * c - b * s
        y = a * s + b * c
        if NEGATE:
            x = -x
            y = -y
        if APART:
            first, second = pair_columns(pair, SIZE, False)
        tl.store(to + first[None, :], x.to(q.dtype.element_ty), mask=inside)
        tl.store(to + second[None, :], y.to(q.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["segments", "query_tokens", "edges"])
def tables_kernel(
    turns, deltas, records, lists, inv_freq, q_start, edge_start, own_start, segments, query_tokens,
    edges,
    SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """turns [longest segment, 2, D/2]: by t; deltas [edges + segments, 2, D/2]: of each group, then of the own segment.
    Grid (segments + blocks of tokens)."""
    pair = tl.arange(0, HALF)
    inside = pair < SIZE // 2
    rate = frequency(inv_freq, pair, inside)[None, :]
    if tl.program_id(0) < segments:
        segment = tl.program_id(0)
        record = records + segment.to(tl.int64) * SEGMENT_FIELDS
        groups = tl.load(record + GROUPS)
        at = tl.load(record + LISTS).to(tl.int64)
        start = tl.load(q_start + segment).to(tl.int64)
        if own_start is not None:
            own_delta = start - tl.load(own_start + segment).to(tl.int64)
        else:
            own_delta = (tl.load(record + OWN_LEN) - tl.load(record + Q_LEN)).to(tl.int64)
        for first in range(0, groups + 1, BLOCK):
            group = first + tl.arange(0, BLOCK)
            edge = tl.load(lists + GROUP_FIRST * (edges + segments) + at + group, mask=group < groups, other=0)
            edge = at - segment + edge.to(tl.int64)
            theirs = tl.load(edge_start + edge, mask=(group < groups) & (edge < edges), other=0).to(tl.int64)
            delta = tl.where(group < groups, start - theirs, own_delta)
            c, s = cosine_sine(delta.to(tl.float64)[:, None] * rate)
            to = (at + group)[:, None] * SIZE + pair[None, :]
            mask = (group <= groups)[:, None] & inside[None, :]
            tl.store(deltas + to, c, mask=mask)
            tl.store(deltas + to + SIZE // 2, s, mask=mask)
    else:
        first = (tl.program_id(0) - segments) * BLOCK
        longest = 0
        for other in range(0, segments, SEGMENTS):
            i = other + tl.arange(0, SEGMENTS)
            length = tl.load(records + i.to(tl.int64) * SEGMENT_FIELDS + Q_LEN, mask=i < segments, other=0)
            longest = tl.maximum(longest, tl.max(length, axis=0))
        if first < longest:
            token = first + tl.arange(0, BLOCK)
            c, s = cosine_sine(token.to(tl.float64)[:, None] * rate)
            to = token.to(tl.int64)[:, None] * SIZE + pair[None, :]
            mask = (token < query_tokens)[:, None] & inside[None, :]
            tl.store(turns + to, c, mask=mask)
            tl.store(turns + to + SIZE // 2, s, mask=mask)


@triton.jit(do_not_specialize=["segments", "tokens", "heads"])
def rope_shift_kernel(
    out, k, offsets, delta, inv_freq, segments, tokens, heads, out_stride_t, out_stride_h, k_stride_t, k_stride_h,
    SIZE: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tokens): BLOCK tokens, one after the other, all heads. A token's segment is found by counting:
    of all segments that begin at or before it, under the offsets' running maximum, the last."""
    pair = tl.arange(0, HALF)
    inside = pair < SIZE // 2
    first, second = pair_columns(pair, SIZE, INTERLEAVED)
    rate = frequency(inv_freq, pair, inside)
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    # The segment of each token, or -1.
    segment = tl.full((BLOCK,), -1, tl.int32)
    for low in range(0, segments, 64):
        i = low + tl.arange(0, 64)
        begin = tl.load(offsets + i, mask=i < segments, other=0).to(tl.int64)
        end = tl.load(offsets + i + 1, mask=i < segments, other=0).to(tl.int64)
        holds = (begin[None, :] <= token[:, None]) & (token[:, None] < end[None, :]) & (i < segments)[None, :]
        segment = tl.maximum(segment, tl.max(tl.where(holds, i[None, :], -1), axis=1))
    exists = token < tokens
    shift = tl.load(delta + segment, mask=exists & (segment >= 0), other=0).to(tl.int64)
    c, s = cosine_sine(shift.to(tl.float64)[:, None] * rate[None, :])
    mask = exists[:, None] & inside[None, :]
    still = (segment < 0)[:, None]  # of no segment
    for head in range(0, heads):
        at = token.to(tl.int64)[:, None] * k_stride_t + tl.cast(head, tl.int64) * k_stride_h
        to = token.to(tl.int64)[:, None] * out_stride_t + tl.cast(head, tl.int64) * out_stride_h
        stored_a = tl.load(k + at + first[None, :], mask=mask, other=0.0)
        stored_b = tl.load(k + at + second[None, :], mask=mask, other=0.0)
        a = stored_a.to(tl.float32)
        b = stored_b.to(tl.float32)
        x = tl.where(still, stored_a, (a * c - b * s).to(k.dtype.element_ty))
        y = tl.where(still, stored_b, (a * s + b * c).to(k.dtype.element_ty))
        tl.store(out + to + first[None, :], x, mask=mask)
        tl.store(out + to + second[None, :], y, mask=mask)


def rope_shift(out, k, offsets, delta, inv_freq, interleaved):
    tokens, heads, size = k.shape
    if out.numel() == 0:
        return
    (k,) = last_stride_one(k)
    block = 32
    with on_device(k):
        rope_shift_kernel[(triton.cdiv(tokens, block),)](
            out, k, offsets.contiguous(), delta.contiguous(), inv_freq.contiguous(), delta.shape[0], tokens, heads,
            *out.stride()[:2], *k.stride()[:2],
            SIZE=size, HALF=power_of_two(size) // 2, INTERLEAVED=interleaved, BLOCK=block, num_warps=4,
        )  # fmt: skip


def tables(records, lists, inv_freq, q_start, edge_start, own_start, query_tokens, edges, size):
    """The two tables of `tables_kernel`."""
    segments = q_start.shape[0]
    turns = torch.empty(query_tokens, size, dtype=torch.float32, device=records.device)
    deltas = torch.empty(edges + segments, size, dtype=torch.float32, device=records.device)
    block = 32
    tables_kernel[(segments + triton.cdiv(query_tokens, block),)](
        turns, deltas, records, lists, inv_freq, q_start, edge_start, own_start, segments, query_tokens,
        edges, SIZE=size, HALF=power_of_two(size) // 2, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return turns, deltas
