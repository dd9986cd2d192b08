# SPDX-License-Identifier: Apache-2.0
"""Which GPU kernel serves a call, and the tile sizes of the Triton kernels: from dtype, head sizes and architecture,
never from how much is in a call, so that a request's bits do not depend on its company."""

from __future__ import annotations

from typing import NamedTuple

from torch_kernels._triton import power_of_two

# A split holds at least this many keys, to keep the traffic of partial results small against that of the keys.
MIN_SPLIT = 1024
# Programs that fill the GPUs this is written for. A constant, so that every device splits alike.
TARGET_PROGRAMS = 128


class Config(NamedTuple):
    """Tiles of rows (tokens times query heads per key head), of keys, and of the keys that remain of a segment."""

    block_m: int
    block_n: int
    block_t: int
    num_warps: int
    num_stages: int
    chunk: int = 0  # pairs of columns in one product of queries and keys, which takes 16 at least; 0: all


def prefers_triton(tokens: int, segments: int) -> bool:
    """Triton's kernel is for sequences, the one in CUDA C++ for decoding. Offsets are on the device, so shapes tell:
    with no more tokens than query segments, hardly one of these has two."""
    return tokens > segments


def attention_config(size: int, value_size: int, element_size: int, rotated: bool, arch: str) -> Config:
    """The largest tiles that do not spill."""
    widest = power_of_two(max(size, value_size))
    if element_size == 4:
        # With 16 pairs at a time, ptxas chooses fewer registers on these architectures, and spills.
        chunk = 32 if arch in ("sm_90", "sm_100") and widest <= 128 else 16
        return Config(16, 16, 16, 4 if widest <= 128 else 8, 1, chunk)
    if arch == "sm_90":
        if widest > 128:
            return Config(64, 32, 32, 8, 2)
        if rotated:
            return Config(128, 64, 16, 8, 2)
        return Config(128, 128 if widest <= 64 else 64, 64, 8, 3)
    # Rotated and large heads spill at 64 rows there: they are served as on architectures without such products.
    if arch == "sm_100" and not rotated and widest <= 128:
        return Config(128, 128, 64, 8, 3) if widest <= 64 else Config(64, 64, 64, 8, 3)
    if widest > 128:
        return Config(32, 16, 16, 4, 2)
    if rotated and widest > 64:
        return Config(32, 32, 16, 8 if arch == "sm_120" else 4, 2)
    return Config(64, 32, 32, 4, 2)


def backward_configs(size: int, value_size: int, element_size: int, rotated: bool, arch: str) -> tuple[Config, Config]:
    """For the gradient of queries, and for that of keys and values, where block_n keys meet block_m rows at a time."""
    widest = power_of_two(max(size, value_size))
    if element_size == 4:
        config = Config(16, 16, 16, 4 if widest <= 128 else 8, 1)
        return config, config
    amd = arch.startswith("gfx")  # where a thread of four warps has twice the registers of one of eight
    if widest > 128:
        if amd:
            return Config(32, 16, 16, 4, 1), Config(16, 16, 16, 4, 1)
        # Two stages, though of few rows: what waits in shared memory waits in no register.
        return Config(32, 16, 16, 4, 1), Config(16, 64 if arch in ("sm_90", "sm_100") else 32, 16, 8, 2)
    if arch in ("sm_90", "sm_100"):
        if widest <= 64:
            return Config(64, 64, 32, 8, 2), Config(32, 64, 32, 8, 2)
        if rotated:
            return Config(64, 32, 16, 8, 2), Config(16, 64, 32, 8, 1)
        return Config(64, 64, 32, 8, 2), Config(32, 64, 32, 8, 1)
    if widest > 64:
        return Config(32, 32, 16, 4, 1), Config(16, 32, 16, 4 if amd else 8, 1)
    return Config(64, 32, 32, 4, 2), Config(32, 64, 32, 4, 2)
