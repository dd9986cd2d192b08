# SPDX-License-Identifier: Apache-2.0
"""Gradients around the ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_kernels import _checks
from torch_kernels.graph_attention import op as _op


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def graph_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: tuple[Tensor, ...],
    scale: float | None,
    block_table: Tensor | None,
    rotation: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """``graph_attention``, differentiable in q, k and v where these are packed."""
    if not _wants_gradient(q, k, v):
        return _attend(q, k, v, graph, scale, block_table, rotation)
    if block_table is not None:
        _checks.fail("graph_attention", "block_table", "None where a gradient is wanted: pages have none", "a tensor")
    # The compiler wants each tensor once, and offsets of queries and keys are often the same.
    unique: list[Tensor] = []
    places: list[int | None] = []
    for index in (*graph, *rotation[:-1]):
        place = None if index is None else next((i for i, other in enumerate(unique) if other is index), len(unique))
        if place == len(unique):
            unique.append(index)
        places.append(place)
    return _GraphAttention.apply(q, k, v, scale, rotation[-1], tuple(places), *unique)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, graph: tuple[Any, ...], scale: float | None, block_table: Tensor | None,
    rotation: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inv_freq, q_start, edge_start, own_start, interleaved = rotation
    return _op.graph_attention(
        q, k, v, *graph, scale=scale, block_table=block_table, inv_freq=inv_freq, q_start=q_start,
        edge_start=edge_start, own_start=own_start, interleaved=interleaved,
    )  # fmt: skip


class _GraphAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        interleaved: bool,
        places: tuple[int | None, ...],
        *unique: Tensor,
    ) -> tuple[Tensor, Tensor]:
        indices = [None if place is None else unique[place] for place in places]
        out, lse = _attend(q, k, v, tuple(indices[:5]), scale, None, (*indices[5:], interleaved))
        ctx.save_for_backward(q, k, v, out, lse, *unique)
        ctx.scale, ctx.interleaved, ctx.places = scale, interleaved, places
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *unique = ctx.saved_tensors
        indices = [None if place is None else unique[place] for place in ctx.places]
        graph, (inv_freq, q_start, edge_start, own_start) = indices[:5], indices[5:]
        gradients = _op.graph_attention_backward(
            grad_out, q, k, v, out, lse, *graph, scale=ctx.scale, inv_freq=inv_freq, q_start=q_start,
            edge_start=edge_start, own_start=own_start, interleaved=ctx.interleaved,
        )  # fmt: skip
        return (*gradients, None, None, None, *(None for _ in unique))


def rope_shift(k: Tensor, offsets: Tensor, delta: Tensor, inv_freq: Tensor, interleaved: bool) -> Tensor:
    """``rope_shift``, differentiable in k."""
    if _wants_gradient(k):
        return _RopeShift.apply(k, offsets, delta, inv_freq, interleaved)
    return _op.rope_shift(k, offsets, delta, inv_freq, interleaved=interleaved)


class _RopeShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, offsets: Tensor, delta: Tensor, inv_freq: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(offsets, delta, inv_freq)
        ctx.interleaved = interleaved
        return _op.rope_shift(k, offsets, delta, inv_freq, interleaved=interleaved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        offsets, delta, inv_freq = ctx.saved_tensors
        return rope_shift(grad, offsets, -delta, inv_freq, ctx.interleaved), None, None, None, None
