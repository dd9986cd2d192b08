# SPDX-License-Identifier: Apache-2.0
"""Tiles whose columns are taken in two halves, the first and the second elements of the pairs that rotate together, as
the gradients' kernels do."""

import triton
import triton.language as tl

from torch_kernels._triton_jit import is_special

from .rotation import pair_columns, turn_of


@triton.jit
def load_halves(
    k, offset, exists, SIZE: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr
):
    pair = tl.arange(0, BLOCK // 2)
    first, second = pair_columns(pair, SIZE, INTERLEAVED)
    if MASKED or SIZE < BLOCK:
        mask = exists[:, None] & (pair < SIZE // 2)[None, :]
        a = tl.load(k + offset[:, None] + first[None, :], mask=mask, other=0.0)
        b = tl.load(k + offset[:, None] + second[None, :], mask=mask, other=0.0)
    else:
        a = tl.load(k + offset[:, None] + first[None, :])
        b = tl.load(k + offset[:, None] + second[None, :])
    return a, b


@triton.jit
def load_turned_halves(
    q, offset, exists, token, turns, delta,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The halves of a tile of queries, turned where ROPE, rounded once."""
    pair = tl.arange(0, BLOCK // 2)
    first, second = pair_columns(pair, SIZE, INTERLEAVED)
    mask = exists[:, None] & (pair < SIZE // 2)[None, :]
    a = tl.load(q + offset[:, None] + first[None, :], mask=mask, other=0.0)
    b = tl.load(q + offset[:, None] + second[None, :], mask=mask, other=0.0)
    if ROPE:
        c, s = turn_of(token, exists, turns, delta, pair, SIZE, True)
        x = (a * c - b * s).to(a.dtype)
        b = (a * s + b * c).to(a.dtype)
        a = x
    return a, b


@triton.jit
def finite(x):
    """x with 0 for NaN and infinities."""
    return tl.where(is_special(x), 0.0, x).to(x.dtype)
