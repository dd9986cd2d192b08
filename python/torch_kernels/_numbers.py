# SPDX-License-Identifier: Apache-2.0
"""Arithmetic with a promise that PyTorch's own does not make."""

import math

import torch
from torch import Tensor


def divide(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, rounded once on every device: CUDA would multiply by the rounded reciprocal of a Python number."""
    return x / x.new_full((), divisor)


def weighted_sum(weights: Tensor, visible: Tensor, values: Tensor) -> Tensor:
    """``weights @ values`` in which a NaN or infinity reaches only the rows that see it (0 * NaN would reach all)."""
    total = weights @ values.masked_fill(~values.isfinite(), 0)
    for special in (math.nan, math.inf, -math.inf):
        where = values.isnan() if math.isnan(special) else values == special
        hit = visible.to(values.dtype) @ where.to(values.dtype) > 0
        total = total + torch.where(hit, special, 0.0)
    return total
