# SPDX-License-Identifier: Apache-2.0
"""The int4 linear ops in PyTorch: their meaning, exact in float64 but for the one rounding at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_kernels._numbers import divide
from torch_kernels.int4_linear import layout_cpu, layout_gpu

A8_COLUMNS = 128  # of a row that share one int8 scale, or a group of the weight's if that is smaller


def int4_linear(
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
    """``x @ W.T + bias`` with ``W[n, k] = scales[k // g, n] * (q[n, k] - 8 - zeros[k // g, n])``, k a packed column."""
    columns = _gather(x.double(), perm)
    if mode == "a8":
        columns = _round_to_int8(columns, group_size)
    out = columns @ dequantize(weight, scales, zeros, out_features, columns.shape[-1], group_size).T
    if bias is not None:
        out = out + bias.double()
    return out.to(x.dtype)


def int4_linear_backward(
    grad: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    in_features: int,
    group_size: int,
) -> Tensor:
    """``grad @ W``: the gradient of x, in x's order of columns."""
    width = in_features if perm is None else len(perm)
    dx = grad.double() @ dequantize(weight, scales, zeros, grad.shape[-1], width, group_size)
    if perm is not None:
        exists = _exists(perm, in_features)
        unpermuted = dx.new_zeros((*dx.shape[:-1], in_features))
        dx = unpermuted.index_add(-1, perm[exists], dx[..., exists])
    return dx.to(grad.dtype)


def dequantize(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, out_features: int, columns: int, group_size: int
) -> Tensor:
    """The packed weight as float64 ``[N, columns]``."""
    layout = layout_cpu if weight.dtype == torch.uint8 else layout_gpu
    q = layout.unpack(weight, out_features, columns).double() - 8
    group = torch.arange(columns, device=weight.device) // (max(columns, 1) if group_size == -1 else group_size)
    if zeros is not None:
        q = q - zeros.double()[group].T
    return scales.double()[group].T * q


def _exists(perm: Tensor, in_features: int) -> Tensor:
    return (perm >= 0) & (perm < in_features)


def _gather(x: Tensor, perm: Tensor | None) -> Tensor:
    """The columns of x in packed order, 0 where there is none."""
    if perm is None:
        return x
    exists = _exists(perm, x.shape[-1])
    gathered = x.new_zeros((*x.shape[:-1], len(perm)))
    gathered[..., exists] = x[..., perm[exists]]
    return gathered


def _round_to_int8(x: Tensor, group_size: int) -> Tensor:
    """Each row's columns rounded to 127 steps of either sign, in blocks with one float32 step each.

    A block with a NaN or an infinity has a step that is none and becomes NaN.
    """
    size = A8_COLUMNS if group_size == -1 else min(group_size, A8_COLUMNS)
    rounded = torch.empty_like(x)
    for block, out in zip(x.split(size, -1), rounded.split(size, -1)):
        if block.numel():
            step = divide(block.abs().amax(-1, keepdim=True).float(), 127).double()
            out.copy_((block / step.where(step != 0, 1.0)).round() * step)
    return rounded
