# SPDX-License-Identifier: Apache-2.0
"""Which drafted nodes the target model accepts. One program per sequence walks the tree; probabilities are compared in
float64."""

import struct

import torch
import triton
import triton.language as tl

from torch_kernels._triton import in_batches, on_device, power_of_two

from .tree import parent_of


@triton.jit
def _deepest(parents, matches, nodes, BLOCK_T: tl.constexpr):
    """Last node of the longest path from node 0 along nodes that match (the lowest index among equals) and its depth;
    -1, 0 without a root.

    ``matches`` points to int32 flags of one sequence. All nodes walk up together; a walk that meets a mismatch is over.
    """
    start = tl.arange(0, BLOCK_T)
    node = tl.where(start < nodes, start, -2)
    depth = tl.zeros_like(node)
    while tl.max(node, axis=0) > 0:
        matching = tl.load(matches + node, mask=node > 0, other=0) > 0
        depth += (node > 0).to(tl.int32)
        node = tl.where(node > 0, tl.where(matching, parent_of(parents, node), -2), node)
    # A walk that has arrived at node 0 stands at 0: depth first, then the lowest index.
    rooted = tl.load(parents) == -1
    key = tl.where((node == 0) & rooted, depth * BLOCK_T + (BLOCK_T - 1 - start), -1)
    best = tl.max(key, axis=0)
    last = tl.where(best >= 0, BLOCK_T - 1 - best % BLOCK_T, -1)
    return last, tl.where(best >= 0, best // BLOCK_T, 0)


@triton.jit
def _emit(path, num_accepted, tokens, draft_tokens, parents, last, depth, next_token, nodes, BLOCK_T: tl.constexpr):
    """Writes the path from node 0 to ``last``, its length, and its tokens followed by the next one."""
    place = tl.arange(0, BLOCK_T)
    on_path = tl.zeros_like(place) - 1
    after = tl.zeros_like(place) - 1
    node = last
    for step in range(tl.where(last >= 0, depth + 1, 0)):
        on_path = tl.where(place == depth - step, node, on_path)
        after = tl.where(place == depth - step - 1, node, after)
        node = tl.maximum(tl.load(parents + node), 0).to(tl.int32)
    token = tl.load(draft_tokens + after, mask=after >= 0, other=-1).to(tl.int64)
    token = tl.where((place == depth) & (last >= 0), next_token.to(tl.int64), token)
    tl.store(path + place, on_path, mask=place < nodes)
    tl.store(tokens + place, token.to(tokens.dtype.element_ty), mask=place < nodes)
    tl.store(num_accepted, depth)


@triton.jit(do_not_specialize=["nodes"])
def tree_verify_greedy_kernel(
    path, num_accepted, tokens, matches, draft_tokens, target_tokens, parents, nodes, BLOCK_T: tl.constexpr
):
    batch = tl.program_id(0).to(tl.int64)
    start = batch * nodes
    node = tl.arange(0, BLOCK_T)
    parent = parent_of(parents + start, tl.where(node < nodes, node, -2))
    draft = tl.load(draft_tokens + start + node, mask=node < nodes, other=-1).to(tl.int64)
    target = tl.load(target_tokens + start + parent, mask=parent >= 0, other=-1).to(tl.int64)
    tl.store(matches + start + node, ((draft == target) & (draft >= 0) & (parent >= 0)).to(tl.int32), mask=node < nodes)
    tl.debug_barrier()
    last, depth = _deepest(parents + start, matches + start, nodes, BLOCK_T)
    next_token = tl.load(target_tokens + start + tl.maximum(last, 0))
    _emit(
        path + start, num_accepted + batch, tokens + start, draft_tokens + start, parents + start, last, depth,
        next_token, nodes, BLOCK_T,
    )  # fmt: skip


@triton.jit
def _softmax_scale(logits, temperature, vocabulary, BLOCK_V: tl.constexpr):
    """max and sum of exp(x - max) of x = logits / temperature, in float64. NaN anywhere gives a NaN sum."""
    peak = tl.full((BLOCK_V,), -float("inf"), tl.float64)
    column = tl.arange(0, BLOCK_V)
    for first in range(0, vocabulary, BLOCK_V):
        x = tl.load(logits + first + column, mask=first + column < vocabulary, other=-float("inf"))
        peak = tl.maximum(peak, x.to(tl.float64) / temperature)
    top = tl.max(peak, axis=0)
    total = tl.zeros((BLOCK_V,), tl.float64)
    for first in range(0, vocabulary, BLOCK_V):
        x = tl.load(logits + first + column, mask=first + column < vocabulary, other=-float("inf"))
        total += tl.exp(x.to(tl.float64) / temperature - top)
    return top, tl.sum(total, axis=0)


@triton.jit
def _double(bits):
    """A float64 argument, which Triton would pass as float32, from its bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["temperature", "epsilon", "delta", "nodes", "vocabulary"])
def typical_matches_kernel(
    matches, draft_tokens, target_logits, parents, temperature, epsilon, delta, nodes, vocabulary, stride_b, stride_t,
    BLOCK_V: tl.constexpr
):  # fmt: skip
    """matches[i] = node i passes its parent's threshold. Grid (nodes, batch): a program computes one node's
    distribution and serves its children."""
    node = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    parents += batch * nodes
    draft_tokens += batch * nodes
    target_logits += batch * stride_b + node.to(tl.int64) * stride_t
    temperature = _double(temperature)
    top, total = _softmax_scale(target_logits, temperature, vocabulary, BLOCK_V)
    column = tl.arange(0, BLOCK_V)
    entropy = tl.zeros((BLOCK_V,), tl.float64)
    for first in range(0, vocabulary, BLOCK_V):
        x = tl.load(target_logits + first + column, mask=first + column < vocabulary, other=-float("inf"))
        p = tl.exp(x.to(tl.float64) / temperature - top) / total
        entropy -= p * tl.log(p + 1e-5)
    bound = _double(delta) * tl.exp(-tl.sum(entropy, axis=0))
    bound = tl.minimum(bound, _double(epsilon))

    for first in range(node + 1, nodes, 128):
        child = first + tl.arange(0, 128)
        mine = (child < nodes) & (tl.load(parents + child, mask=child < nodes, other=-2) == node)
        token = tl.load(draft_tokens + child, mask=mine, other=-1).to(tl.int64)
        known = mine & (token >= 0) & (token < vocabulary)
        x = tl.load(target_logits + token, mask=known, other=-float("inf")).to(tl.float64)
        p = tl.exp(x / temperature - top) / total
        tl.store(matches + batch * nodes + child, (known & (p > bound)).to(tl.int32), mask=mine)


@triton.jit
def _argmax(logits, vocabulary, BLOCK_V: tl.constexpr):
    """Lowest token id with the highest logit; NaN counts as -inf."""
    column = tl.arange(0, BLOCK_V)
    best = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    token = column
    for first in range(0, vocabulary, BLOCK_V):
        x = tl.load(logits + first + column, mask=first + column < vocabulary, other=-float("inf")).to(tl.float32)
        token = tl.where(x > best, first + column, token)
        best = tl.where(x > best, x, best)
    return tl.min(tl.where(best == tl.max(best, axis=0), token, vocabulary), axis=0)


@triton.jit
def _inverse_cdf(mass, uniform, vocabulary, BLOCK_V: tl.constexpr):
    """The smallest x with mass(0) + .. + mass(x) > uniform * total; else the largest with mass, else -1."""
    column = tl.arange(0, BLOCK_V)
    total = tl.sum(tl.zeros((BLOCK_V,), tl.float64), axis=0)
    for first in range(0, vocabulary, BLOCK_V):
        total += tl.sum(tl.load(mass + first + column, mask=first + column < vocabulary, other=0.0), axis=0)
    target = uniform.to(tl.float64) * total
    below = total * 0
    smallest = vocabulary
    largest = vocabulary * 0 - 1
    for first in range(0, vocabulary, BLOCK_V):
        x = tl.load(mass + first + column, mask=first + column < vocabulary, other=0.0)
        reached = (x > 0) & (below + tl.cumsum(x, axis=0) > target)
        smallest = tl.minimum(smallest, tl.min(tl.where(reached, first + column, vocabulary), axis=0))
        largest = tl.maximum(largest, tl.max(tl.where(x > 0, first + column, -1), axis=0))
        below += tl.sum(x, axis=0)
    return tl.where(smallest < vocabulary, smallest, largest)


@triton.jit(do_not_specialize=["temperature", "nodes", "vocabulary"])
def tree_verify_typical_kernel(
    path, num_accepted, tokens, matches, mass, draft_tokens, target_logits, parents, uniforms, temperature, nodes,
    vocabulary,
    stride_b, stride_t, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    start = batch * nodes
    last, depth = _deepest(parents + start, matches + start, nodes, BLOCK_T)
    logits = target_logits + batch * stride_b + tl.maximum(last, 0).to(tl.int64) * stride_t
    if uniforms is None:
        next_token = _argmax(logits, vocabulary, BLOCK_V)
    else:
        temperature = _double(temperature)
        mass += batch * vocabulary
        top, total = _softmax_scale(logits, temperature, vocabulary, BLOCK_V)
        column = tl.arange(0, BLOCK_V)
        for first in range(0, vocabulary, BLOCK_V):
            inside = first + column < vocabulary
            x = tl.load(logits + first + column, mask=inside, other=-float("inf"))
            p = tl.exp(x.to(tl.float64) / temperature - top) / total
            tl.store(mass + first + column, tl.where(p > 0, p, 0.0), mask=inside)
        tl.debug_barrier()
        next_token = _inverse_cdf(mass, tl.load(uniforms + batch * (nodes + 1) + nodes), vocabulary, BLOCK_V)
    _emit(
        path + start, num_accepted + batch, tokens + start, draft_tokens + start, parents + start, last, depth,
        next_token, nodes, BLOCK_T,
    )  # fmt: skip


@triton.jit
def _load_normalised(mass, probs, vocabulary, BLOCK_V: tl.constexpr):
    """mass = probs over their sum, in float64; negative and NaN probabilities count as zero."""
    column = tl.arange(0, BLOCK_V)
    total = tl.sum(tl.zeros((BLOCK_V,), tl.float64), axis=0)
    for first in range(0, vocabulary, BLOCK_V):
        p = tl.load(probs + first + column, mask=first + column < vocabulary, other=0.0).to(tl.float64)
        total += tl.sum(tl.where(p > 0, p, 0.0), axis=0)
    total = tl.where(total > 0, total, 1.0)
    for first in range(0, vocabulary, BLOCK_V):
        p = tl.load(probs + first + column, mask=first + column < vocabulary, other=0.0).to(tl.float64)
        tl.store(mass + first + column, tl.where(p > 0, p, 0.0) / total, mask=first + column < vocabulary)
    tl.debug_barrier()


@triton.jit
def _remaining(r, q, columns, token, vocabulary):
    """What a rejection leaves of r: without q all but the token, with q the positive part of r - q."""
    mass = tl.load(r + columns, mask=columns < vocabulary, other=0.0)
    if q is None:
        mass = tl.where(columns == token, 0.0, mass)
    else:
        mass = tl.maximum(mass - tl.load(q + columns, mask=columns < vocabulary, other=0.0), 0.0)
    return mass


@triton.jit
def _reject(r, q, token, vocabulary, BLOCK_V: tl.constexpr):
    """r = what is left, normalised, unless nothing is left. The barriers keep a thread's write behind all reads of the
    same element."""
    column = tl.arange(0, BLOCK_V)
    total = tl.sum(tl.zeros((BLOCK_V,), tl.float64), axis=0)
    for first in range(0, vocabulary, BLOCK_V):
        total += tl.sum(_remaining(r, q, first + column, token, vocabulary), axis=0)
    tl.debug_barrier()
    if total > 0:
        for first in range(0, vocabulary, BLOCK_V):
            left = _remaining(r, q, first + column, token, vocabulary) / total
            tl.store(r + first + column, left, mask=first + column < vocabulary)
    tl.debug_barrier()


@triton.jit
def _remove(q, token, vocabulary, BLOCK_V: tl.constexpr):
    """q = q without the token, normalised."""
    column = tl.arange(0, BLOCK_V)
    total = tl.sum(tl.zeros((BLOCK_V,), tl.float64), axis=0)
    for first in range(0, vocabulary, BLOCK_V):
        total += tl.sum(_remaining(q, None, first + column, token, vocabulary), axis=0)
    total = tl.where(total > 0, total, 1.0)
    tl.debug_barrier()
    for first in range(0, vocabulary, BLOCK_V):
        left = _remaining(q, None, first + column, token, vocabulary) / total
        tl.store(q + first + column, left, mask=first + column < vocabulary)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["nodes", "vocabulary"])
def tree_verify_sampling_kernel(
    path, num_accepted, tokens, r, q, draft_tokens, target_probs, parents, uniforms, draft_probs, nodes, vocabulary,
    target_stride_b, target_stride_t, draft_stride_b, draft_stride_t,
    REPLACEMENT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """r and q are float64 workspaces [B, V]: what is left of the current node's target and draft distributions."""
    batch = tl.program_id(0).to(tl.int64)
    start = batch * nodes
    parents += start
    draft_tokens += start
    uniforms += batch * (nodes + 1)
    target_probs += batch * target_stride_b
    r += batch * vocabulary
    _load_normalised(r, target_probs, vocabulary, BLOCK_V)
    if q is not None:
        draft_probs += batch * draft_stride_b
        q += batch * vocabulary
        _load_normalised(q, draft_probs, vocabulary, BLOCK_V)

    last = tl.where(tl.load(parents) == -1, 0, -1)
    depth = last * 0
    for child in range(1, nodes):
        token = tl.load(draft_tokens + child).to(tl.int64)
        if (tl.load(parents + child) == last) & (last >= 0) & (token >= 0) & (token < vocabulary):
            bar = tl.load(uniforms + child).to(tl.float64)
            if q is not None:
                bar *= tl.load(q + token)
            if bar < tl.load(r + token):
                last = child
                depth += 1
                # No thread may fill in the new distribution before all have compared with the old one.
                tl.debug_barrier()
                _load_normalised(r, target_probs + tl.cast(child, tl.int64) * target_stride_t, vocabulary, BLOCK_V)
                if q is not None:
                    _load_normalised(q, draft_probs + tl.cast(child, tl.int64) * draft_stride_t, vocabulary, BLOCK_V)
            else:
                _reject(r, q, token, vocabulary, BLOCK_V)
                if q is not None:  # noqa: SIM102 (known at compile time)
                    if not REPLACEMENT:
                        _remove(q, token, vocabulary, BLOCK_V)

    next_token = _inverse_cdf(r, tl.load(uniforms + nodes), vocabulary, BLOCK_V)
    _emit(
        path + start, num_accepted + batch, tokens + start, draft_tokens, parents, last, depth, next_token,
        nodes, BLOCK_T,
    )  # fmt: skip


def _vocabulary_block(vocabulary):
    return min(triton.next_power_of_2(vocabulary), 1024)


def _rows(x):
    """[B, T, V] with V contiguous."""
    return x if x.stride(2) == 1 else x.contiguous()


def _bits(x):
    return struct.unpack("<q", struct.pack("<d", x))[0]


def tree_verify_greedy(path, num_accepted, tokens, draft_tokens, target_tokens, parents):
    batch, nodes = parents.shape
    if nodes == 0:
        num_accepted.zero_()
        return
    if batch == 0:
        return
    matches = torch.empty(batch, nodes, dtype=torch.int32, device=parents.device)
    with on_device(parents):
        tree_verify_greedy_kernel[(batch,)](
            path, num_accepted, tokens, matches, draft_tokens.contiguous(), target_tokens.contiguous(),
            parents.contiguous(), nodes,
            BLOCK_T=power_of_two(nodes),
        )  # fmt: skip


@in_batches()
def tree_verify_typical(
    path, num_accepted, tokens, draft_tokens, target_logits, parents, temperature, epsilon, delta, uniforms
):  # fmt: skip
    batch, nodes, vocabulary = target_logits.shape
    if nodes == 0:
        num_accepted.zero_()
        return
    if batch == 0:
        return
    draft_tokens, parents, target_logits = draft_tokens.contiguous(), parents.contiguous(), _rows(target_logits)
    matches = torch.empty(batch, nodes, dtype=torch.int32, device=parents.device)
    mass = None if uniforms is None else torch.empty(batch, vocabulary, dtype=torch.float64, device=parents.device)
    strides, block = target_logits.stride()[:2], _vocabulary_block(vocabulary)
    with on_device(parents):
        typical_matches_kernel[(nodes, batch)](
            matches, draft_tokens, target_logits, parents, _bits(temperature), _bits(epsilon), _bits(delta), nodes,
            vocabulary, *strides,
            BLOCK_V=block, num_warps=8,
        )  # fmt: skip
        tree_verify_typical_kernel[(batch,)](
            path, num_accepted, tokens, matches, mass, draft_tokens, target_logits, parents,
            None if uniforms is None else uniforms.contiguous(), _bits(temperature), nodes, vocabulary, *strides,
            BLOCK_T=power_of_two(nodes), BLOCK_V=block, num_warps=8,
        )  # fmt: skip


def tree_verify_sampling(
    path, num_accepted, tokens, draft_tokens, target_probs, parents, uniforms, draft_probs, replacement
):
    batch, nodes, vocabulary = target_probs.shape
    if nodes == 0:
        num_accepted.zero_()
        return
    if batch == 0:
        return
    target_probs = _rows(target_probs)
    r = torch.empty(batch, vocabulary, dtype=torch.float64, device=parents.device)
    q = None
    if draft_probs is not None:
        draft_probs, q = _rows(draft_probs), torch.empty_like(r)
    with on_device(parents):
        tree_verify_sampling_kernel[(batch,)](
            path, num_accepted, tokens, r, q, draft_tokens.contiguous(), target_probs, parents.contiguous(),
            uniforms.contiguous(),
            draft_probs, nodes, vocabulary, *target_probs.stride()[:2],
            *(draft_probs.stride()[:2] if q is not None else (0, 0)),
            REPLACEMENT=replacement, BLOCK_T=power_of_two(nodes), BLOCK_V=_vocabulary_block(vocabulary), num_warps=8,
        )  # fmt: skip
