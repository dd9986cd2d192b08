# SPDX-License-Identifier: Apache-2.0
"""Tile sizes and splits of the Triton kernels, from head sizes, numbers of heads, dtype and architecture.

A sequence is split into segments where its heads alone do not fill a GPU. How, follows from the sequence's own length
and the numbers of heads, never from the batch.
"""

from __future__ import annotations

from typing import NamedTuple

from torch_kernels._triton import power_of_two

# Programs that fill the GPUs this is written for. A constant, so that every device splits alike.
TARGET_PROGRAMS = 128
# A segment has at least so many tokens: a multiple of every chunk.
SPAN = 1024
# Tokens after which the backward pass keeps states, so that gradients of the decay are sums of few numbers: a multiple
# of every chunk.
MARK = 2048


class Tile(NamedTuple):
    """Tokens of a chunk, columns of a state in one program, and launch options."""

    chunk: int
    block: int
    num_warps: int
    num_stages: int


def split_rows(size: int, element_size: int) -> tuple[int, int, int]:
    """Parts in which a state's rows are walked, and two powers of two, or one and 0, that hold a part's: 96 = 64 + 32
    costs less than 128. Products in float32 take few rows at a time, to spare registers."""
    parts = 1
    while element_size == 4 and size // parts > 64:
        parts *= 2
    size //= parts
    low = power_of_two(size + 1, 32) // 2
    high = power_of_two(size - low) if size > low else 0
    return (parts, 2 * low, 0) if low == high else (parts, low, high)


def _block(columns: int, most: int) -> int:
    return min(power_of_two(columns), most)


# Architectures whose tensor cores take operands from shared memory; on others they take registers.
LARGE_TILES = ("sm_90", "sm_100")


def forward_tile(element_size: int, rows: int, columns: int, arch: str, gates: bool = False) -> Tile:
    """Of the walk of one output; states have so many rows, and columns that blocks divide. Registers bound tiles."""
    if arch.startswith("gfx"):
        return Tile(32, _block(columns, 32), 4, 2)
    # A state of 64 + 32 rows takes more registers than one of 128.
    if element_size == 4 or rows > 128 or rows != power_of_two(rows, 1):
        return Tile(32, _block(columns, 32), 8, 2)
    if arch not in LARGE_TILES:
        return Tile(32, _block(columns, 64), 8, 3)
    return Tile(64, _block(columns, 32), 4, 3)


def states_tile(element_size: int, rows: int, columns: int, arch: str) -> Tile:
    """Of walks without outputs."""
    return forward_tile(element_size, rows, columns, arch)


def backward_tile(element_size: int, rows: int, columns: int, arch: str, gates: bool = False) -> Tile:
    """Of the three walks of the backward pass, whose states have rows where others have columns."""
    size = max(rows, columns)
    if arch.startswith("gfx"):
        return Tile(32, _block(size, 32), 4, 2)
    if element_size == 4:
        return Tile(32, _block(size, 32), 8, 1)
    if size > 192:
        return Tile(16, _block(size, 32), 8, 1)
    if size > 128 or any(x != power_of_two(x, 1) for x in (rows, columns)):
        return Tile(32, _block(size, 16), 8, 1)
    if arch not in LARGE_TILES:
        return Tile(32, _block(size, 32), 8, 2)
    return Tile(64, _block(size, 32), 4, 2)


def _blocks(columns: int, tile: Tile) -> int:
    return -(-columns // tile.block)


def _segments(programs: int) -> int:
    return max(TARGET_PROGRAMS // programs, 1)


def forward_segments(heads: int, columns: int, tile: Tile) -> int:
    """Segments that a sequence has at most."""
    return _segments(heads * _blocks(columns, tile))


def backward_segments(heads: int, rows: int, columns: int, tile: Tile) -> int:
    return _segments(heads * (2 * _blocks(rows, tile) + _blocks(columns, tile)))


def slope_rows(rows: int) -> int:
    """How many rows of a state a program has in the walk for the slopes' gradient."""
    return min(power_of_two(rows), 128)


def slope_tile(element_size: int, columns: int) -> Tile:
    """Of the walk for the slopes' gradient, which holds two states."""
    return Tile(16, _block(columns, 16 if element_size == 4 else 32), 8, 1)
