# SPDX-License-Identifier: Apache-2.0
"""The meaning of the tree attention ops, in PyTorch one can read.

Each function has the arguments of the op of the same name, returns fresh outputs (ops ending in ``_`` write into
their caches) and runs on any device: the ground the other backends are compared with, and the backend of last resort.
Softmax and sums are accumulated in float32, in float64 for float64 inputs; the verify ops decide in float64.

Two promises shape the code. Rows of a batch are computed one by one from their own lengths, so a row's bits depend
neither on its neighbours nor on how the cache is paged (reading the lengths synchronises a GPU; the compiled backends
do not). And whatever an index tensor holds, nothing outside a tensor is touched: an impossible parent makes a padding
node, an impossible slot holds no key.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._numbers import weighted_sum

QUANTISED_LIMIT = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def tree_mask(parents: Tensor) -> Tensor:
    """Ancestor matrix ``M[b, i, j]`` = j is i or an ancestor of i, from the recurrence ``M[i] = M[parent[i]] | {i}``.

    Rows and columns of padding nodes are false; a node whose parent is padding or out of range is padding too.
    """
    batch, nodes = parents.shape
    rows = torch.arange(batch, device=parents.device)
    mask = torch.zeros(batch, nodes, nodes, dtype=torch.bool, device=parents.device)
    for i in range(nodes):
        parent = parents[:, i]
        has_parent = (parent >= 0) & (parent < i)
        mask[:, i] = mask[rows, parent.clamp(0, nodes - 1).long()] & has_parent[:, None]
        mask[:, i, i] = (parent == -1) | mask[:, i].any(-1)
    return mask


def tree_positions(parents: Tensor, prefix_lens: Tensor) -> Tensor:
    """Sequence position ``prefix_lens[b] + depth[i]`` of each node, int32; 0 for padding. Siblings share a position."""
    seen = tree_mask(parents).sum(-1, dtype=torch.int32)
    return torch.where(seen > 0, prefix_lens[:, None].to(torch.int32) + seen - 1, 0)


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix_lens: Tensor,
    parents: Tensor,
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
    """Attention of T tree nodes to the prefix in the cache and to their own ancestors.

    With scores ``s_k = cap(scale * <q_i, k_k>)`` and ``cap(x) = softcap * tanh(x / softcap)``:
    ``lse_i = ln(sum_k exp(s_k) + exp(sink))`` and ``out_i = sum_k exp(s_k - lse_i) v_k``.
    """
    batch, nodes, query_heads, head_size = q.shape
    kv_heads, value_size = v_cache.shape[2:]
    group = query_heads // kv_heads if kv_heads else 1
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = 1.0 / math.sqrt(head_size) if scale is None else scale

    ancestors = tree_mask(parents)
    depth = ancestors.sum(-1) - 1
    out = q.new_zeros(batch, nodes, query_heads, value_size)
    lse = torch.full((batch, query_heads, nodes), -math.inf, dtype=torch.float32, device=q.device)

    for b, prefix in enumerate(prefix_lens.tolist()):
        prefix = min(max(prefix, 0), _capacity(k_cache, block_table))
        slots = torch.arange(prefix if k_tree is not None else prefix + nodes, device=q.device)
        first, second, exists = _locate(k_cache, block_table, torch.full_like(slots, b), slots)
        keys = _dequantise(k_cache[first, second], k_scale, accumulate)  # [N, Hk, D]
        values = _dequantise(v_cache[first, second], v_scale, accumulate)
        if k_tree is not None and v_tree is not None:
            keys = torch.cat([keys, k_tree[b].to(accumulate)])
            values = torch.cat([values, v_tree[b].to(accumulate)])
            exists = torch.cat([exists, exists.new_ones(nodes)])

        # Which keys a node sees: the whole prefix and its ancestors, as far as the window reaches back in positions.
        is_node = depth[b] >= 0
        in_prefix = is_node[:, None].expand(nodes, prefix)
        visible = torch.cat([in_prefix, ancestors[b]], dim=1) & exists
        if window > 0:
            position = torch.cat([torch.arange(prefix, device=q.device), prefix + depth[b]])
            visible &= position[prefix:, None] - position < window

        # All query heads of a key head side by side: [Hk, G*T, N].
        queries = q[b].to(accumulate).reshape(nodes, kv_heads, group, head_size).permute(1, 2, 0, 3)
        scores = scale * (queries.reshape(kv_heads, group * nodes, head_size) @ keys.permute(1, 2, 0))
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible.repeat(group, 1), -math.inf)

        # A sink is one more key, without a value; without sinks its score is -inf.
        sink = scores.new_full((query_heads,), -math.inf) if sinks is None else sinks.to(accumulate)
        sink = sink[:, None].expand(-1, nodes).masked_fill(~is_node, -math.inf)
        scores = torch.cat([scores, sink.reshape(kv_heads, group * nodes, 1)], dim=-1)
        row_lse = torch.logsumexp(scores, dim=-1, keepdim=True)
        weights = torch.softmax(scores, dim=-1).masked_fill(row_lse == -math.inf, 0)[..., :-1]

        row_out = weighted_sum(weights, visible.repeat(group, 1), values.transpose(0, 1))
        row_out = row_out.reshape(query_heads, nodes, value_size)
        out[b] = row_out.transpose(0, 1).to(q.dtype)
        lse[b] = row_lse.reshape(query_heads, nodes).to(torch.float32)
    return out, lse


def _capacity(cache: Tensor, block_table: Tensor | None) -> int:
    return cache.shape[1] if block_table is None else block_table.shape[1] * cache.shape[1]


def _locate(cache: Tensor, block_table: Tensor | None, rows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where slots of batch rows live: indices into the cache's first two dimensions, and whether the slot exists.

    Indices of slots that do not exist are 0, so that they may be used for reading.
    """
    exists = (slots >= 0) & (slots < _capacity(cache, block_table))
    slots = slots.where(exists, 0).long()
    if block_table is None:
        return rows, slots, exists
    if block_table.shape[1] == 0:
        return slots, slots, exists
    page = block_table[rows, slots // cache.shape[1]].long()
    exists = exists & (page >= 0) & (page < cache.shape[0])
    return page.where(exists, 0), slots % cache.shape[1], exists


def _dequantise(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``stored * scale`` for ``[..., Hk, D]``, the scale one number or one per head."""
    return stored.to(dtype) if scale is None else stored.to(dtype) * scale.to(dtype)[:, None]


def _quantise(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x / scale`` in the cache's dtype: to nearest, ties to even, saturating at int8 +-127 and float8 +-448."""
    if scale is not None:
        accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = x.to(accumulate) / scale.to(accumulate)[:, None]
    if dtype in QUANTISED_LIMIT:
        x = x.clamp(-QUANTISED_LIMIT[dtype], QUANTISED_LIMIT[dtype])
    if dtype == torch.int8:
        x = x.round().nan_to_num(0.0)
    return x.to(dtype)


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Joins attention over two disjoint key sets: ``lse = ln(e^lse_a + e^lse_b)``, ``out = sum e^(lse_x - lse) out_x``.

    out ``[..., T, H, Dv]``, lse ``[..., H, T]`` in natural log. A state with lse -inf saw nothing: its out is not read.
    """
    accumulate = torch.float64 if out_a.dtype == torch.float64 else torch.float32
    lse_a, lse_b = lse_a.to(accumulate), lse_b.to(accumulate)
    lse = torch.logaddexp(lse_a, lse_b)
    out = torch.zeros_like(out_a, dtype=accumulate)
    for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.exp(part_lse - lse).transpose(-1, -2)[..., None]
        seen = (part_lse != -math.inf).transpose(-1, -2)[..., None]
        out = out + torch.where(seen, weight * part.to(accumulate), 0.0)
    return out.to(out_a.dtype), lse.to(torch.float32)


# Verification. Node 0 is the root: the last committed token, whose target distribution decides its children. A row
# whose node 0 is not a root is empty. A draft token outside the vocabulary (for the greedy rule, below 0) is never
# accepted.


def tree_verify_greedy(draft_tokens: Tensor, target_tokens: Tensor, parents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A node is accepted if its parent is and its token is the target's token after the parent."""
    at_parent = target_tokens.gather(1, _parent_index(parents))
    last = _deepest(parents, (draft_tokens == at_parent) & (draft_tokens >= 0))
    next_token = _take(target_tokens, last)
    return _emit(draft_tokens, parents, last, next_token)


def tree_verify_typical(
    draft_tokens: Tensor,
    target_logits: Tensor,
    parents: Tensor,
    temperature: float,
    epsilon: float,
    delta: float,
    uniforms: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Typical acceptance (Medusa): accept a node if its parent is and ``p(token) > min(epsilon, delta * exp(-H))``.

    ``p = softmax(logits / temperature)`` after the parent; ``H = -sum p ln(p + 1e-5)``, Medusa's entropy in nats. The
    next token is the argmax (the lowest id among equals, NaN counts as -inf), or drawn from p at the last node by the
    inverse CDF of tree_verify_sampling with ``uniforms[b, T]``; the other uniforms are not used.
    """
    probs = torch.softmax(target_logits.to(torch.float64) / temperature, dim=-1)
    entropy = -(probs * torch.log(probs + 1e-5)).sum(-1)
    threshold = (delta * torch.exp(-entropy)).clamp(max=epsilon)

    parent = _parent_index(parents)
    rows = torch.arange(parents.shape[0], device=parents.device)[:, None]
    in_vocabulary = (draft_tokens >= 0) & (draft_tokens < probs.shape[-1])
    p = probs[rows, parent, draft_tokens.where(in_vocabulary, 0).long()]
    last = _deepest(parents, in_vocabulary & (p > threshold.gather(1, parent)))
    if uniforms is None:
        logits = _take(target_logits, last)
        logits = logits.masked_fill(logits.isnan(), -math.inf)
        vocabulary = torch.arange(logits.shape[-1], device=logits.device)
        highest = logits == logits.amax(-1, keepdim=True)
        next_token = vocabulary.where(highest, logits.shape[-1]).amin(-1)
    else:
        next_token = _inverse_cdf(_positive(_take(probs, last)), uniforms[:, -1])
    return _emit(draft_tokens, parents, last, next_token)


def tree_verify_sampling(
    draft_tokens: Tensor,
    target_probs: Tensor,
    parents: Tensor,
    uniforms: Tensor,
    draft_probs: Tensor | None = None,
    replacement: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lossless verification: the emitted tokens are distributed as if sampled from the target one by one.

    The walk starts at the root with r = the target's distribution after it, normalised. Negative and NaN
    probabilities count as zero. The children c of the current node are tried in ascending index, with
    x = draft_tokens[b, c] and u = uniforms[b, c]:

    - without draft_probs, children are deterministic: accept if ``u < r(x)``; on rejection ``r(x) = 0``, r
      renormalised;
    - with draft_probs, q = draft_probs at the current node, normalised: accept if ``u * q(x) < r(x)``, which has
      probability ``min(1, r(x) / q(x))``; on rejection ``r = max(r - q, 0)``, renormalised, and with
      ``replacement=False`` afterwards ``q(x) = 0``, q renormalised.

    A child whose token is outside the vocabulary was drawn from nothing: it is passed over and leaves r and q as they
    are. On acceptance the walk goes on from c with c's own target and draft distributions. When no child is left, the
    final token is drawn from r with u = uniforms[b, T]: the smallest token id x with ``r(0) + .. + r(x) > u *
    sum(r)``. Only a token with r(x) > 0 can satisfy that; if rounding leaves none, the largest id with r(x) > 0 is
    taken. A rejection that would leave r without mass, possible only by rounding, leaves r as it is. A target without
    any mass emits -1.
    """
    batch, nodes = parents.shape
    vocabulary = target_probs.shape[-1]
    rows = torch.arange(batch, device=parents.device)
    last = torch.where(_has_root(parents), 0, -1)
    target = _positive(target_probs)
    draft = None if draft_probs is None else _positive(draft_probs)

    r = _normalise(_take(target, last))
    q = None if draft is None else _normalise(_take(draft, last))
    for c in range(1, nodes):
        x = draft_tokens[:, c]
        tried = (parents[:, c] == last) & (last >= 0) & (x >= 0) & (x < vocabulary)
        x = x.where(tried, 0).long()
        u = uniforms[:, c].to(torch.float64)
        accepted = tried & ((u if q is None else u * q[rows, x]) < r[rows, x])
        rejected = tried & ~accepted

        one_hot = torch.nn.functional.one_hot(x, vocabulary).bool()
        remainder = r.masked_fill(one_hot, 0) if q is None else (r - q).clamp(min=0)
        usable = rejected & (remainder.sum(-1) > 0)
        r = torch.where(usable[:, None], _normalise(remainder), r)
        r = torch.where(accepted[:, None], _normalise(target[:, c]), r)
        if q is not None and draft is not None:
            if not replacement:
                q = torch.where(rejected[:, None], _normalise(q.masked_fill(one_hot, 0)), q)
            q = torch.where(accepted[:, None], _normalise(draft[:, c]), q)
        last = last.masked_fill(accepted, c)
    return _emit(draft_tokens, parents, last, _inverse_cdf(r, uniforms[:, -1]))


def _has_root(parents: Tensor) -> Tensor:
    return (parents[:, :1] == -1).any(-1)


def _parent_index(parents: Tensor) -> Tensor:
    """parents as indices: whatever is not an earlier node becomes 0."""
    node = torch.arange(parents.shape[1], device=parents.device)
    return parents.where((parents >= 0) & (parents < node), 0).long()


def _deepest(parents: Tensor, matches: Tensor) -> Tensor:
    """The last node of the longest path of matching nodes from node 0, the lowest index if several; -1 without root."""
    batch, nodes = parents.shape
    if nodes == 0:
        return torch.full((batch,), -1, dtype=torch.long, device=parents.device)
    parent = _parent_index(parents)
    accepted = torch.zeros_like(matches)
    accepted[:, 0] = _has_root(parents)
    for i in range(1, nodes):
        below = (parents[:, i] >= 0) & (parents[:, i] < i)
        accepted[:, i] = matches[:, i] & below & accepted.gather(1, parent[:, i : i + 1])[:, 0]
    length = tree_mask(parents).sum(-1).where(accepted, 0)
    node = torch.arange(nodes, device=parents.device)
    longest = length == length.amax(-1, keepdim=True)
    return node.where(longest, nodes).amin(-1).where(accepted[:, 0], -1)


def _take(x: Tensor, node: Tensor) -> Tensor:
    """``x[b, node[b]]``; rows whose node is -1 get x[b, 0], and zeros if there are no nodes at all."""
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[:1] + x.shape[2:])
    return x[torch.arange(x.shape[0], device=x.device), node.clamp(min=0)]


def _positive(probs: Tensor) -> Tensor:
    return probs.to(torch.float64).where(probs > 0, 0.0)


def _normalise(mass: Tensor) -> Tensor:
    total = mass.sum(-1, keepdim=True)
    return mass / total.where(total > 0, 1.0)


def _inverse_cdf(mass: Tensor, uniform: Tensor) -> Tensor:
    """The smallest x with ``mass(0) + .. + mass(x) > uniform * total``; else the largest with mass, else -1."""
    token = torch.arange(mass.shape[-1], device=mass.device)
    cumulative = mass.cumsum(-1)
    reached = (mass > 0) & (cumulative > uniform.to(torch.float64)[:, None] * cumulative[:, -1:])
    smallest = token.where(reached, mass.shape[-1]).amin(-1)
    largest = token.where(mass > 0, -1).amax(-1)
    return torch.where(reached.any(-1), smallest, largest)


def _emit(draft_tokens: Tensor, parents: Tensor, last: Tensor, next_token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """path, num_accepted and tokens of the walk from node 0 to ``last`` [B]; all -1 and 0 where last is -1."""
    batch, nodes = parents.shape
    if nodes == 0:
        nothing = torch.zeros(batch, 0, dtype=torch.int32, device=parents.device)
        return nothing, nothing.sum(1, dtype=torch.int32), torch.empty_like(draft_tokens)
    on_path = _take(tree_mask(parents), last) & (last >= 0)[:, None]
    num_accepted = (on_path.sum(-1, dtype=torch.int32) - 1).clamp(min=0)

    # A node's place on the path is the number of path nodes before it; places beyond the path stay -1.
    node = torch.arange(nodes, device=parents.device).expand(batch, nodes)
    place = torch.where(on_path, on_path.cumsum(-1) - 1, nodes)
    ordered = torch.full((batch, nodes + 1), -1, dtype=torch.long, device=parents.device).scatter(1, place, node)
    ordered[:, nodes] = -1

    accepted = ordered[:, 1:]
    tokens = draft_tokens.gather(1, accepted.clamp(0, nodes - 1)).where(accepted >= 0, -1)
    final = (node == num_accepted[:, None]) & (last >= 0)[:, None]
    tokens = torch.where(final, next_token[:, None].to(tokens.dtype), tokens)
    return ordered[:, :nodes].to(torch.int32), num_accepted, tokens


def tree_commit_kv_(
    k_cache: Tensor,
    v_cache: Tensor,
    k_tree: Tensor,
    v_tree: Tensor,
    prefix_lens: Tensor,
    path: Tensor,
    num_accepted: Tensor,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Stores the accepted path in the cache: slot ``prefix_lens[b] + j`` = node ``path[b, j]``, j = 0..num_accepted."""
    rows, places, nodes = _accepted(path, num_accepted)
    first, second, exists = _locate(k_cache, block_table, rows, prefix_lens[rows] + places)
    exists = exists & (nodes < k_tree.shape[1])
    rows, nodes, first, second = rows[exists], nodes[exists], first[exists], second[exists]
    for cache, tree, scale in ((k_cache, k_tree, k_scale), (v_cache, v_tree, v_scale)):
        _bits(cache)[first, second] = _bits(_quantise(tree[rows, nodes], scale, cache.dtype))


def tree_compact_kv_(
    k_cache: Tensor,
    v_cache: Tensor,
    prefix_lens: Tensor,
    path: Tensor,
    num_accepted: Tensor,
    block_table: Tensor | None = None,
) -> None:
    """Closes the gaps of the accepted path: slot ``prefix_lens[b] + j`` = slot ``prefix_lens[b] + path[b, j]``.

    Everything is read before anything is written: the moves of one row may overlap.
    """
    rows, places, nodes = _accepted(path, num_accepted)
    to_first, to_second, to_exists = _locate(k_cache, block_table, rows, prefix_lens[rows] + places)
    first, second, exists = _locate(k_cache, block_table, rows, prefix_lens[rows] + nodes)
    exists = exists & to_exists
    for cache in (k_cache, v_cache):
        moved = _bits(cache)[first[exists], second[exists]]
        _bits(cache)[to_first[exists], to_second[exists]] = moved


def _accepted(path: Tensor, num_accepted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row, place on the path, node) of every accepted node, as three lists. A row with path[b, 0] = -1 has none."""
    place = torch.arange(path.shape[1], device=path.device)
    chosen = (place <= num_accepted[:, None]) & (path >= 0) & (path[:, :1] >= 0)
    rows, places = chosen.nonzero(as_tuple=True)
    return rows, places, path[rows, places].long()


def _bits(x: Tensor) -> Tensor:
    """Eight-bit floats as bytes: moving them needs no arithmetic, which torch lacks for them."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
