# SPDX-License-Identifier: Apache-2.0
"""The meaning of the Graph-KV attention ops, in PyTorch one can read.

Each function has the arguments of the op of the same name, returns fresh outputs and runs on any device: the ground the
other backends are compared with, and the backend of last resort. Sums are accumulated in float32, in float64 for
float64 inputs; angles are formed in float64.

Query segments are computed one by one, so a row's bits depend neither on its neighbours nor on how keys are paged
(reading the offsets synchronises a GPU; the compiled backends do not). And whatever an index tensor holds, nothing
outside a tensor is touched: offsets are clamped, segments and pages that do not exist hold no keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .._numbers import weighted_sum


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding: x ``[T, H, D]``, float32 or float64, as its tokens look at ``positions [T]``."""
    angles = positions.to(torch.float64)[:, None, None] * inv_freq.to(torch.float64)
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    pairs = (a * cosine - b * sine, a * sine + b * cosine)
    return torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)


@dataclass(frozen=True)
class _Source:
    """A key segment as one query segment sees it."""

    rows: tuple[Tensor, ...]  # where its tokens are in k and v
    turn: Tensor | None  # [Lq]: by how many positions queries are rotated for its keys
    visible: Tensor  # [Lq, Lk]


def _range(offsets: list[int], i: int, end: int) -> range:
    begin = min(max(offsets[i], 0), end)
    return range(begin, min(max(offsets[i + 1], begin), end))


def _key_rows(k: Tensor, kv_offsets: list[int], block_table: Tensor | None, segment: int) -> tuple[Tensor, ...]:
    if block_table is None:
        tokens = _range(kv_offsets, segment, k.shape[0])
        return (torch.arange(tokens.start, tokens.stop, device=k.device),)
    page = k.shape[1]
    length = min(max(kv_offsets[segment + 1] - kv_offsets[segment], 0), block_table.shape[1] * page)
    slots = torch.arange(length, device=k.device)
    pages = block_table[segment, slots // page].long()
    exists = (pages >= 0) & (pages < k.shape[0])
    return pages[exists], (slots % page)[exists]


def _segments(
    q: Tensor,
    k: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    edge_offsets: Tensor,
    edge_sources: Tensor,
    own_segment: Tensor,
    block_table: Tensor | None,
    inv_freq: Tensor | None,
    q_start: Tensor | None,
    edge_start: Tensor | None,
    own_start: Tensor | None,
) -> Iterator[tuple[slice, list[_Source]]]:
    """The tokens of each query segment, and what they see."""
    q_ends, kv_ends, edge_ends, sources = (x.tolist() for x in (q_offsets, kv_offsets, edge_offsets, edge_sources))
    for a, own in enumerate(own_segment.tolist()):
        tokens = _range(q_ends, a, q.shape[0])
        place = torch.arange(len(tokens), device=q.device)
        seen = []
        for edge in _range(edge_ends, a, len(sources)):
            if not 0 <= sources[edge] < len(kv_ends) - 1:
                continue
            rows = _key_rows(k, kv_ends, block_table, sources[edge])
            turn = None
            if q_start is not None and edge_start is not None:
                turn = place + (q_start[a].long() - edge_start[edge].long())
            seen.append(_Source(rows, turn, torch.ones(len(place), len(rows[0]), dtype=torch.bool, device=q.device)))
        if 0 <= own < len(kv_ends) - 1:
            rows = _key_rows(k, kv_ends, block_table, own)
            ahead = len(rows[0]) - len(place)  # own keys before the segment's first query
            turn = None
            if q_start is not None:
                turn = place + (ahead if own_start is None else q_start[a].long() - own_start[a].long())
            key = torch.arange(len(rows[0]), device=q.device)
            seen.append(_Source(rows, turn, key <= place[:, None] + ahead))
        yield slice(tokens.start, tokens.stop), seen


def _turned(x: Tensor, turn: Tensor | None, inv_freq: Tensor | None, interleaved: bool) -> Tensor:
    return x if turn is None or inv_freq is None else rotate(x, turn, inv_freq, interleaved)


def _by_query_head(x: Tensor, rows: tuple[Tensor, ...], heads: int, dtype: torch.dtype) -> Tensor:
    """Keys or values ``[Hq, Lk, D]`` of these rows."""
    found = x[rows].to(dtype).contiguous()
    return found.repeat_interleave(heads // max(found.shape[1], 1), 1).transpose(0, 1)


def graph_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    edge_offsets: Tensor,
    edge_sources: Tensor,
    own_segment: Tensor,
    scale: float | None = None,
    block_table: Tensor | None = None,
    inv_freq: Tensor | None = None,
    q_start: Tensor | None = None,
    edge_start: Tensor | None = None,
    own_start: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """One softmax per row over the keys of all source segments and, causally, of the own segment."""
    tokens, heads, size = q.shape
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = 1.0 / math.sqrt(size) if scale is None else scale
    out = q.new_zeros(tokens, heads, v.shape[-1])
    lse = torch.full((heads, tokens), -math.inf, dtype=torch.float32, device=q.device)
    graph = (q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment)
    for place, seen in _segments(q, k, *graph, block_table, inv_freq, q_start, edge_start, own_start):
        if not seen:
            continue
        queries = q[place].to(accumulate).contiguous()
        scores, values = [], []
        for source in seen:
            turned = _turned(queries, source.turn, inv_freq, interleaved).transpose(0, 1)
            keys = _by_query_head(k, source.rows, heads, accumulate)
            scores.append((scale * (turned @ keys.transpose(1, 2))).masked_fill(~source.visible, -math.inf))
            values.append(_by_query_head(v, source.rows, heads, accumulate))
        all_scores, visible = torch.cat(scores, -1), torch.cat([source.visible for source in seen], -1)
        row_lse = torch.logsumexp(all_scores, -1)
        weights = torch.softmax(all_scores, -1).masked_fill(row_lse[..., None] == -math.inf, 0)
        row_out = weighted_sum(weights, visible, torch.cat(values, 1))
        out[place] = row_out.transpose(0, 1).to(q.dtype)
        lse[:, place] = row_lse.to(torch.float32)
    return out, lse


def _product(weights: Tensor, visible: Tensor, values: Tensor) -> Tensor:
    """``weights @ values``, NaN where a value that is seen is not finite."""
    strange = ~values.isfinite()
    hit = visible.to(values.dtype) @ strange.to(values.dtype) > 0
    return (weights @ values.masked_fill(strange, 0)).masked_fill(hit, math.nan)


def graph_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    edge_offsets: Tensor,
    edge_sources: Tensor,
    own_segment: Tensor,
    scale: float | None = None,
    inv_freq: Tensor | None = None,
    q_start: Tensor | None = None,
    edge_start: Tensor | None = None,
    own_start: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """With weights P, ``dV = P^T dO`` and, for ``dS = P (dO V^T - rowsum(dO out))``, ``dQ = dS K``, ``dK = dS^T Q``,
    where Q is rotated for the segment whose keys K are, and dQ rotated back. In float64, lse and out are computed anew,
    because lse is float32."""
    tokens, heads, size = q.shape
    kv_heads = k.shape[1]
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = 1.0 / math.sqrt(size) if scale is None else scale
    grad_q = q.new_zeros(q.shape, dtype=accumulate)
    grad_k, grad_v = k.new_zeros(k.shape, dtype=accumulate), v.new_zeros(v.shape, dtype=accumulate)
    graph = (q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment)

    def of_kv_heads(x: Tensor) -> Tensor:
        """[Hq, Lk, D] summed over the query heads that share a key head: [Lk, Hk, D]."""
        return x.unflatten(0, (kv_heads, heads // kv_heads)).sum(1).transpose(0, 1)

    for place, seen in _segments(q, k, *graph, None, inv_freq, q_start, edge_start, own_start):
        if not seen or place.start == place.stop:
            continue
        queries, grads = (x[place].to(accumulate).contiguous() for x in (q, grad_out))
        grads = grads.transpose(0, 1)
        parts = []
        for source in seen:
            turned = _turned(queries, source.turn, inv_freq, interleaved).transpose(0, 1)
            keys, values = (_by_query_head(x, source.rows, heads, accumulate) for x in (k, v))
            scores = (scale * (turned @ keys.transpose(1, 2))).masked_fill(~source.visible, -math.inf)
            parts.append((source, turned, keys, values, scores))
        row_lse = lse[:, place].to(accumulate)
        delta = (grads * out[place].to(accumulate).transpose(0, 1)).sum(-1, keepdim=True)
        if accumulate == torch.float64:
            all_scores = torch.cat([scores for *_, scores in parts], -1)
            row_lse = torch.logsumexp(all_scores, -1)
        for source, turned, keys, values, scores in parts:
            weights = torch.exp(scores - row_lse[..., None]).masked_fill(~source.visible, 0)
            grad_weights = (grads @ values.transpose(1, 2)).masked_fill(~source.visible, 0)
            grad_scores = (scale * weights * (grad_weights - delta)).masked_fill(~source.visible, 0)
            grad_turned = _product(grad_scores, source.visible, keys).transpose(0, 1)
            back = None if source.turn is None else -source.turn
            grad_q[place] += _turned(grad_turned, back, inv_freq, interleaved)
            seen_by = source.visible.T
            grad_k.index_add_(0, source.rows[0], of_kv_heads(_product(grad_scores.transpose(1, 2), seen_by, turned)))
            grad_v.index_add_(0, source.rows[0], of_kv_heads(_product(weights.transpose(1, 2), seen_by, grads)))
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def rope_shift(k: Tensor, offsets: Tensor, delta: Tensor, inv_freq: Tensor, interleaved: bool = False) -> Tensor:
    """The keys of each segment moved by delta positions; tokens of no segment stay as they are."""
    out = k.clone(memory_format=torch.contiguous_format)
    accumulate = torch.float64 if k.dtype == torch.float64 else torch.float32
    ends = offsets.tolist()
    for segment in range(len(ends) - 1):
        tokens = _range(ends, segment, k.shape[0])
        place = slice(tokens.start, tokens.stop)
        out[place] = rotate(k[place].to(accumulate), delta[segment].expand(len(tokens)), inv_freq, interleaved)
    return out
