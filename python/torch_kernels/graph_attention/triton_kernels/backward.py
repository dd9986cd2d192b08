# SPDX-License-Identifier: Apache-2.0
"""Gradients of Graph-KV attention: of queries by query tile, of keys and values by key tile. Nothing is added up by two
programs."""

import math

import torch
import triton
import triton.language as tl

from torch_kernels._triton import architecture, contiguous, last_stride_one, on_device, power_of_two, rows_nearby
from torch_kernels._triton_jit import LOG2E

from .. import heuristics
from .key_gradient import key_gradient_kernel
from .query_gradient import query_gradient_kernel
from .rotation import tables
from .schedule import SEGMENT_FIELDS, Schedule, readers_kernel, schedule_kernel, uncovered_kernel

DELTA_ROWS = 32


@triton.jit(do_not_specialize=["tokens", "heads"])
def delta_kernel(
    delta, out, grad_out, tokens, heads, out_stride_t, out_stride_h, grad_stride_t, grad_stride_h,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta [Hq, Tq]: products of each row of out with its gradient. Grid (blocks of rows)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row // heads
    head = row % heads
    d = tl.arange(0, BLOCK_DV)
    mask = (token < tokens)[:, None] & (d < DV)[None, :]
    a = tl.load(out + (token * out_stride_t + head * out_stride_h)[:, None] + d[None, :], mask=mask, other=0.0)
    b = tl.load(grad_out + (token * grad_stride_t + head * grad_stride_h)[:, None] + d[None, :], mask=mask, other=0.0)
    total = tl.sum(a.to(tl.float32) * b.to(tl.float32), axis=1)
    tl.store(delta + head * tokens + token, total, mask=token < tokens)


def graph_attention_backward(
    grad_q, grad_k, grad_v, grad_out, q, k, v, out, lse, q_offsets, kv_offsets, edge_offsets, edge_sources,
    own_segment, scale, inv_freq, q_start, edge_start, own_start, interleaved, config=None, key_config=None,
):  # fmt: skip
    tokens, query_heads, size = q.shape
    key_tokens, kv_heads, value_size = v.shape
    group = query_heads // kv_heads
    segments, key_segments = own_segment.shape[0], kv_offsets.shape[0] - 1
    scale = 1.0 / math.sqrt(size) if scale is None else float(scale)
    choice = heuristics.backward_configs(
        size, value_size, q.element_size(), inv_freq is not None, architecture(q.device)
    )
    config, key_config = config or choice[0], key_config or choice[1]
    grad_out, q, k, v, out = last_stride_one(grad_out, q, k, v, out)
    k, v = rows_nearby(k, v)
    q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment = contiguous(
        q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment
    )  # fmt: skip
    lse, inv_freq, q_start, edge_start, own_start = contiguous(lse, inv_freq, q_start, edge_start, own_start)
    device = q.device
    rope = inv_freq is not None
    constants = {
        "GROUP": group, "D": size, "DV": value_size, "ROPE": rope, "INTERLEAVED": interleaved,
        "BLOCK_D": power_of_two(size, 32), "BLOCK_DV": power_of_two(value_size),  # halves of 16 at least
    }  # fmt: skip
    with on_device(q):
        if tokens > 0:
            uncovered_kernel[(triton.cdiv(tokens, 256),)](
                grad_q, grad_q, q_offsets, segments, tokens, query_heads * size, 0, grad_q.stride(0), 1, 0, 0,
                VALUE_2=0.0, BLOCK=256, num_warps=4,
            )  # fmt: skip
        if key_tokens > 0:
            uncovered_kernel[(triton.cdiv(key_tokens, 256),)](
                grad_k, grad_v, kv_offsets, key_segments, key_tokens, kv_heads * size, kv_heads * value_size,
                grad_k.stride(0), 1, grad_v.stride(0), 1, VALUE_2=0.0, BLOCK=256, num_warps=4,
            )  # fmt: skip
        if segments == 0 or tokens == 0 or query_heads == 0:
            grad_k.zero_(), grad_v.zero_()
            return
        plan = Schedule(
            q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment, edge_start, tokens, key_tokens, False,
            group, kv_heads, value_size, config, True,
        )  # fmt: skip
        turns = deltas = turned = None
        if rope:
            turned = torch.empty(plan.capacity * kv_heads, config.block_m, size, dtype=q.dtype, device=device)
            turns, deltas = tables(
                plan.records, plan.lists, inv_freq, q_start, edge_start, own_start, tokens, plan.edges,
                size,
            )  # fmt: skip
        delta = torch.empty(query_heads, tokens, dtype=torch.float32, device=device)
        delta_kernel[(triton.cdiv(tokens * query_heads, DELTA_ROWS),)](
            delta, out, grad_out, tokens, query_heads, *out.stride()[:2], *grad_out.stride()[:2],
            DV=value_size, BLOCK_DV=power_of_two(value_size), ROWS=DELTA_ROWS, num_warps=4,
        )  # fmt: skip
        query_gradient_kernel[(plan.capacity * kv_heads,)](
            grad_q, grad_out, q, k, v, lse, delta, plan.items, plan.records, plan.lists, turns, deltas, turned,
            scale * LOG2E.value, scale, tokens, key_tokens, plan.list_stride, kv_heads,
            *grad_q.stride()[:2], *grad_out.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            **constants, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_T=config.block_t,
            STAGES=config.num_stages, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if key_tokens == 0 or key_segments == 0:
            return
        key_records = torch.empty(key_segments, SEGMENT_FIELDS.value, dtype=torch.int32, device=device)
        readers = torch.empty(plan.edges + segments, 2, dtype=torch.int32, device=device)
        capacity = key_tokens // key_config.block_n + min(key_segments, key_tokens)
        items = torch.empty(2 + 2 * capacity, dtype=torch.int32, device=device)
        readers_kernel[(key_segments,)](
            key_records, readers, plan.records, plan.targets, kv_offsets, edge_sources, own_segment, key_tokens,
            segments, plan.edges, BLOCK_K=key_config.block_n, num_warps=4,
        )  # fmt: skip
        schedule_kernel[(key_segments,)](items, key_records, key_segments, capacity, 0, BLOCK_M=1, num_warps=4)
        for of_keys, of_values in gradients_together(size, value_size):
            key_gradient_kernel[(capacity * kv_heads,)](
                grad_k, grad_v, grad_out, q, k, v, lse, delta, items, key_records, readers, plan.records, turns,
                deltas, scale * LOG2E.value, scale, tokens, kv_heads,
                *grad_k.stride()[:2], *grad_v.stride()[:2], *grad_out.stride()[:2], *q.stride()[:2],
                *k.stride()[:2], *v.stride()[:2], **constants, OF_KEYS=of_keys, OF_VALUES=of_values,
                BLOCK_M=key_config.block_m, BLOCK_K=key_config.block_n, STAGES=key_config.num_stages,
                num_warps=key_config.num_warps, num_stages=key_config.num_stages,
            )  # fmt: skip


def gradients_together(size, value_size):
    """Pairs (of keys, of values): the gradients that a launch computes. Large heads have registers for one of them."""
    both = max(power_of_two(size), power_of_two(value_size)) <= 128
    return [(True, True)] if both else [(True, False), (False, True)]
