# SPDX-License-Identifier: Apache-2.0
"""The gradient of the linear layer's input: grad [M, N] times the dequantised weight [N, K].

The weight's scale belongs to the dimension that is summed over, so it multiplies the gradient. That product is kept to
16 bits more than a bfloat16 holds, as the sum of two, and the integers of the weight are exact in either: the sum is as
good as in float32, at tensor core speed. Tiles are the same for every M, and so is the order of the sum.
"""

import os

import torch
import triton
import triton.language as tl

from torch_kernels._triton import on_device

from .quantize import as_rows


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    out, grad, weight, weight_scale, rows, columns, size, grad_stride, weight_stride,
    HALVES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [rows, columns] = (grad [rows, size] * weight_scale) @ weight [size, columns]. Grid (row tiles, column
    tiles). HALVES: float32 operands are split into two bfloat16."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offset = tl.arange(0, BLOCK_K)
    left_tile = grad + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * grad_stride + offset[None, :]
    right_tile = weight + offset.to(tl.int64)[:, None] * weight_stride + tl.minimum(column, columns - 1)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, size, BLOCK_K):
        present = first + offset < size
        scale = tl.load(weight_scale + first + offset, mask=present, other=0.0)
        left = tl.load(left_tile, mask=present[None, :], other=0.0).to(tl.float32) * scale[None, :]
        right = tl.load(right_tile, mask=present[:, None], other=0)
        if HALVES:
            high = left.to(tl.bfloat16)
            low = (left - high.to(tl.float32)).to(tl.bfloat16)
            # Of an infinity nothing is left over.
            low = tl.where(tl.abs(left) < float("inf"), low, 0.0).to(tl.bfloat16)
            total = tl.dot(high, right.to(tl.bfloat16), total)
            total = tl.dot(low, right.to(tl.bfloat16), total)
        else:
            total = tl.dot(left, right.to(tl.float32), total, input_precision="ieee")
        left_tile += BLOCK_K
        right_tile += tl.cast(weight_stride, tl.int64) * BLOCK_K
    target = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + target, total.to(out.dtype.element_ty), mask=inside)


def tile(halves: bool) -> tuple[dict, dict]:
    """Block sizes and launch options."""
    if halves:
        return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32}, {"num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16}, {"num_warps": 4, "num_stages": 2}


def int8_linear_backward(out, grad, weight, weight_scale):
    if out.numel() == 0:
        return
    out, grad = as_rows(out), as_rows(grad)
    (rows, size), columns = grad.shape, weight.shape[1]
    # The interpreter computes bfloat16 wrongly.
    halves = grad.dtype != torch.float32 and os.environ.get("TRITON_INTERPRET") != "1"
    blocks, options = tile(halves)
    with on_device(grad):
        backward_kernel[(triton.cdiv(rows, blocks["BLOCK_M"]), triton.cdiv(columns, blocks["BLOCK_N"]))](
            out, grad, weight, weight_scale, rows, columns, size, grad.stride(0), weight.stride(0),
            HALVES=halves, **blocks, **options,
        )  # fmt: skip
