# SPDX-License-Identifier: Apache-2.0
"""The truth: the recurrence, token by token in float64; and the plain chunked formula, whose errors set the tolerance.

Neither uses the package. Both are differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

F64, F32 = torch.float64, torch.float32


def spans(q: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int, int]]:
    """Batch entry, begin and end of each sequence."""
    if cu_seqlens is None:
        return [(b, 0, q.shape[1]) for b in range(len(q))]
    ends = cu_seqlens.tolist()
    return [(0, begin, end) for begin, end in zip(ends, ends[1:])]


def log_decay(k: Tensor, slopes: Tensor | None, g: Tensor | None) -> Tensor:
    return -slopes.expand(k.shape[:3]) if g is None else g


def over_sequences(one: Callable[..., tuple[Tensor, Tensor]], arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """out and the final states of ``one(q, k, v, g, state, scale)``, which sees a sequence [T, heads, size]."""
    q, k, v = (arguments[name] for name in "qkv")
    g = log_decay(k, arguments.get("slopes"), arguments.get("g"))
    scale, initial = arguments.get("scale"), arguments.get("initial_state")
    outs, states = [], []
    for n, (b, begin, end) in enumerate(spans(q, arguments.get("cu_seqlens"))):
        parts = [x[b, begin:end] for x in (q, k, v, g)]
        state = None if initial is None else initial[n]
        out, state = one(*parts, state, 1.0 if scale is None else scale)
        outs.append(out)
        states.append(state)
    empty = q.new_zeros((0, *k.shape[2:], v.shape[3]), dtype=F64)
    final = torch.stack(states) if states else empty
    shape = (*q.shape[:3], v.shape[3])
    return (torch.cat(outs).reshape(shape) if outs else q.new_zeros(shape, dtype=F64)), final


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v, g = (x.to(F64) for x in (q, k, v, g))
    group = q.shape[1] // k.shape[1]
    state = k.new_zeros((*k.shape[1:], v.shape[2])) if state is None else state.to(F64)
    reset = (g == -math.inf)[:, :, None, None]
    factors = torch.where(reset, 0.0, g[:, :, None, None]).exp()
    added = torch.einsum("thk,thv->thkv", k, v)
    states = []
    for one_reset, factor, one in zip(reset, factors.unbind(), added.unbind(), strict=True):
        state = torch.where(one_reset, 0.0, factor * torch.where(one_reset, 0.0, state)) + one
        states.append(state)
    if not states:
        return q.new_zeros((0, q.shape[1], v.shape[2])), state
    return scale * torch.einsum("thk,thkv->thv", q, torch.stack(states).repeat_interleave(group, 1)), state


def attention(**arguments: Any) -> tuple[Tensor, Tensor]:
    return over_sequences(recurrence, arguments)


def chunked(
    chunk: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """As one would write it: products in the inputs' dtype, states and decays in float32."""
    dtype, wide = q.dtype, F64 if q.dtype == F64 else F32
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.movedim(1, 0) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    g = g.to(wide).repeat_interleave(group, 1).movedim(1, 0)
    state = (
        q.new_zeros((len(q), q.shape[2], v.shape[2]), dtype=wide)
        if state is None
        else state.repeat_interleave(group, 0)
    )
    state, outs = state.to(wide), []
    chunks = zip(*(x.split(chunk, 1) for x in (q, k, v, g)), strict=True) if q.shape[1] else ()
    for one_q, one_k, one_v, one_g in chunks:
        reset = one_g == -math.inf
        # Summed in float64 where float32 would lose everything: that is not what sets the tolerance.
        kept_g = torch.where(reset, 0.0, one_g)
        total = (kept_g if kept_g.min() > -20 else kept_g.double().clamp(min=-2000)).cumsum(1)
        segment = reset.cumsum(1)
        visible = (segment[:, :, None] == segment[:, None, :]).tril()
        decay = torch.where(visible, total[:, :, None] - total[:, None, :], -math.inf).exp().to(wide)
        scores = ((one_q @ one_k.mT).to(wide) * decay * scale).to(dtype)
        inside = (scores @ one_v).to(wide)
        seen = (segment == 0)[:, :, None]
        before = (one_q @ state.to(dtype)).to(wide) * total.exp().to(wide)[:, :, None] * scale
        outs.append((inside + torch.where(seen, before, 0.0)).to(dtype))
        entering = torch.where(segment == segment[:, -1:], total[:, -1:] - total, -math.inf).exp().to(wide)[:, :, None]
        kept = torch.where(reset.any(1), 0.0, total[:, -1].exp()).to(wide)[:, None, None]
        added = ((one_k.to(wide) * entering).to(dtype).mT @ one_v).to(wide)
        state = torch.where(kept == 0, 0.0, kept * state) + added
    heads = len(q) // group
    out = torch.cat(outs, 1).movedim(1, 0) if outs else q.new_zeros((0, len(q), v.shape[2]))
    return out, state.unflatten(0, (heads, group))[:, 0]


def plain_formula(chunk: int, **arguments: Any) -> tuple[Tensor, Tensor]:
    return over_sequences(lambda *parts: chunked(chunk, *parts), arguments)


def gradients(
    function: Callable[..., tuple[Tensor, Tensor]],
    grad_out: Tensor,
    grad_state: Tensor | None,
    dtype: Any,
    **arguments: Any,
) -> dict[str, Tensor]:
    """By name, those of every float argument, computed in ``dtype`` (None: as given)."""
    leaves = {}
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            leaves[name] = x.detach().to(dtype or x.dtype).clone().requires_grad_()
    out, state = function(**(arguments | leaves))
    loss = (out * grad_out.to(out.dtype)).sum()
    if grad_state is not None:
        loss = loss + (state * grad_state.to(state.dtype)).sum()
    loss = loss + sum((x * 0).sum() for x in leaves.values() if x.isfinite().all())  # of empty inputs, too
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: torch.zeros_like(x) if y is None else y for (name, x), y in zip(leaves.items(), found)}
