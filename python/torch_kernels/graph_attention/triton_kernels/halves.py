# SPDX-License-Identifier: Apache-2.0
"""Tiles whose columns are taken in two halves, the first and the second elements of the pairs that rotate together, as
the gradients' kernels do."""

import triton
import triton.language as tl

from torch_kernels._triton_jit import is_special

from .rotation import pair_columns, turn_of


@triton.jit
def load_halves(
    x, offset, exists, SIZE: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, MASKED: tl.constexpr
):
    """[rows, BLOCK / 2] twice; zero where a row does not exist and beyond SIZE. Without MASKED all rows exist."""
    pair = tl.arange(0, BLOCK // 2)
    first, second = pair_columns(pair, SIZE, INTERLEAVED)
    if MASKED or SIZE < BLOCK:
        mask = exists[:, None] & (pair < SIZE // 2)[None, :]
        a = tl.load(x + offset[:, None] + first[None, :], mask=mask, other=0.0)
        b = tl.load(x + offset[:, None] + second[None, :], mask=mask, other=0.0)
    else:
        a = tl.load(x + offset[:, None] + first[None, :])
        b = tl.load(x + offset[:, None] + second[None, :])
    return a, b


@triton.jit
def load_turned_halves(
    q, offset, exists, token, turns, delta,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Of a tile of queries, turned where ROPE, rounded once."""
    a, b = load_halves(q, offset, exists, SIZE, BLOCK, INTERLEAVED, True)
    if ROPE:
        pair = tl.arange(0, BLOCK // 2)
        c, s = turn_of(token, exists, turns, delta, pair, SIZE, True)
        x = (a * c - b * s).to(a.dtype)
        b = (a * s + b * c).to(a.dtype)
        a = x
    return a, b


@triton.jit
def finite(x):
    """x with 0 for NaN and infinities."""
    return tl.where(is_special(x), 0.0, x).to(x.dtype)
