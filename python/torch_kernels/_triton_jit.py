# SPDX-License-Identifier: Apache-2.0
"""Pieces of kernels that several ops share. `_triton.py` has what their launchers share, and needs no Triton."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def round_to_even(x):
    """To the nearest integer, ties to even, for |x| < 2^22: the unit of float32 numbers around 1.5 * 2^23 is 1."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def is_special(x):
    """NaN or infinite. Zero times such a number is not zero, so it would reach rows that do not see it."""
    return (x != x) | (tl.abs(x) == float("inf"))


@triton.jit
def locate(slot, wanted, block_table, pages, page_stride, slot_stride, PAGE: tl.constexpr):
    """Element offsets of a sequence's slots, and which of the wanted ones exist: its block table may hold anything.
    PAGE = 0: slots lie one after another."""
    if PAGE > 0:
        page = tl.load(block_table + slot // PAGE, mask=wanted, other=-1).to(tl.int64)
        offset = page * page_stride + (slot % PAGE).to(tl.int64) * slot_stride
        exists = (page >= 0) & (page < pages)
    else:
        offset = slot.to(tl.int64) * slot_stride
        exists = wanted
    return offset, exists


@triton.jit
def load_tile(base, offset, exists, SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK] elements at base + offset[row]; zero where a row does not exist and beyond SIZE. Without MASKED all
    rows exist."""
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    pointers = base + offset[:, None] + column[None, :]
    if MASKED:
        tile = tl.load(pointers, mask=exists[:, None] & inside[None, :], other=0.0)
    elif SIZE < BLOCK:
        tile = tl.load(pointers, mask=inside[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def softmax_step(scores, peak, total):
    """One step of online softmax, in base 2: the weights of these scores, the decay of what came before, and each row's
    peak and total."""
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    anchor = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weights = tl.exp2(scores - anchor[:, None])
    decay = tl.exp2(peak - anchor)
    return weights, decay, new_peak, total * decay + tl.sum(weights, axis=1)


@triton.jit
def softmax_end(acc, peak, total):
    """Rows of the result and their log-sum-exp, in base 2. Rows that saw nothing give 0 and -inf."""
    empty = total == 0
    result = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, total)[:, None])
    return result, tl.where(empty, -float("inf"), peak + tl.log2(tl.where(empty, 1.0, total)))


@triton.jit
def join_splits(
    partial_out, partial_lse, row, stride, splits, exists,
    DV: tl.constexpr, ROWS: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Joins the splits of ROWS rows, in order. The next split's are `stride` rows further on."""
    d = tl.arange(0, BLOCK_DV)
    inside = exists[:, None] & (d < DV)[None, :]
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    for split in range(splits):
        peak = tl.maximum(peak, tl.load(partial_lse + row + split * stride, mask=exists, other=-float("inf")))
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for split in range(splits):
        at = row + split * stride
        weight = tl.exp2(tl.load(partial_lse + at, mask=exists, other=-float("inf")) - peak)
        part = tl.load(partial_out + at[:, None] * DV + d[None, :], mask=inside, other=0.0)
        acc += tl.where((weight == 0)[:, None], 0.0, weight[:, None] * part)
        total += weight
    return softmax_end(acc, peak, total)
