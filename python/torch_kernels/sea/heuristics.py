# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of the Triton kernels, and which GPU kernel serves sparse attention.

Tiles follow from sizes of the call's rows and heads, dtype and architecture, never from the batch.
"""

from __future__ import annotations

from typing import NamedTuple

from torch_kernels._triton import power_of_two

# Query rows up to which each is worth a block of its own, which reads exactly the columns that it keeps. An assumption:
# half of the smallest tile.
FEW_ROWS = 8

# Up to so many, boundaries of cells are computed in 32 bits.
MAX_CELLS = 1 << 15
# So that a column's cell, had the row but one column, is a 32-bit number.
MAX_CELLS_TIMES_KEYS = 1 << 31

# Architectures whose tensor cores take operands from shared memory; on others they take registers.
LARGE_TILES = ("sm_90", "sm_100")


def prefers_triton(rows: int) -> bool:
    """For sparse attention of so many query rows."""
    return rows > FEW_ROWS


class Tile(NamedTuple):
    """Rows and columns of a product's tile, and launch options."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def _warps(small: bool, arch: str) -> int:
    """sm_100 moves accumulators between tensor memory and registers, and has too few of these in four warps."""
    return 4 if small and arch != "sm_100" else 8


def attention_tile(rows: int, size: int, element_size: int, arch: str, clip: bool) -> Tile:
    """Of sparse attention, for the larger head size. Clipped cells take registers."""
    size, rows = power_of_two(size), power_of_two(rows)
    if element_size == 4:
        return Tile(min(rows, 16), 16, 4 if arch == "sm_90" else 8, 1)  # as spills least
    if arch in LARGE_TILES:
        few = rows < 64
        return Tile(min(rows, 64), 32 if few or clip or size > 128 else 64, _warps(few or size <= 64, arch), 2)
    if size > 64:
        rows = min(rows, 32)
    return Tile(min(rows, 64), 32, 8 if size > 128 else 4, 2)


def query_gradient_tile(size: int, element_size: int, arch: str, clip: bool) -> Tile:
    """Clipped cells take registers."""
    size = power_of_two(size)
    if element_size == 4:
        return Tile(16, 16, 8, 1)
    if arch in LARGE_TILES and size <= 128:
        return Tile(64, 64 if size <= 64 and not clip else 32, _warps(size <= 64, arch), 1)
    if size <= 64:
        return Tile(64, 32, 8, 1)
    return Tile(32, 32, 4, 1) if size <= 128 else Tile(16, 32, 4, 1)


def key_gradient_tile(size: int, element_size: int, arch: str, clip: bool) -> Tile:
    """Clipped cells take registers."""
    size = power_of_two(size)
    if element_size == 4:
        return Tile(16, 16, 8, 1)
    if arch.startswith("gfx") and size > 64:
        return Tile(16, 32, 4, 1)
    if size > 128:
        return Tile(32, 32, 8, 1)
    if arch in LARGE_TILES and size <= 64:
        return Tile(64, 64, _warps(True, arch), 1)
    return Tile(16 if clip and arch in LARGE_TILES else 32, 64, 8, 1)


def features_tile(element_size: int, arch: str) -> Tile:
    """Of a product with projections of this size."""
    if element_size == 4:
        return Tile(64, 32, 4, 1)
    return Tile(128 if arch in LARGE_TILES else 64, 64, 4, 2)


# Tokens whose states are summed together, before which the linear attention of a token finds a state.
SPAN = 256


def linear_tile(element_size: int, columns: int, arch: str) -> Tile:
    """Of linear attention: tokens, and columns of the output."""
    if element_size == 4:
        return Tile(32, min(power_of_two(columns), 32), 4, 1)
    block = min(power_of_two(columns), 128 if arch in LARGE_TILES else 64)
    return Tile(64, block, 8, 2)
