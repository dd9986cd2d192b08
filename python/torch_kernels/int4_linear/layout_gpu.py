# SPDX-License-Identifier: Apache-2.0
"""The packed weight of CUDA and Triton: int32 [ceil(N/32), ceil(K/64), 2, 32, 4].

A tile of 32 output features and 64 input features is 1 KiB; the tiles of 32 output features follow one another along
K, so a warp that owns them streams one contiguous run. Nibble i (bits 4i to 4i+3) of the word [a, b, h, lane, j] is

    q[n, k]   with   n = 32 a + 16 h + 8 (i % 2) + lane // 4
                     k = 64 b + 16 j + 8 (i // 2 % 2) + 2 (lane % 4) + i // 4

that is, of the pairs of nibbles (i, i + 4) pair 0 to 3 of a word is register 0 to 3 of the A operand of mma.m16n8k16
that lane `lane` holds, and the last index makes one 16-byte load per lane. Bits 4i to 4i+3 of each byte, that is the
even or the odd nibbles, are also a register of mma.m16n8k32 on int8, when the columns of x within each 16 are put in
the order INT8_ORDER. Beyond N and K, q is 8: a weight of zero.
"""

import torch

VERSION = 1
TILE_N, TILE_K = 32, 64
INT8_ORDER = tuple(2 * (p // 4) + p % 4 // 2 + 8 * (p % 2) for p in range(16))  # 0 8 1 9 2 10 3 11 ...


def shape(out_features: int, in_features: int) -> tuple[int, ...]:
    """The packed tensor's shape."""
    return (-(-out_features // TILE_N), -(-in_features // TILE_K), 2, 32, 4)


def pack(q: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K] with values 0 to 15 -> int32, packed."""
    rows, columns = q.shape
    tiles_n, tiles_k = shape(rows, columns)[:2]
    padded = q.new_full((tiles_n * TILE_N, tiles_k * TILE_K), 8)
    padded[:rows, :columns] = q
    # n = (a, h, e, r), k = (b, j, f, t, u) with lane = 4 r + t and nibble = 4 u + 2 f + e
    parts = padded.view(tiles_n, 2, 2, 8, tiles_k, 4, 2, 4, 2)
    low, high = (parts[:, :, e].permute(0, 3, 1, 2, 6, 4, 7, 5) for e in (0, 1))  # a b h r t j u f
    return (low | high << 4).flatten(-2).view(torch.int32).view(shape(rows, columns))


def unpack(weight: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """The inverse of pack."""
    tiles_n, tiles_k = weight.shape[:2]
    octets = weight.contiguous().view(torch.uint8).view(tiles_n, tiles_k, 2, 8, 4, 4, 2, 2)  # a b h r t j u f
    parts = torch.stack((octets & 15, octets >> 4))  # e a b h r t j u f
    padded = parts.permute(1, 3, 0, 4, 2, 6, 8, 5, 7).reshape(tiles_n * TILE_N, tiles_k * TILE_K)
    return padded[:out_features, :in_features].contiguous()
