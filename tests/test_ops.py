# SPDX-License-Identifier: Apache-2.0
"""What torch sees of every op: schemas, public functions, fakes, compilation, gradients, devices."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_kernels
from torch import Tensor

from .backends import Backend
from .calls import EVERY, OPS, as_tuple, call, on, sample
from .tolerance import assert_bitwise

SCHEMAS = Path(__file__).with_name("data") / "schemas.txt"
# Their public functions take an object that has the weight and its scales.
TAKE_WEIGHTS = ("int4_linear", "int8_linear")
# Autograd alone calls them.
NOT_PUBLIC = ("graph_attention_backward", "int4_linear_backward", "int8_linear_backward")


def schema(op: str) -> Any:
    return getattr(torch.ops.kernels, op).default._schema


def test_schemas_are_those_that_saved_programs_call() -> None:
    assert [str(schema(op)) for op in sorted(OPS)] == SCHEMAS.read_text().splitlines()


@pytest.mark.parametrize("op", [op for op in OPS if op not in NOT_PUBLIC])
def test_public_function(op: str) -> None:
    """``torch_kernels.<op>`` is documented, and has the op's arguments in order, by the same names and defaults."""
    function = getattr(torch_kernels, op)
    assert "Args:" in function.__doc__ and "Raises:" in function.__doc__
    if op in TAKE_WEIGHTS:
        return
    parameters = inspect.signature(function).parameters
    assert list(parameters) == [argument.name for argument in schema(op).arguments]
    for argument in schema(op).arguments:
        parameter = parameters[argument.name]
        assert (parameter.kind is parameter.KEYWORD_ONLY) == argument.kwarg_only
        assert parameter.default == (argument.default_value if argument.has_default_value() else parameter.empty)


@pytest.mark.parametrize(("op", "i"), EVERY)
def test_opcheck(any_backend: Backend, op: str, i: int) -> None:
    positional, keywords = sample(any_backend, op, i)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # The schema check compares inputs by arithmetic that torch has no float8 kernels for.
    if torch.float8_e4m3fn in {x.dtype for x in positional.values() if isinstance(x, Tensor)}:
        checks.remove("test_schema")
    with on(any_backend, op):
        torch.library.opcheck(
            getattr(torch.ops.kernels, op).default, tuple(positional.values()), keywords, test_utils=checks
        )


@pytest.mark.parametrize(("op", "i"), EVERY)
def test_compiles_without_a_break(any_backend: Backend, op: str, i: int) -> None:
    public = op not in NOT_PUBLIC + TAKE_WEIGHTS
    function = getattr(torch_kernels if public else torch.ops.kernels, op)

    def around(*args: Any, **kwargs: Any) -> Any:
        if not op.endswith("_"):
            args = [x + 0 if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in args]
        return function(*args, **kwargs)

    torch.compiler.reset()
    with on(any_backend, op), torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        eager, compiled = sample(any_backend, op, i), sample(any_backend, op, i)
        expected = function(*eager[0].values(), **eager[1])
        actual = torch.compile(around, fullgraph=True, backend="aot_eager")(*compiled[0].values(), **compiled[1])
    for x, y in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert_bitwise("output", x, y)
    for name, x in eager[0].items():
        if x is not None:
            assert_bitwise(name, compiled[0][name], x)


@pytest.mark.parametrize("op", OPS)
def test_no_gradient_is_lost_in_silence(any_backend: Backend, op: str) -> None:
    """An op that has no backward pass of its own refuses what requires grad, and names its first such argument."""
    positional, _ = sample(any_backend, op, 0)
    floating = [name for name, x in positional.items() if isinstance(x, Tensor) and x.is_floating_point()]
    for name in floating:
        required = {name: lambda x: x.requires_grad_()}
        with pytest.raises(ValueError, match=f"{op}: {name} requires grad"):
            call(any_backend, op, 0, **required)
        with torch.no_grad():
            call(any_backend, op, 0, **required)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize(("op", "i"), EVERY)
def test_other_device(any_backend: Backend, op: str, i: int) -> None:
    positional, keywords = sample(any_backend, op, i)
    tensors = [name for name, x in (positional | keywords).items() if isinstance(x, Tensor)]
    for name in tensors[1:]:
        with pytest.raises(ValueError, match=f"{op}.*{name}"):
            call(any_backend, op, i, **{name: lambda x: x.cpu()})
