# SPDX-License-Identifier: Apache-2.0
"""Gradients and autocast around the ops. Rounding to integers counts as the identity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_kernels.int8_linear import op as _op


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autocast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As ``torch.nn.functional.linear`` casts; a float32 bias may stay."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype in _op.DTYPES:
        x = x.to(torch.get_autocast_dtype(x.device.type))
        if bias is not None and bias.dtype != torch.float32:
            bias = bias.to(x.dtype)
    return x, bias


def _bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad[None].flatten(0, -2).sum(0, dtype=torch.float32).to(dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """``int8_linear``, differentiable in x and bias."""
    x, bias = _autocast(x, bias)
    if _wants_gradient(x, bias):
        return _Linear.apply(x, weight, weight_scale, bias, x_scale, threshold)
    return _op.int8_linear(x, weight, weight_scale, bias, x_scale=x_scale, threshold=threshold)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        x_scale: Tensor | None,
        threshold: float,
    ) -> Tensor:
        ctx.save_for_backward(weight, weight_scale)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _op.int8_linear(x, weight, weight_scale, bias, x_scale=x_scale, threshold=threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _op.int8_linear_backward(grad, *ctx.saved_tensors)
        if ctx.needs_input_grad[3]:
            dbias = _bias_gradient(grad, ctx.bias_dtype)
        return dx, None, None, dbias, None, None


def hadamard_transform(x: Tensor, scale: float | None) -> Tensor:
    """``hadamard_transform``, differentiable in x."""
    if _wants_gradient(x):
        return _Hadamard.apply(x, scale)
    return _op.hadamard_transform(x, scale=scale)


class _Hadamard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float | None) -> Tensor:
        ctx.scale = scale
        return _op.hadamard_transform(x, scale=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return hadamard_transform(grad, ctx.scale), None  # the matrix is symmetric


def rotated_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    signs: Tensor,
    smooth: Tensor | None,
    x_scale: Tensor | None,
) -> Tensor:
    """``rotate_quantize`` times a weight that was rotated and smoothed alike, differentiable in x and bias."""
    x, bias = _autocast(x, bias)
    if _wants_gradient(x, bias):
        return _RotatedLinear.apply(x, weight, weight_scale, bias, signs, smooth, x_scale)
    return _multiply_rotated(x, weight, weight_scale, bias, signs, smooth, x_scale)


def _multiply_rotated(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    signs: Tensor,
    smooth: Tensor | None,
    x_scale: Tensor | None,
) -> Tensor:
    q, scale = _op.rotate_quantize(x, signs=signs, smooth=smooth, x_scale=x_scale)
    products = _op.int8_mm(q.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
    y = products.float() * scale[..., None] * weight_scale
    if bias is not None:
        y = y + bias
    # A cast that does nothing would have Dynamo of torch 2.11 lose the incoming gradient.
    return y if y.dtype == x.dtype else y.to(x.dtype)


class _RotatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        signs: Tensor,
        smooth: Tensor | None,
        x_scale: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, weight_scale, signs, smooth)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _multiply_rotated(x, weight, weight_scale, bias, signs, smooth, x_scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, weight_scale, signs, smooth = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _op.int8_linear_backward(grad.float(), weight, weight_scale)
            dx = _op.hadamard_transform(dx if smooth is None else dx / smooth)
            dx = (dx * signs).to(grad.dtype)
        if ctx.needs_input_grad[3]:
            dbias = _bias_gradient(grad, ctx.bias_dtype)
        return dx, None, None, dbias, None, None, None
