# SPDX-License-Identifier: Apache-2.0
"""Tiles of rows with arbitrary addresses, and what is not finite in them: shared by attention and its gradients."""

import triton
import triton.language as tl

from torch_kernels._triton import head_chunk, power_of_two
from torch_kernels._triton_jit import LOG2E


@triton.jit
def load_tile(x, offset, exists, column, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] elements; zero where a row does not exist and from column SIZE on."""
    mask = exists[:, None]
    if SIZE < BLOCK:
        mask = mask & (column < SIZE)[None, :]
    return tl.load(x + offset[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def products(
    x_tile, x, x_offset, x_exists, y, y_offset, y_exists,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """x y^T of rows in memory. x_tile is x's, loaded; but float32 takes columns in chunks, to spare registers."""
    if CHUNK == BLOCK:
        y_tile = load_tile(y, y_offset, y_exists, tl.arange(0, BLOCK), SIZE, BLOCK)
        result = tl.dot(x_tile, tl.trans(y_tile), input_precision="ieee")
    else:
        result = tl.zeros((x_offset.shape[0], y_offset.shape[0]), tl.float32)
        for first in range(0, SIZE, CHUNK):
            column = first + tl.arange(0, CHUNK)
            x_chunk = load_tile(x, x_offset, x_exists, column, SIZE, SIZE + 1)
            y_chunk = load_tile(y, y_offset, y_exists, column, SIZE, SIZE + 1)
            result = tl.dot(x_chunk, tl.trans(y_chunk), result, input_precision="ieee")
    return result


# Zero times a NaN or an infinity is NaN, so in products these reach rows that do not keep them. A program whose result
# is not finite raises an alarm, and a second launch repairs it: walks that leave out what is not finite, and then count
# how many of each kind a row keeps. Rows that keep none get the same bits as without them. The kinds:
CLEAN, INFINITY, MINUS_INFINITY, NAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def finite(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0).to(x.dtype)


@triton.jit
def flag():
    """Where in `alarms` this program's is."""
    program = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    return program * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def not_finite(acc):
    """1 if anything in it is not."""
    return (tl.sum(tl.sum(tl.abs(acc), axis=1), axis=0) * 0.0 != 0.0).to(tl.int32)


@triton.jit
def split_special(x, kind):
    """x without what is not finite (CLEAN), or where that is."""
    return tl.where(kind == CLEAN, finite(x), (~(tl.abs(x) < float("inf"))).to(x.dtype))


@triton.jit
def lse_in_base_2(lse):
    """A row that keeps nothing, or nothing but -inf, has no probabilities; those of one with +inf are NaN."""
    finite = tl.where(lse == -float("inf"), 0.0, lse * LOG2E)
    return tl.where(lse == float("inf"), float("nan"), finite)


@triton.jit
def load_gate(gate, row, exists):
    if gate is None:
        value = exists.to(tl.float32)
    else:
        value = tl.load(gate + row, mask=exists, other=0.0).to(tl.float32)
    return value


def strides(x):
    """Of batch, token and head; a pooled context of one row is every row's."""
    if x is None:
        return 0, 0, 0
    return x.stride(0), 0 if x.shape[1] == 1 else x.stride(1), x.stride(2)


def head_blocks(size: int, value_size: int, element_size: int) -> dict:
    return {
        "D": size, "BLOCK_D": power_of_two(size), "CHUNK": head_chunk(size, element_size),
        "DV": value_size, "BLOCK_DV": power_of_two(value_size), "CHUNK_V": head_chunk(value_size, element_size),
    }  # fmt: skip


def launch_options(tile) -> dict:
    return {"M": tile.rows, "N": tile.columns, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
