# SPDX-License-Identifier: Apache-2.0
"""Attention of tree nodes to the cached prefix and to their ancestors.

The T*G rows that share a key/value head (T nodes, G query heads per key/value head) are packed into tiles of BLOCK_M,
so that each tile of keys is loaded once for all of them. A program handles one such tile and one split of the prefix,
in three steps: prefix tiles every row sees in full, without any mask; prefix tiles at the window's edge and at the
prefix's end; and, in the last split, tree tiles from the last to the first, whose mask comes from walking up the
parents. A second kernel joins the splits.

Scores are kept in base 2: ``exp(x) = exp2(x * log2(e))``. Splits depend on the row's own prefix and on the head
configuration only.
"""

import math

import torch
import triton
import triton.language as tl

from torch_kernels._triton import architecture, contiguous, head_chunk, last_stride_one, on_device, power_of_two
from torch_kernels._triton_jit import (
    LN2,
    LOG2E,
    is_special,
    join_splits,
    load_tile,
    locate,
    softmax_end,
    softmax_step,
)

from ..heuristics import MIN_SPLIT, TARGET_PROGRAMS, attention_config
from .tree import depth_of, mark_ancestors, parent_of

COMBINE_ROWS = 8


@triton.jit
def _tanh(x, EXACT: tl.constexpr):
    """tanh to 1e-7; EXACT keeps the relative error of small arguments, too."""
    result = 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1)
    if EXACT:
        square = x * x
        near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
        result = tl.where(tl.abs(x) < 0.3, near, result)
    return result


@triton.jit
def _decode(x, dtype: tl.constexpr):
    """Cache elements in the queries' dtype. uint8 is the bits of float8_e4m3fn, for GPUs without that type."""
    if x.dtype == tl.uint8:
        bits = ((x & 0x80).to(tl.uint16) << 8) | ((x & 0x7F).to(tl.uint16) << 7)
        value = (bits.to(tl.float16, bitcast=True) * 256.0).to(dtype)
        value = tl.where((x & 0x7F) == 0x7F, float("nan"), value)
    else:
        value = x.to(dtype)
    return value


@triton.jit
def _split_plan(prefix, window, max_splits, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, MIN_KEYS: tl.constexpr):
    """First key that can be visible, rounded down to a tile; keys per split; number of splits."""
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(prefix - window + 1, 0) // BLOCK_N * BLOCK_N
    size = tl.maximum(tl.cdiv(prefix - begin, max_splits), MIN_KEYS)
    size = tl.cdiv(size, BLOCK_N) * BLOCK_N
    return begin, size, tl.maximum(tl.cdiv(prefix - begin, size), 1)


@triton.jit
def _scores(
    q, q_tile, q_offset, q_exists, base, offset, exists,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of the query rows with the keys at base + offset; float32 takes the head size in chunks, to spare
    registers."""
    if CHUNK == BLOCK:
        k = _decode(load_tile(base, offset, exists, SIZE, BLOCK, MASKED), q_tile.dtype)
        scores = tl.dot(q_tile, tl.trans(k), input_precision=PRECISION)
    else:
        scores = tl.zeros((q_offset.shape[0], offset.shape[0]), tl.float32)
        for first in range(0, SIZE, CHUNK):
            d = first + tl.arange(0, CHUNK)
            inside = (d < SIZE)[None, :]
            q_chunk = tl.load(q + q_offset[:, None] + d[None, :], mask=q_exists[:, None] & inside, other=0.0)
            k_chunk = tl.load(base + offset[:, None] + d[None, :], mask=exists[:, None] & inside, other=0.0)
            scores = tl.dot(q_chunk, tl.trans(_decode(k_chunk, q_chunk.dtype)), scores, input_precision=PRECISION)
    return scores


@triton.jit
def _finite(v):
    """v with 0 for NaN and infinities, and whether there were any."""
    special = is_special(v)
    return tl.where(special, 0.0, v).to(v.dtype), tl.max(tl.max(special.to(tl.int32), axis=1), axis=0)


@triton.jit
def _attend(
    scores, v, visible, acc, peak, total, score_scale, softcap,
    MASKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what a tile of keys gives."""
    scores *= score_scale
    if HAS_SOFTCAP:
        scores = softcap * LOG2E * _tanh(scores / softcap, v.dtype == tl.float32)
    if MASKED:
        scores = tl.where(visible, scores, -float("inf"))
    weights, decay, peak, total = softmax_step(scores, peak, total)
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, peak, total


@triton.jit
def _add_special(results, offset, v, seen, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Adds the NaN and infinities of one key's values to the results of the rows that see it."""
    d = tl.arange(0, BLOCK_DV)
    special = is_special(v)
    affected = seen[:, None] & (special & (d < DV))[None, :]
    target = results + offset[:, None] + d[None, :]
    result = tl.load(target, mask=affected, other=0.0).to(tl.float32) + v[None, :]
    tl.store(target, result.to(results.dtype.element_ty), mask=affected)
    tl.debug_barrier()  # another thread may load for the next key what this one has stored


@triton.jit(do_not_specialize=["window", "nodes", "capacity", "pages", "max_splits", "split_capacity", "table_stride"])
def tree_attention_kernel(
    out, lse, partial_out, partial_lse, q, k_cache, v_cache, prefix_lens, parents, k_tree, v_tree, block_table, sinks,
    k_scale, v_scale,
    scale, softcap, window, nodes, capacity, pages, max_splits, split_capacity, table_stride,
    out_stride_b, out_stride_t, out_stride_h, q_stride_b, q_stride_t, q_stride_h,
    k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    kt_stride_b, kt_stride_t, kt_stride_h, vt_stride_b, vt_stride_t, vt_stride_h,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles * splits, key/value heads, batch). PAGE = 0 is a contiguous cache; scales are per head."""
    row_tiles = tl.cdiv(nodes * GROUP, BLOCK_M)
    split = tl.program_id(0) // row_tiles
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    prefix = tl.minimum(tl.maximum(tl.load(prefix_lens + batch), 0), capacity).to(tl.int32)
    begin, size, splits = _split_plan(prefix, window, max_splits, HAS_WINDOW, BLOCK_N, MIN_KEYS)
    if split >= splits:
        return

    parents += batch * nodes
    node = row // GROUP
    query_head = head * GROUP + row % GROUP
    depth = depth_of(parents, tl.where(node < nodes, node, -2))
    deepest = tl.max(depth, axis=0)

    # The prefix keys of this split. If all rows are padding there is nothing to do.
    begin += split * size
    end = tl.where(deepest >= 0, tl.minimum(begin + size, prefix), begin)
    tiles = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N)
    full_begin = 0
    if HAS_WINDOW:
        full_begin = tl.minimum(tl.cdiv(tl.maximum(prefix + deepest - window + 1 - begin, 0), BLOCK_N), tiles)
    full_end = tl.maximum(tl.maximum(end - begin, 0) // BLOCK_N, full_begin)

    q_offset = batch * q_stride_b + node.to(tl.int64) * q_stride_t + query_head * q_stride_h
    q_tile = load_tile(q, q_offset, node < nodes, D, BLOCK_D, True)
    k_cache += head * k_stride_h
    v_cache += head * v_stride_h
    if PAGE > 0:
        block_table += batch * table_stride
    else:
        k_cache += batch * k_stride_b
        v_cache += batch * v_stride_b
    # With a softcap, scores are capped before they are brought to base 2.
    tree_scale = scale if HAS_SOFTCAP else scale * LOG2E
    cache_scale = tree_scale
    if k_scale is not None:
        cache_scale = tree_scale * tl.load(k_scale + head)

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if sinks is not None:  # noqa: SIM102 (known at compile time, unlike the next)
        if split == 0:
            peak = tl.load(sinks + query_head).to(tl.float32) * LOG2E
            total = tl.where(peak == -float("inf"), 0.0, 1.0)
    special = 0
    column = tl.arange(0, BLOCK_N)

    for tile in range(full_begin, full_end):
        slot = begin + tile * BLOCK_N + column
        k_offset, exists = locate(slot, slot < end, block_table, pages, k_stride_b, k_stride_s, PAGE)
        v_offset, exists = locate(slot, slot < end, block_table, pages, v_stride_b, v_stride_s, PAGE)
        scores = _scores(
            q, q_tile, q_offset, node < nodes, k_cache, k_offset, exists, D, BLOCK_D, CHUNK, PAGE > 0, PRECISION
        )
        v = _decode(load_tile(v_cache, v_offset, exists, DV, BLOCK_DV, PAGE > 0), q_tile.dtype)
        acc, peak, total = _attend(
            scores, v, exists[None, :], acc, peak, total, cache_scale, softcap, PAGE > 0, HAS_SOFTCAP, PRECISION
        )

    # The tiles left out: those before full_begin, and the last one when the prefix ends inside it.
    for step in range(tiles - (full_end - full_begin)):
        tile = tl.where(step < full_begin, step, tiles - 1)
        slot = begin + tile * BLOCK_N + column
        k_offset, exists = locate(slot, slot < end, block_table, pages, k_stride_b, k_stride_s, PAGE)
        v_offset, exists = locate(slot, slot < end, block_table, pages, v_stride_b, v_stride_s, PAGE)
        scores = _scores(
            q, q_tile, q_offset, node < nodes, k_cache, k_offset, exists, D, BLOCK_D, CHUNK, True, PRECISION
        )
        v = _decode(load_tile(v_cache, v_offset, exists, DV, BLOCK_DV, True), q_tile.dtype)
        visible = exists[None, :]
        if HAS_WINDOW:
            visible = visible & (prefix + depth[:, None] - slot[None, :] < window)
            v, found = _finite(v)
            special = tl.maximum(special, found)
        acc, peak, total = _attend(
            scores, v, visible, acc, peak, total, cache_scale, softcap, True, HAS_SOFTCAP, PRECISION
        )

    if k_scale is not None:
        value_scale = tl.load(v_scale + head)
        if k_tree is not None:
            acc *= value_scale

    # Tree tiles from the last to the first. One step up is one position back, so the window is a number of steps.
    # Padding rows have seen the prefix as all rows do: they start again from nothing and see no node.
    total = tl.where(depth >= 0, total, 0.0)
    peak = tl.where(depth >= 0, peak, -float("inf"))
    walker = tl.where((depth >= 0) & (split == splits - 1), node, -2)
    reach = tl.zeros_like(node) + nodes
    if HAS_WINDOW:
        reach = tl.zeros_like(node) + tl.minimum(window, nodes)
    tree_tiles = tl.cdiv(tl.max(walker, axis=0) + 1, BLOCK_N)
    for step in tl.range(0, tree_tiles, num_stages=1):
        first = (tree_tiles - 1 - step) * BLOCK_N
        visible, walker, reach = mark_ancestors(parents, walker, reach, first, BLOCK_N)
        key = first + column
        if k_tree is not None:
            exists = key < nodes
            k_base = k_tree + batch * kt_stride_b + head * kt_stride_h
            v_base = v_tree + batch * vt_stride_b + head * vt_stride_h
            k_offset = key.to(tl.int64) * kt_stride_t
            scores = _scores(
                q, q_tile, q_offset, node < nodes, k_base, k_offset, exists, D, BLOCK_D, CHUNK, True, PRECISION
            )
            v = load_tile(v_base, key.to(tl.int64) * vt_stride_t, exists, DV, BLOCK_DV, True)
            score_scale = tree_scale
        else:
            slot = prefix + key
            wanted = (key < nodes) & (slot < capacity)
            k_offset, exists = locate(slot, wanted, block_table, pages, k_stride_b, k_stride_s, PAGE)
            v_offset, exists = locate(slot, wanted, block_table, pages, v_stride_b, v_stride_s, PAGE)
            scores = _scores(
                q, q_tile, q_offset, node < nodes, k_cache, k_offset, exists, D, BLOCK_D, CHUNK, True, PRECISION
            )
            v = load_tile(v_cache, v_offset, exists, DV, BLOCK_DV, True)
            score_scale = cache_scale
        v, found = _finite(_decode(v, q_tile.dtype))
        special = tl.maximum(special, found)
        visible = visible & exists[None, :]
        acc, peak, total = _attend(
            scores, v, visible, acc, peak, total, score_scale, softcap, True, HAS_SOFTCAP, PRECISION
        )

    if k_scale is not None:  # noqa: SIM102 (what is None is known at compile time)
        if k_tree is None:
            acc *= value_scale

    result, row_lse = softmax_end(acc, peak, total)
    # The rows again: computed anew, in other words than above, they occupy no registers during the loops.
    row = (tl.program_id(0) - split * row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    node = row // GROUP
    query_head = head * GROUP + row % GROUP
    d = tl.arange(0, BLOCK_DV)
    if SPLIT:
        at = ((batch * tl.num_programs(1) + head) * split_capacity + split) * nodes * GROUP + row
        tl.store(partial_lse + at, row_lse, mask=node < nodes)
        results = partial_out
        offset = at * DV
    else:
        at = (batch * tl.num_programs(1) * GROUP + query_head) * nodes + node
        tl.store(lse + at, row_lse * LN2, mask=node < nodes)
        results = out
        offset = batch * out_stride_b + node.to(tl.int64) * out_stride_t + query_head * out_stride_h
    inside = (node < nodes)[:, None] & (d < DV)[None, :]
    tl.store(results + offset[:, None] + d[None, :], result.to(results.dtype.element_ty), mask=inside)

    # Rare: add the NaN and infinities that _finite took out, key by key, to the rows that see the key.
    if special > 0:
        tl.debug_barrier()
        depth = depth_of(parents, tl.where(node < nodes, node, -2))
        for tile in range(full_begin):
            for step in range(BLOCK_N):
                slot = begin + tile * BLOCK_N + step + d * 0
                v_offset, exists = locate(slot, slot < end, block_table, pages, v_stride_b, v_stride_s, PAGE)
                v = _decode(tl.load(v_cache + v_offset + d, mask=exists & (d < DV), other=0.0), q_tile.dtype).to(
                    tl.float32
                )
                seen = (depth >= 0) & (prefix + depth - (begin + tile * BLOCK_N + step) < window)
                _add_special(results, offset, v, seen, DV, BLOCK_DV)
        for key in range(tl.where(split == splits - 1, nodes, 0)):
            if k_tree is not None:
                v_base = v_tree + batch * vt_stride_b + head * vt_stride_h
                v = tl.load(v_base + tl.cast(key, tl.int64) * vt_stride_t + d, mask=d < DV, other=0.0).to(tl.float32)
            else:
                slot = prefix + key + d * 0
                v_offset, exists = locate(slot, slot < capacity, block_table, pages, v_stride_b, v_stride_s, PAGE)
                v = _decode(tl.load(v_cache + v_offset + d, mask=exists & (d < DV), other=0.0), q_tile.dtype).to(
                    tl.float32
                )
            walker = tl.where(depth >= 0, node, -2)
            steps = tl.zeros_like(node)
            while tl.max(walker, axis=0) > key:
                steps += (walker > key).to(tl.int32)
                walker = tl.where(walker > key, parent_of(parents, walker), walker)
            seen = walker == key
            if HAS_WINDOW:
                seen = seen & (steps < window)
            _add_special(results, offset, v, seen, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["window", "nodes", "capacity", "max_splits", "split_capacity"])
def combine_kernel(
    out, lse, partial_out, partial_lse, prefix_lens, window, nodes, capacity, max_splits, split_capacity,
    out_stride_b, out_stride_t, out_stride_h,
    GROUP: tl.constexpr, DV: tl.constexpr, HAS_WINDOW: tl.constexpr, MIN_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Joins the splits of BLOCK_M rows. Grid (row tiles, key/value heads, batch)."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    node = row // GROUP
    query_head = head * GROUP + row % GROUP
    prefix = tl.minimum(tl.maximum(tl.load(prefix_lens + batch), 0), capacity).to(tl.int32)
    _, _, splits = _split_plan(prefix, window, max_splits, HAS_WINDOW, BLOCK_N, MIN_KEYS)

    first = (batch * tl.num_programs(1) + head) * split_capacity * nodes * GROUP + row
    present = node < nodes
    result, row_lse = join_splits(
        partial_out, partial_lse, first, nodes * GROUP, splits, present, DV, BLOCK_M, BLOCK_DV
    )  # fmt: skip
    d = tl.arange(0, BLOCK_DV)
    inside = present[:, None] & (d < DV)[None, :]
    offset = batch * out_stride_b + node.to(tl.int64) * out_stride_t + query_head * out_stride_h
    tl.store(out + offset[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + (batch * tl.num_programs(1) * GROUP + query_head) * nodes + node, row_lse * LN2, mask=present)


def has_float8(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9)


def tree_attention(
    out, lse, q, k_cache, v_cache, prefix_lens, parents, k_tree, v_tree, block_table, scale, softcap, window, sinks,
    k_scale, v_scale
):  # fmt: skip
    batch, nodes, query_heads, head_size = q.shape
    kv_heads, value_size = v_cache.shape[2:]
    if out.numel() == 0 and lse.numel() == 0:
        return
    group = query_heads // kv_heads
    paged = block_table is not None
    page = max(k_cache.shape[1], 1) if paged else 0
    capacity = block_table.shape[1] * k_cache.shape[1] if paged else k_cache.shape[1]
    config = attention_config(
        nodes * group, head_size, value_size, q.element_size(), k_scale is not None, softcap > 0, architecture(q.device)
    )

    row_tiles = triton.cdiv(nodes * group, config.block_m)
    max_splits = max(TARGET_PROGRAMS // (kv_heads * row_tiles), 1)
    reachable = min(capacity, window + config.block_n) if window > 0 else capacity
    split_capacity = max(min(max_splits, triton.cdiv(reachable, MIN_SPLIT)), 1)
    partial_out = partial_lse = None
    if split_capacity > 1:
        partial_out = torch.empty(
            batch, kv_heads, split_capacity, nodes * group, value_size, dtype=torch.float32, device=q.device
        )
        partial_lse = torch.empty(batch, kv_heads, split_capacity, nodes * group, dtype=torch.float32, device=q.device)

    q, k_cache, v_cache, k_tree, v_tree = last_stride_one(q, k_cache, v_cache, k_tree, v_tree)
    if k_cache.dtype == torch.float8_e4m3fn and not has_float8(q.device):
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    if k_scale is not None:
        k_scale, v_scale = k_scale.expand(kv_heads).contiguous(), v_scale.expand(kv_heads).contiguous()
    tree_strides = (*k_tree.stride()[:3], *v_tree.stride()[:3]) if k_tree is not None else (0,) * 6
    table, parents, prefix_lens, sinks = contiguous(block_table, parents, prefix_lens, sinks)
    with on_device(q):
        tree_attention_kernel[(row_tiles * split_capacity, kv_heads, batch)](
            out, lse, partial_out, partial_lse, q, k_cache, v_cache, prefix_lens, parents, k_tree, v_tree, table,
            sinks, k_scale, v_scale,
            1.0 / math.sqrt(head_size) if scale is None else float(scale), float(softcap), window, nodes, capacity,
            k_cache.shape[0],
            max_splits, split_capacity, table.shape[1] if paged else 0,
            *out.stride()[:3], *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], *tree_strides,
            GROUP=group, D=head_size, DV=value_size, PAGE=page, HAS_WINDOW=window > 0, HAS_SOFTCAP=softcap > 0,
            SPLIT=split_capacity > 1, PRECISION="ieee", MIN_KEYS=MIN_SPLIT, BLOCK_M=config.block_m,
            BLOCK_N=config.block_n, BLOCK_D=power_of_two(head_size), BLOCK_DV=power_of_two(value_size),
            CHUNK=head_chunk(head_size, q.element_size()), **config.options(),
        )  # fmt: skip
        if split_capacity > 1:
            combine_kernel[(triton.cdiv(nodes * group, COMBINE_ROWS), kv_heads, batch)](
                out, lse, partial_out, partial_lse, prefix_lens, window, nodes, capacity, max_splits, split_capacity,
                *out.stride()[:3],
                GROUP=group, DV=value_size, HAS_WINDOW=window > 0, MIN_KEYS=MIN_SPLIT, BLOCK_M=COMBINE_ROWS,
                BLOCK_N=config.block_n, BLOCK_DV=power_of_two(value_size), num_warps=4,
            )  # fmt: skip
