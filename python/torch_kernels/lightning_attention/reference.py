# SPDX-License-Identifier: Apache-2.0
"""What the lightning attention ops mean, in PyTorch: the recurrence, token by token.

    S_t = e^g_t S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

with the log decay g_t = -slope. A decay of zero (g = -inf) forgets by selection: what came before, NaN included, has no
influence. States are float32 (float64 for float64 inputs) and grow by ``expm1(g) S + k^T v``, because e^g of a slow
head cannot be told from 1 in float32 for long. Arithmetic is in float64, so that only results, and states between
calls, are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 128  # tokens whose states the backward pass holds at once


def _advance(state: Tensor, g: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The state ``[..., K, V]`` after a token with log decay g ``[...]``, key ``[..., K]`` and value ``[..., V]``."""
    g = g.to(state.dtype)[..., None, None]
    added = k[..., :, None] * v[..., None, :]
    return torch.where(g == -torch.inf, added, state + (torch.expm1(g) * state + added))


def _decayed(state: Tensor, g: Tensor) -> Tensor:
    """The state ``[..., K, V]`` times e^g, g ``[...]``."""
    g = g.to(state.dtype)[..., None, None]
    return torch.where(g == -torch.inf, 0.0, torch.exp(g) * state)


def _read(q: Tensor, state: Tensor) -> Tensor:
    """q ``[..., Hq, K]`` times the states ``[..., H, K, V]`` of their key/value heads: ``[..., Hq, V]``."""
    return (q.unflatten(-2, (state.shape[-3], -1)) @ state).flatten(-3, -2)


def _log_decay(slopes: Tensor, k: Tensor) -> Tensor:
    """The slopes as a log decay of each token ``[B, T, H]``."""
    return -slopes.expand(*k.shape[:2], -1)


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> Iterator[tuple[slice, slice]]:
    """For each group of sequences of equal length: its states, and its tokens."""
    if cu_seqlens is None:
        yield slice(None), slice(0, x.shape[1])
        return
    offsets = cu_seqlens.tolist()
    for n, (start, end) in enumerate(zip(offsets, offsets[1:])):
        yield slice(n, n + 1), slice(start, end)


def _states(k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """All the states, zero."""
    count = k.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    return k.new_zeros((count, *k.shape[2:], v.shape[3]), dtype=dtype)


# ---- whole sequences ----


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor]:
    scale = 1.0 if scale is None else scale
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    states = _states(k, v, cu_seqlens) if initial_state is None else initial_state.clone()
    for n, tokens in _sequences(q, cu_seqlens):
        state = states[n].double()
        for t in range(tokens.start, tokens.stop):
            state = _advance(state, g[:, t], k[:, t].double(), v[:, t].double())
            out[:, t] = scale * _read(q[:, t].double(), state)
        states[n] = state
    return out, states if output_final_state else states[:0].clone()


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor]:
    return simple_gla(q, k, v, _log_decay(slopes, k), initial_state, cu_seqlens, scale, output_final_state)


def simple_gla_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    grad_final_state: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    decay_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Walks back with the gradient ``carry`` of the state after each token; blocks of states are computed again."""
    scale = 1.0 if scale is None else scale
    grad_q, grad_k, grad_v, grad_g = (x.new_zeros(x.shape) for x in (q, k, v, g))
    states = _states(k, v, cu_seqlens) if initial_state is None else initial_state
    grad_states = torch.zeros_like(states) if grad_final_state is None else grad_final_state.clone()
    heads = k.shape[2]
    for n, tokens in _sequences(q, cu_seqlens):
        starts = range(tokens.start, tokens.stop, BLOCK)
        state, before_block = states[n].double(), {}
        for t in range(tokens.start, tokens.stop):
            if t in starts:
                before_block[t] = state
            state = _advance(state, g[:, t], k[:, t].double(), v[:, t].double())
        carry = grad_states[n].double()
        for start in reversed(starts):
            block, known = range(start, min(start + BLOCK, tokens.stop)), [before_block[start]]
            for t in block:
                known.append(_advance(known[-1], g[:, t], k[:, t].double(), v[:, t].double()))
            for t in reversed(block):
                before, after = known[t - start], known[t - start + 1]
                grouped = q[:, t].double().unflatten(-2, (heads, -1))
                grad = scale * grad_out[:, t].double().unflatten(-2, (heads, -1))
                carry = carry + grouped.mT @ grad
                grad_q[:, t] = (grad @ after.mT).flatten(-3, -2)
                grad_k[:, t] = (carry @ v[:, t].double()[..., None])[..., 0]
                grad_v[:, t] = (k[:, t].double()[..., None, :] @ carry)[..., 0, :]
                carry_before = _decayed(carry, g[:, t])
                forgotten = g[:, t] == -torch.inf
                grad_g[:, t] = torch.where(forgotten, 0.0, (carry_before * before).sum((-1, -2))).to(g.dtype)
                carry = carry_before
        grad_states[n] = carry
    grad_g = grad_g if decay_gradient else g.new_empty(0)
    return grad_q, grad_k, grad_v, grad_g, grad_states[: 0 if initial_state is None else None].clone()


def lightning_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    grad_final_state: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    decay_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = _log_decay(slopes, k)
    *grads, grad_g, grad_state = simple_gla_backward(
        grad_out, q, k, v, g, grad_final_state, initial_state, cu_seqlens, scale
    )
    grad_slopes = -grad_g.double().sum((0, 1)).to(slopes.dtype) if decay_gradient else slopes.new_empty(0)
    return *grads, grad_slopes, grad_state  # type: ignore[return-value]


def lightning_chunk_state(k: Tensor, v: Tensor, slopes: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    states = _states(k, v, cu_seqlens)
    for n, tokens in _sequences(k, cu_seqlens):
        state = states[n].double()
        for t in range(tokens.start, tokens.stop):
            state = _advance(state, -slopes, k[:, t].double(), v[:, t].double())
        states[n] = state
    return states


def lightning_apply_state(
    q: Tensor, state: Tensor, slopes: Tensor, cu_seqlens: Tensor | None = None, scale: float | None = None
) -> Tensor:
    scale = 1.0 if scale is None else scale
    out = q.new_zeros((*q.shape[:3], state.shape[3]))
    for n, tokens in _sequences(q, cu_seqlens):
        for i, t in enumerate(range(tokens.start, tokens.stop)):
            out[:, t] = scale * _read(q[:, t].double(), _decayed(state[n].double(), -slopes.double() * (i + 1)))
    return out


# ---- decoding: a pool of states ----


def _rows(state: Tensor, state_indices: Tensor | None, count: int) -> list[int]:
    """Which state each row has; -1 for padding, and for what is none."""
    if state_indices is None:
        return list(range(count))
    return [p if 0 <= p < len(state) else -1 for p in state_indices.tolist()]


def lightning_attention_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    slopes: Tensor,
    state_indices: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    scale = 1.0 if scale is None else scale
    out = q.new_zeros((*q.shape[:2], v.shape[2]))
    for n, p in enumerate(_rows(state, state_indices, len(q))):
        if p >= 0:
            after = _advance(state[p].double(), -slopes, k[n].double(), v[n].double())
            out[n] = scale * _read(q[n].double(), after)
            state[p] = after
    return out


def lightning_attention_verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    slopes: Tensor,
    parents: Tensor | None = None,
    state_indices: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Each node's state follows from its parent's; a root's from the pool."""
    scale = 1.0 if scale is None else scale
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    chain = range(-1, q.shape[1] - 1)
    for n, p in enumerate(_rows(state, state_indices, len(q))):
        if p < 0:
            continue
        states = {-1: state[p].double()}
        for t, parent in enumerate(chain if parents is None else parents[n].tolist()):
            if parent < t and parent in states:
                states[t] = _advance(states[parent], -slopes, k[n, t].double(), v[n, t].double())
                out[n, t] = scale * _read(q[n, t].double(), states[t])
    return out


def lightning_attention_commit_(
    k: Tensor,
    v: Tensor,
    state: Tensor,
    slopes: Tensor,
    path: Tensor,
    num_accepted: Tensor,
    state_indices: Tensor | None = None,
) -> None:
    for n, p in enumerate(_rows(state, state_indices, len(k))):
        if p < 0:
            continue
        for node in path[n, : max(0, int(num_accepted[n]) + 1)].tolist():
            if not 0 <= node < k.shape[1]:
                break
            state[p] = _advance(state[p].double(), -slopes, k[n, node].double(), v[n, node].double())
