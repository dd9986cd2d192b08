# SPDX-License-Identifier: Apache-2.0
"""The order of a sequence over W ranks that balances causal attention."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def zigzag_shard(x: Tensor, group: dist.ProcessGroup | None = None, dim: int = 1) -> Tensor:
    """This rank's part of x in zigzag order: of 2W equal chunks, the r-th and the (2W - 1 - r)-th.

    Args:
        x: the whole, on every rank; its size along ``dim`` must be a multiple of 2W.
        group: the ranks; None means all.
        dim: the dimension of the sequence.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if x.shape[dim] % (2 * world):
        raise ValueError(f"zigzag_shard: x must have a multiple of {2 * world} tokens, got {x.shape[dim]}")
    chunks = x.chunk(2 * world, dim)
    return torch.cat([chunks[rank], chunks[-1 - rank]], dim) if x.shape[dim] else x
