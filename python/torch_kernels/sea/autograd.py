# SPDX-License-Identifier: Apache-2.0
"""Gradients around the ops. The backward pass computes features, states and probabilities again.

Those of favor_features and running_mean are matrix products and a sum that torch has; the others have ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_kernels.sea import op as _op


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# ---- favor_features ----


def favor_features(x: Tensor, proj: Tensor, kind: str, eps: float, shift: Tensor | None) -> Tensor:
    """Differentiable in x, proj and shift."""
    if _wants_gradient(x, proj, shift):
        return _FavorFeatures.apply(x, proj, kind, eps, shift)
    return _op.favor_features(x, proj, kind=kind, eps=eps, shift=shift)


class _FavorFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, proj: Tensor, kind: str, eps: float, shift: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, proj, shift)
        ctx.kind = kind
        return _op.favor_features(x, proj, kind=kind, eps=eps, shift=shift)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, proj, shift = ctx.saved_tensors
        dtype = _op.state_dtype(x.dtype)
        factor = x.shape[-1] ** -0.25
        scaled, weight, grad = factor * x.to(dtype), proj.to(dtype), grad.to(dtype)
        projected = scaled @ weight.T
        if ctx.kind == "relu":
            grad = torch.where(projected > 0, grad, 0.0)
            grad_scaled = grad @ weight
        else:
            exponent = projected - scaled.square().sum(-1, keepdim=True) / 2
            if shift is not None:
                exponent = exponent - shift.to(dtype)
            grad = grad * (proj.shape[0] ** -0.5 * exponent.exp())
            grad_scaled = grad @ weight - scaled * grad.sum(-1, keepdim=True)
        grad_proj = grad.flatten(0, 2).T @ scaled.flatten(0, 2) if ctx.needs_input_grad[1] else None
        grad_shift = None
        if shift is not None and ctx.needs_input_grad[4]:
            grad_shift = -grad.sum(-1, keepdim=True).sum_to_size(shift.shape).to(shift.dtype)
        grad_x = (factor * grad_scaled).to(x.dtype)
        return grad_x, None if grad_proj is None else grad_proj.to(proj.dtype), None, None, grad_shift


# ---- linear_attention ----


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    initial_state: Tensor | None,
    initial_norm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable in all floats."""
    arguments = (q, k, v, initial_state, initial_norm, causal, eps)
    if _wants_gradient(q, k, v, initial_state, initial_norm):
        return _LinearAttention.apply(*arguments)
    return _linear_attention(*arguments)


def _linear_attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, initial_state, initial_norm, causal, eps = arguments
    return _op.linear_attention(q, k, v, causal=causal, initial_state=initial_state, initial_norm=initial_norm, eps=eps)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, ctx.causal, ctx.eps = arguments
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return _linear_attention(*arguments)

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None, grad_norm: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, initial_state, initial_norm = ctx.saved_tensors
        *grads, grad_initial_state, grad_initial_norm = _op.linear_attention_backward(
            torch.zeros_like(v) if grad_out is None else grad_out, q, k, v, grad_state=grad_state, grad_norm=grad_norm,
            causal=ctx.causal, initial_state=initial_state, initial_norm=initial_norm, eps=ctx.eps,
        )  # fmt: skip
        initial = (None, None) if initial_state is None else (grad_initial_state, grad_initial_norm)
        return *grads, *initial, None, None


# ---- sea_attention ----


def sea_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cells: Tensor,
    widths: Tensor,
    num_cells: int,
    scale: float | None,
    max_columns_per_cell: int,
    row_gain: Tensor | None,
    mix: Tensor | None,
    pooled: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Differentiable in q, k, v, row_gain, mix and pooled."""
    arguments = (q, k, v, cells, widths, row_gain, mix, pooled, num_cells, scale, max_columns_per_cell)
    if _wants_gradient(q, k, v, row_gain, mix, pooled):
        return _SeaAttention.apply(*arguments)
    return _sea_attention(*arguments)


def _sea_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    q, k, v, cells, widths, row_gain, mix, pooled, num_cells, scale, max_columns_per_cell = arguments
    return _op.sea_attention(
        q, k, v, cells, widths, num_cells=num_cells, scale=scale, max_columns_per_cell=max_columns_per_cell,
        row_gain=row_gain, mix=mix, pooled=pooled,
    )  # fmt: skip


class _SeaAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.num_cells, ctx.scale, ctx.max_columns_per_cell = arguments
        out, lse = _sea_attention(*arguments)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cells, widths, row_gain, mix, pooled, out, lse = ctx.saved_tensors
        grad_q, grad_k, grad_v, *of_gates = _op.sea_attention_backward(
            grad_out, q, k, v, out, lse, cells, widths, num_cells=ctx.num_cells, scale=ctx.scale,
            max_columns_per_cell=ctx.max_columns_per_cell, row_gain=row_gain, mix=mix, pooled=pooled,
        )  # fmt: skip
        gates = (grad if gate is not None else None for gate, grad in zip((row_gain, mix, pooled), of_gates))
        return grad_q, grad_k, grad_v, None, None, *gates, None, None, None


# ---- sea_stretch ----


def sea_stretch(x: Tensor, widths: Tensor, length: int, fill: float) -> Tensor:
    """Differentiable in x."""
    if _wants_gradient(x):
        return _SeaStretch.apply(x, widths, length, fill)
    return _op.sea_stretch(x, widths, length=length, fill=fill)


class _SeaStretch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: Tensor, length: int, fill: float) -> Tensor:
        ctx.save_for_backward(widths)
        ctx.num_cells = x.shape[3]
        return _op.sea_stretch(x, widths, length=length, fill=fill)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (widths,) = ctx.saved_tensors
        return _op.sea_stretch_backward(grad, widths, num_cells=ctx.num_cells), None, None, None


# ---- running_mean ----


def running_mean(v: Tensor, sum: Tensor | None, count: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable in v and sum."""
    if _wants_gradient(v, sum):
        return _RunningMean.apply(v, sum, count)
    return _op.running_mean(v, sum=sum, count=count)


class _RunningMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, sum: Tensor | None, count: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(count)
        ctx.dtype = v.dtype
        return _op.running_mean(v, sum=sum, count=count)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (count,) = ctx.saved_tensors
        before = 0 if count is None else count[:, None, None, None]
        tokens = torch.arange(1, grad_mean.shape[1] + 1, device=grad_mean.device)[:, None, None]
        each = grad_mean.double() / (before + tokens)
        sums = each.flip(1).cumsum(1).flip(1)
        grad_initial = None if count is None else grad_sum + each.sum(1)
        return (sums + grad_sum[:, None]).to(ctx.dtype), grad_initial, None
