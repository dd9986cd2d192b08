# SPDX-License-Identifier: Apache-2.0
"""The int8 linear ops in PyTorch, on any device: what the other backends are to compute.

Integer parts are exact. A quantised number is ``round(x / scale)``, a float32 division correctly rounded and then
rounded half to even, so every backend finds the same integer. Sums of floating-point numbers are float32.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from torch_kernels._numbers import divide

F32 = torch.float32


def int8_quantize(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as int8: q [.., K], scale [..], and which columns hold outliers [K].

    A number with ``|x| >= threshold > 0`` is an outlier (infinities are, NaN is not). The scale of a row is the largest
    ``|x|`` among its numbers that are not, over 127; q is 0 in every column that holds an outlier of any row, and in
    rows whose scale is 0 or not finite.
    """
    x = x.to(F32)
    is_outlier = (x.abs() >= threshold) if threshold > 0 else torch.zeros_like(x, dtype=torch.bool)
    outliers = is_outlier.flatten(0, -2).any(0) if x.dim() > 1 else is_outlier
    scale = divide(_absmax(x.masked_fill(is_outlier, 0)), 127)
    return _round(x.masked_fill(outliers, 0), scale, 127), scale, outliers


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of integers. float64 holds every such sum exactly and multiplies on all devices."""
    return (a.to(torch.float64) @ b.to(torch.float64).T).to(torch.int64).to(torch.int32)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """``x @ (weight * weight_scale[:, None]).T + bias`` with rows of x as int8, outlier columns as they are."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(F32)
    if x_scale is None:
        q, scale, outliers = int8_quantize(rows, threshold)
    else:
        scale = _static_scale(rows, x_scale)
        q = _round(rows, scale, 127)
    y = int8_mm(q, weight).to(F32) * scale[:, None] * weight_scale
    if threshold > 0:
        dequantised = weight.to(F32) * weight_scale[:, None]
        y = y + rows.masked_fill(~outliers, 0) @ dequantised.masked_fill(~outliers, 0).T
    if bias is not None:
        y = y + bias.to(F32)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def int8_linear_backward(grad: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """``grad @ (weight * weight_scale[:, None])``: the gradient of x as if its quantisation were the identity."""
    return ((grad.to(F32) * weight_scale) @ weight.to(F32)).to(grad.dtype)


@functools.cache
def _base(order: int) -> tuple[tuple[int, ...], ...]:
    """A symmetric Hadamard matrix of order 1, or of order q + 1 with q = 11 or 19 by Paley's first construction.

    With chi(a) = 1 where a is a square modulo q, 0 for a = 0, -1 elsewhere: row 0 and column 0 are 1, and entry
    ``[1 + i][1 + j]`` is ``-chi(i + j)``, or -1 where i + j = 0 modulo q. (Paley has ``chi(i - j)``; rows and columns
    are permuted and signed here so that the matrix becomes symmetric, thus its own inverse but for the factor.)
    """
    q = order - 1
    squares = {i * i % q for i in range(1, q)} if q else set()
    inner = [[1 if (i + j) % q not in squares | {0} else -1 for j in range(q)] for i in range(q)]
    return ((1,) * order, *((1, *row) for row in inner))


def hadamard_factors(n: int) -> tuple[int, int] | None:
    """(base, power of two) with ``n = base * power`` and base 1, 12 or 20, or None if there are none."""
    for base in (1, 12, 20):
        power = n // base
        if n > 0 and n % base == 0 and power & (power - 1) == 0:
            return base, power
    return None


def hadamard_matrix(n: int, device: torch.device | str = "cpu") -> Tensor:
    """The matrix of +1 and -1 ``[n, n]``, float64: ``kron(H_base, H_power)``, both symmetric; H_power by Sylvester."""
    base, power = hadamard_factors(n) or (0, 0)
    matrix = torch.tensor(_base(base), dtype=torch.float64, device=device)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device=device)
    for _ in range(power.bit_length() - 1):
        matrix = torch.kron(matrix, two)
    return matrix


def _rotate(x: Tensor) -> Tensor:
    """``x @ H``, float32, by butterflies along the power of two and a small product along the base."""
    base, power = hadamard_factors(x.shape[-1]) or (0, 0)
    y = x.to(F32).unflatten(-1, (base, power))
    stride = 1
    while stride < power:
        even, odd = y.unflatten(-1, (-1, 2, stride)).unbind(-2)
        y = torch.stack((even + odd, even - odd), -2).flatten(-3)
        stride *= 2
    if base > 1:
        signs = torch.tensor(_base(base), dtype=F32, device=x.device)
        y = (signs[:, :, None] * y[..., None, :, :]).sum(-2)
    return y.flatten(-2)


def hadamard_transform(x: Tensor, scale: float | None = None) -> Tensor:
    """``scale * x @ H`` along the last dimension; scale None is 1/sqrt(n), which makes it orthonormal."""
    factor = 1 / math.sqrt(x.shape[-1]) if scale is None else scale
    return (_rotate(x) * factor).to(x.dtype)


def rotate_quantize(
    x: Tensor,
    signs: Tensor | None = None,
    smooth: Tensor | None = None,
    x_scale: Tensor | None = None,
    bits: int = 8,
) -> tuple[Tensor, Tensor]:
    """``r = (x * signs) @ H / sqrt(n) / smooth`` in float32, and its rows as integers: q [.., n], scale [..]."""
    x = x.to(F32)
    if signs is not None:
        x = x * signs.to(F32)
    r = _rotate(x) * (1 / math.sqrt(x.shape[-1]))
    if smooth is not None:
        r = r / smooth.to(F32)
    limit = 2 ** (bits - 1) - 1
    scale = divide(_absmax(r), limit) if x_scale is None else _static_scale(r, x_scale)
    return _round(r, scale, limit), scale


def _absmax(x: Tensor) -> Tensor:
    """The largest magnitude of each row; NaN if the row holds one, 0 if it is empty."""
    return x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])


def _static_scale(x: Tensor, x_scale: Tensor) -> Tensor:
    """x_scale for every row; NaN for a row that holds a NaN or an infinity, which saturation would hide."""
    return torch.where(x.isfinite().all(-1), x_scale[0], math.nan)


def _round(x: Tensor, scale: Tensor, limit: int) -> Tensor:
    """``x / scale`` to the nearest integer, half to even, at most ``limit``; 0 where scale is 0 or not finite."""
    usable = ((scale != 0) & scale.isfinite())[..., None]
    steps = (x / scale[..., None]).round().clamp(-limit, limit)
    return torch.where(usable, steps, 0).nan_to_num(0).to(torch.int8)
