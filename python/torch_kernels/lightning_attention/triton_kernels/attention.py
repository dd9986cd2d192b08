# SPDX-License-Identifier: Apache-2.0
"""Attention over whole sequences, in one pass: a program walks a segment for one query head and a block of values.

Where the heads alone fill a GPU a sequence is one segment. Otherwise the states before each segment are computed first.
"""

import triton
import triton.language as tl

from torch_kernels._triton import architecture, contiguous, on_device

from ..heuristics import SPAN, forward_segments, forward_tile
from .sequences import address, locate, room
from .states import aligned, rows, segment_states, strides
from .walk import walk


@triton.jit(do_not_specialize=[
    "tokens", "sequences", "parts", "segments", "heads",
    "q_batch", "q_token", "q_head", "k_batch", "k_token", "k_head", "v_batch", "v_token", "v_head",
])  # fmt: skip
def attention_kernel(
    out, final, q, k, v, slopes, gates, states, cu_seqlens, scale, tokens, sequences, parts, segments, heads,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    GROUP: tl.constexpr, K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, PARTS: tl.constexpr, V: tl.constexpr,
    SPLIT: tl.constexpr, SPAN: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`states`: before each segment, or None; with one segment that is each sequence's initial state. GROUP query heads
    share a key/value head."""
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    block = tl.program_id(0) % BLOCKS
    head = tl.program_id(0) // BLOCKS % heads
    item = tl.program_id(0) // BLOCKS // heads
    sequence, start, length, begin, end, present = locate(
        cu_seqlens, item, tokens, sequences, parts, segments, SPLIT, SPAN
    )
    if not present:
        return
    batch = sequence if cu_seqlens is None else sequence * 0
    key_head = head // GROUP
    key_heads = heads // GROUP
    q = address(q, batch, start, head, q_batch, q_token, q_head)
    k = address(k, batch, start, key_head, k_batch, k_token, k_head)
    v = address(v, batch, start, key_head, v_batch, v_token, v_head)
    first_row = batch.to(tl.int64) * tokens + start
    out += (first_row * heads + head) * V
    slope = None if slopes is None else tl.load(slopes + key_head)
    if gates is not None:
        gates += first_row * key_heads + key_head
    if states is not None:
        states += (item.to(tl.int64) * key_heads + key_head) * (K * V)
    column = block * BLOCK + tl.arange(0, BLOCK)
    if final is not None:
        final += (sequence.to(tl.int64) * key_heads + key_head) * (K * V)
    walk(
        out, None, q, k, v, None, slope, gates, states, final, None, scale, begin, end, length,
        (head % GROUP == 0) & (end == length),
        heads * V, q_token * 8, k_token * 8, 0, v_token * 8, 0, 0, key_heads, 0, column,
        K, K0, K1, PARTS, V, BLOCK, C, False, 1, False, 1,
    )  # fmt: skip


def _forward(out, final_state, q, k, v, slopes, gates, initial_state, cu_seqlens, scale, output_final_state):
    batch, tokens, heads, size = q.shape
    key_heads, columns = v.shape[2:]
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    if sequences * heads == 0:
        return
    q, k, v = aligned(q), aligned(k), aligned(v)
    slopes, gates, initial = contiguous(slopes, gates, initial_state)
    final = final_state if output_final_state else None
    scale = 1.0 if scale is None else scale
    tile = forward_tile(q.element_size(), size, columns, architecture(q.device), gates is not None)
    segments = forward_segments(heads, columns, tile) if tokens > SPAN else 1
    items, parts = room(cu_seqlens, batch, tokens, segments, SPAN)
    with on_device(q):
        states = initial
        if segments > 1:
            states = segment_states(k, v, slopes, gates, initial, None, cu_seqlens, 1.0, key_heads, segments)
        attention_kernel[(items * heads * triton.cdiv(columns, tile.block),)](
            out, final, q, k, v, slopes, gates, states, cu_seqlens, scale, tokens, sequences, parts, segments, heads,
            *strides(q), *strides(k), *strides(v),
            GROUP=heads // key_heads, **rows(size, q.element_size()), V=columns, SPLIT=segments > 1, SPAN=SPAN,
            C=tile.chunk, BLOCK=tile.block, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


def lightning_attention(
    out, final_state, q, k, v, slopes, initial_state, cu_seqlens, scale, output_final_state
):  # fmt: skip
    _forward(out, final_state, q, k, v, slopes, None, initial_state, cu_seqlens, scale, output_final_state)


def simple_gla(out, final_state, q, k, v, g, initial_state, cu_seqlens, scale, output_final_state):
    _forward(out, final_state, q, k, v, None, g, initial_state, cu_seqlens, scale, output_final_state)
