# SPDX-License-Identifier: Apache-2.0
"""Gradients around the ops. Saved are the inputs alone: the backward pass computes states again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_kernels.lightning_attention import op as _op


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def whole_sequences(
    decay: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """``lightning_attention`` (decay "slopes") or ``simple_gla`` (decay "g"), differentiable in all floats."""
    arguments = (q, k, v, rate, initial_state, cu_seqlens, scale, output_final_state)
    if _wants_gradient(q, k, v, rate, initial_state):
        return _WholeSequences.apply(decay, *arguments)
    return _forward(decay, *arguments)


def _forward(decay: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    q, k, v, rate, initial_state, cu_seqlens, scale, output_final_state = arguments
    op = _op.lightning_attention if decay == "slopes" else _op.simple_gla
    return op(
        q, k, v, rate, initial_state=initial_state, cu_seqlens=cu_seqlens, scale=scale,
        output_final_state=output_final_state,
    )  # fmt: skip


class _WholeSequences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, scale, output_final_state = arguments
        ctx.save_for_backward(*tensors)
        ctx.decay, ctx.scale, ctx.output_final_state = decay, scale, output_final_state
        return _forward(decay, *arguments)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_final_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, rate, initial_state, cu_seqlens = ctx.saved_tensors
        op = _op.lightning_attention_backward if ctx.decay == "slopes" else _op.simple_gla_backward
        grad_q, grad_k, grad_v, grad_rate, grad_state = op(
            grad_out, q, k, v, rate, grad_final_state=grad_final_state if ctx.output_final_state else None,
            initial_state=initial_state, cu_seqlens=cu_seqlens, scale=ctx.scale, decay_gradient=ctx.needs_input_grad[4],
        )  # fmt: skip
        return (
            None, grad_q, grad_k, grad_v, grad_rate if ctx.needs_input_grad[4] else None,
            None if initial_state is None else grad_state, None, None, None,
        )  # fmt: skip


def chunk_state(k: Tensor, v: Tensor, slopes: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``lightning_chunk_state``, differentiable in k, v and slopes."""
    if _wants_gradient(k, v, slopes):
        return _ChunkState.apply(k, v, slopes, cu_seqlens)
    return _op.lightning_chunk_state(k, v, slopes, cu_seqlens=cu_seqlens)


class _ChunkState(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, slopes: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        ctx.save_for_backward(k, v, slopes, cu_seqlens)
        return _op.lightning_chunk_state(k, v, slopes, cu_seqlens=cu_seqlens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The state is the final one of any attention over these keys and values."""
        k, v, slopes, cu_seqlens = ctx.saved_tensors
        _, grad_k, grad_v, grad_slopes, _ = _op.lightning_attention_backward(
            _zeros(v), _zeros(k), k, v, slopes, grad_final_state=grad, cu_seqlens=cu_seqlens,
            decay_gradient=ctx.needs_input_grad[2],
        )  # fmt: skip
        return grad_k, grad_v, grad_slopes if ctx.needs_input_grad[2] else None, None


def apply_state(q: Tensor, state: Tensor, slopes: Tensor, cu_seqlens: Tensor | None, scale: float | None) -> Tensor:
    """``lightning_apply_state``, differentiable in q, state and slopes."""
    if _wants_gradient(q, state, slopes):
        return _ApplyState.apply(q, state, slopes, cu_seqlens, scale)
    return _op.lightning_apply_state(q, state, slopes, cu_seqlens=cu_seqlens, scale=scale)


class _ApplyState(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, state: Tensor, slopes: Tensor, cu_seqlens: Tensor | None, scale: float | None
    ) -> Tensor:
        ctx.save_for_backward(q, state, slopes, cu_seqlens)
        ctx.scale = scale
        return _op.lightning_apply_state(q, state, slopes, cu_seqlens=cu_seqlens, scale=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """What a state adds to attention over keys and values that are zero is all of it."""
        q, state, slopes, cu_seqlens = ctx.saved_tensors
        tokens, heads = q[:, :, :1].expand(-1, -1, state.shape[1], -1), state.shape[3]
        k, v = _zeros(tokens), _zeros(tokens[..., :1].expand(-1, -1, -1, heads))
        grad_q, _, _, grad_slopes, grad_state = _op.lightning_attention_backward(
            grad, q, k, v, slopes, initial_state=state, cu_seqlens=cu_seqlens, scale=ctx.scale,
            decay_gradient=ctx.needs_input_grad[2],
        )  # fmt: skip
        return grad_q, grad_state, grad_slopes if ctx.needs_input_grad[2] else None, None, None


def _zeros(like: Tensor) -> Tensor:
    """Zeros of a shape ``[B, T, H, size]``, held once for all tokens and heads."""
    return like.new_zeros(like.shape[-1]).expand(like.shape)
