# SPDX-License-Identifier: Apache-2.0
"""Gradients of attention over whole sequences.

Three walks, side by side in one launch: a forward one for dq, and two in reverse for dv and dk, which read the same
queries and gradients at the same time. States are computed again.

The gradient of a gate follows from theirs. With r_t = q_t . dq_t - k_t . dk_t, that of the log decay at token t is
the sum of r over all tokens from t on, plus <S, dS> at the end. Each r is a difference of large numbers, so sums run
over an interval of MARK tokens only, at whose end the walks leave S and dS; r comes from float32. Slopes have a walk of
their own: slope_gradient.py.
"""

import torch
import triton
import triton.language as tl

from torch_kernels._triton import architecture, contiguous, on_device

from ..heuristics import MARK, SPAN, backward_segments, backward_tile
from .sequences import address, bounds, find, first_part, locate, room
from .slope_gradient import slope_gradient
from .states import aligned, rows, segment_states, strides
from .walk import walk

EVERY = tl.constexpr(1 << 30)  # segments without a limit


@triton.jit(do_not_specialize=[
    "tokens", "sequences", "parts", "segments", "mark_parts", "heads",
    "q_batch", "q_token", "q_head", "k_batch", "k_token", "k_head", "v_batch", "v_token", "v_head",
    "grad_batch", "grad_token", "grad_head",
])  # fmt: skip
def backward_kernel(
    dq, dk, dv, dots, state_marks, grad_marks, grad_initial, grad, q, k, v, slopes, gates, states, grad_states,
    cu_seqlens, scale, tokens, sequences, parts, segments, mark_parts, heads,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, grad_batch, grad_token, grad_head,
    GROUP: tl.constexpr, K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, PARTS: tl.constexpr,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, V_PARTS: tl.constexpr,
    SPLIT: tl.constexpr, SPAN: tl.constexpr, MARK: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`heads` are those of keys and values, GROUP query heads for each. states, grad_states: before and after each
    segment, or None; with one segment the initial state and the final state's gradient.

    For the gates' gradient, or all None: dots [blocks, query heads, B * T] of q . dq, then [blocks, heads, B * T] of
    k . dk, and marks.
    """
    K_BLOCKS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    V_BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    query_programs = heads * (GROUP * K_BLOCKS)
    programs = query_programs + heads * (K_BLOCKS + V_BLOCKS)
    item = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    sequence, start, length, begin, end, present = locate(
        cu_seqlens, item, tokens, sequences, parts, segments, SPLIT, SPAN
    )
    if not present:
        return
    for_query = program < query_programs
    if for_query:
        block = program % K_BLOCKS
        query_head = program // K_BLOCKS
        head = query_head // GROUP
    else:
        block = (program - query_programs) % (K_BLOCKS + V_BLOCKS)
        head = (program - query_programs) // (K_BLOCKS + V_BLOCKS)
        query_head = head * GROUP

    batch = sequence if cu_seqlens is None else sequence * 0
    q = address(q, batch, start, query_head, q_batch, q_token, q_head)
    grad = address(grad, batch, start, query_head, grad_batch, grad_token, grad_head)
    k = address(k, batch, start, head, k_batch, k_token, k_head)
    v = address(v, batch, start, head, v_batch, v_token, v_head)
    first_row = batch.to(tl.int64) * tokens + start
    rows_in_all = sequences.to(tl.int64) * tokens if cu_seqlens is None else tokens.to(tl.int64)
    slope = None if slopes is None else tl.load(slopes + head)
    if gates is not None:
        gates += first_row * heads + head
    state = (item.to(tl.int64) * heads + head) * (K * V)
    mark = (first_part(cu_seqlens, sequence, start, mark_parts, MARK).to(tl.int64) * heads + head) * (K * V)
    mark_step = heads * (K * V)
    if states is not None:
        states += state
    if grad_states is not None:
        grad_states += state

    if for_query:
        column = block * BLOCK + tl.arange(0, BLOCK)
        marks = None if dots is None else state_marks + mark
        # Query heads of a group have the same states.
        mark_end = tl.where(query_head % GROUP == 0, length, -1)
        walk(
            dq + (first_row * (heads * GROUP) + query_head) * K,
            None if dots is None else dots + (block * (heads * GROUP) + query_head) * rows_in_all + first_row,
            grad, v, k, None if dots is None else q, slope, gates, states, None, marks, scale, begin, end, mark_end,
            False,
            heads * GROUP * K, grad_token * 8, v_token * 8, 0, k_token * 8, 0, q_token * 8, heads, mark_step, column,
            V, V0, V1, V_PARTS, K, BLOCK, C, False, 1, True, MARK,
        )  # fmt: skip
    elif block < V_BLOCKS:
        column = block * BLOCK + tl.arange(0, BLOCK)
        if grad_initial is not None:
            grad_initial += (sequence.to(tl.int64) * heads + head) * (K * V)
        walk(
            dv + (first_row * heads + head) * V, None,
            k, q, grad, None, slope, gates, grad_states, grad_initial,
            None if dots is None else grad_marks + mark, scale, begin, end, length,
            begin == 0,
            heads * V, k_token * 8, q_token * 8, q_head * 8, grad_token * 8, grad_head * 8, 0, heads, mark_step, column,
            K, K0, K1, PARTS, V, BLOCK, C, True, GROUP, False, MARK,
        )  # fmt: skip
    else:
        column = (block - V_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        walk(
            dk + (first_row * heads + head) * K,
            None if dots is None else (
                dots + (K_BLOCKS * GROUP * heads + (block - V_BLOCKS) * heads + head) * rows_in_all + first_row
            ),
            v, grad, q, None if dots is None else k, slope, gates, grad_states, None, None, scale, begin, end, length,
            False,
            heads * K, v_token * 8, grad_token * 8, grad_head * 8, q_token * 8, q_head * 8, k_token * 8, heads, 0,
            column, V, V0, V1, V_PARTS, K, BLOCK, C, True, GROUP, True, MARK,
        )  # fmt: skip


@triton.jit
def _add_unless_reset(value, reset, next_value, next_reset):
    return tl.where(next_reset != 0, next_value, value + next_value), reset | next_reset


@triton.jit(do_not_specialize=["tokens", "sequences", "mark_parts", "heads"])
def decay_gradient_kernel(
    out, dots, state_marks, grad_marks, gates, cu_seqlens, tokens, sequences, mark_parts, heads,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, MARK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out: the gradients of the gates. A program has one interval of one head."""
    head = tl.program_id(0) % heads
    item = tl.program_id(0) // heads
    sequence, part = find(cu_seqlens, item, tokens, sequences, mark_parts, MARK)
    start, stop = bounds(cu_seqlens, sequence, tokens)
    begin = start + part * MARK
    end = tl.minimum(begin + MARK, stop)
    batch = sequence if cu_seqlens is None else sequence * 0
    first_row = batch.to(tl.int64) * tokens
    rows_in_all = sequences.to(tl.int64) * tokens if cu_seqlens is None else tokens.to(tl.int64)

    state = (item.to(tl.int64) * heads + head) * SIZE
    size = tl.where(begin < end, SIZE, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, SIZE, BLOCK):
        element = first + tl.arange(0, BLOCK)
        inside = element < size
        total += tl.load(state_marks + state + element, mask=inside, other=0.0) * tl.load(
            grad_marks + state + element, mask=inside, other=0.0
        )
    at_end = tl.sum(total, axis=0)

    offset = tl.arange(0, MARK)
    row = first_row + begin + offset
    exists = offset < end - begin
    r = tl.zeros((MARK,), tl.float32)
    for block in range(BLOCKS):
        for member in range(GROUP):
            source = dots + (block * (heads * GROUP) + head * GROUP + member) * rows_in_all
            r += tl.load(source + row, mask=exists, other=0.0)
    for block in range(BLOCKS):
        source = dots + (BLOCKS * GROUP * heads + block * heads + head) * rows_in_all
        r -= tl.load(source + row, mask=exists, other=0.0)
    last = offset == end - begin - 1
    gate = gates + row * heads + head
    reset = tl.load(gate, mask=exists, other=0.0) == -float("inf")
    # Nothing that follows a reset depends on a decay before it.
    next_exists = exists & (begin + offset + 1 < stop)
    next_reset = tl.load(gate + heads, mask=next_exists, other=0.0) == -float("inf")
    value = tl.where(last & (next_reset == 0), r + at_end, r)
    sums, _ = tl.associative_scan((value, next_reset.to(tl.int32)), 0, _add_unless_reset, reverse=True)
    tl.store(out + row * heads + head, tl.where(reset, 0.0, sums), mask=exists)


def _backward(
    dq, dk, dv, grad_decay, grad_initial, grad, q, k, v, slopes, gates, grad_final, initial, cu_seqlens, scale,
    decay_gradient,
):  # fmt: skip
    batch, tokens, query_heads, size = q.shape
    heads, columns = v.shape[2:]
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    if sequences * query_heads == 0:
        grad_decay.zero_()
        return
    grad, q, k, v = aligned(grad), aligned(q), aligned(k), aligned(v)
    slopes, gates, grad_final, initial = contiguous(slopes, gates, grad_final, initial)
    grad_initial = None if initial is None else grad_initial
    scale = 1.0 if scale is None else scale
    group, device = query_heads // heads, q.device
    tile = backward_tile(q.element_size(), size, columns, architecture(device), gates is not None)
    segments = backward_segments(heads, size, columns, tile) if tokens > SPAN else 1
    items, parts = room(cu_seqlens, batch, tokens, segments, SPAN)
    key_blocks, value_blocks = triton.cdiv(size, tile.block), triton.cdiv(columns, tile.block)
    marks, mark_parts, dots, state_marks, grad_marks = 0, 0, None, None, None
    if gates is not None and decay_gradient:
        marks, mark_parts = room(cu_seqlens, batch, tokens, EVERY.value, MARK)
        state_marks, grad_marks = torch.empty(2, marks, heads, size, columns, dtype=torch.float32, device=device)
        dots = torch.empty(key_blocks * (query_heads + heads) * batch * tokens, dtype=torch.float32, device=device)
    with on_device(q):
        states, grad_states = initial, grad_final
        if segments > 1:
            states = segment_states(k, v, slopes, gates, initial, None, cu_seqlens, 1.0, heads, segments)
            grad_states = segment_states(
                q, grad, slopes, gates, grad_final, None, cu_seqlens, scale, heads, segments, reverse=True
            )
        low, high, value_parts = (rows(columns, v.element_size())[name] for name in ("K0", "K1", "PARTS"))
        backward_kernel[(items * heads * (group * key_blocks + key_blocks + value_blocks),)](
            dq, dk, dv, dots, state_marks, grad_marks, grad_initial, grad, q, k, v, slopes, gates, states, grad_states,
            cu_seqlens, scale, tokens, sequences, parts, segments, mark_parts, heads,
            *strides(q), *strides(k), *strides(v), *strides(grad),
            GROUP=group, **rows(size, k.element_size()), V=columns, V0=low, V1=high, V_PARTS=value_parts,
            SPLIT=segments > 1, SPAN=SPAN, MARK=MARK, C=tile.chunk,
            BLOCK=tile.block, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if not decay_gradient:
            return
        if gates is None:
            slope_gradient(grad_decay, grad, q, k, v, slopes, initial, grad_final, cu_seqlens, scale)
        else:
            decay_gradient_kernel[(marks * heads,)](
                grad_decay, dots, state_marks, grad_marks, gates, cu_seqlens, tokens, sequences, mark_parts, heads,
                GROUP=group, SIZE=size * columns, BLOCKS=key_blocks, MARK=MARK, BLOCK=1024,
            )  # fmt: skip


def lightning_attention_backward(
    grad_q, grad_k, grad_v, grad_slopes, grad_initial_state,
    grad_out, q, k, v, slopes, grad_final_state, initial_state, cu_seqlens, scale, decay_gradient,
):  # fmt: skip
    _backward(
        grad_q, grad_k, grad_v, grad_slopes, grad_initial_state, grad_out, q, k, v, slopes, None, grad_final_state,
        initial_state, cu_seqlens, scale, decay_gradient,
    )  # fmt: skip


def simple_gla_backward(
    grad_q, grad_k, grad_v, grad_g, grad_initial_state,
    grad_out, q, k, v, g, grad_final_state, initial_state, cu_seqlens, scale, decay_gradient,
):  # fmt: skip
    _backward(
        grad_q, grad_k, grad_v, grad_g, grad_initial_state, grad_out, q, k, v, None, g, grad_final_state,
        initial_state, cu_seqlens, scale, decay_gradient,
    )  # fmt: skip
