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
    """Where the words of output features first .. first+BLOCK_N-1 are: the start of each one's row of tiles, and the
    place in a tile, in the order (slab of 16 features, lane, 16 columns). BLOCK_K is at most a tile's 64 columns. A
    tile beyond the last output feature is replaced by the last."""
    PER_LANE: tl.constexpr = BLOCK_K // 16
    index = tl.arange(0, BLOCK_N * BLOCK_K // 8)
    slab = first // 16 + index // (32 * PER_LANE)
    tiles = tl.minimum(slab // 2, tiles_n - 1).to(tl.int64) * tile_stride
    return tiles, slab % 2 * 128 + index // PER_LANE % 32 * 4 + index % PER_LANE


@triton.jit
def load_words(weight, tiles, place, column, BLOCK_K: tl.constexpr):
    """The words of BLOCK_K columns."""
    if BLOCK_K == 64:
        first = column * 4
    else:
        first = column // 64 * 256 + column % 64 // 16
    return tl.load(weight + tiles + (place + first))


@triton.jit
def unpack(words, zero, dtype: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K] of q - 8 - zero, exact. zero is [BLOCK_N], or None for 0.

    16-bit floats are made by writing q into the last bits of the number 1024 (128 in bfloat16), which is then
    subtracted. For int8 it is q itself, the 16 columns of each 16 in the order of layout_gpu.INT8_ORDER.
    """
    # Dimensions: slab of 16 features, lane // 4, lane % 4, 16 columns; then the bits of the nibble's place.
    SHAPE: tl.constexpr = (BLOCK_N // 16, 8, 4, BLOCK_K // 16, 2, 2, 2)
    if dtype == tl.int8:
        octets = tl.join(words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F)
        low = tl.join(octets.to(tl.int8), (octets >> 8).to(tl.int8))
        high = tl.join((octets >> 16).to(tl.int8), (octets >> 24).to(tl.int8))
        q = tl.reshape(tl.join(low, high), SHAPE)
        w = tl.reshape(tl.permute(q, (0, 4, 1, 3, 2, 6, 5)), (BLOCK_N, BLOCK_K))
    else:
        BITS: tl.constexpr = 0x64006400 if dtype == tl.float16 else (0x43004300 if dtype == tl.bfloat16 else 0)
        OFFSET: tl.constexpr = 1032 if dtype == tl.float16 else (136 if dtype == tl.bfloat16 else 8)
        first = tl.join(words & 0x000F000F | BITS, (words >> 4) & 0x000F000F | BITS)
        second = tl.join((words >> 8) & 0x000F000F | BITS, (words >> 12) & 0x000F000F | BITS)
        pairs = tl.join(first, second)
        q = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
        if BITS > 0:
            q = q.to(dtype, bitcast=True)
        q = tl.reshape(q, SHAPE)
        q = tl.reshape(tl.permute(q, (0, 4, 1, 3, 5, 2, 6)), (BLOCK_N, BLOCK_K))
        if zero is None:
            w = (q - OFFSET).to(dtype)
        elif BITS > 0:
            # The zero points of 16-bit products are integers, so this sum is exact, too.
            w = q - (zero.to(dtype) + OFFSET)[:, None]
        else:
            w = (q - OFFSET).to(dtype) - zero.to(dtype)[:, None]
    return w
