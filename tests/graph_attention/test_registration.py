# SPDX-License-Identifier: Apache-2.0
"""The ops as torch sees them: schemas, fakes, compilation, and the public functions."""

from __future__ import annotations

import torch
import torch_kernels
from torch import Tensor
from torch_kernels._registry import OPS, triton_version

from ..backends import Backend
from ..tolerance import assert_bitwise
from .samples import samples


def test_decoding_is_cudas_and_sequences_are_tritons() -> None:
    cuda = next(backend for backend in OPS["graph_attention"].backends if backend.name == "cuda")
    assert cuda.refuses is not None
    for i, served in ((0, True), (1, True), (2, False), (3, False), (4, False)):
        positional, _ = samples("cpu")["graph_attention"][i]
        with torch_kernels.use_backend("cuda"):
            assert cuda.refuses(*positional.values()) is None
        if triton_version():
            assert (cuda.refuses(*positional.values()) is None) == served


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
