# SPDX-License-Identifier: Apache-2.0
"""The ops as torch sees them: schemas, fakes, compilation, and the public functions."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch_kernels
from torch import Tensor
from torch_kernels._registry import OPS, triton_version

from ..backends import Backend
from ..tolerance import assert_bitwise
from .samples import samples

GRAPH = "Tensor q_offsets, Tensor kv_offsets, Tensor edge_offsets, Tensor edge_sources, Tensor own_segment"
ROTATION = (
    "Tensor? inv_freq=None, Tensor? q_start=None, Tensor? edge_start=None, Tensor? own_start=None, "
    "bool interleaved=False"
)
SCHEMAS = {
    "graph_attention": f"(Tensor q, Tensor k, Tensor v, {GRAPH}, *, float? scale=None, Tensor? block_table=None, "
    f"{ROTATION}) -> (Tensor out, Tensor lse)",
    "graph_attention_backward": f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {GRAPH}, *, "
    f"float? scale=None, {ROTATION}) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    "rope_shift": "(Tensor k, Tensor offsets, Tensor delta, Tensor inv_freq, *, bool interleaved=False) -> Tensor",
}
SIGNATURES = {
    "graph_attention": "(q, k, v, q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment, *, scale=None, "
    "block_table=None, inv_freq=None, q_start=None, edge_start=None, own_start=None, interleaved=False)",
    "rope_shift": "(k, offsets, delta, inv_freq, *, interleaved=False)",
}


def every_sample() -> list[Any]:
    counts = {op: len(calls) for op, calls in samples("cpu").items()}
    return [pytest.param(op, i, id=f"{op}-{i}") for op, count in counts.items() for i in range(count)]


def as_tuple(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


@pytest.fixture
def backend_of(any_backend: Backend) -> Any:
    """No backend is forced on a GPU: sequences are Triton's there, decoding is CUDA's."""
    return (lambda: any_backend.forced()) if any_backend.name == "cpu" else torch.no_grad


@pytest.mark.parametrize("op", SCHEMAS)
def test_schema(op: str) -> None:
    assert str(getattr(torch.ops.kernels, op).default._schema) == f"kernels::{op}{SCHEMAS[op]}"


@pytest.mark.parametrize("op", SIGNATURES)
def test_signature_and_documentation(op: str) -> None:
    function = getattr(torch_kernels, op)
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
    assert str(inspect.Signature(parameters)) == SIGNATURES[op]
    assert "Args:" in function.__doc__ and "Raises:" in function.__doc__


def test_decoding_is_cudas_and_sequences_are_tritons() -> None:
    cuda = next(backend for backend in OPS["graph_attention"].backends if backend.name == "cuda")
    assert cuda.refuses is not None
    for i, served in ((0, True), (1, True), (2, False), (3, False), (4, False)):
        positional, _ = samples("cpu")["graph_attention"][i]
        with torch_kernels.use_backend("cuda"):
            assert cuda.refuses(*positional.values()) is None
        if triton_version():
            assert (cuda.refuses(*positional.values()) is None) == served


@pytest.mark.parametrize(("op", "i"), every_sample())
def test_opcheck(any_backend: Backend, backend_of: Any, op: str, i: int) -> None:
    positional, keywords = samples(any_backend.device)[op][i]
    with backend_of():
        torch.library.opcheck(getattr(torch.ops.kernels, op).default, tuple(positional.values()), keywords)


@pytest.mark.parametrize(("op", "i"), every_sample())
def test_op_compiles_without_a_break(any_backend: Backend, backend_of: Any, op: str, i: int) -> None:
    positional, keywords = samples(any_backend.device)[op][i]
    function = getattr(torch.ops.kernels, op)
    torch.compiler.reset()
    with backend_of():
        compiled = torch.compile(lambda *args: function(*args, **keywords), fullgraph=True, backend="aot_eager")
        expected, actual = function(*positional.values(), **keywords), compiled(*positional.values())
    for x, y in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert_bitwise("output", x, y)


def test_compiles_with_its_gradients(any_backend: Backend) -> None:
    arguments, keywords = samples(any_backend.device)["graph_attention"][3]
    graph = {name: x for name, x in arguments.items() if name not in "qkv"} | keywords

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = torch_kernels.rope_shift(k * 2, graph["kv_offsets"], graph["q_start"], graph["inv_freq"])
        return torch_kernels.graph_attention(q + 1, k, v, **graph)[0].relu()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        inputs = [arguments[name].clone().requires_grad_() for name in "qkv"]
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    for name, eager, other in zip(("out", "dq", "dk", "dv"), *results):
        assert_bitwise(name, other, eager)


def test_the_op_itself_refuses_gradients(any_backend: Backend) -> None:
    for op in SCHEMAS:
        positional, keywords = samples(any_backend.device)[op][0]
        name = next(iter(positional))
        positional |= {name: positional[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match=f"{op}: {name} requires grad"):
            getattr(torch.ops.kernels, op)(*positional.values(), **keywords)
        with torch.no_grad():
            getattr(torch.ops.kernels, op)(*positional.values(), **keywords)
