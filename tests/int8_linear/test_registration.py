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

SCHEMAS = {
    "int8_quantize": "(Tensor x, *, float threshold=0.) -> (Tensor q, Tensor scale, Tensor outliers)",
    "int8_mm": "(Tensor a, Tensor b) -> Tensor",
    "int8_linear": "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, *, Tensor? x_scale=None, "
    "float threshold=0.) -> Tensor",
    "int8_linear_backward": "(Tensor grad, Tensor weight, Tensor weight_scale) -> Tensor",
    "hadamard_transform": "(Tensor x, *, float? scale=None) -> Tensor",
    "rotate_quantize": "(Tensor x, *, Tensor? signs=None, Tensor? smooth=None, Tensor? x_scale=None, int bits=8) -> "
    "(Tensor q, Tensor scale)",
}
SIGNATURES = {
    "int8_quantize": "(x, *, threshold=0.0)",
    "int8_mm": "(a, b)",
    "int8_linear": "(x, w, bias=None, threshold=0.0, *, x_scale=None)",
    "hadamard_transform": "(x, *, scale=None)",
    "rotate_quantize": "(x, *, signs=None, smooth=None, x_scale=None, bits=8)",
}


def every_sample() -> list[Any]:
    counts = {op: len(calls) for op, calls in samples("cpu").items()}
    return [pytest.param(op, i, id=f"{op}-{i}") for op, count in counts.items() for i in range(count)]


def as_tuple(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


@pytest.mark.parametrize("op", SCHEMAS)
def test_schema(op: str) -> None:
    assert str(getattr(torch.ops.kernels, op).default._schema) == f"kernels::{op}{SCHEMAS[op]}"


@pytest.mark.parametrize("op", SIGNATURES)
def test_signature_and_documentation(op: str) -> None:
    function = getattr(torch_kernels, op)
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
    assert str(inspect.Signature(parameters)) == SIGNATURES[op]
    assert "Args:" in function.__doc__ and "Raises:" in function.__doc__


@pytest.mark.parametrize(("op", "i"), every_sample())
def test_opcheck(any_backend: Backend, op: str, i: int) -> None:
    positional, keywords = samples(any_backend.device)[op][i]
    with torch_kernels.use_backend(any_backend.name):
        torch.library.opcheck(getattr(torch.ops.kernels, op).default, tuple(positional.values()), keywords)


@pytest.mark.parametrize(("op", "i"), every_sample())
def test_op_compiles_without_a_break(any_backend: Backend, op: str, i: int) -> None:
    positional, keywords = samples(any_backend.device)[op][i]
    function = getattr(torch.ops.kernels, op)
    torch.compiler.reset()
    with torch_kernels.use_backend(any_backend.name):
        compiled = torch.compile(lambda *args: function(*args, **keywords), fullgraph=True, backend="aot_eager")
        expected, actual = function(*positional.values(), **keywords), compiled(*positional.values())
    for x, y in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert_bitwise("output", x, y)


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


@pytest.mark.parametrize("op", [op for op in SCHEMAS if op != "int8_mm"])
def test_the_op_itself_refuses_gradients(any_backend: Backend, op: str) -> None:
    positional, keywords = samples(any_backend.device)[op][0]
    name = next(iter(positional))
    positional |= {name: positional[name].clone().requires_grad_()}
    with torch_kernels.use_backend(any_backend.name):
        with pytest.raises(ValueError, match=f"{op}: {name} requires grad"):
            getattr(torch.ops.kernels, op)(*positional.values(), **keywords)
        with torch.no_grad():
            getattr(torch.ops.kernels, op)(*positional.values(), **keywords)
