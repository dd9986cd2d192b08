# SPDX-License-Identifier: Apache-2.0
"""Gradients and autocast around the op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_kernels.int4_linear import op as _op
from torch_kernels.int4_linear.packing import Packed


def linear(x: Tensor, packed: Packed, bias: Tensor | None, mode: str) -> Tensor:
    """``int4_linear`` on a packed weight, differentiable in x and bias."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype in _op.DTYPES:
        x = x.to(torch.get_autocast_dtype(x.device.type))
        if bias is not None and bias.dtype != torch.float32:
            bias = bias.to(x.dtype)
    weight, scales, zeros, perm, _, out_features, group_size = packed
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, weight, scales, zeros, perm, bias, out_features, group_size, mode)
    return _op.int4_linear(
        x, weight, scales, zeros, perm, bias, out_features=out_features, group_size=group_size, mode=mode
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        perm: Tensor | None,
        bias: Tensor | None,
        out_features: int,
        group_size: int,
        mode: str,
    ) -> Tensor:
        ctx.save_for_backward(weight, scales, zeros, perm)
        ctx.in_features, ctx.group_size = x.shape[-1], group_size
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _op.int4_linear(
            x, weight, scales, zeros, perm, bias, out_features=out_features, group_size=group_size, mode=mode
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scales, zeros, perm = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _op.int4_linear_backward(
                grad, weight, scales, zeros, perm, in_features=ctx.in_features, group_size=ctx.group_size
            )
        if ctx.needs_input_grad[5]:
            rows = grad[None] if grad.dim() == 1 else grad.flatten(0, -2)
            dbias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, None, None, None, None, dbias, None, None, None
