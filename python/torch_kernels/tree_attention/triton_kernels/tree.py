# SPDX-License-Identifier: Apache-2.0
"""Walks over a tree given by its parents, and the ops that are nothing but a walk.

A walk starts at many nodes at once and follows parents until every one has arrived at -1 (a root) or -2 (padding). A
parent that is not an earlier node counts as padding, so indices strictly decrease: a walk ends and stays inside the
tensor whatever it holds.
"""

import torch
import triton
import triton.language as tl

from torch_kernels._triton import in_batches, on_device


@triton.jit
def parent_of(parents, node):
    """Parents of nodes; entries that have already arrived (below 0) stay as they are."""
    parent = tl.load(parents + node, mask=node >= 0, other=-2)
    parent = tl.where((parent >= -1) & (parent < node), parent, -2).to(tl.int32)
    return tl.where(node >= 0, parent, node)


@triton.jit
def depth_of(parents, node):
    """Depth of each node, 0 for a root, -1 for padding and for entries below 0."""
    depth = tl.zeros_like(node) - 1
    while tl.max(node, axis=0) >= 0:
        depth += (node >= 0).to(tl.int32)
        node = parent_of(parents, node)
    return tl.where(node == -1, depth, -1)


@triton.jit
def mark_ancestors(parents, node, reach, first, BLOCK_N: tl.constexpr):
    """One step of a walk through column tiles from the last to the first: every row moves up until it has left the
    tile.

    ``node`` is where each row stands, ``reach`` how many more nodes it may see, itself included. Ancestors have
    smaller indices, so a row never needs a tile that it has left. Returns which of columns first .. first+BLOCK_N-1
    the rows see, and the moved node and reach.
    """
    columns = first + tl.arange(0, BLOCK_N)
    visible = (node != node)[:, None] & (columns < 0)[None, :]  # nothing yet
    while tl.max(node, axis=0) >= first:
        visible = visible | (node[:, None] == columns[None, :])
        inside = node >= first
        reach = tl.where(inside, reach - 1, reach)
        above = tl.where(reach > 0, parent_of(parents, node), -1)
        node = tl.where(inside, above, node)
    return visible, node, reach


@triton.jit(do_not_specialize=["nodes"])
def tree_mask_kernel(mask, parents, nodes, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    batch = tl.program_id(1).to(tl.int64)
    parents += batch * nodes
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    node = tl.where(rows < nodes, rows, -2)
    node = tl.where(depth_of(parents, node) >= 0, node, -2)
    reach = tl.zeros_like(node) + nodes
    for tile in range(tl.cdiv(nodes, BLOCK_N)):
        first = (tl.cdiv(nodes, BLOCK_N) - 1 - tile) * BLOCK_N
        visible, node, reach = mark_ancestors(parents, node, reach, first, BLOCK_N)
        columns = first + tl.arange(0, BLOCK_N)
        inside = (rows[:, None] < nodes) & (columns[None, :] < nodes)
        target = (batch * nodes + rows[:, None]) * nodes + columns[None, :]
        tl.store(mask + target, visible.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["nodes"])
def tree_positions_kernel(positions, parents, prefix_lens, nodes, BLOCK: tl.constexpr):
    batch = tl.program_id(1).to(tl.int64)
    node = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    depth = depth_of(parents + batch * nodes, tl.where(node < nodes, node, -2))
    position = tl.load(prefix_lens + batch).to(tl.int32) + depth
    tl.store(positions + batch * nodes + node, tl.where(depth >= 0, position, 0), mask=node < nodes)


@in_batches()
def tree_mask(mask, parents):
    batch, nodes = parents.shape
    if batch * nodes:
        with on_device(parents):
            grid = (triton.cdiv(nodes, 16), batch)
            tree_mask_kernel[grid](mask.view(torch.uint8), parents.contiguous(), nodes, BLOCK_M=16, BLOCK_N=64)


@in_batches()
def tree_positions(positions, parents, prefix_lens):
    batch, nodes = parents.shape
    if batch * nodes:
        with on_device(parents):
            grid = (triton.cdiv(nodes, 128), batch)
            tree_positions_kernel[grid](positions, parents.contiguous(), prefix_lens.contiguous(), nodes, BLOCK=128)
