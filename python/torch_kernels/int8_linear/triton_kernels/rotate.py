# SPDX-License-Identifier: Apache-2.0
"""Hadamard transforms of rows, and rotated rows as int8.

A transform of n = base * 2^p numbers is one along the base (Paley's matrix of order 12 or 20) and one along the power
of two (Sylvester's), in any order. A program holds a few whole transforms in registers. One that does not fit goes
through memory once, in float32: first along its lower bits, then along the rest.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from torch_kernels._triton import on_device

from .quantize import as_rows, magnitude, quantize_rows, scale_of, static_scale, to_int8

# Numbers a program holds at most, and aims at.
MOST, USUAL = 16384, 4096
# Bit i is set where i is a square modulo base - 1, or 0.
SQUARES = {base: sum(1 << i for i in {i * i % (base - 1) for i in range(base - 1)}) for base in (12, 20)}


class Pass(NamedTuple):
    """Transforms of base * 2^bits numbers at distance `inner`, as a kernel sees them."""

    base: int
    bits: int
    inner: int

    @property
    def size(self) -> int:
        return self.base << self.bits

    @property
    def padded(self) -> int:
        return triton.next_power_of_2(self.base) << self.bits

    def launch(self) -> tuple[dict, dict]:
        """Constants and options of the kernel. At a distance, 16 neighbours fill whole sectors of memory."""
        lines = max(USUAL // self.padded, 16 if self.inner > 1 else 1)
        constants = {"BASE": self.base, "SQUARES": SQUARES.get(self.base, 0), "BITS": self.bits, "LINES": lines,
                     "BASE_BLOCK": triton.next_power_of_2(self.base)}  # fmt: skip
        return constants, {"num_warps": max(self.padded * lines // 1024, 4)}


def passes(n: int) -> list[Pass]:
    """One pass, or two where n does not fit into a program."""
    base = next(base for base in (1, 12, 20) if n % base == 0 and (n // base) & (n // base - 1) == 0)
    bits = (n // base).bit_length() - 1
    whole = Pass(base, bits, 1)
    if whole.padded <= MOST:
        return [whole]
    # The second pass takes at least 16 lines.
    low = max(bits // 2, bits - (MOST // 16 // triton.next_power_of_2(base)).bit_length() + 1)
    return [Pass(1, low, 1), Pass(base, bits - low, 1 << low)]


@triton.jit
def _butterflies(x, LINES: tl.constexpr, BITS: tl.constexpr):
    """Sylvester's transform of rows of x [LINES, 2^BITS]. Each step transforms the lowest bit and makes it the highest,
    so that in the end all are back in place."""
    for _ in tl.static_range(BITS):
        even, odd = tl.split(tl.reshape(x, (LINES, 2 ** (BITS - 1), 2)))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (LINES, 2**BITS))
    return x


@triton.jit
def _load(x, signs, at, position, inside):
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if signs is not None:
        value *= tl.load(signs + position, mask=inside, other=0.0)
    return value


@triton.jit(do_not_specialize=["lines"])
def rotate_kernel(
    out, scale, x, signs, smooth, x_scale, factor, limit, lines, per_row, inner, x_stride, out_stride,
    BASE: tl.constexpr, SQUARES: tl.constexpr, BITS: tl.constexpr, LINES: tl.constexpr, BASE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of lines). A row has per_row lines, transforms of numbers at distance inner; with `scale` a line is a
    row, and becomes integers."""
    POWER: tl.constexpr = 2**BITS
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    row = line // per_row
    rest = line % per_row
    start = rest // inner * (BASE * POWER * inner) + rest % inner
    x_offset = row.to(tl.int64) * x_stride
    if BASE == 1:
        step = tl.arange(0, POWER)
        position = start[:, None] + step[None, :] * inner
        inside = (line < lines)[:, None] & (step >= 0)[None, :]
        value = _load(x, signs, x_offset[:, None] + position, position, inside)
    else:
        i = tl.arange(0, BASE_BLOCK)[None, :, None]
        step = tl.arange(0, POWER)[None, None, :]
        inside = (line < lines)[:, None, None] & (step >= 0)
        value = tl.zeros((LINES, BASE_BLOCK, POWER), tl.float32)
        for j in range(BASE):
            position = start[:, None, None] + (j * POWER + step) * inner
            part = _load(x, signs, x_offset[:, None, None] + position, position, inside)
            # Row 0 and column 0 of the base are 1; others -1 where i + j is a square modulo BASE - 1, or 0.
            square = (SQUARES >> ((i - 1 + j - 1 + BASE - 1) % (BASE - 1))) & 1
            value += tl.where((i == 0) | (i * 0 + j == 0), 1, 1 - 2 * square).to(tl.float32) * part
    value = tl.reshape(_butterflies(value, LINES * BASE_BLOCK, BITS), (LINES, BASE_BLOCK * POWER)) * factor

    # For bases, the numbers past the end are not part of the transform.
    index = tl.arange(0, BASE_BLOCK * POWER)
    position = start[:, None] + index[None, :] * inner
    inside = (line < lines)[:, None] & (index < BASE * POWER)[None, :]
    if smooth is not None:
        value = tl.div_rn(value, tl.load(smooth + position, mask=inside, other=1.0))
    target = out + row.to(tl.int64)[:, None] * out_stride + position
    if scale is None:
        tl.store(target, value.to(out.dtype.element_ty), mask=inside)
    else:
        largest = tl.max(tl.where(inside, magnitude(value), 0), axis=1)
        row_scale = scale_of(largest, limit) if x_scale is None else static_scale(largest, x_scale)
        tl.store(scale + line, row_scale, mask=line < lines)
        tl.store(target, to_int8(value, row_scale, limit), mask=inside)


def _run(out, x, part: Pass, *, scale=None, signs=None, smooth=None, x_scale=None, factor=1.0, limit=0.0):
    rows, n = x.shape
    per_row = n // part.size
    constants, options = part.launch()
    rotate_kernel[(triton.cdiv(rows * per_row, constants["LINES"]),)](
        out, scale, x, signs, smooth, x_scale, factor, limit, rows * per_row, per_row, part.inner, x.stride(0),
        out.stride(0), **constants, **options,
    )  # fmt: skip


def hadamard_transform(out, x, scale):
    if x.numel() == 0:
        return
    out, x = as_rows(out), as_rows(x)
    *before, last = passes(x.shape[1])
    with on_device(x):
        for part in before:
            between = torch.empty(x.shape, dtype=torch.float32, device=x.device)
            _run(between, x, part)
            x = between
        _run(out, x, last, factor=1 / math.sqrt(x.shape[1]) if scale is None else float(scale))


def rotate_quantize(q, scale, x, signs, smooth, x_scale, bits):
    if x.numel() == 0:
        return
    q, x = as_rows(q), as_rows(x)
    limit, factor = 2.0 ** (bits - 1) - 1, 1 / math.sqrt(x.shape[1])
    first, *rest = passes(x.shape[1])
    with on_device(x):
        if not rest:
            _run(q, x, first, scale=scale, signs=signs, smooth=smooth, x_scale=x_scale, factor=factor, limit=limit)
            return
        rotated = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        _run(rotated, x, first, signs=signs)
        _run(rotated, rotated, rest[0], factor=factor)
        quantize_rows(q, scale, rotated, limit=limit, smooth=smooth, x_scale=x_scale)
