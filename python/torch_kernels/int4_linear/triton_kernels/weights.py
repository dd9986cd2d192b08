# SPDX-License-Identifier: Apache-2.0
"""Tiles of the packed weight, as layout_gpu.py describes it.

A tile is loaded as a vector of words in an order that makes each thread's words neighbours in memory and, once
unpacked, its own operand of the tensor cores' product: 16 output features of all columns of the step, then the next
16. Unpacking is a chain of joins, which give a thread more elements and move nothing between threads.
"""

import triton
import triton.language as tl


@triton.jit
def word_offsets(first, tiles_n, tile_stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where the words of output features first .. first+BLOCK_N-1 of the first BLOCK_K columns are, in the order (tile
    of 64 columns, slab of 16 features, lane, 16 columns). A tile beyond the weight's end is replaced by its last."""
    SLABS: tl.constexpr = BLOCK_N // 16
    PER_LANE: tl.constexpr = min(BLOCK_K // 16, 4)
    index = tl.arange(0, BLOCK_N * BLOCK_K // 8)
    slab = first // 16 + index // (32 * PER_LANE) % SLABS
    tile = tl.minimum(slab // 2, tiles_n - 1).to(tl.int64) * tile_stride
    in_tile = slab % 2 * 128 + index // PER_LANE % 32 * 4 + index % PER_LANE
    return tile, index // (32 * PER_LANE * SLABS) * 256 + in_tile


@triton.jit
def load_words(weight, tile, offset, column, tile_stride, BLOCK_K: tl.constexpr):
    """The words of the step that begins at the column. Nothing is read beyond a tile's row."""
    if BLOCK_K > 64:
        first = column * 4
        words = tl.load(weight + tile + (offset + first), mask=offset + first < tile_stride, other=0)
    else:
        words = tl.load(weight + tile + (offset + (column // 64 * 256 + column % 64 // 16)))
    return words


@triton.jit
def unpack(words, zero, dtype: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K] of q - 8 - zero, exact. zero is [BLOCK_N], or None for 0.

    16-bit floats are made by writing q into the last bits of the number 1024 (128 in bfloat16), which is then
    subtracted. For int8 it is q itself, the 16 columns of each 16 in the order of layout_gpu.INT8_ORDER.
    """
    TILES: tl.constexpr = max(BLOCK_K // 64, 1)
    PER_LANE: tl.constexpr = min(BLOCK_K // 16, 4)
    # Dimensions: tile of 64 columns, slab of 16 features, lane // 4, lane % 4, 16 columns; then the nibble's bits.
    if dtype == tl.int8:
        octets = tl.join(words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F)
        low = tl.join(octets.to(tl.int8), (octets >> 8).to(tl.int8))
        high = tl.join((octets >> 16).to(tl.int8), (octets >> 24).to(tl.int8))
        q = tl.reshape(tl.join(low, high), (TILES, BLOCK_N // 16, 8, 4, PER_LANE, 2, 2, 2))
        w = tl.reshape(tl.permute(q, (1, 5, 2, 0, 4, 3, 7, 6)), (BLOCK_N, BLOCK_K))
    else:
        BITS: tl.constexpr = 0x64006400 if dtype == tl.float16 else (0x43004300 if dtype == tl.bfloat16 else 0)
        OFFSET: tl.constexpr = 1032 if dtype == tl.float16 else (136 if dtype == tl.bfloat16 else 8)
        first = tl.join(words & 0x000F000F | BITS, (words >> 4) & 0x000F000F | BITS)
        second = tl.join((words >> 8) & 0x000F000F | BITS, (words >> 12) & 0x000F000F | BITS)
        pairs = tl.join(first, second)
        q = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
        if BITS > 0:
            q = q.to(dtype, bitcast=True)
        q = tl.reshape(q, (TILES, BLOCK_N // 16, 8, 4, PER_LANE, 2, 2, 2))
        q = tl.reshape(tl.permute(q, (1, 5, 2, 0, 4, 6, 3, 7)), (BLOCK_N, BLOCK_K))
        if zero is None:
            w = (q - OFFSET).to(dtype)
        elif BITS > 0:
            # The zero points of 16-bit products are integers, so this sum is exact, too.
            w = q - (zero.to(dtype) + OFFSET)[:, None]
        else:
            w = (q - OFFSET).to(dtype) - zero.to(dtype)[:, None]
    return w
