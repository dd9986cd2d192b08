# SPDX-License-Identifier: Apache-2.0
"""From cells to columns: scores of cells as a dense map and back, and lists of kept columns as CSR."""

import torch
import triton
import triton.language as tl

from torch_kernels._triton import on_device

from ..csr import in_two_steps
from .cells import load_bits, load_widths, near_cell

COLUMNS = 1024
CSR_CELLS = 128


@triton.jit
def _boundary(cell, width, CELLS: tl.constexpr):
    """v_cell of a row, for any number of cells."""
    return ((2 * cell.to(tl.int64) * width + CELLS) // (2 * CELLS)).to(tl.int32)


@triton.jit
def _cell_of(column, width, CELLS: tl.constexpr):
    """(K (2 j + 1) - 1) // (2 w): a guess in float32 is off by one at most. Products may wrap around, the remainder
    does not."""
    guess = near_cell(column, width, CELLS).to(tl.int32)
    remainder = CELLS * (2 * column + 1) - 1 - 2 * width * guess
    return guess + (remainder >= 2 * width).to(tl.int32) - (remainder < 0).to(tl.int32)


@triton.jit(do_not_specialize=["rows", "heads", "length"])
def stretch_kernel(
    out, x, widths, fill, rows, heads, length, x_stride_b, x_stride_h, x_stride_t, CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * Tq, column blocks)."""
    item = tl.program_id(0).to(tl.int64)
    row, head, batch = item % rows, item // rows % heads, item // rows // heads
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    width = load_widths(widths, batch * rows + row, row >= 0, length)
    seen = column < width
    cell = tl.where(seen, _cell_of(column, width, CELLS), 0)
    value = tl.load(x + batch * x_stride_b + head * x_stride_h + row * x_stride_t + cell, mask=seen, other=0.0)
    value = tl.where(seen, value.to(tl.float32), fill)
    tl.store(out + item * length + column, value.to(out.dtype.element_ty), mask=column < length)


@triton.jit(do_not_specialize=["rows", "heads", "length"])
def stretch_backward_kernel(
    grad_x, g, widths, rows, heads, length, g_stride_b, g_stride_h, g_stride_t, CELLS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Each cell's sum over its columns. Grid (B * H * Tq, cell blocks)."""
    item = tl.program_id(0).to(tl.int64)
    row, head, batch = item % rows, item // rows % heads, item // rows // heads
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    width = load_widths(widths, batch * rows + row, row >= 0, length)
    begin, end = _boundary(cell, width, CELLS), _boundary(cell + 1, width, CELLS)
    end = tl.where(cell < CELLS, end, begin)
    g += batch * g_stride_b + head * g_stride_h + row * g_stride_t
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(tl.max(end - begin, axis=0)):
        total += tl.load(g + begin + step, mask=begin + step < end, other=0.0).to(tl.float32)
    tl.store(grad_x + item * CELLS + cell, total.to(grad_x.dtype.element_ty), mask=cell < CELLS)


@triton.jit
def _lengths(words, head, first, width, limit, CELLS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Of BLOCK cells: where they end, their sizes, and how many columns the row keeps of each."""
    cell = first + tl.arange(0, BLOCK)
    inside = cell < CELLS
    bits = load_bits(words, head * CELLS + cell, inside, WORDS)
    begin, end = _boundary(cell, width, CELLS), _boundary(cell + 1, width, CELLS)
    size = tl.where(inside & ((bits & 1) != 0), end - begin, 0)
    return end, size, tl.minimum(size, limit)


@triton.jit(do_not_specialize=["heads", "limit"])
def csr_rows_kernel(
    counts, cells, widths, heads, limit, CELLS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """How many columns each row keeps. Grid (B * Tq * H)."""
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    width = load_widths(widths, row, row >= 0, 2**31 - 1)
    total = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, CELLS, BLOCK):
        _, _, length = _lengths(cells + row * WORDS, head, first, width, limit, CELLS, WORDS, BLOCK)
        total += length
    tl.store(counts + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["heads", "limit"])
def csr_columns_kernel(
    col, crow, cells, widths, heads, limit, CELLS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    width = load_widths(widths, row, row >= 0, 2**31 - 1)
    at = tl.load(crow + tl.program_id(0))
    for first in range(0, CELLS, BLOCK):
        end, size, length = _lengths(cells + row * WORDS, head, first, width, limit, CELLS, WORDS, BLOCK)
        before = tl.cumsum(length, axis=0) - length
        for step in range(tl.max(length, axis=0)):
            back = (length - 1 - step).to(tl.int64)
            column = end - 1 - (back * size // tl.maximum(length, 1)).to(tl.int32)
            tl.store(col + (at + before + step).to(tl.int64), column, mask=step < length)
        at += tl.sum(length, axis=0)


def sea_stretch(out, x, widths, length, fill):
    batch, heads, rows, num_cells = x.shape
    if out.numel() == 0:
        return
    block = min(COLUMNS, triton.next_power_of_2(length))
    with on_device(x):
        stretch_kernel[(batch * heads * rows, triton.cdiv(length, block))](
            out, x, widths.contiguous(), float(fill), rows, heads, length, *x.stride()[:3],
            CELLS=num_cells, BLOCK=block, num_warps=4,
        )  # fmt: skip


def sea_stretch_backward(grad_x, grad_out, widths, num_cells):
    batch, heads, rows, length = grad_out.shape
    if grad_x.numel() == 0:
        return
    block = min(COLUMNS, triton.next_power_of_2(num_cells))
    with on_device(grad_out):
        stretch_backward_kernel[(batch * heads * rows, triton.cdiv(num_cells, block))](
            grad_x, grad_out, widths.contiguous(), rows, heads, length, *grad_out.stride()[:3],
            CELLS=num_cells, BLOCK=block, num_warps=4,
        )  # fmt: skip


def _csr_arguments(cells, widths, num_heads, num_cells, max_columns):
    limit = min(max_columns, 2**31 - 1) or 2**31 - 1
    block = min(CSR_CELLS, triton.next_power_of_2(num_cells))
    return (cells, widths, num_heads, limit), {"CELLS": num_cells, "WORDS": cells.shape[2], "BLOCK": block}


def _csr_rows(crow, *arguments):
    crow[0] = 0
    if crow.numel() == 1:
        return
    tensors, sizes = _csr_arguments(*arguments)
    counts = torch.empty(crow.numel() - 1, dtype=torch.int32, device=crow.device)
    with on_device(crow):
        csr_rows_kernel[(counts.numel(),)](counts, *tensors, **sizes, num_warps=1)
    total = counts.cumsum(0)
    if int(total[-1]) >= 2**31:
        raise ValueError(f"sea_csr: widths must give fewer than 2**31 columns in all, got {int(total[-1])}")
    crow[1:] = total


def _csr_columns(col, crow, *arguments):
    if col.numel() == 0:
        return
    tensors, sizes = _csr_arguments(*arguments)
    with on_device(crow):
        csr_columns_kernel[(crow.numel() - 1,)](col, crow, *tensors, **sizes, num_warps=1)


sea_csr = in_two_steps(_csr_rows, _csr_columns)
