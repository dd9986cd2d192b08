# SPDX-License-Identifier: Apache-2.0
"""Writing accepted nodes into the key/value cache, moving them inside it, and joining attention states."""

import torch
import triton
import triton.language as tl

from torch_kernels._triton import contiguous, on_device
from torch_kernels._triton_jit import locate, round_to_even


@triton.jit
def _float8_bits(x):
    """float8_e4m3fn bits of a float32 within +-448, rounded to nearest even. Written out for GPUs without that type."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Keep three mantissa bits and move the exponent's bias from 127 to 7; below 2^-6 the format is a multiple of 2^-9.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    small = round_to_even(tl.abs(x) * 512.0).to(tl.int32)
    code = tl.where(tl.abs(x) < 0.015625, small, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _locate_inside(slot, wanted, block_table, pages, capacity, page_stride, slot_stride, PAGE: tl.constexpr):
    """As `locate`, of slots that may lie outside the sequence's own."""
    inside = wanted & (slot >= 0) & (slot < capacity)
    return locate(slot, inside, block_table, pages, page_stride, slot_stride, PAGE)


@triton.jit
def _path_nodes(path, num_accepted, path_length):
    """Nodes on the accepted path, the root included; 0 for a sequence without a root."""
    count = tl.minimum(tl.load(num_accepted) + 1, path_length).to(tl.int32)
    return tl.where(tl.load(path) >= 0, count, 0)


@triton.jit(do_not_specialize=["path_length", "nodes", "capacity", "pages", "table_stride"])
def tree_commit_kv_kernel(
    cache, tree, prefix_lens, path, num_accepted, block_table, scale, path_length, nodes, capacity, pages,
    table_stride,
    cache_stride_b, cache_stride_s, cache_stride_h, cache_stride_d, tree_stride_b, tree_stride_t, tree_stride_h,
    tree_stride_d,
    SIZE: tl.constexpr, LIMIT: tl.constexpr, PAGE: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the path, heads, batch). LIMIT is the largest value of a quantised cache, 0 for others."""
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    path += batch * path_length
    node = tl.load(path + j, mask=j < _path_nodes(path, num_accepted + batch, path_length), other=-1).to(tl.int64)
    accepted = (node >= 0) & (node < nodes)
    slot = tl.load(prefix_lens + batch).to(tl.int64) + j
    if PAGE > 0:
        block_table += batch * table_stride
    else:
        cache += batch * cache_stride_b
    offset, exists = _locate_inside(
        slot, accepted, block_table, pages, capacity, cache_stride_b, cache_stride_s, PAGE
    )  # fmt: skip

    d = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (d < SIZE)[None, :]
    source = batch * tree_stride_b + node * tree_stride_t + head * tree_stride_h
    x = tl.load(tree + source[:, None] + d[None, :] * tree_stride_d, mask=inside, other=0)
    if scale is not None:
        x = tl.div_rn(x.to(tl.float32), tl.zeros_like(x).to(tl.float32) + tl.load(scale + head))
    if LIMIT > 0:
        x = x.to(tl.float32)
        x = tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))
        if LIMIT == 127:
            x = tl.where(x != x, 0.0, round_to_even(x)).to(tl.int8)
        else:
            x = _float8_bits(x)
    target = offset + head * cache_stride_h
    tl.store(cache + target[:, None] + d[None, :] * cache_stride_d, x.to(cache.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["path_length", "capacity", "pages", "table_stride"])
def tree_compact_kv_kernel(
    cache, prefix_lens, path, num_accepted, block_table, path_length, capacity, pages, table_stride,
    stride_b, stride_s, stride_h, stride_d,
    SIZE: tl.constexpr, PAGE: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the head size, heads, batch): one program makes all moves of its columns.

    A path increases, so path[j] >= j: going up in tiles, nothing is overwritten before it has been read, once a tile
    is read before written.
    """
    batch = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    cache += tl.program_id(1).to(tl.int64) * stride_h + d[None, :] * stride_d
    path += batch * path_length
    if PAGE > 0:
        block_table += batch * table_stride
    else:
        cache += batch * stride_b
    prefix = tl.load(prefix_lens + batch).to(tl.int64)
    count = _path_nodes(path, num_accepted + batch, path_length)
    for first in range(0, count, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        node = tl.load(path + j, mask=j < count, other=-1).to(tl.int64)
        wanted = (node >= 0) & (node < path_length)
        source, has_source = _locate_inside(
            prefix + node, wanted, block_table, pages, capacity, stride_b, stride_s, PAGE
        )  # fmt: skip
        target, has_target = _locate_inside(
            prefix + j, wanted, block_table, pages, capacity, stride_b, stride_s, PAGE
        )  # fmt: skip
        moved = (has_source & has_target)[:, None] & (d < SIZE)[None, :]
        rows = tl.load(cache + source[:, None], mask=moved)
        tl.debug_barrier()
        tl.store(cache + target[:, None], rows, mask=moved)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["rows", "nodes", "heads"])
def merge_attention_states_kernel(
    out, lse, out_a, lse_a, out_b, lse_b, rows, nodes, heads, SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr
):  # fmt: skip
    """One row is one (.., node, head) of contiguous out [.., T, H, SIZE]; its lse is at [.., H, T]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = row < rows
    head = row % heads
    node = row // heads % nodes
    at = (row // heads // nodes * heads + head) * nodes + node
    a = tl.load(lse_a + at, mask=present, other=-float("inf"))
    b = tl.load(lse_b + at, mask=present, other=-float("inf"))
    peak = tl.maximum(a, b)
    total = peak + tl.log(tl.exp(a - peak) + tl.exp(b - peak))
    # Equal infinities would give NaN; a state at -inf leaves the other's lse as it is, to the bit.
    merged = tl.where(b == -float("inf"), a, tl.where(a == -float("inf"), b, total))
    weight_a = tl.exp(a - merged)[:, None]
    weight_b = tl.exp(b - merged)[:, None]

    d = tl.arange(0, BLOCK_D)
    inside = present[:, None] & (d < SIZE)[None, :]
    offset = row[:, None] * SIZE + d[None, :]
    part_a = tl.load(out_a + offset, mask=inside, other=0).to(tl.float32)
    part_b = tl.load(out_b + offset, mask=inside, other=0).to(tl.float32)
    result = tl.where((a == -float("inf"))[:, None], 0.0, weight_a * part_a)
    result += tl.where((b == -float("inf"))[:, None], 0.0, weight_b * part_b)
    tl.store(out + offset, result.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + at, merged, mask=present)


# Largest magnitudes of quantised caches.
LIMITS = {torch.int8: 127, torch.float8_e4m3fn: 448}
# Moving a value needs its size only.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _layout(cache, block_table):
    """(page size or 0, slots a sequence may use, block table, its row length)"""
    if block_table is None:
        return 0, cache.shape[1], None, 0
    return max(cache.shape[1], 1), block_table.shape[1] * cache.shape[1], block_table.contiguous(), block_table.shape[1]


def tree_commit_kv_(k_cache, v_cache, k_tree, v_tree, prefix_lens, path, num_accepted, block_table, k_scale, v_scale):
    batch, length = path.shape
    prefix_lens, path, num_accepted = contiguous(prefix_lens, path, num_accepted)
    for cache, tree, scale in ((k_cache, k_tree, k_scale), (v_cache, v_tree, v_scale)):
        heads, size = cache.shape[2:]
        if batch * length * heads * size * tree.shape[1] == 0:
            continue
        page, capacity, table, table_stride = _layout(cache, block_table)
        scale = None if scale is None else scale.expand(heads).contiguous()
        limit = LIMITS.get(cache.dtype, 0)
        with on_device(cache):
            tree_commit_kv_kernel[(triton.cdiv(length, 8), heads, batch)](
                cache.view(torch.uint8) if limit == 448 else cache, tree, prefix_lens, path, num_accepted, table, scale,
                length, tree.shape[1], capacity, cache.shape[0], table_stride, *cache.stride(), *tree.stride(),
                SIZE=size, LIMIT=limit, PAGE=page, BLOCK_J=8, BLOCK_D=triton.next_power_of_2(size),
            )  # fmt: skip


def tree_compact_kv_(k_cache, v_cache, prefix_lens, path, num_accepted, block_table):
    batch, length = path.shape
    prefix_lens, path, num_accepted = contiguous(prefix_lens, path, num_accepted)
    for cache in (k_cache, v_cache):
        heads, size = cache.shape[2:]
        if batch * length * heads * size == 0:
            continue
        page, capacity, table, table_stride = _layout(cache, block_table)
        block_d = min(triton.next_power_of_2(size), 64)
        with on_device(cache):
            tree_compact_kv_kernel[(triton.cdiv(size, block_d), heads, batch)](
                cache.view(BITS[cache.element_size()]), prefix_lens, path, num_accepted, table,
                length, capacity, cache.shape[0], table_stride, *cache.stride(),
                SIZE=size, PAGE=page, BLOCK_J=16, BLOCK_D=block_d,
            )  # fmt: skip


def merge_attention_states(out, lse, out_a, lse_a, out_b, lse_b):
    nodes, heads, size = out.shape[-3:]
    rows = lse.numel()
    if rows == 0:
        return
    with on_device(out):
        merge_attention_states_kernel[(triton.cdiv(rows, 16),)](
            out, lse, out_a.contiguous(), lse_a.contiguous(), out_b.contiguous(), lse_b.contiguous(), rows, nodes,
            heads,
            SIZE=size, BLOCK_M=16, BLOCK_D=max(triton.next_power_of_2(size), 1),
        )  # fmt: skip
