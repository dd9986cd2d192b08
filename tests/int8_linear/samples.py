# SPDX-License-Identifier: Apache-2.0
"""One small valid call of every op, as (positional, keyword) arguments by name."""

from __future__ import annotations

from typing import Any

import torch

Call = tuple[dict[str, Any], dict[str, Any]]


def samples(device: str, backend: str = "cpu") -> dict[str, list[Call]]:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator).to(device)

    x, one = numbers(2, 3, 24), torch.full((1,), 0.03, device=device)
    x[0, 1, 5] = 7.0
    layer = {"x": x, "weight": integers(5, 24), "weight_scale": numbers(5).abs()}
    vectors = {"signs": numbers(24).sign(), "smooth": numbers(24).abs() + 0.1}
    return {
        "int8_quantize": [({"x": x}, {}), ({"x": x}, {"threshold": 6.0})],
        "int8_mm": [({"a": integers(3, 24), "b": integers(5, 24)}, {})],
        "int8_linear": [
            (layer, {}),
            (layer | {"bias": numbers(5)}, {"threshold": 6.0}),
            (layer | {"bias": numbers(5)}, {"x_scale": one}),
        ],
        "int8_linear_backward": [({"grad": numbers(2, 3, 5)} | {k: layer[k] for k in ("weight", "weight_scale")}, {})],
        "hadamard_transform": [({"x": x}, {}), ({"x": x}, {"scale": 0.5})],
        "rotate_quantize": [({"x": x}, {}), ({"x": x}, vectors | {"bits": 4}), ({"x": x}, {"x_scale": one})],
    }
