# SPDX-License-Identifier: Apache-2.0
"""The gradient of the slopes: each pair of a query and an earlier key weighs by the distance between them.

    d out_t / d slope = -scale * sum_j (t - j) e^(-slope (t - j)) (q_t . k_j) v_j

Beside the state S, the walk carries A, in which every token is weighed by its age, too. Nothing cancels: the usual sums
over q . dq - k . dk are differences of large numbers, which slopes would multiply by positions.
"""

import torch
import triton
import triton.language as tl

from torch_kernels._triton_jit import LOG2E

from ..heuristics import slope_rows, slope_tile
from .sequences import address, bounds
from .states import strides
from .walk import load_rows

SUM_BLOCK = 256


@triton.jit(do_not_specialize=[
    "tokens", "heads", "q_batch", "q_token", "q_head", "k_batch", "k_token", "k_head", "v_batch", "v_token", "v_head",
    "grad_batch", "grad_token", "grad_head",
])  # fmt: skip
def slope_gradient_kernel(
    partial, grad, q, k, v, slopes, initial, grad_final, cu_seqlens, scale, tokens, heads,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, grad_batch, grad_token, grad_head,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial [sequences * blocks * GROUP, heads], still to be added up. A program walks one sequence of one query head
    for one block of the state: the gradient is a sum over its rows and columns."""
    COLUMN_BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    BLOCKS: tl.constexpr = (K + ROWS - 1) // ROWS * COLUMN_BLOCKS
    query_head = tl.program_id(0) // BLOCKS % (heads * GROUP)
    block = tl.program_id(0) % BLOCKS
    sequence = tl.program_id(0) // BLOCKS // (heads * GROUP)
    head = query_head // GROUP
    member = query_head % GROUP
    start, stop = bounds(cu_seqlens, sequence, tokens)
    length = stop - start
    batch = sequence if cu_seqlens is None else sequence * 0
    q = address(q, batch, start, query_head, q_batch, q_token, q_head)
    grad = address(grad, batch, start, query_head, grad_batch, grad_token, grad_head)
    k = address(k, batch, start, head, k_batch, k_token, k_head)
    v = address(v, batch, start, head, v_batch, v_token, v_head)
    slope = tl.load(slopes + head)
    rate = -LOG2E * slope

    token = tl.arange(0, C)
    channel = block // COLUMN_BLOCKS * ROWS + tl.arange(0, ROWS)
    column = block % COLUMN_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    at_state = (sequence.to(tl.int64) * heads + head) * (K * V) + channel[:, None] * V + column[None, :]
    in_state = (channel < K)[:, None] & (column < V)[None, :]
    state = tl.zeros((ROWS, BLOCK), tl.float32)
    if initial is not None:
        state = tl.load(initial + at_state, mask=in_state, other=0.0)
    aged = tl.zeros((ROWS, BLOCK), tl.float32)
    distance = (token[:, None] - token[None, :]).to(tl.float32)
    pair_weight = tl.where(distance > 0, distance * tl.exp2(rate * tl.maximum(distance, 0.0)), 0.0)
    age = (token + 1).to(tl.float32)
    read_weight = tl.exp2(rate * age)
    total = tl.zeros((C,), tl.float32)

    for step in tl.range(0, tl.cdiv(length, C), num_stages=1):
        first = tl.cast(step * C, tl.int64)
        count = tl.minimum(length - step * C, C)
        exists = token < count
        queries = load_rows(q + first * (q_token * 8), q_token * 8, token, exists, channel, K, True)
        values = load_rows(v + first * (v_token * 8), v_token * 8, token, exists, column, V, True)
        grads = load_rows(grad + first * (grad_token * 8), grad_token * 8, token, exists, column, V, True)
        # Keys lie [channels, tokens], so that no product needs a transposed result.
        at_keys = channel[:, None] + token[None, :] * (k_token * 8)
        in_keys = (channel < K)[:, None] & exists[None, :]
        keys = tl.load(k + first * (k_token * 8) + at_keys, mask=in_keys, other=0.0)
        at_values = column[:, None] + token[None, :] * (v_token * 8)
        in_values = (column < V)[:, None] & exists[None, :]
        turned = tl.load(v + first * (v_token * 8) + at_values, mask=in_values, other=0.0)

        scores = tl.dot(queries, keys, input_precision="ieee")
        products = tl.dot(grads, turned, input_precision="ieee")
        pairs = tl.where(pair_weight > 0, scores * products * pair_weight, 0.0)
        fresh = tl.dot(queries, state.to(queries.dtype), input_precision="ieee")
        old = tl.dot(queries, aged.to(queries.dtype), input_precision="ieee")
        read = tl.sum((fresh * age[:, None] + old) * grads.to(tl.float32), axis=1) * read_weight
        total += tl.sum(pairs, axis=1) + tl.where(exists, read, 0.0)

        left = tl.maximum(count - 1 - token, 0).to(tl.float32)  # tokens that follow in the chunk
        decayed = keys.to(tl.float32) * tl.exp2(rate * left)[None, :]
        span = count.to(tl.float32)
        decay = tl.exp2(rate * span)
        aged = decay * (aged + span * state) + tl.dot(
            (decayed * left[None, :]).to(values.dtype), values, input_precision="ieee"
        )
        state = decay * state + tl.dot(decayed.to(values.dtype), values, input_precision="ieee")

    gradient = -scale * tl.sum(total, axis=0)
    if grad_final is not None:
        final = tl.sum(tl.sum(aged * tl.load(grad_final + at_state, mask=in_state, other=0.0), axis=1), axis=0)
        gradient = tl.where(member == 0, gradient - final, gradient)
    gradient = tl.where(slope == float("inf"), 0.0, gradient)
    tl.store(partial + ((sequence * BLOCKS + block) * GROUP + member).to(tl.int64) * heads + head, gradient)


@triton.jit(do_not_specialize=["items", "heads"])
def sum_kernel(out, partial, items, heads, BLOCK: tl.constexpr):
    """Adds up partial [items, heads]. Grid (heads)."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, items, BLOCK):
        item = first + tl.arange(0, BLOCK)
        at = partial + item.to(tl.int64) * heads + tl.program_id(0)
        total += tl.load(at, mask=item < items, other=0.0).to(tl.float64)
    tl.store(out + tl.program_id(0), tl.sum(total, axis=0).to(tl.float32))


def slope_gradient(out, grad, q, k, v, slopes, initial, grad_final, cu_seqlens, scale):
    batch, tokens, query_heads, size = q.shape
    heads, columns = v.shape[2:]
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    tile = slope_tile(q.element_size(), columns)
    state_rows = slope_rows(size)
    blocks, group = triton.cdiv(size, state_rows) * triton.cdiv(columns, tile.block), query_heads // heads
    partial = torch.empty(sequences * blocks * group, heads, dtype=torch.float32, device=q.device)
    slope_gradient_kernel[(len(partial) * heads,)](
        partial, grad, q, k, v, slopes, initial, grad_final, cu_seqlens, scale, tokens, heads,
        *strides(q), *strides(k), *strides(v), *strides(grad),
        GROUP=group, K=size, V=columns, ROWS=state_rows, C=tile.chunk, BLOCK=tile.block,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    sum_kernel[(heads,)](out, partial, len(partial), heads, BLOCK=SUM_BLOCK)
