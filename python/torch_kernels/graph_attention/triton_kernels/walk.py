# SPDX-License-Identifier: Apache-2.0
"""The walk of a tile of queries over the keys it sees: by group of edges, over whole tiles of the group's sources, then
over what remains of these; the own segment comes last. What is where stands in the lists of schedule.py."""

import triton
import triton.language as tl

from .schedule import (
    FULL_TILES,
    GROUP_FIRST,
    GROUPS,
    OWN_BEGIN,
    OWN_LEN,
    OWN_SEGMENT,
    Q_BEGIN,
    Q_LEN,
    TAIL_END,
    TAIL_KEY,
    TAIL_TILES,
)

SOURCES = tl.constexpr(32)  # looked at together, one a lane


@triton.jit
def load_segment(record):
    """What a walk takes from its segment's record."""
    return (
        tl.load(record + Q_BEGIN).to(tl.int64),
        tl.load(record + Q_LEN),
        tl.load(record + GROUPS),
        tl.load(record + OWN_BEGIN),
        tl.load(record + OWN_LEN),
        tl.load(record + OWN_SEGMENT),
        tl.load(record + FULL_TILES),
        tl.load(record + TAIL_TILES),
    )


@triton.jit
def own_keys(tile, q_len, own_len, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a tile of queries: how far its own keys begin before its segment's first token, how many tiles of them all
    rows see, which are taken without a mask, and how many keys its last row sees."""
    ahead = own_len - q_len
    own_first = tl.minimum(tl.maximum(tile * BLOCK_M // GROUP + ahead + 1, 0), own_len)
    last_token = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, q_len - 1)
    own_last = tl.minimum(tl.maximum(last_token + ahead + 1, 0), own_len)
    return ahead, own_first // BLOCK_N, own_last


@triton.jit
def group_range(lists, list_stride, group, groups, BEFORE: tl.constexpr, INDEX: tl.constexpr):
    """Of a group of edges, or of the own segment, which comes last: the tiles of its sources, and these in the list."""
    begin = tl.load(lists + GROUP_FIRST * list_stride + tl.minimum(group, groups))
    end = tl.load(lists + GROUP_FIRST * list_stride + tl.minimum(group + 1, groups))
    return (
        tl.load(lists + BEFORE * list_stride + begin),
        tl.load(lists + BEFORE * list_stride + end),
        tl.load(lists + INDEX * list_stride + begin),
        tl.load(lists + INDEX * list_stride + end),
    )


@triton.jit
def load_sources(lists, list_stride, source, source_end, begin, end, own, FIRST: tl.constexpr):
    """SOURCES sources of the list whose fields begin at FIRST, from `source` on. Returns their fields (key, segment,
    first tile, tile behind the last, and, of the list of tails, where their keys end) and which of the tiles begin ..
    end they have. The own segment's tiles, from `own` on, follow those of the last source."""
    at = lists + FIRST * list_stride + source + tl.arange(0, SOURCES)
    present = source + tl.arange(0, SOURCES) < source_end
    key = tl.load(at, mask=present, other=0)
    segment = tl.load(at + list_stride, mask=present, other=0)
    first = tl.load(at + 2 * list_stride, mask=present, other=0)
    until = tl.load(at + 3 * list_stride, mask=present, other=0)
    key_end = until
    if FIRST == TAIL_KEY:
        key_end = tl.load(lists + TAIL_END * list_stride + source + tl.arange(0, SOURCES), mask=present, other=0)
    # The first source's first tile; the own segment's if there are no sources.
    lowest = tl.where(source < source_end, tl.min(tl.where(present, first, 0x7FFFFFFF), axis=0), own)
    from_ = tl.maximum(begin, lowest)
    to = end
    if source + SOURCES < source_end:
        to = tl.minimum(end, tl.max(until, axis=0))
    return key, segment, first, until, key_end, from_, to


@triton.jit
def pick(values, first, until, tile):
    """The value of the source that has the tile; no loads, no branches: addresses are known well ahead."""
    return tl.sum(tl.where((first <= tile) & (tile < until), values, 0), axis=0)
