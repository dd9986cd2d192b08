# SPDX-License-Identifier: Apache-2.0
"""Decoding over a pool of states: one token, a draft tree, and the commit of what was accepted of it.

A program has a slice of one head's state, [K, BLOCK_V], which it reads once.
"""

import torch
import triton
import triton.language as tl

from torch_kernels._triton import architecture, contiguous, on_device, power_of_two

from .walk import expm1

BLOCK_V = 32
BLOCK_M = 16
# Tiles of BLOCK_M query rows that a program multiplies with its slice.
TILES = 4


@triton.jit
def _state_index(state_indices, n, pool):
    """Which state a row has; -1 for padding, and for what is none."""
    index = n
    if state_indices is not None:
        index = tl.load(state_indices + n).to(tl.int64)
    return tl.where((index >= 0) & (index < pool), index, -1)


@triton.jit
def _slice(state, index, head, stride_p, stride_h, stride_k, K: tl.constexpr, V: tl.constexpr,
           BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """Rows, columns, pointers and mask of the program's slice of a state; nothing of one that does not exist."""
    row = tl.arange(0, BLOCK_K)
    column = tl.program_id(0) % tl.cdiv(V, BLOCK_V) * BLOCK_V + tl.arange(0, BLOCK_V)
    pointers = state + index * stride_p + head * stride_h + row[:, None] * stride_k + column[None, :]
    return row, column, pointers, (row < tl.where(index >= 0, K, 0))[:, None] & (column < V)[None, :]


@triton.jit
def _advance(x, k, v, row, column, slope, K: tl.constexpr, V: tl.constexpr):
    """The state after the token with this key and value. An infinite slope forgets by selection."""
    keys = tl.load(k + row, mask=row < K, other=0.0).to(tl.float32)
    values = tl.load(v + column, mask=column < V, other=0.0).to(tl.float32)
    added = keys[:, None] * values[None, :]
    return tl.where(slope == float("inf"), added, x + (expm1(-slope) * x + added))


@triton.jit(do_not_specialize=["pool"])
def step_kernel(
    out, q, k, v, state, slopes, state_indices, scale, pool,
    q_stride_n, q_stride_h, k_stride_n, k_stride_h, v_stride_n, v_stride_h, state_stride_p, state_stride_h,
    state_stride_k,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid (slices, heads, rows)."""
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(2).to(tl.int64)
    index = _state_index(state_indices, n, pool)
    row, column, pointers, inside = _slice(
        state, index, head, state_stride_p, state_stride_h, state_stride_k, K, V, BLOCK_K, BLOCK_V
    )
    x = tl.load(pointers, mask=inside, other=0.0)
    k += n * k_stride_n + head * k_stride_h
    v += n * v_stride_n + head * v_stride_h
    x = _advance(x, k, v, row, column, tl.load(slopes + head), K, V)
    tl.store(pointers, x, mask=inside)
    for i in range(GROUP):
        query_head = head * GROUP + i
        queries = tl.load(q + n * q_stride_n + query_head * q_stride_h + row, mask=row < K, other=0.0).to(tl.float32)
        result = tl.where(index >= 0, scale * tl.sum(queries[:, None] * x, axis=0), 0.0)
        target = out + (n * tl.num_programs(1) * GROUP + query_head) * V + column
        tl.store(target, result.to(out.dtype.element_ty), mask=column < V)


@triton.jit
def _node_at(path, place, places, nodes):
    node = tl.load(path + place, mask=place < places, other=-1)
    return tl.where(node < nodes, node, -1).to(tl.int32)


@triton.jit(do_not_specialize=["pool", "nodes"])
def commit_kernel(
    k, v, state, slopes, path, num_accepted, state_indices, pool, nodes,
    k_stride_n, k_stride_t, k_stride_h, v_stride_n, v_stride_t, v_stride_h, state_stride_p, state_stride_h,
    state_stride_k,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Grid (slices, heads, rows)."""
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(2).to(tl.int64)
    index = _state_index(state_indices, n, pool)
    row, column, pointers, inside = _slice(
        state, index, head, state_stride_p, state_stride_h, state_stride_k, K, V, BLOCK_K, BLOCK_V
    )
    path += n * nodes
    last = tl.minimum(tl.maximum(tl.load(num_accepted + n), -1), nodes - 1).to(tl.int32)
    places = tl.where(index >= 0, last + 1, 0)
    place = 0
    node = _node_at(path, place, places, nodes)
    if node >= 0:
        x = tl.load(pointers, mask=inside, other=0.0)
        slope = tl.load(slopes + head)
        k += n * k_stride_n + head * k_stride_h
        v += n * v_stride_n + head * v_stride_h
        while node >= 0:
            at = node.to(tl.int64)
            x = _advance(x, k + at * k_stride_t, v + at * v_stride_t, row, column, slope, K, V)
            place += 1
            node = _node_at(path, place, places, nodes)
        tl.store(pointers, x, mask=inside)


@triton.jit(do_not_specialize=["pool", "nodes", "blocks"])
def verify_kernel(
    out, q, k, v, state, slopes, parents, state_indices, scale, pool, nodes,
    q_stride_n, q_stride_t, q_stride_h, k_stride_n, k_stride_t, k_stride_h, v_stride_n, v_stride_t, v_stride_h,
    state_stride_p, state_stride_h, state_stride_k,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, TILES: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks * slices, heads, rows of the batch). Row r of a head is query head r % GROUP of node r // GROUP.

    All rows of a tile walk up the tree together, so the step they are at is how far the nodes are that they meet.
    """
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(2).to(tl.int64)
    index = _state_index(state_indices, n, pool)
    column = tl.program_id(0) % tl.cdiv(V, BLOCK_V) * BLOCK_V + tl.arange(0, BLOCK_V)
    state += index * state_stride_p + head * state_stride_h + column[None, :]
    state_rows = tl.where(index >= 0, K, 0)  # nothing of a state that does not exist
    slope = tl.load(slopes + head)
    forget = slope == float("inf")
    k += n * k_stride_n + head * k_stride_h
    v += n * v_stride_n + head * v_stride_h
    key_columns = tl.arange(0, BLOCK_K)[None, :]
    value_columns = column[None, :]
    first = tl.program_id(0) // tl.cdiv(V, BLOCK_V) * TILES
    for tile in range(first, tl.minimum(first + TILES, tl.cdiv(nodes * GROUP, BLOCK_M))):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        start = row // GROUP
        exists = start < nodes
        query_head = head * GROUP + row % GROUP
        q_offset = n * q_stride_n + start.to(tl.int64) * q_stride_t + query_head * q_stride_h
        present = exists[:, None] & (key_columns < K)
        queries = tl.load(q + q_offset[:, None] + key_columns, mask=present, other=0.0).to(tl.float32)
        of_state = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for chunk in range(0, K, CHUNK):
            part = chunk + tl.arange(0, CHUNK)
            some = tl.load(q + q_offset[:, None] + part[None, :], mask=exists[:, None] & (part < K)[None, :], other=0.0)
            inside = (part < state_rows)[:, None] & (value_columns < V)
            x = tl.load(state + part[:, None] * state_stride_k, mask=inside, other=0.0)
            of_state = tl.dot(some.to(tl.float32), x, of_state, input_precision=PRECISION)

        of_tree = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        depth = tl.zeros_like(start)
        node = tl.where(start < tl.where(index >= 0, nodes, 0), start, -2)
        step = 0
        while tl.max(node, axis=0) >= 0:
            walks = node >= 0
            at = node.to(tl.int64)[:, None]
            keys = tl.load(k + at * k_stride_t + key_columns, mask=walks[:, None] & (key_columns < K), other=0.0)
            values = tl.load(v + at * v_stride_t + value_columns, mask=walks[:, None] & (value_columns < V), other=0.0)
            score = tl.sum(queries * keys.to(tl.float32), axis=1)
            faded = tl.where(step == 0, 1.0, tl.exp(-slope * step))
            sees = walks & ((step == 0) | (slope != float("inf")))
            of_tree += tl.where(sees[:, None], (score * faded)[:, None] * values.to(tl.float32), 0.0)
            depth = tl.where(walks, step, depth)
            parent = node - 1
            if parents is not None:
                parent = tl.load(parents + n * nodes + node, mask=walks, other=-2)
                parent = tl.where((parent >= -1) & (parent < node), parent, -2).to(tl.int32)
            node = tl.where(walks, parent, node)
            step += 1

        # A walk that did not end at a root began at padding, or below it.
        faded = tl.exp(-slope * (depth + 1).to(tl.float32))
        result = of_tree + tl.where(forget, 0.0, faded[:, None] * of_state)
        result = tl.where((node == -1)[:, None], scale * result, 0.0)
        offset = ((n * nodes + start) * tl.num_programs(1) * GROUP + query_head) * V
        target = out + offset[:, None] + value_columns
        tl.store(target, result.to(out.dtype.element_ty), mask=exists[:, None] & (value_columns < V))


def blocks(key_size, value_size):
    return {"K": key_size, "V": value_size, "BLOCK_K": power_of_two(key_size), "BLOCK_V": BLOCK_V}


def lightning_attention_step_(out, q, k, v, state, slopes, state_indices, scale):
    rows, query_heads = q.shape[:2]
    pool, heads, key_size, value_size = state.shape
    if out.numel() == 0:
        return
    slopes, state_indices = contiguous(slopes, state_indices)
    with on_device(q):
        step_kernel[(triton.cdiv(value_size, BLOCK_V), heads, rows)](
            out, q, k, v, state, slopes, state_indices, 1.0 if scale is None else float(scale), pool,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *state.stride()[:3],
            GROUP=query_heads // heads, **blocks(key_size, value_size),
        )  # fmt: skip


def lightning_attention_commit_(k, v, state, slopes, path, num_accepted, state_indices):
    rows, nodes = path.shape
    pool, heads, key_size, value_size = state.shape
    if rows * nodes == 0:
        return
    slopes, path, num_accepted, state_indices = contiguous(slopes, path, num_accepted, state_indices)
    with on_device(k):
        commit_kernel[(triton.cdiv(value_size, BLOCK_V), heads, rows)](
            k, v, state, slopes, path, num_accepted, state_indices, pool, nodes,
            *k.stride()[:3], *v.stride()[:3], *state.stride()[:3], **blocks(key_size, value_size),
        )  # fmt: skip


def lightning_attention_verify(out, q, k, v, state, slopes, parents, state_indices, scale):
    rows, nodes, query_heads = q.shape[:3]
    pool, heads, key_size, value_size = state.shape
    if out.numel() == 0:
        return
    group = query_heads // heads
    slopes, parents, state_indices = contiguous(slopes, parents, state_indices)
    row_blocks = triton.cdiv(nodes * group, BLOCK_M * TILES)
    with on_device(q):
        verify_kernel[(row_blocks * triton.cdiv(value_size, BLOCK_V), heads, rows)](
            out, q, k, v, state, slopes, parents, state_indices, 1.0 if scale is None else float(scale), pool, nodes,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *state.stride()[:3],
            GROUP=group, **blocks(key_size, value_size), **verify_tiles(q.dtype, key_size, architecture(q.device)),
        )  # fmt: skip


def verify_tiles(dtype, key_size, arch):
    """Products of float32 queries run on the ordinary cores, where registers bound the part of a row that a product
    takes. Those of 16 bits with float32 states take three products on tensor cores."""
    full = dtype == torch.float32
    chunk = min(power_of_two(key_size), 32 if full else 128)
    precision = "ieee" if full or arch == "gfx942" else "tf32x3"
    return {"BLOCK_M": BLOCK_M, "TILES": TILES, "CHUNK": chunk, "PRECISION": precision}
