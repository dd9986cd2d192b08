# SPDX-License-Identifier: Apache-2.0
"""Small calls of every Graph-KV attention op, for ``python -m torch_kernels selftest``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_kernels.graph_attention import reference
from torch_kernels.graph_attention.graph import SegmentGraph


def _run(op: str, arguments: dict[str, Any], device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The op's outputs and the reference's in float64."""

    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x

    ours = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    exact = {name: x if name in ("inv_freq", "lse") else wide(x) for name, x in arguments.items()}
    got, truth = getattr(torch.ops.kernels, op)(**ours), getattr(reference, op)(**exact)
    return (got, truth) if isinstance(got, tuple) else ((got,), (truth,))


def cases() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    graph = SegmentGraph([70, 0, 33, 150], [(0, 3), (1, 3), (2, 3), (0, 2)])
    heads, kv_heads, size, tokens, segments = 8, 2, 64, sum(graph.lengths), len(graph)
    names = ("q_offsets", "kv_offsets", "edge_offsets", "edge_sources", "own_segment")
    indices: dict[str, Any] = dict(zip(names, graph.arguments, strict=True))
    last: dict[str, Any] = indices | {"q_offsets": torch.arange(segments + 1, dtype=torch.int32)}
    inv_freq = 10000.0 ** -(torch.arange(0, size, 2) / size)
    places = dict(zip(("q_start", "edge_start", "own_start"), graph.positions(), strict=True))

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        name = str(dtype).removeprefix("torch.")
        q, k = normal(tokens, heads, size, dtype=dtype), normal(tokens, kv_heads, size, dtype=dtype)
        v = normal(tokens, kv_heads, size, dtype=dtype)
        extra: dict[str, Any]
        for extra in ({}, {"inv_freq": inv_freq, **places}):
            description = f"{name} {' '.join(extra)}"
            call = {"q": q, "k": k, "v": v} | indices | extra
            yield "graph_attention", description, partial(_run, "graph_attention", call), tolerance
            decode = call | last | {"q": q[:segments]}
            yield "graph_attention", f"decode {description}", partial(_run, "graph_attention", decode), tolerance
            out, lse = reference.graph_attention(**call)
            backward = {"grad_out": normal(tokens, heads, size, dtype=dtype), "out": out, "lse": lse} | call
            yield (
                "graph_attention_backward", description, partial(_run, "graph_attention_backward", backward),
                4 * tolerance,
            )  # fmt: skip
        shift = {"k": k, "offsets": graph.kv_offsets, "delta": torch.tensor([5, 1, -7, 200000]), "inv_freq": inv_freq}
        yield "rope_shift", name, partial(_run, "rope_shift", shift), tolerance
