# SPDX-License-Identifier: Apache-2.0
"""The gradients of keys and values, by key tile, along the list of query segments that read it."""

import triton
import triton.language as tl

from torch_kernels._triton_jit import LOG2E, is_special, load_tile

from .halves import finite, load_halves, load_turned_halves
from .rotation import pair_columns
from .schedule import (
    EDGE_READERS,
    KEY_BEGIN,
    KEY_LEN,
    MAX_SPLITS,
    OWN_READERS,
    Q_BEGIN,
    Q_LEN,
    READERS,
    SEGMENT_FIELDS,
)


@triton.jit(do_not_specialize=["tokens"])
def key_gradient_kernel(
    grad_k, grad_v, grad_out, q, k, v, lse, delta, items, key_records, readers, records, turns, deltas,
    scale, score_scale, tokens, kv_heads,
    gk_stride_t, gk_stride_h, gv_stride_t, gv_stride_h, go_stride_t, go_stride_h, q_stride_t, q_stride_h,
    k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
    OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (items * key/value heads): a tile of BLOCK_K keys, and all rows that read it, BLOCK_M at a time. Gives the
    gradients of keys, of values, or both."""
    item = tl.program_id(0) // kv_heads
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    if item >= tl.load(items):
        return
    record = key_records + tl.load(items + 2 + item * 2).to(tl.int64) * SEGMENT_FIELDS
    first_key = tl.load(items + 3 + item * 2) // MAX_SPLITS * BLOCK_K
    key_len = tl.load(record + KEY_LEN)
    edge_readers = tl.load(record + EDGE_READERS)
    all_readers = edge_readers + tl.load(record + OWN_READERS)
    readers += tl.load(record + READERS).to(tl.int64) * 2

    key = first_key + tl.arange(0, BLOCK_K)
    present = key < key_len
    position = tl.load(record + KEY_BEGIN).to(tl.int64) + key
    k_a, k_b = load_halves(
        k + head * k_stride_h, position * k_stride_t, present, D, BLOCK_D, INTERLEAVED, True
    )  # fmt: skip
    if OF_KEYS:
        v_tile = load_tile(v + head * v_stride_h, position * v_stride_t, present, DV, BLOCK_DV, True)
        grad_a = tl.zeros((BLOCK_K, BLOCK_D // 2), tl.float32)
        grad_b = tl.zeros((BLOCK_K, BLOCK_D // 2), tl.float32)
    if OF_VALUES:
        value_grad = tl.zeros((BLOCK_K, BLOCK_DV), tl.float32)
    for reader in range(0, all_readers):
        query_record = records + tl.load(readers + reader * 2).to(tl.int64) * SEGMENT_FIELDS
        q_begin = tl.load(query_record + Q_BEGIN).to(tl.int64)
        q_len = tl.load(query_record + Q_LEN)
        here = deltas
        if ROPE:
            here += tl.load(readers + reader * 2 + 1).to(tl.int64) * D
        own = reader >= edge_readers
        ahead = tl.where(own, key_len - q_len, key_len)
        # The first row that sees any key of the tile.
        first_row = tl.maximum(first_key - ahead, 0) * GROUP // BLOCK_M * BLOCK_M
        for row0 in tl.range(first_row, q_len * GROUP, BLOCK_M, num_stages=STAGES):
            row = row0 + tl.arange(0, BLOCK_M)
            token = row // GROUP
            exists = token < q_len
            query_head = head * GROUP + row % GROUP
            at = query_head * tokens + q_begin + token
            q_offset = (q_begin + token) * q_stride_t + query_head * q_stride_h
            go_offset = (q_begin + token) * go_stride_t + query_head * go_stride_h
            q_a, q_b = load_turned_halves(q, q_offset, exists, token, turns, here, D, BLOCK_D, ROPE, INTERLEAVED)
            grad = load_tile(grad_out, go_offset, exists, DV, BLOCK_DV, True)
            row_lse = tl.load(lse + at, mask=exists, other=float("inf")) * LOG2E
            row_lse = tl.where(row_lse == -float("inf"), float("inf"), row_lse)
            scores = tl.dot(k_a, tl.trans(q_a), input_precision="ieee")
            scores = tl.dot(k_b, tl.trans(q_b), scores, input_precision="ieee")
            weights = tl.exp2(scores * scale - row_lse[None, :])
            visible = key[:, None] <= (token + ahead)[None, :]
            if OF_KEYS:
                row_delta = tl.load(delta + at, mask=exists, other=0.0)
                change = tl.dot(v_tile, tl.trans(grad), input_precision="ieee") - row_delta[None, :]
                change = tl.where(visible, weights * change, 0.0).to(q_a.dtype)
                if own:
                    # NaN and infinities of a row must not reach keys that it does not see; those it sees get NaN.
                    q_a = finite(q_a)
                    q_b = finite(q_b)
                grad_a = tl.dot(change, q_a, grad_a, input_precision="ieee")
                grad_b = tl.dot(change, q_b, grad_b, input_precision="ieee")
            if OF_VALUES:
                weights = tl.where(visible, weights, 0.0)
                if own:
                    special = tl.max(is_special(grad).to(tl.int32), axis=1) > 0
                    weights = tl.where(visible & special[None, :], float("nan"), weights)
                    grad = finite(grad)
                value_grad = tl.dot(weights.to(grad.dtype), grad, value_grad, input_precision="ieee")

    # The keys again, loaded anew: they occupy no registers during the loops.
    tl.debug_barrier()
    record = key_records + tl.load(items + 2 + item * 2).to(tl.int64) * SEGMENT_FIELDS
    key = tl.load(items + 3 + item * 2) // MAX_SPLITS * BLOCK_K + tl.arange(0, BLOCK_K)
    present = key < tl.load(record + KEY_LEN)
    position = tl.load(record + KEY_BEGIN).to(tl.int64) + key
    if OF_KEYS:
        pair = tl.arange(0, BLOCK_D // 2)
        first, second = pair_columns(pair, D, INTERLEAVED)
        mask = present[:, None] & (pair < D // 2)[None, :]
        to = grad_k + (position * gk_stride_t + head * gk_stride_h)[:, None]
        tl.store(to + first[None, :], (grad_a * score_scale).to(grad_k.dtype.element_ty), mask=mask)
        tl.store(to + second[None, :], (grad_b * score_scale).to(grad_k.dtype.element_ty), mask=mask)
    if OF_VALUES:
        d = tl.arange(0, BLOCK_DV)
        to = grad_v + (position * gv_stride_t + head * gv_stride_h)[:, None] + d[None, :]
        tl.store(to, value_grad.to(grad_v.dtype.element_ty), mask=present[:, None] & (d < DV)[None, :])
