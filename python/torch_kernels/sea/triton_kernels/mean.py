# SPDX-License-Identifier: Apache-2.0
"""The mean of all tokens so far, from sums in float64: of parts of a sequence, before each part, and within it."""

import torch
import triton
import triton.language as tl

from torch_kernels._triton import in_batches, on_device

PART = 256  # tokens
BLOCK = 128  # columns


@triton.jit
def _columns(v, batch, columns, size, v_stride_b, v_stride_h, BLOCK: tl.constexpr):
    """Of the heads side by side: pointers to the first token's, and which exist."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = (column // size).to(tl.int64)
    return column, v + batch * v_stride_b + head * v_stride_h + column % size, column < columns


@triton.jit(do_not_specialize=["tokens", "parts", "columns"])
def part_sums_kernel(
    sums, v, tokens, parts, columns, size, v_stride_b, v_stride_t, v_stride_h, PART: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """sums [B, parts, columns]. Grid (column blocks, parts, batch)."""
    part, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    column, v, exists = _columns(v, batch, columns, size, v_stride_b, v_stride_h, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for token in range(part * PART, tl.minimum(part * PART + PART, tokens)):
        total += tl.load(v + tl.cast(token, tl.int64) * v_stride_t, mask=exists, other=0.0).to(tl.float64)
    tl.store(sums + (batch * parts + part) * columns + column, total, mask=exists)


@triton.jit(do_not_specialize=["parts", "columns"])
def sums_before_kernel(sums, final, initial, parts, columns, BLOCK: tl.constexpr):
    """Replaces each part's sum by that of all before it. Grid (column blocks, batch)."""
    batch = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = column < columns
    total = tl.zeros((BLOCK,), tl.float64)
    if initial is not None:
        total = tl.load(initial + batch * columns + column, mask=exists, other=0.0)
    for part in range(parts):
        at = sums + (batch * parts + part) * columns + column
        added = tl.load(at, mask=exists, other=0.0)
        tl.store(at, total, mask=exists)
        total += added
    tl.store(final + batch * columns + column, total, mask=exists)


@triton.jit(do_not_specialize=["tokens", "parts", "columns"])
def mean_kernel(
    mean, v, sums, count, tokens, parts, columns, size, v_stride_b, v_stride_t, v_stride_h, PART: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    part, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    column, v, exists = _columns(v, batch, columns, size, v_stride_b, v_stride_h, BLOCK)
    total = tl.load(sums + (batch * parts + part) * columns + column, mask=exists, other=0.0)
    before = batch * 0
    if count is not None:
        before = tl.load(count + batch)
    for token in range(part * PART, tl.minimum(part * PART + PART, tokens)):
        at = tl.cast(token, tl.int64)
        total += tl.load(v + at * v_stride_t, mask=exists, other=0.0).to(tl.float64)
        value = total / (before + token + 1).to(tl.float64)
        target = mean + (batch * tokens + at) * columns + column
        tl.store(target, value.to(tl.float32).to(mean.dtype.element_ty), mask=exists)


@in_batches()
def running_mean(mean, sum_after, count_after, v, sum, count):
    batch, tokens, heads, size = v.shape
    columns, parts = heads * size, triton.cdiv(tokens, PART)
    if count is None:
        count_after.fill_(tokens)
    else:
        torch.add(count, tokens, out=count_after)
    if batch * columns == 0:
        return
    sums = torch.empty(batch, parts, columns, dtype=torch.float64, device=v.device)
    blocks, arguments = triton.cdiv(columns, BLOCK), (tokens, parts, columns, size, *v.stride()[:3])
    options = {"BLOCK": BLOCK, "num_warps": 4}
    with on_device(v):
        if parts:
            part_sums_kernel[(blocks, parts, batch)](sums, v, *arguments, PART=PART, **options)
        sums_before_kernel[(blocks, batch)](
            sums, sum_after, None if sum is None else sum.contiguous(), parts, columns, **options
        )  # fmt: skip
        if parts:
            mean_kernel[(blocks, parts, batch)](
                mean, v, sums, None if count is None else count.contiguous(), *arguments, PART=PART, **options
            )  # fmt: skip
