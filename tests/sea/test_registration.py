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

GATES = "Tensor? row_gain=None, Tensor? mix=None, Tensor? pooled=None"
CELLS = f"int num_cells, float? scale=None, int max_columns_per_cell=0, {GATES}"
INITIAL = "bool causal=True, Tensor? initial_state=None, Tensor? initial_norm=None, float eps=0."
SCHEMAS = {
    "favor_features": "(Tensor x, Tensor proj, *, str kind, float eps, Tensor? shift=None) -> Tensor",
    "linear_attention": f"(Tensor q, Tensor k, Tensor v, *, {INITIAL}) -> (Tensor out, Tensor state, Tensor norm)",
    "linear_attention_backward": "(Tensor grad_out, Tensor q, Tensor k, Tensor v, *, Tensor? grad_state=None, "
    f"Tensor? grad_norm=None, {INITIAL}) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_initial_state, "
    "Tensor grad_initial_norm)",
    "sea_select": "(Tensor scores, Tensor widths, *, float k) -> Tensor",
    "sea_attention": f"(Tensor q, Tensor k, Tensor v, Tensor cells, Tensor widths, *, {CELLS}) -> "
    "(Tensor out, Tensor lse)",
    "sea_attention_backward": "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cells, "
    f"Tensor widths, *, {CELLS}) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_row_gain, "
    "Tensor grad_mix, Tensor grad_pooled)",
    "sea_stretch": "(Tensor x, Tensor widths, *, int length, float fill=0.) -> Tensor",
    "sea_stretch_backward": "(Tensor grad_out, Tensor widths, *, int num_cells) -> Tensor",
    "sea_csr": "(Tensor cells, Tensor widths, *, int num_heads, int num_cells, int max_columns_per_cell=0) -> "
    "(Tensor crow, Tensor col)",
    "running_mean": "(Tensor v, *, Tensor? sum=None, Tensor? count=None) -> (Tensor mean, Tensor sum, Tensor count)",
}


def every_sample() -> list[Any]:
    counts = {op: len(calls) for op, calls in samples("cpu").items()}
    return [pytest.param(op, i, id=f"{op}-{i}") for op, count in counts.items() for i in range(count)]


def as_tuple(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


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
        required = parameter.default is parameter.empty
        assert required == (not argument.has_default_value())
        assert required or parameter.default == argument.default_value
    assert "Args:" in function.__doc__


@pytest.mark.parametrize(("op", "i"), every_sample())
def test_opcheck(any_backend: Backend, op: str, i: int) -> None:
    positional, keywords = samples(any_backend.device)[op][i]
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    with any_backend.forced():
        torch.library.opcheck(
            getattr(torch.ops.kernels, op).default, tuple(positional.values()), keywords, test_utils=utils
        )


@pytest.mark.parametrize(("op", "i"), every_sample())
def test_compiles_without_a_break(any_backend: Backend, op: str, i: int) -> None:
    function = getattr(torch_kernels, op)

    def around(*args: Any, **kwargs: Any) -> Any:
        return function(*(x + 0 if x.dtype == torch.float32 else x for x in args), **kwargs)

    torch.compiler.reset()
    positional, keywords = samples(any_backend.device)[op][i]
    with any_backend.forced(), torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        expected = function(*positional.values(), **keywords)
        actual = torch.compile(around, fullgraph=True, backend="aot_eager")(*positional.values(), **keywords)
    for x, y in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert_bitwise("output", x, y)


def test_training_compiles_without_a_break(any_backend: Backend) -> None:
    """Select, attend and stretch, forward and backward, for several lengths."""
    torch.compiler.reset()

    def loss(q: Tensor, scores: Tensor, widths: Tensor) -> Tensor:
        cells = torch_kernels.sea_select(scores, widths, k=2)
        out, _ = torch_kernels.sea_attention(q, q + 1, q * 2, cells, widths, num_cells=4)
        stretched = torch_kernels.sea_stretch(scores, widths, length=q.shape[1])
        return out.square().sum() + stretched.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with any_backend.forced():
        for tokens in (3, 5, 8):
            q = torch.randn(1, tokens, 2, 8, device=any_backend.device, requires_grad=True)
            scores = torch.randn(1, 2, tokens, 4, device=any_backend.device, requires_grad=True)
            widths = torch.arange(1, tokens + 1, device=any_backend.device)[None]
            grads = [torch.autograd.grad(f(q, scores, widths), (q, scores)) for f in (compiled, loss)]
            for x, y in zip(*grads, strict=True):
                assert_bitwise("gradient", x, y)
