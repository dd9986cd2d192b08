# SPDX-License-Identifier: Apache-2.0
"""Which GPU kernel serves tree attention."""

from __future__ import annotations

import torch

# Rows that share a key/value head from which on Triton's kernel is faster, by architecture; measured on an H100, where
# it multiplies with wgmma and the CUDA kernel does not. With fewer rows the CUDA kernel starts sooner: its launch costs
# the host a few microseconds, Triton's several times as much.
TRITON_ROWS = {"sm_90": 17}


def prefers_triton(rows: int, dtype: torch.dtype, arch: str) -> bool:
    """For ``rows`` query rows per key/value head; float32 has no tensor cores in either."""
    return dtype != torch.float32 and rows >= TRITON_ROWS.get(arch, rows + 1)
