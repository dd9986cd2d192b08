# SPDX-License-Identifier: Apache-2.0
"""Tree attention, verification and cache updates computed one path at a time, in float64 and plain Python.

Written from the definitions, without a look at the reference: for every node, collect the keys on its way to the root
and attend to them with plain softmax; for every verification, list all paths from the root.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def array(x: Tensor) -> np.ndarray:
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.float8_e4m3fn else x).double().numpy()


def way_up(parents: list[int], node: int) -> list[int]:
    """The node, its parent, ..., its root; nothing for padding."""
    way = []
    while node >= 0 and parents[node] != -2:
        way.append(node)
        node = parents[node]
    return way


def cached(cache: Tensor, block_table: Tensor | None, row: int, slots: list[int]) -> np.ndarray:
    """``[len(slots), Hk, D]`` float64."""
    stored = array(cache if block_table is not None else cache[row])
    if block_table is not None:
        page = cache.shape[1]
        table = block_table[row].tolist()
        return stored[[table[s // page] for s in slots], [s % page for s in slots]]
    return stored[slots]


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix_lens: Tensor,
    parents: Tensor,
    *,
    k_tree: Tensor | None = None,
    v_tree: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, nodes, heads, size = q.shape
    kv_heads, value_size = v_cache.shape[2], v_cache.shape[3]
    out = np.zeros((batch, nodes, heads, value_size))
    lse = np.full((batch, heads, nodes), -np.inf)
    factor = 1 / math.sqrt(size) if scale is None else scale
    sink = None if sinks is None else array(sinks).reshape(kv_heads, -1, 1)
    for b in range(batch):
        prefix, tree = int(prefix_lens[b]), parents[b].tolist()
        keys = row_of(b, prefix, nodes, k_cache, k_tree, k_scale, block_table)
        values = row_of(b, prefix, nodes, v_cache, v_tree, v_scale, block_table)
        for i in range(nodes):
            way = way_up(tree, i)[::-1]
            if not way:
                continue
            # Seen as a plain sequence: the prefix, then the path. A window keeps the last tokens of that sequence.
            sequence = list(range(prefix)) + [prefix + node for node in way]
            sequence = sequence[-window:] if window else sequence
            query = array(q[b, i]).reshape(kv_heads, -1, size)
            score = factor * (query @ keys[sequence].transpose(1, 2, 0))  # [Hk, G, n]
            if softcap:
                score = softcap * np.tanh(score / softcap)
            terms = score if sink is None else np.concatenate([score, sink], axis=2)
            top = terms.max(axis=2, keepdims=True)
            total = top + np.log(np.exp(terms - top).sum(axis=2, keepdims=True))
            lse[b, :, i] = total.reshape(heads)
            out[b, i] = (np.exp(score - total) @ values[sequence].transpose(1, 0, 2)).reshape(heads, value_size)
    return torch.from_numpy(out), torch.from_numpy(lse)


def row_of(
    b: int, prefix: int, nodes: int, cache: Tensor, own: Tensor | None, scale: Tensor | None, block_table: Tensor | None
) -> np.ndarray:
    """Keys or values of one row, prefix first and then all nodes: ``[prefix + T, Hk, D]`` float64."""
    stored = cached(cache, block_table, b, list(range(prefix if own is not None else prefix + nodes)))
    stored = stored if scale is None else stored * array(scale)[:, None]
    return stored if own is None else np.concatenate([stored, array(own[b])])


def plain_formula(
    dtype: torch.dtype,
    backwards: bool,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix_lens: Tensor,
    parents: Tensor,
    *,
    k_tree: Tensor | None = None,
    v_tree: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a PyTorch user would write, computed in ``dtype``; ``backwards`` adds everything up in the reverse order."""
    batch, nodes, heads, size = q.shape
    group = heads // v_cache.shape[2]
    factor = 1 / math.sqrt(size) if scale is None else scale
    out = torch.zeros(batch, nodes, heads, v_cache.shape[3], dtype=dtype)
    lse = torch.full((batch, heads, nodes), -math.inf, dtype=dtype)
    for b in range(batch):
        prefix, tree = int(prefix_lens[b]), parents[b].tolist()
        keys, values = (
            torch.from_numpy(row_of(b, prefix, nodes, cache, own, cache_scale, block_table))
            .to(dtype)
            .repeat_interleave(group, dim=1)
            .transpose(0, 1)
            for cache, own, cache_scale in ((k_cache, k_tree, k_scale), (v_cache, v_tree, v_scale))
        )
        visible = torch.zeros(nodes, prefix + nodes, dtype=torch.bool)
        for i in range(nodes):
            way = way_up(tree, i)[::-1]
            sequence = list(range(prefix)) + [prefix + node for node in way]
            visible[i, sequence[-window:] if way else []] = True
        query = q[b].detach().cpu().to(dtype).transpose(0, 1)
        if backwards:
            keys, values, visible, query = keys.flip(1, 2), values.flip(1), visible.flip(1), query.flip(2)
        scores = (query @ keys.transpose(1, 2)) * factor
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, -math.inf)
        if sinks is not None:
            sink = sinks.detach().cpu().to(dtype)[:, None, None].expand(-1, nodes, 1)
            scores = torch.cat([scores, sink], -1)
            values = torch.cat([values, values.new_zeros(heads, 1, values.shape[-1])], 1)
        out[b] = (scores.softmax(-1) @ values).transpose(0, 1)
        lse[b] = scores.logsumexp(-1)
    return out, lse


def paths(parents: list[int]) -> list[list[int]]:
    """Every way from the root, node 0, down to some node."""
    if not parents or parents[0] != -1:
        return []
    ways = [way_up(parents, node)[::-1] for node in range(len(parents))]
    return [way for way in ways if way and way[0] == 0]


def report(draft: list[int], path: list[int], final: int) -> tuple[list[int], int, list[int]]:
    """(path, num_accepted, tokens) of one row as the ops return them."""
    nodes = len(draft)
    if not path:
        return [-1] * nodes, 0, [-1] * nodes
    tokens = [draft[node] for node in path[1:]] + [final]
    return path + [-1] * (nodes - len(path)), len(path) - 1, tokens + [-1] * (nodes - len(tokens))


def longest(ways: list[list[int]], accepts: object) -> list[int]:
    """The longest path all of whose steps (parent, node) are accepted; the lowest last node among equals."""
    accepted = [way for way in ways if all(accepts(a, b) for a, b in zip(way, way[1:], strict=False))]
    return max(accepted, key=lambda way: (len(way), -way[-1]), default=[])


def verify_greedy(draft: list[int], target: list[int], parents: list[int]) -> tuple[list[int], int, list[int]]:
    way = longest(paths(parents), lambda a, b: draft[b] == target[a])
    return report(draft, way, target[way[-1]] if way else -1)


def typical_margin(probabilities: np.ndarray, token: int, epsilon: float, delta: float) -> float:
    """``p(token) - min(epsilon, delta * exp(-H))`` with Medusa's entropy; relative to the threshold."""
    entropy = -sum(p * math.log(p + 1e-5) for p in probabilities.tolist())
    threshold = min(epsilon, delta * math.exp(-entropy))
    return (probabilities[token] - threshold) / max(threshold, 1e-30)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def verify_sampling(
    draft: list[int],
    target: list[list[float]],
    parents: list[int],
    uniforms: list[float],
    proposals: list[list[float]] | None,
    replacement: bool,
) -> tuple[list[int], np.ndarray, float]:
    """One row: the path, the final token's distribution, and the margin of the closest acceptance."""
    margin = 1.0
    if not parents or parents[0] != -1:
        return [], np.zeros(0), margin
    path = [0]
    while True:
        here = path[-1]
        p = np.array(target[here], dtype=np.float64)
        p /= p.sum()
        q = None if proposals is None else np.array(proposals[here], dtype=np.float64)
        q = q if q is None else q / q.sum()
        for child in [c for c, parent in enumerate(parents) if parent == here]:
            x = draft[child]
            if not 0 <= x < len(p):
                continue
            proposal = np.eye(len(p))[x] if q is None else q
            ratio = p[x] / proposal[x]
            margin = min(margin, abs(ratio - uniforms[child])) if ratio > 0 else margin
            if uniforms[child] < ratio:
                path.append(child)
                break
            p = np.maximum(p - proposal, 0) if q is not None else np.where(np.arange(len(p)) == x, 0, p)
            p /= p.sum()
            if q is not None and not replacement:
                q[x] = 0
                q /= q.sum()
        else:
            return path, p, margin
