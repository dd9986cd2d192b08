# SPDX-License-Identifier: Apache-2.0
"""Which GPU kernel serves tree attention, and the tiles and splits of the Triton kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch

from torch_kernels._triton import power_of_two

# Rows that share a key/value head from which on Triton's kernel serves, by architecture. On an H100 it took less
# time with any number of rows, launches not counted. That a launch from Triton costs the host too much for few rows is
# an assumption, and 17 an estimate.
TRITON_ROWS = {"sm_90": 17}
# A split holds at least this many keys, to keep the traffic of partial results small against that of the keys.
MIN_SPLIT = 512
# Programs that fill the GPUs this is written for. A constant, so that every device splits alike.
TARGET_PROGRAMS = 128


def prefers_triton(rows: int, dtype: torch.dtype, arch: str) -> bool:
    """For ``rows`` query rows per key/value head; float32 has no tensor cores in either."""
    return dtype != torch.float32 and rows >= TRITON_ROWS.get(arch, rows + 1)


class Config(NamedTuple):
    """Tile sizes and launch options of one kernel instance."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int | bool]:
        # Tiles with and without a mask must round alike, or a paged cache would give other bits than a contiguous one:
        # no multiplication may be fused into an addition in one of them only.
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}


def attention_config(
    rows: int, head_size: int, value_size: int, element_size: int, quantised: bool, softcap: bool, arch: str
) -> Config:
    """The largest tiles that do not spill, for `rows` packed rows per key/value head; element_size is the queries'."""
    widest = power_of_two(max(head_size, value_size))
    if element_size == 4:
        # Full float32 products run on the ordinary cores, where registers bound the tile.
        return Config(16, 16, 4 if widest <= 128 else 8, 1)
    block_m = power_of_two(rows)
    if arch in ("sm_90", "sm_100"):
        block_m = min(block_m, 128 if widest <= 128 else 64)
        wide_keys = widest <= 128 and (block_m == 16 or (arch == "sm_90" and not quantised))
        return Config(block_m, 64 if wide_keys else 32, 8 if block_m * widest > 64 * 64 else 4, 3)
    if widest > 128:
        return Config(min(block_m, 32), 16, 4, 2)
    # Tiles of 64 rows spill where those of 128, with twice the warps, do not.
    block_m = 128 if block_m >= 128 and not softcap else min(block_m, 32)
    return Config(block_m, 64 if block_m == 16 else 32, 8 if block_m == 128 else 4, 2)
