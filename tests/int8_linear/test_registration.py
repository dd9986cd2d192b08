# SPDX-License-Identifier: Apache-2.0
"""The ops as torch sees them: schemas, fakes, compilation, and the public functions."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch_kernels
from torch import Tensor

from ..backends import Backend
from ..tolerance import assert_bitwise
from .samples import samples


def test_signature() -> None:
    assert str(inspect.signature(torch_kernels.int8_linear)).startswith(
        "(x: 'Tensor', w: 'Int8Weight', bias: 'Tensor | None' = None, threshold: 'float' = 0.0, *, x_scale:"
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_layer_compiles_with_its_gradients(any_backend: Backend, dynamic: bool) -> None:
    arguments, _ = samples(any_backend.device)["int8_linear"][1]
    w = torch_kernels.Int8Weight(arguments["weight"], arguments["weight_scale"])

    def step(x: Tensor, bias: Tensor) -> Tensor:
        x = torch_kernels.hadamard_transform(x * 2)
        return torch_kernels.int8_linear(x, w, bias, threshold=3.0).relu()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch_kernels.use_backend(any_backend.name):
        for rows in (2, 1, 4) if dynamic else (2,):
            results = []
            for function in (step, compiled):
                x = arguments["x"].repeat(rows, 1, 1)[:rows].clone().requires_grad_()
                bias = arguments["bias"].clone().requires_grad_()
                y = function(x, bias)
                results.append((y, *torch.autograd.grad(y.sum(), (x, bias))))
            for name, eager, other in zip(("y", "dx", "dbias"), *results):
                assert_bitwise(name, other, eager)


@pytest.mark.parametrize("options", [{}, {"threshold": 3.0}, {"rotate": True}, {"smooth": True, "rotate": True}])
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_module_compiles(any_backend: Backend, options: dict[str, Any], wants_gradient: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(24, 7).to(any_backend.device)
    if "smooth" in options:
        options = options | {"smooth": torch.rand(24, generator=generator) + 0.5}
    x = torch.randn(2, 3, 24, generator=generator).to(any_backend.device).requires_grad_(wants_gradient)
    torch.compiler.reset()
    with torch_kernels.use_backend(any_backend.name), torch.set_grad_enabled(wants_gradient):
        layer = torch_kernels.nn.Int8Linear.from_linear(linear, **options)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        expected, actual = layer(x), compiled(x)
        assert_bitwise("y", actual, expected)
        if wants_gradient:
            for one, other in zip(*(torch.autograd.grad(y.sum(), (x, layer.bias)) for y in (expected, actual))):
                assert_bitwise("gradient", other, one)


def test_autocast(any_backend: Backend) -> None:
    (arguments, _), device = samples(any_backend.device)["int8_linear"][1], any_backend.device
    w = torch_kernels.Int8Weight(arguments["weight"], arguments["weight_scale"])
    half = torch.float16  # every backend computes in it
    with torch_kernels.use_backend(any_backend.name):
        with torch.autocast(device, half):
            y = torch_kernels.int8_linear(arguments["x"], w, arguments["bias"])
        assert_bitwise("y", y, torch_kernels.int8_linear(arguments["x"].to(half), w, arguments["bias"]))
