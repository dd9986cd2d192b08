# SPDX-License-Identifier: Apache-2.0
"""The ops once more, in numpy: integers as int64, everything a scale touches in float32 or, for truths, in float64."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor


def array(x: Tensor) -> np.ndarray:
    """Any tensor as numpy; floating point as float32, which holds all float16 and bfloat16 numbers."""
    x = x.detach().cpu()
    return (x.float() if x.is_floating_point() else x).numpy()


def quantize(x: Tensor, threshold: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q int64, scale float32, outliers bool, by the definition of LLM.int8()."""
    values = array(x)
    outlier = np.abs(values) >= np.float32(threshold) if threshold > 0 else np.zeros(values.shape, bool)
    columns = outlier.reshape(-1, values.shape[-1]).any(0) if values.size else np.zeros(values.shape[-1:], bool)
    scale = np.where(outlier, np.float32(0), np.abs(values)).max(-1, initial=0) / np.float32(127)
    return round_to_integers(np.where(columns, np.float32(0), values), scale, 127), scale, columns


def round_to_integers(values: np.ndarray, scale: np.ndarray, limit: int) -> np.ndarray:
    """``values / scale`` in float32, half to even, saturating; 0 in rows whose scale is 0 or not finite."""
    usable = (np.isfinite(scale) & (scale != 0))[..., None]
    with np.errstate(all="ignore"):
        steps = np.rint(values / np.where(usable, scale[..., None], np.float32(1)))
    steps = np.clip(np.nan_to_num(steps, posinf=limit, neginf=-limit), -limit, limit)
    return np.where(usable, steps, 0).astype(np.int64)


def products(q: np.ndarray, weight: Tensor) -> np.ndarray:
    return q @ array(weight).astype(np.int64).T


def quantized(x: Tensor, x_scale: Tensor | None, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if x_scale is None:
        return quantize(x, threshold)
    finite = np.isfinite(array(x)).all(-1)
    scale = np.where(finite, array(x_scale)[0], np.float32(np.nan))
    return round_to_integers(array(x), scale, 127), scale, np.zeros(x.shape[-1:], bool)


def scaled_products(
    x: Tensor, weight: Tensor, weight_scale: Tensor, x_scale: Tensor | None = None, threshold: float = 0.0
) -> Tensor:
    """The integer part of a layer to the last bit: float32 products of sum, row scale and column scale, in that order.

    For rows [M, K].
    """
    q, scale, _ = quantized(x, x_scale, threshold)
    with np.errstate(all="ignore"):
        y = products(q, weight).astype(np.float32) * scale[:, None] * array(weight_scale)
    return torch.from_numpy(y).to(x.dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, float]:
    """The truth in float64 for rows [M, K], and the largest magnitude among what is added up."""
    q, scale, columns = quantized(x, x_scale, threshold)
    wide = array(weight_scale).astype(np.float64)
    with np.errstate(all="ignore"):
        y = products(q, weight) * scale.astype(np.float64)[:, None] * wide
        x64, w64 = array(x).astype(np.float64)[:, columns], array(weight).astype(np.float64)[:, columns] * wide[:, None]
        largest = max(magnitude(y), magnitude(np.abs(x64) @ np.abs(w64).T))
        y = y + x64 @ w64.T
    if bias is not None:
        largest = max(largest, magnitude(array(bias)))
        y = y + array(bias).astype(np.float64)
    return torch.from_numpy(y), largest


def magnitude(values: np.ndarray) -> float:
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max(initial=0.0))


# The symmetric Hadamard matrices of order 12 and 20, a row a hexadecimal number whose highest bit is column 0; 1 is +1.
BASE = {
    1: ["1"],
    12: "fff 91d a3a c74 8e9 9d2 ba4 f48 e91 d23 a47 c8e".split(),
    20: "fffff 98579 b0af2 e15e4 c2bc9 85793 8af26 95e4c abc98 d7930 "
    "af261 de4c2 bc985 f930a f2615 e4c2b c9857 930af a615e cc2bc".split(),
}


def base_matrix(order: int) -> np.ndarray:
    rows = [[int(bit) for bit in f"{int(row, 16):0{order}b}"] for row in BASE[order]]
    return np.array(rows) * 2 - 1


@functools.cache
def hadamard(n: int) -> np.ndarray:
    """``kron(base, Sylvester)``, int64 ``[n, n]``: base 1, 12 or 20."""
    base = next(b for b in (1, 12, 20) if n % b == 0 and (n // b) & (n // b - 1) == 0)
    matrix = base_matrix(base)
    while len(matrix) < n:
        matrix = np.kron(matrix, [[1, 1], [1, -1]])
    return matrix.astype(np.int64)
