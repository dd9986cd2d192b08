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
    """Tile sizes and launch options of the fused kernel."""

    block_m: int  # rows
    block_n: int  # output features
    block_k: int  # input features that one step takes
    num_warps: int
    num_stages: int


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def row_block(rows: int, largest: int) -> int:
    """The number of rows in a tile for which all tiles together cost least, counting unpacking."""
    sizes = [size for size in (16, 32, 64, 128) if size <= largest]
    return min(sizes, key=lambda size: (_ceil_div(rows, size) * (size + UNPACK_ROWS), size))


def step_columns(group_size: int, element_size: int) -> int:
    """Input features per step: at most a group, because the group's scale is applied to the sum of a step. Integer
    products are of at least 32, which hold two groups of 16."""
    largest, least = {1: (128, 32), 2: (128, 16), 4: (32, 16)}[element_size]
    return max(min(group_size if group_size > 0 else largest, largest), least)


def _stages(tile_bytes: int, arch: str) -> int:
    """Tiles in flight: at most four, and no more than half of what fits, to leave room for a second block, unless two
    tiles need more."""
    if arch.startswith("gfx"):
        return 2
    shared = SHARED_KIB.get(arch, 99) * 1024
    return max(2 if 2 * tile_bytes <= shared else 1, min(shared // 2 // tile_bytes, 4))


def forward_tile(rows: int, group_size: int, element_size: int, arch: str) -> Tile:
    """Tiles of the fused kernel; element_size is that of the activations in the product: 1 in mode a8."""
    block_m = row_block(rows, 64 if element_size == 4 else 128)
    # Wide tiles share a row of x among more output features; narrow ones give few rows more programs.
    block_n = 128 if block_m >= 64 and element_size < 4 else 64
    block_k = step_columns(group_size, element_size)
    num_warps = 8 if block_m * block_n >= 64 * 128 else 4
    return Tile(block_m, block_n, block_k, num_warps, _stages(block_k * (block_m * element_size + block_n // 2), arch))


def backward_tile(rows: int, element_size: int, arch: str) -> Tile:
    """Tiles of the gradient's kernel. block_k counts input features, which are its output; a step takes block_n."""
    block_m = row_block(rows, 64 if element_size == 4 else 128)
    block_n, block_k = (32, 64) if element_size == 4 else (64, 64)
    num_warps = 8 if block_m == 128 else 4
    return Tile(block_m, block_n, block_k, num_warps, _stages(block_n * (block_m * element_size + block_k // 2), arch))


def split_size(features: int, columns: int, step: int, programs: int = 1) -> int:
    """How many of the columns summed over belong to one split, a multiple of the step: as many splits as are needed to
    fill a GPU with `programs` programs for each 64 features, none shorter than MIN_SPLIT. Independent of M unless the
    caller makes `programs` depend on it."""
    wanted = max(TARGET_PROGRAMS // max(_ceil_div(features, 64) * programs, 1), 1)
    size = max(_ceil_div(columns, wanted), MIN_SPLIT)
    return _ceil_div(size, step) * step


def sums_in_sequence(row_tiles: int, feature_tiles: int, multiprocessors: int) -> bool:
    """Whether one program sums all splits, because there are programs enough without splits side by side."""
    return row_tiles * feature_tiles >= multiprocessors


def dense_from(arch: str) -> int:
    """Rows from which it is faster to dequantise the weight once and to call the vendor's dense product, which is
    mode fast's choice only. Per weight, dequantising writes and reads 2 bytes and reads half a one, which the better
    rate of the dense product must earn back: rows * (1 / fused - 1 / dense) * 2 FLOP / peak > 2.5 B / bandwidth."""
    return round(1.25 * BALANCE.get(arch, 156) / (1 / FUSED_RATE - 1 / DENSE_RATE))


def prefers_triton(rows: int, mode: str) -> bool:
    """Whether a call that the compiled CUDA kernel could serve is faster in Triton. Only mode fast may choose by M:
    the two do not give the same bits."""
    return mode == "fast" and rows > CUDA_ROWS
