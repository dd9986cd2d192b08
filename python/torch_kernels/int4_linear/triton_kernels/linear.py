# SPDX-License-Identifier: Apache-2.0
"""y = x W^T + bias with the int4 weight unpacked on its way into the tensor cores.

The product is computed transposed, W x^T: the weight is the operand that tensor cores take from registers, and its 64
or more output features, not the few rows of x, fill the instruction's fixed dimension. So every M runs the same
instructions in the same order of columns, and a row's bits do not depend on M. The scale of a group and, where zero
points are not integers, their correction are applied to the float32 sum of each step (``block_k`` columns of one
group); in mode a8 to the exact int32 sum.

K may be split. The splits are summed in order, either by the program itself or, side by side, by a second kernel.
"""

import torch
import triton
import triton.language as tl

from torch_kernels._triton import architecture, multiprocessors, on_device

from .. import heuristics, layout_gpu
from .rows import prepare
from .weights import load_words, unpack, word_offsets

# Of the dense product's workspace, so that a chunk stays in the L2 cache from dequantisation to product.
DENSE_WORKSPACE_BYTES = 32 << 20
SUM_BLOCK = 512


@triton.jit
def _sum_columns(
    x, row_scales, row_sums, weight, scales, zeros, first, begin, end, tiles_n, tile_stride, features, groups, row,
    rows, columns, x_stride, row_groups, EVEN: tl.constexpr,
    GROUP: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_M] sum over columns begin .. end-1, in float32. GROUP = 0 is one group of all columns."""
    dtype: tl.constexpr = x.dtype.element_ty
    # In mode a8 the weight is q, else q - 8; the sums of x over the group correct for the rest.
    BASE: tl.constexpr = 8.0 if dtype == tl.int8 else 0.0
    # Groups in a step: one, except that integer products of 32 columns hold two groups of 16.
    PARTS: tl.constexpr = STEP // GROUP if 0 < GROUP and GROUP < STEP else 1
    feature = first + tl.arange(0, BLOCK_N)
    offset = tl.arange(0, BLOCK_K)
    tiles, place = word_offsets(first, tiles_n, tile_stride, BLOCK_N, BLOCK_K)
    x_rows = x + row[None, :].to(tl.int64) * x_stride
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(begin, end, STEP):
        for part in tl.static_range(PARTS):
            group = 0
            if GROUP > 0:
                group = tl.minimum(start // GROUP + part, groups - 1)
            at = tl.cast(group, tl.int64) * features + feature
            scale = tl.load(scales + at, mask=feature < features, other=0.0).to(tl.float32)
            zero = None
            correction = tl.zeros((BLOCK_N,), tl.float32) - BASE
            if zeros is not None:
                zero = tl.load(zeros + at, mask=feature < features, other=0.0)
                if row_sums is not None:
                    correction -= zero.to(tl.float32)
                    zero = None

            product = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if dtype == tl.int8 else tl.float32)
            for chunk in tl.static_range(STEP // BLOCK_K):
                column = start + chunk * BLOCK_K
                stored = column
                if not EVEN:  # a step may go beyond the weight's last tile of columns
                    stored = tl.multiple_of(tl.minimum(column, tile_stride // 4 - BLOCK_K), BLOCK_K)
                words = load_words(weight, tiles, place, stored, BLOCK_K)
                w = unpack(words, zero, dtype, BLOCK_N, BLOCK_K)
                inside = (row < rows)[None, :]
                if not EVEN:
                    inside = inside & (column + offset < columns)[:, None]
                values = tl.load(x_rows + (column + offset)[:, None], mask=inside, other=0)
                if PARTS > 1:
                    values = tl.where((offset // GROUP == part)[:, None], values, 0).to(dtype)
                if dtype == tl.int8:
                    product = tl.dot(w, values, product, out_dtype=tl.int32)
                else:
                    product = tl.dot(w, values, product, input_precision="ieee")

            product = product.to(tl.float32)
            at_row = row.to(tl.int64) * row_groups + start // STEP * PARTS + part
            if row_sums is not None:
                total = tl.load(row_sums + at_row, mask=row < rows, other=0.0)
                product = tl.fma(
                    tl.broadcast_to(correction[:, None], (BLOCK_N, BLOCK_M)),
                    tl.broadcast_to(total[None, :], (BLOCK_N, BLOCK_M)),
                    product,
                )
            if row_scales is not None:
                product *= tl.load(row_scales + at_row, mask=row < rows, other=0.0)[None, :]
            sums = tl.fma(product, tl.broadcast_to(scale[:, None], (BLOCK_N, BLOCK_M)), sums)
    return sums


@triton.jit(do_not_specialize=["rows", "split_steps"])
def int4_linear_kernel(
    out, x, row_scales, row_sums, weight, scales, zeros, bias, rows, features, columns, tiles_n, groups, x_stride,
    tile_stride, row_groups, split_steps,
    EVEN: tl.constexpr, GROUP: tl.constexpr, SEQUENCE: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (feature tiles * row tiles, splits side by side). With several, out is [splits, rows, features] in float32.
    SEQUENCE: the program sums all splits. EVEN: columns is a multiple of STEP."""
    feature_tiles = tl.cdiv(features, BLOCK_N)
    first = tl.program_id(0) % feature_tiles * BLOCK_N
    row = tl.program_id(0) // feature_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    if SEQUENCE:
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for begin_steps in range(0, tl.cdiv(columns, STEP), split_steps):
            begin = begin_steps * STEP
            sums += _sum_columns(
                x, row_scales, row_sums, weight, scales, zeros, first, begin,
                tl.minimum(begin + split_steps * STEP, columns), tiles_n, tile_stride, features, groups, row, rows,
                columns, x_stride, row_groups, EVEN, GROUP, STEP, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        begin = tl.program_id(1) * split_steps * STEP
        sums = _sum_columns(
            x, row_scales, row_sums, weight, scales, zeros, first, begin,
            tl.minimum(begin + split_steps * STEP, columns), tiles_n, tile_stride, features, groups, row, rows,
            columns, x_stride, row_groups, EVEN, GROUP, STEP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    feature = first + tl.arange(0, BLOCK_N)
    if bias is not None:
        sums += tl.load(bias + feature, mask=feature < features, other=0.0).to(tl.float32)[:, None]
    place = (tl.program_id(1).to(tl.int64) * rows + row) * features
    inside = (row < rows)[None, :] & (feature < features)[:, None]
    tl.store(out + place[None, :] + feature[:, None], sums.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "splits"])
def sum_splits_kernel(
    out, partial, bias, perm, rows, features, splits, out_features, HAS_PERM: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums [splits, rows, features] over the splits, in order. Grid (rows, blocks of features). With perm, feature j
    goes to perm[j] of out_features."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        place = (tl.cast(split, tl.int64) * rows + row) * features + feature
        sums += tl.load(partial + place, mask=feature < features, other=0.0)
    if bias is not None:
        sums += tl.load(bias + feature, mask=feature < features, other=0.0).to(tl.float32)
    target = feature
    if HAS_PERM:
        target = tl.load(perm + feature, mask=feature < features, other=-1)
    inside = (feature < features) & (target >= 0) & (target < out_features)
    tl.store(out + row * out_features + target, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def dequantise_kernel(
    out, weight, scales, zeros, features, columns, tiles_n, tile_stride, first_feature,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [.., columns] = W from first_feature on, rounded to out's dtype. Grid (feature tiles, steps of columns)."""
    start = tl.program_id(0) * BLOCK_N
    first = first_feature + start
    feature = first + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_K
    tiles, place = word_offsets(first, tiles_n, tile_stride, BLOCK_N, BLOCK_K)
    words = load_words(weight, tiles, place, column, BLOCK_K)
    group = 0
    if GROUP > 0:
        group = column // GROUP
    at = tl.cast(group, tl.int64) * features + feature
    scale = tl.load(scales + at, mask=feature < features, other=0.0).to(tl.float32)
    w = unpack(words, None, tl.float32, BLOCK_N, BLOCK_K)
    if zeros is not None:
        w -= tl.load(zeros + at, mask=feature < features, other=0.0).to(tl.float32)[:, None]
    w *= scale[:, None]
    k = column + tl.arange(0, BLOCK_K)
    place = (start + tl.arange(0, BLOCK_N)).to(tl.int64) * columns
    inside = (feature < features)[:, None] & (k < columns)[None, :]
    tl.store(out + place[:, None] + k[None, :], w.to(out.dtype.element_ty), mask=inside)


def launch_options(arch: str) -> dict:
    """AMD's matrix instructions come in two shapes, which sum in different orders: one serves every M."""
    return {"matrix_instr_nonkdim": 16} if arch.startswith("gfx") else {}


def _dense(out, x, weight, scales, zeros, bias, group_size):
    """The product with W dequantised to x's dtype, a chunk of output features after another."""
    features, columns = out.shape[1], x.shape[1]
    chunk = min(max(DENSE_WORKSPACE_BYTES // (2 * columns) // 128, 1) * 128, features)
    workspace = torch.empty(chunk, columns, dtype=x.dtype, device=x.device)
    tiles_n, tile_stride = weight.shape[0], weight.numel() // weight.shape[0]
    step = min(heuristics.step_columns(group_size, 2), 64)
    for first in range(0, features, chunk):
        count = min(chunk, features - first)
        dequantise_kernel[(triton.cdiv(count, 64), triton.cdiv(columns, step))](
            workspace, weight, scales, zeros, features, columns, tiles_n, tile_stride, first,
            GROUP=max(group_size, 0), BLOCK_N=64, BLOCK_K=step,
        )  # fmt: skip
        dense, part = workspace[:count].t(), out[:, first : first + count]
        if bias is None:
            torch.mm(x, dense, out=part)
        else:
            torch.addmm(bias[first : first + count], x, dense, out=part)


def int4_linear(out, x, weight, scales, zeros, perm, bias, out_features, group_size, mode):
    if out.numel() == 0:
        return
    rows, in_features = out.numel() // out_features, x.shape[-1]
    rows_out, x = out.view(rows, out_features), x.reshape(rows, in_features)
    x = x if x.stride(1) == 1 else x.contiguous()
    packed_columns = in_features if perm is None else perm.shape[0]
    if packed_columns == 0:
        rows_out.zero_() if bias is None else rows_out.copy_(bias)
        return
    arch, quantise = architecture(x.device), mode == "a8"
    # One group of all columns needs no group index.
    group_size = -1 if group_size >= packed_columns else group_size
    fractional = zeros is not None and zeros.dtype == torch.float32 and x.element_size() == 2
    dense = mode == "fast" and x.element_size() == 2 and rows >= heuristics.dense_from(arch)
    dense = dense and (bias is None or bias.dtype == x.dtype)
    step = heuristics.step_columns(group_size, 1 if quantise else x.element_size())
    row_group = min(group_size, step) if group_size > 0 else step
    with on_device(x):
        sums = quantise or (fractional and not dense)
        x, row_scales, row_sums = prepare(x, perm, packed_columns, row_group, step, quantise, sums)
        if dense:
            _dense(rows_out, x[:, :packed_columns], weight, scales, zeros, bias, group_size)
        else:
            plan = heuristics.forward_plan(
                rows, out_features, packed_columns, group_size, x.element_size(), mode, arch, multiprocessors(x.device)
            )
            _fused(rows_out, x, row_scales, row_sums, weight, scales, zeros, bias, group_size, plan, arch)


def _fused(out, x, row_scales, row_sums, weight, scales, zeros, bias, group_size, plan, arch):
    (rows, features), tile, columns = out.shape, plan.tile, x.shape[1]
    feature_tiles, row_tiles = triton.cdiv(features, tile.block_n), triton.cdiv(rows, tile.block_m)
    # x may have been padded to whole steps beyond the weight's last tile of columns.
    even = columns % plan.step == 0 and columns <= weight.shape[1] * layout_gpu.TILE_K
    side_by_side = plan.splits > 1 and not plan.sequence
    beside = plan.splits if side_by_side else 1
    target = out
    if side_by_side:
        target = torch.empty(beside, rows, features, dtype=torch.float32, device=x.device)
    int4_linear_kernel[(feature_tiles * row_tiles, beside)](
        target, x, row_scales, row_sums, weight, scales, zeros, None if side_by_side else bias, rows, features,
        columns, weight.shape[0], scales.shape[0], x.stride(0), weight.numel() // weight.shape[0],
        0 if row_sums is None else row_sums.shape[1], plan.split // plan.step,
        EVEN=even, GROUP=max(group_size, 0), SEQUENCE=plan.sequence, STEP=plan.step,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **launch_options(arch),
    )  # fmt: skip
    if side_by_side:
        sum_splits_kernel[(rows, triton.cdiv(features, SUM_BLOCK))](
            out, target, bias, None, rows, features, beside, features, HAS_PERM=False, BLOCK=SUM_BLOCK
        )
