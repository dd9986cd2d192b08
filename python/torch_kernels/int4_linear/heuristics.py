# SPDX-License-Identifier: Apache-2.0
"""Which kernel and which tiles serve a product of M rows with an int4 weight [N, K].

Pure functions of sizes and of the architecture's name. In modes exact and a8 a row's bits must not depend on M. There,
what decides the order of summation, `block_k` and `split_columns`, follows from N, K, the group size and the dtype
alone; M decides only how many rows and columns share a tile, and whether the splits of K are summed by one program
after another or side by side, which is the same sum.
"""

from __future__ import annotations

from typing import NamedTuple

# Programs that fill the GPUs this is written for. A constant, so that every device splits alike.
TARGET_PROGRAMS = 256
# A split has at least this many columns, to keep the traffic of partial sums small against that of the weight.
MIN_SPLIT = 512
# Unpacking a tile of weights costs about as much as multiplying it with this many rows. An estimate.
UNPACK_ROWS = 48

# Shared memory that one block may use, in KiB.
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
# Dense 16-bit tensor-core FLOP per byte of memory traffic, of each architecture's largest GPU.
BALANCE = {"sm_80": 156, "sm_86": 200, "sm_89": 165, "sm_90": 206, "sm_100": 281, "sm_120": 117, "gfx942": 247}
# Shares of the tensor cores' peak that the fused kernel and the vendor's dense product reach. Estimates.
FUSED_RATE, DENSE_RATE = 0.5, 0.75
# The compiled CUDA kernel is made for few rows; beyond, the Triton kernel's larger tiles win. An estimate.
CUDA_ROWS = 64


class Tile(NamedTuple):
    """Tile sizes and launch options of a kernel."""

    block_m: int  # rows
    block_n: int  # output features
    block_k: int  # input features
    num_warps: int
    num_stages: int


class Plan(NamedTuple):
    """How the fused kernel, or the gradient's, is launched."""

    tile: Tile
    step: int  # columns whose sum takes one scale: a multiple of block_k
    split: int  # columns (gradient: output features) of one split
    splits: int
    sequence: bool  # a program sums all splits, one after another; otherwise they run side by side


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def row_block(rows: int, largest: int = 64) -> int:
    """The number of rows in a tile for which all tiles together cost least, counting unpacking. Tiles of 128 rows spill
    registers."""
    sizes = [size for size in (16, 32, 64) if size <= largest]
    return min(sizes, key=lambda size: (_ceil_div(rows, size) * (size + UNPACK_ROWS), size))


def step_columns(group_size: int, element_size: int) -> int:
    """Columns whose sum takes one scale: at most a group, and few enough for the registers. Integer products are of at
    least 32, which hold two groups of 16."""
    most, least = {1: (128, 32), 2: (128, 16), 4: (32, 16)}[element_size]
    return max(min(group_size, most) if group_size > 0 else most, least)


def split_size(features: int, columns: int, step: int, programs: int = 1) -> int:
    """How many of the columns summed over belong to one split, a multiple of the step: as many splits as are needed to
    fill a GPU with `programs` programs for each 64 features, none shorter than MIN_SPLIT. Independent of M unless the
    caller makes `programs` depend on it."""
    wanted = max(TARGET_PROGRAMS // max(_ceil_div(features, 64) * programs, 1), 1)
    size = max(_ceil_div(columns, wanted), MIN_SPLIT)
    return _ceil_div(size, step) * step


def _stages(bytes_per_step: int, arch: str) -> int:
    """Steps in flight: at most four, and no more than fit into half of the shared memory, to leave room for a second
    block; two if that is all that fits."""
    if arch.startswith("gfx"):
        return 2
    shared = SHARED_KIB.get(arch, 99) * 1024
    return max(2 if 2 * bytes_per_step <= shared else 1, min(shared // 2 // bytes_per_step, 4))


def forward_plan(
    rows: int, features: int, columns: int, group_size: int, element_size: int, mode: str, arch: str,
    multiprocessors: int,
) -> Plan:  # fmt: skip
    """Of the fused kernel; element_size is that of the activations in the product, 1 in mode a8."""
    step = step_columns(group_size, element_size)
    least = 128  # so that a split holds whole steps of every group size
    split = split_size(features, columns, least)
    block_m = row_block(rows, 16 if element_size == 4 else 64)
    # Wide tiles share a row of x among more output features; narrow ones give few rows more programs.
    block_n = 32 if element_size == 4 else 128 if block_m == 64 else 64
    block_k = min(step, 16 if element_size == 4 else 64)
    tiles = _ceil_div(rows, block_m) * _ceil_div(features, block_n)
    if mode == "fast":
        split = split_size(features, columns, least, _ceil_div(rows, block_m))
    splits = _ceil_div(columns, split)
    stages = _stages(step * (block_m * element_size + block_n // 2), arch)
    tile = Tile(block_m, block_n, block_k, 8 if block_m == 64 else 4, stages)
    return Plan(tile, step, split, splits, splits > 1 and tiles >= multiprocessors)


def backward_plan(rows: int, features: int, columns: int, element_size: int, arch: str, multiprocessors: int) -> Plan:
    """Of the gradient's kernel, which sums over output features, block_n at a time, for tiles of columns."""
    block_n, block_k = (32, 64) if element_size == 4 else (64, 64)
    split = split_size(columns, features, block_n)
    splits = _ceil_div(features, split)
    block_m = row_block(rows)
    tiles = _ceil_div(rows, block_m) * _ceil_div(columns, block_k)
    stages = _stages(block_n * (block_m * element_size + block_k // 2), arch)
    tile = Tile(block_m, block_n, block_k, 8 if block_m == 64 else 4, stages)
    return Plan(tile, block_n, split, splits, splits > 1 and tiles >= multiprocessors)


def dense_from(arch: str) -> int:
    """Rows from which it is faster to dequantise the weight once and to call the vendor's dense product, which is
    mode fast's choice only. Per weight, dequantising writes and reads 2 bytes and reads half a one, which the better
    rate of the dense product must earn back: rows * (1 / fused - 1 / dense) * 2 FLOP / peak > 2.5 B / bandwidth."""
    return round(1.25 * BALANCE.get(arch, 156) / (1 / FUSED_RATE - 1 / DENSE_RATE))


def prefers_triton(rows: int, mode: str) -> bool:
    """Whether a call that the compiled CUDA kernel could serve is faster in Triton. Only mode fast may choose by M:
    the two do not give the same bits."""
    return mode == "fast" and rows > CUDA_ROWS
