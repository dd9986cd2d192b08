# SPDX-License-Identifier: Apache-2.0
"""Rotated and smoothed layers: what happens to the weight so that what happens to x cancels."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_kernels import _checks
from torch_kernels.int8_linear import autograd, reference


def rotation_signs(features: int) -> Tensor:
    """The random signs ``[features]`` of rotated layers, float32 on the CPU: always the same for a width."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randint(2, (features,), generator=generator, device="cpu").float() * 2 - 1


def check_rotatable(name: str, argument: str, features: int) -> None:
    if reference.hadamard_factors(features) is None:
        _checks.fail(name, argument, "2^p, 12 * 2^p or 20 * 2^p to be rotated", features)


def fold(dense: Tensor, signs: Tensor | None, smooth: Tensor | None) -> Tensor:
    """``W S H / sqrt(n) * smooth``, what ``(x S) H / sqrt(n) / smooth`` is to be multiplied by to give ``x W^T``.

    Without signs nothing is rotated, without smooth nothing smoothed.
    """
    if signs is not None:
        dense = autograd.hadamard_transform(dense.float() * signs, None)
    return dense if smooth is None else dense.float() * smooth
