# SPDX-License-Identifier: Apache-2.0
"""Which GPU kernel serves tree attention."""

from __future__ import annotations

import torch

# Rows that share a key/value head from which on Triton's kernel serves, by architecture. On an H100 it took less
# time with any number of rows, launches not counted. That a launch from Triton costs the host too much for few rows is
# an assumption, and 17 an estimate.
TRITON_ROWS = {"sm_90": 17}


def prefers_triton(rows: int, dtype: torch.dtype, arch: str) -> bool:
    """For ``rows`` query rows per key/value head; float32 has no tensor cores in either."""
    return dtype != torch.float32 and rows >= TRITON_ROWS.get(arch, rows + 1)
