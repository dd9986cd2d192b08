# SPDX-License-Identifier: Apache-2.0
"""sea_csr in two steps: how many columns there are says how large the result is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def in_two_steps(rows: Callable[..., Any], columns: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """``rows(crow, *arguments)`` writes crow, then ``columns(col, crow, *arguments)`` writes col; arguments are those
    of the op."""

    def sea_csr(cells: Tensor, widths: Tensor, num_heads: int, *rest: Any) -> tuple[Tensor, Tensor]:
        cells, widths = cells.contiguous(), widths.contiguous()
        crow = cells.new_empty(cells.shape[0] * cells.shape[1] * num_heads + 1)
        rows(crow, cells, widths, num_heads, *rest)
        col = cells.new_empty(int(crow[-1]))
        columns(col, crow, cells, widths, num_heads, *rest)
        return crow, col

    return sea_csr
