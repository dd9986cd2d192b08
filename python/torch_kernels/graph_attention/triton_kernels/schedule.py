# SPDX-License-Identifier: Apache-2.0
"""Who does what: a work list made on the device, of query tiles or key tiles, from the graph's index tensors.

``segments_kernel`` looks at one query segment per program. It writes the segment's record (``SEGMENT_FIELDS`` numbers)
and, for each of its edges, where the source's keys are, in tiles of BLOCK_N keys and, for what remains of a source, of
BLOCK_T. Edges of a segment are cut into groups: runs with one rotation. Lists of a segment's edges start at
``edge_begin + segment`` and have one element more than there are edges.

``schedule_kernel`` lists the work items, those that take longest first. The host knows upper bounds of all sizes only.

Offsets are made monotone, so segments never overlap, whatever is in the tensors: the bounds hold.
"""

import torch
import triton
import triton.language as tl

from .. import heuristics

EDGES = tl.constexpr(128)  # that a program looks at together
SEGMENTS = tl.constexpr(512)
SEGMENT_FIELDS = tl.constexpr(16)

# Fields of a segment's record.
Q_BEGIN = tl.constexpr(0)
Q_LEN = tl.constexpr(1)
LISTS = tl.constexpr(2)  # where the lists of its edges start
GROUPS = tl.constexpr(3)
OWN_BEGIN = tl.constexpr(4)  # first token of its own keys
OWN_LEN = tl.constexpr(5)
OWN_SEGMENT = tl.constexpr(6)
FULL_TILES = tl.constexpr(7)  # of its sources
TAIL_TILES = tl.constexpr(8)
COST = tl.constexpr(9)  # of a tile, in keys
TILES = tl.constexpr(10)
WANTED_SPLITS = tl.constexpr(11)
SPLITS = tl.constexpr(12)
PARTIALS = tl.constexpr(13)  # its first row of partial results

# Lists of edges, each as long as LIST_STRIDE.
GROUP_FIRST = tl.constexpr(0)  # the first edge of each group
FULL_BEFORE = tl.constexpr(1)  # full tiles before an edge
FULL_INDEX = tl.constexpr(2)  # sources with full tiles before an edge
TAIL_BEFORE = tl.constexpr(3)
TAIL_INDEX = tl.constexpr(4)
# Of the sources that have such tiles: the first key of tile t would be KEY + t * tile size; tiles FROM .. UNTIL - 1.
FULL_KEY = tl.constexpr(5)
FULL_SEGMENT = tl.constexpr(6)
FULL_FROM = tl.constexpr(7)
FULL_UNTIL = tl.constexpr(8)
TAIL_KEY = tl.constexpr(9)
TAIL_SEGMENT = tl.constexpr(10)
TAIL_FROM = tl.constexpr(11)
TAIL_UNTIL = tl.constexpr(12)
TAIL_END = tl.constexpr(13)  # behind the last key
LISTS_COUNT = 14

MAX_SPLITS = tl.constexpr(32)
# Partial results of splits take at most this much memory; segments beyond are not split.
PARTIAL_BYTES = 512 << 20


@triton.jit
def clamped(offsets, i, low, high):
    value = tl.load(offsets + i).to(tl.int64)
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def monotone_range(offsets, i, limit):
    """Segment i of the offsets' running maximum."""
    begin = tl.zeros((), tl.int64)
    for first in range(0, i + 1, SEGMENTS):
        at = first + tl.arange(0, SEGMENTS)
        begin = tl.maximum(begin, tl.max(tl.load(offsets + at, mask=at <= i, other=0).to(tl.int64), axis=0))
    begin = tl.minimum(begin, limit)
    return begin, clamped(offsets, i + 1, begin, limit)


@triton.jit
def key_range(kv_offsets, segment, exists, key_tokens, PAGED: tl.constexpr):
    """First token and length of key segments; of paged ones, tokens are counted from 0."""
    begin = tl.load(kv_offsets + segment, mask=exists, other=0).to(tl.int64)
    end = tl.load(kv_offsets + segment + 1, mask=exists, other=0).to(tl.int64)
    if PAGED:
        length = tl.minimum(tl.maximum(end - begin, 0), key_tokens)
        begin = begin * 0
    else:
        begin = tl.minimum(tl.maximum(begin, 0), key_tokens)
        length = tl.minimum(tl.maximum(end, begin), key_tokens) - begin
    return begin.to(tl.int32), tl.where(exists, length, 0).to(tl.int32)


@triton.jit(do_not_specialize=["segments", "tokens", "columns", "columns_2", "column_stride_2"])
def uncovered_kernel(
    x, x_2, offsets, segments, tokens, columns, columns_2, stride, column_stride, stride_2, column_stride_2,
    VALUE_2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of x and x_2 that belong to no segment become 0 and VALUE_2. Grid (blocks of tokens)."""
    begin = tl.zeros((), tl.int64) + tokens
    end = tl.zeros((), tl.int64)
    if segments > 0:
        begin, _ = monotone_range(offsets, 0, tokens)
        _, end = monotone_range(offsets, segments - 1, tokens)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    uncovered = ((row < begin) | (row >= end)) & (row < tokens)
    if tl.max(uncovered.to(tl.int32), axis=0) > 0:
        column = tl.arange(0, 128).to(tl.int64)
        for first in range(0, columns, 128):
            at = row[:, None] * stride + (first + column)[None, :] * column_stride
            mask = uncovered[:, None] & (first + column < columns)[None, :]
            tl.store(x + at, tl.zeros((BLOCK, 128), x.dtype.element_ty), mask=mask)
        for first in range(0, columns_2, 128):
            at = row[:, None] * stride_2 + (first + column)[None, :] * column_stride_2
            mask = uncovered[:, None] & (first + column < columns_2)[None, :]
            tl.store(x_2 + at, tl.full((BLOCK, 128), VALUE_2, x_2.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["query_tokens", "key_tokens", "key_segments", "edges", "list_stride", "most"])
def segments_kernel(
    records, lists, edge_targets, q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment, edge_start,
    query_tokens, key_tokens, key_segments, edges, list_stride, most,
    GROUP: tl.constexpr, PAGED: tl.constexpr, TARGET: tl.constexpr, MIN_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid (query segments). TARGET: programs that fill the GPU, of one key/value head."""
    segment = tl.program_id(0)
    q_begin, q_end = monotone_range(q_offsets, segment, query_tokens)
    edge_begin, edge_end = monotone_range(edge_offsets, segment, edges)
    own = tl.load(own_segment + segment).to(tl.int64)
    own_begin, own_len = key_range(kv_offsets, tl.maximum(own, 0), (own >= 0) & (own < key_segments), key_tokens, PAGED)
    count = (edge_end - edge_begin).to(tl.int32)
    at = (edge_begin + segment).to(tl.int64)
    lists += at

    full_tiles = 0
    full_sources = 0
    tail_tiles = 0
    tail_sources = 0
    groups = 0
    keys = tl.zeros((), tl.int64)
    for first in range(0, count, EDGES):
        edge = first + tl.arange(0, EDGES)
        present = edge < count
        source = tl.load(edge_sources + edge_begin + edge, mask=present, other=-1).to(tl.int64)
        exists = (source >= 0) & (source < key_segments)
        source = tl.where(exists, source, 0)
        begin, length = key_range(kv_offsets, source, exists, key_tokens, PAGED)
        full = length // BLOCK_N
        tail = tl.cdiv(length - full * BLOCK_N, BLOCK_T)
        full_until = full_tiles + tl.cumsum(full, axis=0)
        tail_until = tail_tiles + tl.cumsum(tail, axis=0)
        full_index = full_sources + tl.cumsum((full > 0).to(tl.int32), axis=0) - (full > 0).to(tl.int32)
        tail_index = tail_sources + tl.cumsum((tail > 0).to(tl.int32), axis=0) - (tail > 0).to(tl.int32)
        starts = edge == 0
        if edge_start is not None:
            start = tl.load(edge_start + edge_begin + edge, mask=present, other=0).to(tl.int64)
            before = tl.load(edge_start + edge_begin + edge - 1, mask=present & (edge > 0), other=0).to(tl.int64)
            starts = (edge == 0) | (start != before)
        starts = (starts & present).to(tl.int32)
        group = groups + tl.cumsum(starts, axis=0) - 1
        if edge_targets is not None:
            to = edge_targets + (edge_begin + edge) * 2
            tl.store(to, tl.zeros_like(edge) + segment, mask=present)
            tl.store(to + 1, at.to(tl.int32) + group, mask=present)

        tl.store(lists + GROUP_FIRST * list_stride + group, edge, mask=starts > 0)
        tl.store(lists + FULL_BEFORE * list_stride + edge, full_until - full, mask=present)
        tl.store(lists + TAIL_BEFORE * list_stride + edge, tail_until - tail, mask=present)
        tl.store(lists + FULL_INDEX * list_stride + edge, full_index, mask=present)
        tl.store(lists + TAIL_INDEX * list_stride + edge, tail_index, mask=present)
        full_from = full_until - full
        tail_from = tail_until - tail
        tail_key = begin + full * BLOCK_N - tail_from * BLOCK_T
        tl.store(lists + FULL_KEY * list_stride + full_index, begin - full_from * BLOCK_N, mask=full > 0)
        tl.store(lists + FULL_FROM * list_stride + full_index, full_from, mask=full > 0)
        tl.store(lists + FULL_SEGMENT * list_stride + full_index, source.to(tl.int32), mask=full > 0)
        tl.store(lists + FULL_UNTIL * list_stride + full_index, full_until, mask=full > 0)
        tl.store(lists + TAIL_KEY * list_stride + tail_index, tail_key, mask=tail > 0)
        tl.store(lists + TAIL_FROM * list_stride + tail_index, tail_from, mask=tail > 0)
        tl.store(lists + TAIL_SEGMENT * list_stride + tail_index, source.to(tl.int32), mask=tail > 0)
        tl.store(lists + TAIL_UNTIL * list_stride + tail_index, tail_until, mask=tail > 0)
        tl.store(lists + TAIL_END * list_stride + tail_index, begin + length, mask=tail > 0)

        full_tiles += tl.sum(full, axis=0)
        tail_tiles += tl.sum(tail, axis=0)
        full_sources += tl.sum((full > 0).to(tl.int32), axis=0)
        tail_sources += tl.sum((tail > 0).to(tl.int32), axis=0)
        groups += tl.sum(starts, axis=0)
        keys += tl.sum(length.to(tl.int64), axis=0)
    tl.store(lists + GROUP_FIRST * list_stride + groups, count)
    tl.store(lists + FULL_BEFORE * list_stride + count, full_tiles)
    tl.store(lists + TAIL_BEFORE * list_stride + count, tail_tiles)
    tl.store(lists + FULL_INDEX * list_stride + count, full_sources)
    tl.store(lists + TAIL_INDEX * list_stride + count, tail_sources)

    length = (q_end - q_begin).to(tl.int32)
    tiles = tl.cdiv(length * GROUP, BLOCK_M)
    keys = tl.minimum(keys + own_len, 1 << 30).to(tl.int32)
    splits = tl.minimum(tl.minimum(TARGET // tl.maximum(tiles, 1), keys // MIN_SPLIT), most)
    record = records + segment.to(tl.int64) * SEGMENT_FIELDS
    tl.store(record + Q_BEGIN, q_begin.to(tl.int32))
    tl.store(record + Q_LEN, length)
    tl.store(record + LISTS, at.to(tl.int32))
    tl.store(record + GROUPS, groups)
    tl.store(record + OWN_BEGIN, own_begin)
    tl.store(record + OWN_LEN, own_len)
    tl.store(record + OWN_SEGMENT, tl.minimum(tl.maximum(own, 0), tl.maximum(key_segments - 1, 0)).to(tl.int32))
    tl.store(record + FULL_TILES, full_tiles)
    tl.store(record + TAIL_TILES, tail_tiles)
    tl.store(record + COST, keys)
    tl.store(record + TILES, tiles)
    tl.store(record + WANTED_SPLITS, tl.maximum(splits, 1))


@triton.jit(do_not_specialize=["segments", "capacity", "partial_capacity"])
def schedule_kernel(
    items, records, segments, capacity, partial_capacity,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid (segments). items[0] is their number; then pairs (segment, tile * MAX_SPLITS + split) follow."""
    me = tl.program_id(0)
    record = records + me.to(tl.int64) * SEGMENT_FIELDS
    my_cost = tl.load(record + COST) // tl.load(record + WANTED_SPLITS)
    total = 0
    begin = 0
    splits = 1
    partials = tl.zeros((), tl.int64)
    rows_before = tl.zeros((), tl.int64)
    for first in range(0, segments, SEGMENTS):
        other = first + tl.arange(0, SEGMENTS)
        present = other < segments
        theirs = records + other.to(tl.int64) * SEGMENT_FIELDS
        tiles = tl.load(theirs + TILES, mask=present, other=0)
        wanted = tl.load(theirs + WANTED_SPLITS, mask=present, other=1)
        cost = tl.load(theirs + COST, mask=present, other=0) // wanted
        rows = tl.where(wanted > 1, tiles.to(tl.int64) * BLOCK_M * wanted, 0)
        until = rows_before + tl.cumsum(rows, axis=0)
        granted = tl.where(until <= partial_capacity, wanted, 1)
        count = tiles * granted
        earlier = (cost > my_cost) | ((cost == my_cost) & (other < me))
        total += tl.sum(count, axis=0)
        begin += tl.sum(tl.where(earlier, count, 0), axis=0)
        mine = other == me
        splits = tl.maximum(splits, tl.max(tl.where(mine, granted, 1), axis=0))
        partials += tl.sum(tl.where(mine, until - rows, 0), axis=0)
        rows_before += tl.sum(rows, axis=0)
    tl.store(record + SPLITS, splits)
    tl.store(record + PARTIALS, tl.minimum(partials, partial_capacity).to(tl.int32))
    if me == 0:
        tl.store(items, tl.minimum(total, capacity))
    tiles = tl.load(record + TILES)
    for first in range(0, tiles * splits, EDGES):
        i = first + tl.arange(0, EDGES)
        mask = (i < tiles * splits) & (begin + i < capacity)
        at = items + 2 + (begin + i).to(tl.int64) * 2
        tl.store(at, tl.zeros_like(i) + me, mask=mask)
        tl.store(at + 1, (tiles - 1 - i // splits) * MAX_SPLITS + i % splits, mask=mask)


# A key segment's record has these fields besides TILES, COST, WANTED_SPLITS and SPLITS.
KEY_BEGIN = tl.constexpr(4)
KEY_LEN = tl.constexpr(5)
READERS = tl.constexpr(2)  # where its list of readers starts
EDGE_READERS = tl.constexpr(3)
OWN_READERS = tl.constexpr(6)


@triton.jit(do_not_specialize=["key_tokens", "query_segments", "edges"])
def readers_kernel(
    key_records, readers, records, edge_targets, kv_offsets, edge_sources, own_segment, key_tokens, query_segments,
    edges, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Who reads a key segment: pairs (query segment, row of the table of deltas), first by edges, then as their own,
    each in ascending order. Grid (key segments)."""
    segment = tl.program_id(0)
    before = tl.zeros((), tl.int32)
    for first in range(0, edges, SEGMENTS):
        edge = first + tl.arange(0, SEGMENTS)
        source = tl.load(edge_sources + edge, mask=edge < edges, other=-1).to(tl.int64)
        target = tl.load(edge_targets + edge.to(tl.int64) * 2, mask=edge < edges, other=-1)
        before += tl.sum(((source >= 0) & (source < segment) & (target >= 0)).to(tl.int32), axis=0)
    for first in range(0, query_segments, SEGMENTS):
        other = first + tl.arange(0, SEGMENTS)
        own = tl.load(own_segment + other, mask=other < query_segments, other=-1).to(tl.int64)
        before += tl.sum(((own >= 0) & (own < segment)).to(tl.int32), axis=0)
    by_edge = 0
    rows = tl.zeros((), tl.int64)
    readers += before.to(tl.int64) * 2
    for first in range(0, edges, SEGMENTS):
        edge = first + tl.arange(0, SEGMENTS)
        source = tl.load(edge_sources + edge, mask=edge < edges, other=-1).to(tl.int64)
        at = edge_targets + edge.to(tl.int64) * 2
        target = tl.load(at, mask=edge < edges, other=-1)
        mine = (source == segment) & (target >= 0)
        index = by_edge + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(readers + index * 2, target, mask=mine)
        tl.store(readers + index * 2 + 1, tl.load(at + 1, mask=mine, other=0), mask=mine)
        length = tl.load(records + target.to(tl.int64) * SEGMENT_FIELDS + Q_LEN, mask=mine, other=0)
        rows += tl.sum(length.to(tl.int64), axis=0)
        by_edge += tl.sum(mine.to(tl.int32), axis=0)
    count = by_edge
    for first in range(0, query_segments, SEGMENTS):
        other = first + tl.arange(0, SEGMENTS)
        own = tl.load(own_segment + other, mask=other < query_segments, other=-1).to(tl.int64)
        mine = own == segment
        record = records + other.to(tl.int64) * SEGMENT_FIELDS
        index = count + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        delta = tl.load(record + LISTS, mask=mine, other=0) + tl.load(record + GROUPS, mask=mine, other=0)
        tl.store(readers + index * 2, other, mask=mine)
        tl.store(readers + index * 2 + 1, delta, mask=mine)
        rows += tl.sum(tl.load(record + Q_LEN, mask=mine, other=0).to(tl.int64), axis=0)
        count += tl.sum(mine.to(tl.int32), axis=0)
    begin, length = key_range(kv_offsets, segment, True, key_tokens, False)
    record = key_records + segment.to(tl.int64) * SEGMENT_FIELDS
    tl.store(record + KEY_BEGIN, begin)
    tl.store(record + KEY_LEN, length)
    tl.store(record + READERS, before)
    tl.store(record + EDGE_READERS, by_edge)
    tl.store(record + OWN_READERS, count - by_edge)
    tl.store(record + TILES, tl.cdiv(length, BLOCK_K))
    tl.store(record + COST, tl.minimum(rows, 1 << 30).to(tl.int32))
    tl.store(record + WANTED_SPLITS, 1)


class Schedule:
    """The device's work list for query tiles, and what the host knows of it: upper bounds."""

    def __init__(
        self, q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment, edge_start, query_tokens, key_tokens,
        paged, group, kv_heads, value_size, config, backward=False,
    ):  # fmt: skip
        device = q_offsets.device
        self.segments, self.edges = own_segment.shape[0], edge_sources.shape[0]
        self.list_stride = self.edges + self.segments
        target = max(heuristics.TARGET_PROGRAMS // kv_heads, 1)
        rows = query_tokens * group + self.segments * config.block_m
        most = min(target, MAX_SPLITS.value, key_tokens * max(self.segments, 1) // heuristics.MIN_SPLIT)
        most = 1 if backward else most
        tiles = query_tokens * group // config.block_m + min(self.segments, query_tokens)
        self.partial_capacity = 0
        self.capacity = tiles
        if most > 1:
            wanted = min(self.segments * target * config.block_m, rows * most)
            self.partial_capacity = min(wanted, PARTIAL_BYTES // (4 * kv_heads * value_size))
            self.capacity = tiles + self.partial_capacity // config.block_m
        self.records = torch.empty(self.segments, SEGMENT_FIELDS.value, dtype=torch.int32, device=device)
        self.lists = torch.empty(LISTS_COUNT, self.list_stride, dtype=torch.int32, device=device)
        # Edges of no segment have no target. Of interest to the backward pass only.
        self.targets = torch.full((self.edges, 2), -1, dtype=torch.int32, device=device) if backward else None
        self.items = torch.empty(2 + 2 * self.capacity, dtype=torch.int32, device=device)
        segments_kernel[(self.segments,)](
            self.records, self.lists, self.targets, q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment,
            edge_start, query_tokens, key_tokens, kv_offsets.shape[0] - 1, self.edges, self.list_stride, max(most, 1),
            GROUP=group, PAGED=paged, TARGET=target, MIN_SPLIT=heuristics.MIN_SPLIT,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_T=config.block_t, num_warps=4,
        )  # fmt: skip
        schedule_kernel[(self.segments,)](
            self.items, self.records, self.segments, self.capacity, self.partial_capacity,
            BLOCK_M=config.block_m, num_warps=4,
        )  # fmt: skip
