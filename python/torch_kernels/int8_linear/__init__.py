# SPDX-License-Identifier: Apache-2.0
"""Linear layers with 8-bit weights and activations, LLM.int8(), and the rotation that makes activations easy to round.

:class:`Int8Weight` holds the weight; :func:`int8_linear` multiplies by it, :func:`int8_quantize` and :func:`int8_mm`
are its two halves; :func:`hadamard_transform` and :func:`rotate_quantize` spread outliers over all columns first.
"""

from __future__ import annotations

from torch import Tensor

from torch_kernels import _checks
from torch_kernels.int8_linear import autograd
from torch_kernels.int8_linear import op as _op
from torch_kernels.int8_linear.weight import Int8Weight

__all__ = ["Int8Weight", "hadamard_transform", "int8_linear", "int8_mm", "int8_quantize", "rotate_quantize"]


def int8_quantize(x: Tensor, *, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    r"""Rounds the rows of x to int8, each with its own scale, and sets columns with outliers aside.

    .. math::
        \mathrm{scale}_m = \max_{k:\,|x_{mk}| < \mathrm{threshold}} |x_{mk}| / 127, \qquad
        q_{mk} = \mathrm{round}(x_{mk} / \mathrm{scale}_m)

    Rounding is half to even; -128 never occurs. With a threshold, a column in which any row holds
    :math:`|x| \ge \mathrm{threshold}` is an outlier column: q is 0 there. Infinities count as outliers, NaN does not.

    Args:
        x: ``[.., K]``, float32, float16 or bfloat16.
        threshold: 0 for none (all numbers count); LLM.int8() uses 6. Compared in float32.

    Returns:
        q int8 ``[.., K]``; scale float32 ``[..]``; outliers bool ``[K]``.

        A row of zeros has scale 0 and q 0; a row with NaN (or, without a threshold, an infinity) has a scale that is
        not finite and q 0. Nothing here depends on values by its shape, and nothing synchronises the device.

    Raises:
        ValueError, TypeError: an argument has a wrong dtype, shape or value.

    Dettmers et al., *LLM.int8()*, arXiv 2208.07339.
    """
    return _op.int8_quantize(x, threshold=threshold)


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """The exact product of int8 matrices, ``a @ b.T``.

    Args:
        a: int8 ``[M, K]``, any size, -128 included.
        b: int8 ``[N, K]``.

    Returns:
        int32 ``[M, N]``. From K = 131072 on sums may leave int32; they wrap around then.

    Raises:
        ValueError, TypeError: an argument has a wrong dtype, shape or device.
    """
    return _op.int8_mm(a, b)


def int8_linear(
    x: Tensor, w: Int8Weight, bias: Tensor | None = None, threshold: float = 0.0, *, x_scale: Tensor | None = None
) -> Tensor:
    r"""A linear layer with an 8-bit weight, its activations rounded to int8 on the way in.

    With q, the row scales and the outlier columns O of :func:`int8_quantize`:

    .. math::
        y_{mn} = \Big(\sum_k q_{mk}\, w_{nk}\Big) \mathrm{scale}_m\, \mathrm{wscale}_n
               + \sum_{k \in O} x_{mk}\, w_{nk}\, \mathrm{wscale}_n + \mathrm{bias}_n

    The first sum is exact, everything after it float32, and y is rounded to x's dtype once. ``threshold=6.0`` is
    LLM.int8(); 0 is W8A8 with a scale for each row.

    Args:
        x: ``[.., K]``, float32, float16 or bfloat16, K at most 131071. Under autocast it is cast as
            ``torch.nn.functional.linear`` casts.
        w: the weight ``[N, K]``.
        bias: ``[N]``, x's dtype or float32.
        threshold: columns in which any row holds ``|x| >= threshold`` are multiplied in floating point; 0 for none.
        x_scale: ``[1]``, float32: one scale for all rows, known beforehand (SmoothQuant, Quamba; see
            :func:`torch_kernels.calibrate`). Larger numbers saturate at ±127. Not with a threshold.

    Returns:
        ``[.., N]`` in x's dtype.

        A row of zeros gives exactly the bias. A row with a NaN or infinity gives nothing finite, and other rows nothing
        of it. With threshold 0 a row's bits do not depend on the other rows; with a threshold, outlier columns are
        those of the whole batch.

    Raises:
        ValueError, TypeError: an argument has a wrong type, dtype, shape, device or value.

    Differentiable in x and bias, as if rounding were the identity: ``dx = (dy * wscale) @ w``, without a weight in
    floating point.

    Dettmers et al., *LLM.int8()*, arXiv 2208.07339; Xiao et al., *SmoothQuant*, arXiv 2211.10438; Chiang et al.,
    *Quamba*, arXiv 2410.13229.
    """
    _checks.is_tensor("int8_linear", x=x)
    if not isinstance(w, Int8Weight):
        _checks.fail("int8_linear", "w", "an Int8Weight", type(w).__name__, TypeError)
    return autograd.linear(x, w.weight, w.scale, bias, x_scale, threshold)


def hadamard_transform(x: Tensor, *, scale: float | None = None) -> Tensor:
    r"""The Hadamard transform of the last dimension, ``scale * x @ H``, in n log n additions.

    .. math::
        H = H_b \otimes \begin{pmatrix} 1 & 1 \\ 1 & -1 \end{pmatrix}^{\otimes p}, \qquad n = b \cdot 2^p, \quad
        b \in \{1, 12, 20\}

    :math:`H_{12}` and :math:`H_{20}` are Paley's first construction for q = 11 and 19 with rows and columns signed and
    permuted so that they are symmetric: the first row and column are 1, and entry ``[1 + i][1 + j]`` is 1 where i + j
    is no square modulo q, else -1. Every H is symmetric, so with the default scale the transform is orthonormal and
    its own inverse.

    Args:
        x: ``[.., n]``, float32, float16 or bfloat16; n is :math:`2^p`, :math:`12 \cdot 2^p` or :math:`20 \cdot 2^p`
            (thus also :math:`40 \cdot 2^p`).
        scale: multiplies the sums; None is ``1 / sqrt(n)``.

    Returns:
        ``[.., n]`` in x's dtype; sums are float32, rounded once.

    Raises:
        ValueError, TypeError: x has another dtype, or an n of another form.

    Differentiable in x; the gradient is the same transform.

    As in Ashkboos et al., *QuaRot*, arXiv 2404.00456.
    """
    return autograd.hadamard_transform(x, scale)


def rotate_quantize(
    x: Tensor,
    *,
    signs: Tensor | None = None,
    smooth: Tensor | None = None,
    x_scale: Tensor | None = None,
    bits: int = 8,
) -> tuple[Tensor, Tensor]:
    r"""Rotates rows, smooths and quantises them, in one pass that never rounds the rotated values to x's dtype.

    .. math::
        r = (x \odot \mathrm{signs})\, H / \sqrt{n} \oslash \mathrm{smooth}, \qquad
        q = \mathrm{round}(r / \mathrm{scale}), \quad |q| \le 2^{\mathrm{bits} - 1} - 1

    with H as in :func:`hadamard_transform`. As ``(x S H)(W S H)^T / n = x W^T``, a layer with weight
    ``W S H / sqrt(n) * smooth`` undoes rotation and smoothing.

    Args:
        x: ``[.., n]``, float32, float16 or bfloat16; n as for :func:`hadamard_transform`.
        signs: ``[n]`` of +1 and -1, int8 or floating point: makes the rotation a random one.
        smooth: ``[n]``, floating point: divides each channel after the rotation.
        x_scale: ``[1]``, float32: the scale of all rows, known beforehand; larger values saturate.
        bits: 2 to 8.

    Returns:
        q int8 ``[.., n]``, and scale float32 ``[..]``, the row's ``max|r|`` over the largest q, or ``x_scale``.

        A row of zeros has scale 0 (unless ``x_scale`` is given) and q 0; one with a NaN or infinity has a scale that
        is not finite, also with ``x_scale``, and q 0.

    Raises:
        ValueError, TypeError: an argument has a wrong dtype, shape, device or value.

    Ashkboos et al., *QuaRot*, arXiv 2404.00456; Chiang et al., *Quamba*, arXiv 2410.13229; rotation before smoothing:
    *QuantVGGT*, arXiv 2509.21302.
    """
    return _op.rotate_quantize(x, signs=signs, smooth=smooth, x_scale=x_scale, bits=bits)
