# SPDX-License-Identifier: Apache-2.0
"""States without outputs: of segments, so that segments can be walked side by side; of whole sequences; and what a
state gives to a sequence that follows it.
"""

import torch
import triton
import triton.language as tl

from torch_kernels._triton import architecture, on_device
from torch_kernels._triton_jit import LOG2E

from ..heuristics import SPAN, forward_segments, split_rows, states_tile
from .sequences import address, bounds, first_part, locate, room, segment_size
from .walk import expm1, load_row, load_rows, load_state, store_sum, walk

SCAN_BLOCK = 1024


@triton.jit(do_not_specialize=[
    "tokens", "sequences", "parts", "segments", "heads",
    "k_batch", "k_token", "k_head", "v_batch", "v_token", "v_head",
])  # fmt: skip
def segment_states_kernel(
    states, decays, k, v, slopes, gates, cu_seqlens, scale, tokens, sequences, parts, segments, heads,
    k_batch, k_token, k_head, v_batch, v_token, v_head,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, PARTS: tl.constexpr, V: tl.constexpr,
    MEMBERS: tl.constexpr, REVERSE: tl.constexpr, SPLIT: tl.constexpr, SPAN: tl.constexpr,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """states [segments, heads, K, V]: what each segment adds to the state after it (REVERSE: to the gradient before
    it). decays [segments, heads]: the sum of its gates."""
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
    k = address(k, batch, start, head * MEMBERS, k_batch, k_token, k_head)
    v = address(v, batch, start, head * MEMBERS, v_batch, v_token, v_head)
    slope = None if slopes is None else tl.load(slopes + head)
    target = item.to(tl.int64) * heads + head
    if gates is not None:
        gates += (batch.to(tl.int64) * tokens + start) * heads + head
        total = 0.0
        for first in tl.range(begin, end, 128, num_stages=1):
            at = first + tl.arange(0, 128)
            total += tl.sum(tl.load(gates + at.to(tl.int64) * heads, mask=at < end, other=0.0), axis=0)
        if block == 0:
            tl.store(decays + target, total)
    column = block * BLOCK + tl.arange(0, BLOCK)
    walk(
        None, None, None, k, v, None, slope, gates, None, states + target * (K * V), None, scale, begin, end, length,
        True, 0, 0, k_token * 8, k_head * 8, v_token * 8, v_head * 8, 0, heads, 0, column,
        K, K0, K1, PARTS, V, BLOCK, C, REVERSE, MEMBERS, False, 1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "parts", "segments", "heads"])
def scan_kernel(
    states, final, initial, decays, slopes, cu_seqlens, tokens, parts, segments, heads,
    SIZE: tl.constexpr, REVERSE: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turns what each segment adds into the state before it (REVERSE: the gradient after it), in place, and gives the
    state after the last. Grid (sequences * heads, blocks of a state)."""
    head = tl.program_id(0) % heads
    sequence = tl.program_id(0) // heads
    start, stop = bounds(cu_seqlens, sequence, tokens)
    length = stop - start
    size = segment_size(length, segments, SPAN)
    count = tl.maximum(tl.cdiv(length, size), 1)
    item = first_part(cu_seqlens, sequence, start, parts, SPAN)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < SIZE
    state = tl.zeros((BLOCK,), tl.float32)
    target = (sequence.to(tl.int64) * heads + head) * SIZE + element
    if initial is not None:
        state = tl.load(initial + target, mask=inside, other=0.0)
    for step in range(count):
        segment = count - 1 - step if REVERSE else step
        at = (item + segment).to(tl.int64) * heads + head
        if decays is not None:
            log_decay = tl.load(decays + at)
        else:
            log_decay = -tl.load(slopes + head) * (tl.minimum(size, length - segment * size)).to(tl.float32)
            # Of nothing nothing decays, however fast.
            log_decay = tl.where(length > 0, log_decay, 0.0)
        added = tl.load(states + at * SIZE + element, mask=inside, other=0.0)
        tl.store(states + at * SIZE + element, state, mask=inside)
        state = tl.where(log_decay == -float("inf"), added, state + state * expm1(log_decay) + added)
    if final is not None:
        tl.store(final + target, state, mask=inside)


@triton.jit(do_not_specialize=["tokens", "sequences", "parts", "segments", "heads", "q_batch", "q_token", "q_head"])
def apply_state_kernel(
    out, q, state, slopes, cu_seqlens, scale, tokens, sequences, parts, segments, heads, q_batch, q_token, q_head,
    GROUP: tl.constexpr, K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, PARTS: tl.constexpr, V: tl.constexpr,
    SPLIT: tl.constexpr, SPAN: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out_i = scale * exp(-slope * (i + 1)) * q_i S. A program takes one segment."""
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    SIZE: tl.constexpr = K // PARTS
    block = tl.program_id(0) % BLOCKS
    head = tl.program_id(0) // BLOCKS % heads
    item = tl.program_id(0) // BLOCKS // heads
    sequence, start, length, begin, end, present = locate(
        cu_seqlens, item, tokens, sequences, parts, segments, SPLIT, SPAN
    )
    if not present:
        return
    batch = sequence if cu_seqlens is None else sequence * 0
    group_head = head // GROUP
    slope = tl.load(slopes + group_head)
    q = address(q, batch, start, head, q_batch, q_token, q_head)
    out += ((batch.to(tl.int64) * tokens + start) * heads + head) * V
    state += (sequence.to(tl.int64) * (heads // GROUP) + group_head) * (K * V)
    column = block * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, C)
    for part in tl.range(0, PARTS, num_stages=1):
        if PARTS > 1:
            tl.debug_barrier()  # as in a walk
        low, high = load_state(state + part * (SIZE * V), column, SIZE, K0, K1, V, False)
        for step in range(tl.cdiv(end - begin, C)):
            first = begin + step * C
            at = first.to(tl.int64)
            exists = row < end - first
            rows = q + part * SIZE + at * (q_token * 8)
            q0 = load_rows(rows, q_token * 8, row, exists, tl.arange(0, K0), SIZE, K0 > SIZE)
            result = tl.dot(q0, low.to(q0.dtype), input_precision="ieee")
            if K1 > 0:
                q1 = load_rows(rows, q_token * 8, row, exists, K0 + tl.arange(0, K1), SIZE, K0 + K1 > SIZE)
                result = tl.dot(q1, high.to(q1.dtype), result, input_precision="ieee")
            weight = tl.exp2(-slope * LOG2E * (first + row + 1).to(tl.float32)) * scale
            result *= weight[:, None]
            target = out + at * (heads * V) + column
            # As in a walk; an infinite slope is selected, too.
            if tl.sum(tl.sum(tl.abs(result), axis=1), axis=0) < float("inf"):
                store_sum(
                    target[None, :] + row[:, None] * (heads * V), result, exists[:, None] & (column < V)[None, :], part,
                    PARTS > 1,
                )  # fmt: skip
            else:
                for i in tl.range(0, tl.minimum(C, end - first), num_stages=1):
                    line = rows + i * (q_token * 8)
                    exact = tl.sum(load_row(line, tl.arange(0, K0), SIZE)[:, None] * low, axis=0)
                    if K1 > 0:
                        exact += tl.sum(load_row(line, K0 + tl.arange(0, K1), SIZE)[:, None] * high, axis=0)
                    exact *= tl.exp2(-slope * LOG2E * (first + i + 1).to(tl.float32)) * scale
                    exact = tl.where(slope == float("inf"), 0.0, exact)
                    store_sum(target + i * (heads * V), exact, column < V, part, PARTS > 1)


def aligned(x):
    """x, or a copy of it, in rows that begin at multiples of 16 bytes and of eight elements."""
    fits = all(stride % 8 == 0 and stride < 2**23 for stride in x.stride()[1:-1]) and x.stride(0) % 8 == 0
    if x.stride(-1) == 1 and fits and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def strides(x):
    """In the unit of `address`."""
    return tuple(stride // 8 for stride in x.stride()[:-1])


def rows(size: int, element_size: int) -> dict:
    """How a walk divides a state of so many rows."""
    parts, low, high = split_rows(size, element_size)
    return {"K": size, "K0": low, "K1": high, "PARTS": parts}


def segment_states(k, v, slopes, gates, initial, final, cu_seqlens, scale, heads, segments, reverse=False, alone=False):
    """The states before each segment (the gradients after each, if reverse), and that after the last in `final`.

    `alone`: a sequence is one segment, and only `final` is wanted.
    """
    batch, tokens, key_heads, size = k.shape
    columns = v.shape[-1]
    items, parts = room(cu_seqlens, batch, tokens, segments, SPAN)
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    states = final if alone else torch.empty(items, heads, size, columns, dtype=torch.float32, device=k.device)
    decays = None if gates is None else torch.empty(items, heads, dtype=torch.float32, device=k.device)
    tile = states_tile(k.element_size(), size, columns, architecture(k.device))
    segment_states_kernel[(items * heads * triton.cdiv(columns, tile.block),)](
        states, decays, k, v, slopes, gates, cu_seqlens, scale, tokens, sequences, parts, segments, heads,
        *strides(k), *strides(v),
        **rows(size, k.element_size()), V=columns, MEMBERS=key_heads // heads, REVERSE=reverse,
        SPLIT=not alone, SPAN=SPAN, C=tile.chunk, BLOCK=tile.block,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if not alone:
        scan_kernel[(sequences * heads, triton.cdiv(size * columns, SCAN_BLOCK))](
            states, final, initial, decays, slopes, cu_seqlens, tokens, parts, segments, heads,
            SIZE=size * columns, REVERSE=reverse, SPAN=SPAN, BLOCK=SCAN_BLOCK,
        )  # fmt: skip
    return states


def lightning_chunk_state(out, k, v, slopes, cu_seqlens):
    if out.numel() == 0:
        return
    k, v, slopes = aligned(k), aligned(v), slopes.contiguous()
    heads = k.shape[2]
    tile = states_tile(k.element_size(), k.shape[-1], v.shape[-1], architecture(k.device))
    segments = forward_segments(heads, v.shape[-1], tile) if k.shape[1] > SPAN else 1
    with on_device(k):
        segment_states(k, v, slopes, None, None, out, cu_seqlens, 1.0, heads, segments, alone=segments == 1)


def lightning_apply_state(out, q, state, slopes, cu_seqlens, scale):
    if out.numel() == 0:
        return
    q, state, slopes = aligned(q), state.contiguous(), slopes.contiguous()
    batch, tokens, heads, size = q.shape
    columns = out.shape[-1]
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    many = 2**20
    items, parts = room(cu_seqlens, batch, tokens, many, SPAN)
    tile = states_tile(q.element_size(), size, columns, architecture(q.device))
    with on_device(q):
        apply_state_kernel[(items * heads * triton.cdiv(columns, tile.block),)](
            out, q, state, slopes, cu_seqlens, 1.0 if scale is None else scale, tokens, sequences, parts, many, heads,
            *strides(q),
            GROUP=heads // slopes.shape[0], **rows(size, q.element_size()), V=columns, SPLIT=True, SPAN=SPAN,
            C=tile.chunk, BLOCK=tile.block, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
