# SPDX-License-Identifier: Apache-2.0
"""Graph-KV attention as one dense masked softmax over all keys, in float64 and numpy.

Written from the definition, without a look at the reference. Rotary embedding multiplies complex numbers: queries are
rotated by their absolute positions, and every cached key goes on from its place in its segment to the position that the
edge gives it. Nothing is shared between edges, and no difference of positions is formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def rotate(x: np.ndarray, positions: np.ndarray, inv_freq: Tensor, interleaved: bool) -> np.ndarray:
    """[T, H, D] at ``positions [T]``, pairs of channels as complex numbers."""
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = (a + 1j * b) * np.exp(1j * positions[:, None, None] * array(inv_freq))
    if not interleaved:
        return np.concatenate([turned.real, turned.imag], -1)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


@dataclass
class Edge:
    """What a query segment sees of one key segment."""

    queries: np.ndarray  # token numbers
    keys: np.ndarray  # rows of the gathered keys
    q_positions: np.ndarray | None
    start: int  # the position of the first key
    visible: np.ndarray  # [queries, keys]


def flat(x: Tensor, kv_offsets: Tensor, block_table: Tensor | None) -> np.ndarray:
    """All keys or values in the order of their segments ``[.., H, D]``; packed ones with what lies around them."""
    stored = array(x)
    if block_table is None:
        return stored
    lengths, page = kv_offsets.diff().tolist(), x.shape[1]
    places = [(block_table[s, n // page].item(), n % page) for s, length in enumerate(lengths) for n in range(length)]
    return stored[[p for p, _ in places], [n for _, n in places]]


def edges(
    q_offsets: Tensor,
    kv_offsets: Tensor,
    edge_offsets: Tensor,
    edge_sources: Tensor,
    own_segment: Tensor,
    q_start: Tensor | None,
    edge_start: Tensor | None,
    own_start: Tensor | None,
    paged: bool,
) -> list[Edge]:
    q_ends, kv_ends, ends, sources = (x.tolist() for x in (q_offsets, kv_offsets, edge_offsets, edge_sources))
    base = kv_ends[0] if paged else 0
    found = []
    for a, own in enumerate(own_segment.tolist()):
        queries = np.arange(q_ends[a], q_ends[a + 1])
        place = np.arange(len(queries))
        positions = None if q_start is None else q_start[a].item() + place

        def keys_of(segment: int) -> np.ndarray:
            return np.arange(kv_ends[segment] - base, kv_ends[segment + 1] - base)

        for e in range(ends[a], ends[a + 1]):
            keys = keys_of(sources[e])
            start = 0 if edge_start is None else edge_start[e].item()
            found.append(Edge(queries, keys, positions, start, np.ones((len(queries), len(keys)), bool)))
        if own >= 0:
            keys = keys_of(own)
            behind = len(keys) - len(queries)
            if own_start is not None:
                start = own_start[a].item()
            else:
                start = 0 if q_start is None else q_start[a].item() - behind
            found.append(Edge(queries, keys, positions, start, np.arange(len(keys)) <= place[:, None] + behind))
    return found


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    edge_offsets: Tensor,
    edge_sources: Tensor,
    own_segment: Tensor,
    *,
    scale: float | None = None,
    block_table: Tensor | None = None,
    inv_freq: Tensor | None = None,
    q_start: Tensor | None = None,
    edge_start: Tensor | None = None,
    own_start: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    scores, values, queries, _ = dense_scores(
        q, k, v, q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment, scale, block_table, inv_freq, q_start,
        edge_start, own_start, interleaved,
    )  # fmt: skip
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isinf(top), 0, top)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    weights = weights / np.where(total == 0, 1, total)
    seen = np.where(np.isfinite(values), values, 0) if not np.isfinite(values).all() else values
    return torch.from_numpy((weights @ seen).transpose(1, 0, 2).copy()), torch.from_numpy(lse)


def dense_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    edge_offsets: Tensor,
    edge_sources: Tensor,
    own_segment: Tensor,
    scale: float | None,
    block_table: Tensor | None,
    inv_freq: Tensor | None,
    q_start: Tensor | None,
    edge_start: Tensor | None,
    own_start: Tensor | None,
    interleaved: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scores ``[Hq, Tq, Tk]``, -inf where hidden; values ``[Hq, Tk, Dv]``; queries and keys by head."""
    group = q.shape[1] // k.shape[-2]
    keys, values = (flat(x, kv_offsets, block_table).repeat(group, axis=1) for x in (k, v))
    queries = array(q)
    scores = np.full((q.shape[1], len(queries), len(keys)), -np.inf)
    index = (q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment, q_start, edge_start, own_start)
    for edge in edges(*index, block_table is not None):
        a, b = queries[edge.queries], keys[edge.keys]
        if inv_freq is not None:
            a = rotate(a, edge.q_positions, inv_freq, interleaved)
            b = rotate(b, np.full(len(b), edge.start), inv_freq, interleaved)
        block = (1 / math.sqrt(q.shape[2]) if scale is None else scale) * (a.transpose(1, 0, 2) @ b.transpose(1, 2, 0))
        scores[:, edge.queries[:, None], edge.keys] = np.where(edge.visible, block, -np.inf)
    return scores, values.transpose(1, 0, 2), queries, keys


def plain_formula(
    dtype: torch.dtype,
    backwards: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    edge_offsets: Tensor,
    edge_sources: Tensor,
    own_segment: Tensor,
    *,
    scale: float | None = None,
    block_table: Tensor | None = None,
    inv_freq: Tensor | None = None,
    q_start: Tensor | None = None,
    edge_start: Tensor | None = None,
    own_start: Tensor | None = None,
    interleaved: bool = False,
    grad_out: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, ...]:
    """What a PyTorch user would write: queries rotated for each source and rounded to q's dtype (unless ``exact``), all
    else in ``dtype``; ``backwards`` adds everything up in the reverse order. With ``grad_out``: the gradients of q, k
    and v."""
    group = q.shape[1] // k.shape[-2]
    factor = 1 / math.sqrt(q.shape[2]) if scale is None else scale

    def product(a: Tensor, b: Tensor) -> Tensor:
        return a.flip(-1) @ b.flip(-2) if backwards else a @ b

    leaves = [q.detach().cpu().to(dtype)]
    leaves += [torch.from_numpy(flat(x, kv_offsets, block_table)).nan_to_num(0.0).to(dtype) for x in (k, v)]
    leaves = [leaf.requires_grad_(grad_out is not None) for leaf in leaves]
    query, keys, values = leaves[0], *(x.repeat_interleave(group, dim=1) for x in leaves[1:])
    mask = torch.zeros(len(query), len(keys), dtype=torch.bool)
    scores = torch.zeros(q.shape[1], len(query), len(keys), dtype=dtype)
    head = torch.arange(q.shape[1])[:, None, None]
    index = (q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment, q_start, edge_start, own_start)
    for edge in edges(*index, block_table is not None):
        rows, columns = torch.from_numpy(edge.queries), torch.from_numpy(edge.keys)
        turned = query[rows]
        if inv_freq is not None:
            angle = torch.from_numpy(edge.q_positions - edge.start).double()[:, None, None] * inv_freq.cpu().double()
            turned = rotate_plainly(turned, angle, interleaved)
            turned = turned if exact else turned.to(q.dtype).to(dtype)
        block = product(turned.transpose(0, 1), keys[columns].permute(1, 2, 0)) * factor
        scores = scores.index_put((head, rows[:, None], columns), block)
        mask[rows[:, None], columns] = torch.from_numpy(edge.visible)
    scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0)
    out = product(weights, values.transpose(0, 1)).transpose(0, 1)
    if grad_out is None:
        return out, scores.logsumexp(-1)
    grad = grad_out.detach().cpu().to(dtype)
    return torch.autograd.grad(out, leaves, grad, allow_unused=True, materialize_grads=True)


def rotate_plainly(x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cosine, sine = angle.cos().to(wide), angle.sin().to(wide)
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    pairs = (a * cosine - b * sine, a * sine + b * cosine)
    return torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
