# SPDX-License-Identifier: Apache-2.0
"""One small valid call of every op, as (positional, keyword) arguments by name."""

from __future__ import annotations

from typing import Any

import torch
from torch_kernels.sea import reference

Call = tuple[dict[str, Any], dict[str, Any]]


def samples(device: str, backend: str = "cpu") -> dict[str, list[Call]]:
    generator = torch.Generator().manual_seed(0)
    batch, rows, keys, heads, num_cells, size, value_size, m = 2, 3, 5, 2, 20, 16, 8, 6

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    widths = torch.tensor([[3, 4, 5], [5, 0, -1]], dtype=torch.int32, device=device)
    cells = torch.tensor([[[0x0F0F0F0F, 255], [-1, -1], [0, 3]]] * 2, dtype=torch.int32, device=device)
    q, k, v = (
        numbers(batch, rows, heads, size),
        numbers(batch, keys, heads, size),
        numbers(batch, keys, heads, value_size),
    )
    gates = {
        "row_gain": numbers(batch, heads, rows),
        "mix": numbers(batch, heads, rows),
        "pooled": numbers(batch, 1, heads, value_size),
    }
    inputs = {"q": q, "k": k, "v": v}
    selection = {"cells": cells, "widths": widths}
    grad = {"grad_out": numbers(batch, rows, heads, value_size)}
    options = {"num_cells": num_cells, "scale": 0.3, "max_columns_per_cell": 1, **gates}

    def returned(**options: Any) -> dict[str, torch.Tensor]:
        """What the forward pass gave, which its backward pass is told."""
        return dict(zip(("out", "lse"), reference.sea_attention(**inputs, **selection, **options), strict=True))

    features = {n: numbers(batch, keys, heads, m).abs() for n in ("q", "k")} | {"v": v}
    states = numbers(batch, heads, m, value_size), numbers(batch, heads, m).abs()
    initial = {"initial_state": states[0], "initial_norm": states[1], "eps": 0.1}
    grad_features = {"grad_out": numbers(batch, keys, heads, value_size)}
    scores = numbers(batch, heads, rows, num_cells)
    csr = {"num_heads": heads, "num_cells": num_cells}
    total, count = numbers(batch, heads, value_size).double(), torch.tensor([0, 7], device=device)
    return {
        "favor_features": [
            ({"x": q, "proj": numbers(m, size)}, {"kind": "relu", "eps": 1e-3}),
            ({"x": q, "proj": numbers(m, size)}, {"kind": "exp", "eps": 1e-4, "shift": numbers(batch, 1, heads, 1)}),
        ],
        "linear_attention": [(features, {}), (features, {"causal": False, **initial})],
        "linear_attention_backward": [
            (grad_features | features, {}),
            (grad_features | features, {"grad_state": states[0], "grad_norm": states[1], "causal": False, **initial}),
        ],
        "sea_select": [({"scores": scores, "widths": widths}, {"k": 2.0})],
        "sea_attention": [(inputs | selection, {"num_cells": num_cells}), (inputs | selection, options)],
        "sea_attention_backward": [
            (grad | inputs | returned(num_cells=num_cells) | selection, {"num_cells": num_cells}),
            (grad | inputs | returned(**options) | selection, options),
        ],
        "sea_stretch": [({"x": scores, "widths": widths}, {"length": 6, "fill": -1.0})],
        "sea_stretch_backward": [({"grad_out": numbers(batch, heads, rows, 6), "widths": widths}, {"num_cells": 4})],
        "sea_csr": [(selection, csr), (selection, csr | {"max_columns_per_cell": 1})],
        "running_mean": [({"v": v}, {}), ({"v": v}, {"sum": total, "count": count})],
    }
