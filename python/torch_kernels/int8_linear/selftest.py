# SPDX-License-Identifier: Apache-2.0
"""Small calls of every int8 linear op, for ``python -m torch_kernels selftest``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_kernels.int8_linear import reference
from torch_kernels.int8_linear.weight import Int8Weight


def _run(op: str, arguments: dict[str, Any], device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The op's outputs and the reference's, which computes in float32 whatever the dtype."""
    ours = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    got, truth = getattr(torch.ops.kernels, op)(**ours), getattr(reference, op)(**arguments)
    return (got, truth) if isinstance(got, tuple) else ((got,), (truth,))


def cases() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    rows, inputs, outputs = 9, 320, 77

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    w = Int8Weight.quantize(normal(outputs, inputs) / inputs**0.5)
    weight = {"weight": w.weight, "weight_scale": w.scale}
    signs = torch.where(normal(inputs) > 0, 1.0, -1.0)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        name = str(dtype).removeprefix("torch.")
        x, bias = normal(rows, inputs, dtype=dtype), normal(outputs, dtype=dtype)
        x[3, 5] = 9.0
        extra: dict[str, Any]
        for extra in ({}, {"threshold": 6.0}):
            yield "int8_quantize", f"{name} {' '.join(extra)}", partial(_run, "int8_quantize", {"x": x} | extra)
        for extra in ({}, {"threshold": 6.0}, {"x_scale": torch.full((1,), 0.03)}):
            arguments: dict[str, Any] = {"x": x, "bias": bias} | weight | extra
            yield "int8_linear", f"{name} {' '.join(extra)}", partial(_run, "int8_linear", arguments), tolerance
        grad = normal(rows, outputs, dtype=dtype)
        yield "int8_linear_backward", name, partial(_run, "int8_linear_backward", {"grad": grad} | weight), tolerance
        yield "hadamard_transform", name, partial(_run, "hadamard_transform", {"x": x}), tolerance
        # Sums of small integers are exact, so q is, whatever the order of the additions.
        x = normal(rows, 64).mul(4).round().to(dtype)
        yield "rotate_quantize", name, partial(_run, "rotate_quantize", {"x": x, "signs": signs[:64], "bits": 4})
    a, b = (torch.randint(-128, 128, (n, inputs), dtype=torch.int8, generator=generator) for n in (rows, outputs))
    yield "int8_mm", "", partial(_run, "int8_mm", {"a": a, "b": b})
