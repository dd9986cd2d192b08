# SPDX-License-Identifier: Apache-2.0
"""The ops as torch sees them: schemas, fakes, compilation, and the public functions."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch_kernels
from torch import Tensor

from ..backends import Backend, need
from ..tolerance import assert_bitwise
from .samples import samples

QKV = "Tensor q, Tensor k, Tensor v"
OPTIONS = "Tensor? initial_state=None, Tensor? cu_seqlens=None, float? scale=None"
FORWARD = f"{OPTIONS}, bool output_final_state=False) -> (Tensor out, Tensor final_state)"
GRADS = "Tensor grad_q, Tensor grad_k, Tensor grad_v"
SCHEMAS = {
    "lightning_attention": f"({QKV}, Tensor slopes, *, {FORWARD}",
    "simple_gla": f"({QKV}, Tensor g, *, {FORWARD}",
    "lightning_attention_backward": f"(Tensor grad_out, {QKV}, Tensor slopes, *, Tensor? grad_final_state=None, "
    f"{OPTIONS}, bool decay_gradient=True) -> ({GRADS}, Tensor grad_slopes, Tensor grad_initial_state)",
    "simple_gla_backward": f"(Tensor grad_out, {QKV}, Tensor g, *, Tensor? grad_final_state=None, {OPTIONS}, "
    f"bool decay_gradient=True) -> ({GRADS}, Tensor grad_g, Tensor grad_initial_state)",
    "lightning_chunk_state": "(Tensor k, Tensor v, Tensor slopes, *, Tensor? cu_seqlens=None) -> Tensor",
    "lightning_apply_state": "(Tensor q, Tensor state, Tensor slopes, *, Tensor? cu_seqlens=None, "
    "float? scale=None) -> Tensor",
    "lightning_attention_step_": f"({QKV}, Tensor(a!) state, Tensor slopes, *, Tensor? state_indices=None, "
    "float? scale=None) -> Tensor",
    "lightning_attention_verify": f"({QKV}, Tensor state, Tensor slopes, *, Tensor? parents=None, "
    "Tensor? state_indices=None, float? scale=None) -> Tensor",
    "lightning_attention_commit_": "(Tensor k, Tensor v, Tensor(a!) state, Tensor slopes, Tensor path, "
    "Tensor num_accepted, *, Tensor? state_indices=None) -> ()",
}


def every_sample() -> list[Any]:
    counts = {op: len(calls) for op, calls in samples("cpu").items()}
    return [pytest.param(op, i, id=f"{op}-{i}") for op, count in counts.items() for i in range(count)]


def as_tuple(x: Any) -> tuple[Tensor, ...]:
    return () if x is None else (x,) if isinstance(x, Tensor) else tuple(x)


@pytest.mark.parametrize("op", SCHEMAS)
def test_schema(op: str) -> None:
    assert str(getattr(torch.ops.kernels, op).default._schema) == f"kernels::{op}{SCHEMAS[op]}"


@pytest.mark.parametrize("op", SCHEMAS)
def test_signature_and_documentation(op: str) -> None:
    """``torch_kernels.<op>`` has the op's arguments, in order, by the same names and with the same defaults."""
    function = getattr(torch_kernels, op)
    schema = getattr(torch.ops.kernels, op).default._schema
    parameters = inspect.signature(function).parameters
    assert list(parameters) == [a.name for a in schema.arguments]
    for argument in schema.arguments:
        parameter = parameters[argument.name]
        assert (parameter.kind is parameter.KEYWORD_ONLY) == argument.kwarg_only
        assert not argument.kwarg_only or parameter.default == argument.default_value
    assert "Args:" in function.__doc__


@pytest.mark.parametrize(("op", "i"), every_sample())
def test_opcheck(any_backend: Backend, op: str, i: int) -> None:
    need(any_backend, op)
    positional, keywords = samples(any_backend.device)[op][i]
    with any_backend.forced():
        torch.library.opcheck(
            getattr(torch.ops.kernels, op).default,
            tuple(positional.values()),
            keywords,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.parametrize(("op", "i"), every_sample())
def test_compiles_without_a_break(any_backend: Backend, op: str, i: int) -> None:
    need(any_backend, op)
    function = getattr(torch_kernels, op)

    def around(*args: Any, **kwargs: Any) -> Any:
        args = [x + 0 if x.dtype == torch.float32 and not op.endswith("_") else x for x in args]
        return function(*args, **kwargs)

    torch.compiler.reset()
    with any_backend.forced(), torch.no_grad():
        eager_args, compiled_args = samples(any_backend.device)[op][i], samples(any_backend.device)[op][i]
        expected = function(*eager_args[0].values(), **eager_args[1])
        compiled = torch.compile(around, fullgraph=True, backend="aot_eager")
        actual = compiled(*compiled_args[0].values(), **compiled_args[1])
    for x, y in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert_bitwise("output", x, y)
    for name, x in eager_args[0].items():
        assert_bitwise(name, compiled_args[0][name], x)


def test_compiled_function_keeps_working_for_other_sizes(any_backend: Backend) -> None:
    need(any_backend, "lightning_attention")
    torch.compiler.reset()
    function = torch.compile(
        lambda q, slopes: torch_kernels.lightning_attention(q, q, q, slopes)[0] + 1,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    slopes = torch.tensor([0.5, 0.1], device=any_backend.device)
    with any_backend.forced():
        for tokens in (3, 5, 9):
            q = torch.ones(1, tokens, 2, 8, device=any_backend.device)
            expected = torch_kernels.lightning_attention(q, q, q, slopes)[0] + 1
            assert_bitwise("out", function(q, slopes), expected)
