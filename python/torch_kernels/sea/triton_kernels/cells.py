# SPDX-License-Identifier: Apache-2.0
"""Cells and columns: which columns a tile of rows must look at, and which of them each row keeps.

With a width w = K * whole + rest, cell m begins at v_m = m * whole + (2 m rest + K) // (2 K), which fits in 32 bits for
up to heuristics.MAX_CELLS cells.
"""

import triton
import triton.language as tl

# Whether cells are clipped: their products of sizes and limit fit in 32 bits, or not.
NARROW, WIDE = tl.constexpr(1), tl.constexpr(2)


def clip_mode(keys: int, num_cells: int, limit: int) -> int:
    """0 where no cell can have more columns than the limit (0: none)."""
    most = keys // num_cells + 1
    if limit == 0 or limit >= most:
        return 0
    return NARROW.value if most * limit < 2**31 else WIDE.value


@triton.jit
def boundary(cell, whole, rest, CELLS: tl.constexpr):
    """v_cell of a row."""
    return cell * whole + (2 * cell * rest + CELLS) // (2 * CELLS)


@triton.jit
def load_widths(widths, row, exists, keys):
    """Widths of rows, at least 0 and at most `keys`."""
    width = tl.load(widths + row, mask=exists, other=0)
    return tl.minimum(tl.maximum(width, 0), keys).to(tl.int32)


@triton.jit
def load_bits(words, bit, exists, WORDS: tl.constexpr):
    """32 bits of each row's bitset, from `bit` on; anything behind its end."""
    word = tl.minimum(bit >> 5, WORDS - 1)
    shift = (bit & 31).to(tl.uint32)
    low = tl.load(words + word, mask=exists, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(words + tl.minimum(word + 1, WORDS - 1), mask=exists, other=0).to(tl.uint32, bitcast=True)
    return (low >> shift) | ((high << 1) << (31 - shift))


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def any_bits(bits):
    """The bits that any row has."""
    return tl.reduce(bits, 0, _or)


@triton.jit
def lowest_bit(bits):
    """The place of the lowest bit set: a power of two's exponent as a float32."""
    power = bits ^ (bits & (bits - 1))
    return (power.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def cells_of_head(words, head, first, exists, CELLS: tl.constexpr, WORDS: tl.constexpr):
    """32 bits of each row: which of a head's cells from `first` on it keeps."""
    bits = load_bits(words, head * CELLS + first, exists, WORDS)
    count = tl.minimum(CELLS - first, 32).to(tl.uint32)
    return bits & (tl.full((), 0xFFFFFFFF, tl.uint32) >> (32 - count))


@triton.jit
def _ones(count):
    """The lowest `count` of 64 bits."""
    count = count.to(tl.int64)
    return tl.where(count < 64, (tl.full((), 1, tl.int64) << tl.minimum(count, 63)) - 1, -1)


@triton.jit
def near_cell(column, width, CELLS: tl.constexpr):
    """The cell of a column, as a real number that is exact to 0.01."""
    return (column + 0.5) * CELLS / tl.maximum(width, 1).to(tl.float32)


@triton.jit
def cells_in_tile(narrowest, CELLS: tl.constexpr, N: tl.constexpr):
    """How many cells, at most, a row of at least this width has in N columns."""
    return tl.minimum(near_cell(N, narrowest, CELLS) + 2.6, CELLS).to(tl.int32)


@triton.jit
def kept_columns(
    words, head, exists, width, whole, rest, start, cells, limit,
    CELLS: tl.constexpr, WORDS: tl.constexpr, CLIP: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """[rows, N]: which columns from `start` on each row keeps. cells: from `cells_in_tile`; limit: columns that a cell
    gives at most, see `clip_mode`."""
    column = tl.arange(0, N)
    cell = tl.maximum(near_cell(start, width, CELLS) - 0.25, 0.0).to(tl.int32)
    left = boundary(cell, whole, rest, CELLS) - start
    mask = _ones(tl.minimum(tl.maximum(left, 0), N)) * 0
    kept = (mask[:, None] + column[None, :]) < 0
    before = _ones(tl.minimum(tl.maximum(left, 0), N))
    for first in range(0, cells, 32):
        bits = load_bits(words, head * CELLS + cell, exists, WORDS)
        for _ in range(tl.minimum(cells - first, 32)):
            right = boundary(cell + 1, whole, rest, CELLS) - start
            here = ((bits & 1) != 0) & (cell < CELLS)
            if CLIP:
                size = (right - left)[:, None]
                if CLIP == WIDE:
                    size = size.to(tl.int64)
                length = tl.minimum(size, limit)
                behind = right[:, None] - 1 - column[None, :]
                remainder = (behind * length) % tl.maximum(size, 1)
                inside = here[:, None] & (column[None, :] >= left[:, None]) & (behind >= 0)
                kept = kept | (inside & ((remainder == 0) | (remainder > size - length)))
                left = right
            else:
                after = _ones(tl.minimum(tl.maximum(right, 0), N))
                mask = mask | tl.where(here, after & ~before, 0)
                before = after
            bits = bits >> 1
            cell += 1
    if not CLIP:
        kept = ((mask[:, None] >> column[None, :].to(tl.int64)) & 1) != 0
    return kept
