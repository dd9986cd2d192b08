# SPDX-License-Identifier: Apache-2.0
"""dx = grad W, with W unpacked on its way into the tensor cores.

Transposed as the forward product is: W^T grad^T. The sum runs over output features, of which each has a scale of its
own, so the scale belongs to the weight here: (q - 8 - zero) * scale is formed in float32 and rounded once to grad's
dtype, as a dense weight of that dtype would be.
"""

import torch
import triton
import triton.language as tl

from torch_kernels._triton import architecture, multiprocessors, on_device

from .. import heuristics
from .linear import SUM_BLOCK, launch_options, sum_splits_kernel
from .weights import load_words, unpack, word_offsets


@triton.jit
def _by_group(pointer, column, feature, groups, features, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """[features, BLOCK_K] of a [groups, features] tensor, each group's value for all of its columns."""
    GROUPS: tl.constexpr = BLOCK_K // GROUP if 0 < GROUP and GROUP < BLOCK_K else 1
    first = 0
    if GROUP > 0:
        first = column // GROUP
    group = first + tl.arange(0, GROUPS)
    at = group[None, :].to(tl.int64) * features + feature[:, None]
    values = tl.load(pointer + at, mask=(group < groups)[None, :] & (feature < features)[:, None], other=0.0)
    wide = tl.broadcast_to(values.to(tl.float32)[:, :, None], (feature.shape[0], GROUPS, BLOCK_K // GROUPS))
    return tl.reshape(wide, (feature.shape[0], BLOCK_K))


@triton.jit
def _sum_features(
    grad, weight, scales, zeros, first, begin, end, tiles_n, tile_stride, features, groups, row, rows, grad_stride,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K, BLOCK_M] sum over output features begin .. end-1, for the columns from `first` on."""
    dtype: tl.constexpr = grad.dtype.element_ty
    offset = tl.arange(0, BLOCK_N)
    grad_rows = grad + row[None, :].to(tl.int64) * grad_stride
    sums = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for start in range(begin, end, BLOCK_N):
        feature = start + offset
        tiles, place = word_offsets(start, tiles_n, tile_stride, BLOCK_N, BLOCK_K)
        words = load_words(weight, tiles, place, first, BLOCK_K)
        w = unpack(words, None, dtype, BLOCK_N, BLOCK_K).to(tl.float32)
        if zeros is not None:
            w -= _by_group(zeros, first, feature, groups, features, GROUP, BLOCK_K)
        w = (w * _by_group(scales, first, feature, groups, features, GROUP, BLOCK_K)).to(dtype)
        inside = (row < rows)[None, :] & (feature < features)[:, None]
        values = tl.load(grad_rows + feature[:, None], mask=inside, other=0.0)
        sums += tl.dot(tl.trans(w), values, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["rows", "split_steps"])
def int4_linear_backward_kernel(
    out, grad, weight, scales, zeros, perm, rows, features, columns, groups, in_features, tiles_n, grad_stride,
    tile_stride, split_steps,
    GROUP: tl.constexpr, SEQUENCE: tl.constexpr, PARTIAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (column tiles * row tiles, splits side by side). PARTIAL: out is [splits, rows, columns] in float32, in the
    packed order; otherwise column j goes to perm[j]. SEQUENCE: the program sums all splits."""
    column_tiles = tl.cdiv(columns, BLOCK_K)
    first = tl.program_id(0) % column_tiles * BLOCK_K
    row = tl.program_id(0) // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    if SEQUENCE:
        sums = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
        for begin_steps in range(0, tl.cdiv(features, BLOCK_N), split_steps):
            begin = begin_steps * BLOCK_N
            sums += _sum_features(
                grad, weight, scales, zeros, first, begin, tl.minimum(begin + split_steps * BLOCK_N, features), tiles_n,
                tile_stride, features, groups, row, rows, grad_stride, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        begin = tl.program_id(1) * split_steps * BLOCK_N
        sums = _sum_features(
            grad, weight, scales, zeros, first, begin, tl.minimum(begin + split_steps * BLOCK_N, features), tiles_n,
            tile_stride, features, groups, row, rows, grad_stride, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    column = first + tl.arange(0, BLOCK_K)
    if PARTIAL:
        inside = (row < rows)[None, :] & (column < columns)[:, None]
        place = (tl.program_id(1).to(tl.int64) * rows + row) * columns
        tl.store(out + place[None, :] + column[:, None], sums, mask=inside)
    else:
        target = column
        if perm is not None:
            target = tl.load(perm + column, mask=column < columns, other=-1)
        exists = (column < columns) & (target >= 0) & (target < in_features)
        place = out + row[None, :].to(tl.int64) * in_features + target[:, None]
        tl.store(place, sums.to(out.dtype.element_ty), mask=(row < rows)[None, :] & exists[:, None])


def int4_linear_backward(out, grad, weight, scales, zeros, perm, in_features, group_size):
    features = grad.shape[-1]
    if out.numel() == 0:
        return
    rows, columns = out.numel() // in_features, in_features if perm is None else perm.shape[0]
    rows_out, grad = out.view(rows, in_features), grad.reshape(rows, features)
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    if perm is not None or features == 0:
        rows_out.zero_()
    if features == 0 or columns == 0:
        return
    arch = architecture(grad.device)
    plan = heuristics.backward_plan(
        rows, features, columns, grad.element_size(), arch, multiprocessors(grad.device)
    )  # fmt: skip
    tile = plan.tile
    column_tiles, row_tiles = triton.cdiv(columns, tile.block_k), triton.cdiv(rows, tile.block_m)
    side_by_side = plan.splits > 1 and not plan.sequence
    beside = plan.splits if side_by_side else 1
    target = rows_out
    with on_device(grad):
        if side_by_side:
            target = torch.empty(beside, rows, columns, dtype=torch.float32, device=grad.device)
        int4_linear_backward_kernel[(column_tiles * row_tiles, beside)](
            target, grad, weight, scales, zeros, perm, rows, features, columns, scales.shape[0], in_features,
            weight.shape[0], grad.stride(0), weight.numel() // weight.shape[0], plan.split // plan.step,
            GROUP=0 if group_size >= columns else max(group_size, 0), SEQUENCE=plan.sequence, PARTIAL=side_by_side,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, num_warps=tile.num_warps,
            num_stages=tile.num_stages, **launch_options(arch),
        )  # fmt: skip
        if side_by_side:
            sum_splits_kernel[(rows, triton.cdiv(columns, SUM_BLOCK))](
                rows_out, target, None, perm, rows, columns, beside, in_features,
                HAS_PERM=perm is not None, BLOCK=SUM_BLOCK,
            )  # fmt: skip
