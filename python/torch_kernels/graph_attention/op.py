# SPDX-License-Identifier: Apache-2.0
"""Schemas, checks and outputs of the Graph-KV attention ops."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_kernels import _checks, _native
from torch_kernels._registry import Backend, Op, may_choose_triton, native, unit_stride
from torch_kernels.graph_attention import heuristics, reference

MAX_HEAD_SIZE = 256
ON_GPU = (torch.float32, torch.float16, torch.bfloat16)
FREQUENCIES = (torch.float32, torch.float64)


def _leaves_sequences(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, *_: Any) -> str | None:
    """For the CUDA kernel, which computes every token alone: Triton's serves sequences unless a backend is forced."""
    if may_choose_triton() and heuristics.prefers_triton(q.shape[0], q_offsets.shape[0] - 1):
        return "Triton's kernel is faster for query segments of several tokens"
    return None


def _backends(name: str, on_cuda: bool = True, refuses: Callable[..., str | None] | None = None) -> tuple[Backend, ...]:
    def triton() -> Callable[..., Any]:
        return getattr(importlib.import_module("torch_kernels.graph_attention.triton_kernels"), name)

    kernels = (
        Backend("cpu", native("cpu", name), _checks.FLOATING),
        Backend("cuda", native("cuda", name), ON_GPU, unit_stride, refuses),
        Backend("triton", triton, ON_GPU),
        Backend("emulator", native("emulator", name), ON_GPU, unit_stride),
        Backend("reference", lambda: getattr(reference, name), _checks.FLOATING),
    )
    return tuple(kernel for kernel in kernels if on_cuda or kernel.name not in ("cuda", "emulator"))


def _check_floating(op: str, dtype_of: Tensor, **tensors: Tensor | None) -> None:
    """float32, float16 or bfloat16, float64 on the CPU, and all the same."""
    _checks.dtype(op, _checks.FLOATING if dtype_of.device.type == "cpu" else ON_GPU, **tensors)
    _checks.dtype(op, (dtype_of.dtype,), **tensors)


def _check_head_sizes(op: str, dims: dict[str, int]) -> None:
    for name in ("D", "Dv"):
        if name in dims and (dims[name] % 8 or not 8 <= dims[name] <= MAX_HEAD_SIZE):
            _checks.fail(op, f"head size {name}", f"a multiple of 8 up to {MAX_HEAD_SIZE}", dims[name])


def _check_offsets(op: str, dims: dict[str, int], name: str, offsets: Tensor, segments: str) -> None:
    """Offsets of `segments` are one more; a dimension named before must agree."""
    if (
        offsets.dim() != 1
        or offsets.shape[0] < 1
        or dims.setdefault(segments, offsets.shape[0] - 1) + 1 != len(offsets)
    ):
        known = f"{segments}={dims[segments]}" if segments in dims else segments
        _checks.fail(op, name, f"[{known} + 1]", f"shape {list(offsets.shape)}")


def _check_graph(
    op: str,
    q: Any,
    k: Any,
    v: Any,
    q_offsets: Any,
    kv_offsets: Any,
    edge_offsets: Any,
    edge_sources: Any,
    own_segment: Any,
    block_table: Any,
    inv_freq: Any,
    q_start: Any,
    edge_start: Any,
    own_start: Any,
) -> dict[str, int]:
    dims: dict[str, int] = {}
    indices = {
        "q_offsets": q_offsets, "kv_offsets": kv_offsets, "edge_offsets": edge_offsets, "edge_sources": edge_sources,
        "own_segment": own_segment, "block_table": block_table, "q_start": q_start, "edge_start": edge_start,
        "own_start": own_start,
    }  # fmt: skip
    keys = "Tk Hk {}" if block_table is None else "P page Hk {}"
    _checks.shape(op, dims, q=(q, "Tq Hq D"), k=(k, keys.format("D")), v=(v, keys.format("Dv")))
    _checks.shape(op, dims, own_segment=(own_segment, "Nq"), edge_sources=(edge_sources, "E"))
    _check_offsets(op, dims, "q_offsets", q_offsets, "Nq")
    _check_offsets(op, dims, "kv_offsets", kv_offsets, "Nk")
    _check_offsets(op, dims, "edge_offsets", edge_offsets, "Nq")
    _checks.shape(op, dims, block_table=(block_table, "Nk pages"), q_start=(q_start, "Nq"))
    _checks.shape(op, dims, edge_start=(edge_start, "E"), own_start=(own_start, "Nq"))
    _check_floating(op, q, q=q, k=k, v=v)
    _checks.dtype(op, _checks.INDEX, **indices)
    _check_head_sizes(op, dims)
    dims["D/2"] = dims["D"] // 2
    _checks.shape(op, dims, inv_freq=(inv_freq, "D/2"))
    _checks.dtype(op, FREQUENCIES, inv_freq=inv_freq)
    _checks.same_device(op, q, k=k, v=v, inv_freq=inv_freq, **indices)
    if dims["Hk"] == 0 or dims["Hq"] % dims["Hk"]:
        _checks.fail(op, "Hq", f"a multiple of Hk={dims['Hk']}", dims["Hq"])
    if block_table is not None and dims["page"] < 1:
        _checks.fail(op, "k", "pages of at least one slot", f"shape {list(k.shape)}")
    for name, start in (("q_start", q_start), ("edge_start", edge_start)):
        if inv_freq is not None and start is None:
            _checks.fail(op, name, "given with inv_freq", "None")
    for name, start in (("q_start", q_start), ("edge_start", edge_start), ("own_start", own_start)):
        if inv_freq is None and start is not None:
            _checks.fail(op, name, "None without inv_freq", "a tensor")
    return dims


# ---- graph_attention ----


def _check_attention(
    op: str,
    q: Any,
    k: Any,
    v: Any,
    q_offsets: Any,
    kv_offsets: Any,
    edge_offsets: Any,
    edge_sources: Any,
    own_segment: Any,
    scale: float | None,
    block_table: Any,
    *rotation: Any,
) -> None:
    graph = (q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment)
    _check_graph(op, q, k, v, *graph, block_table, *rotation[:4])


def _allocate_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    tokens, heads = q.shape[:2]
    return q.new_empty((tokens, heads, v.shape[-1])), q.new_empty((heads, tokens), dtype=torch.float32)


def _validate_attention(op: str, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
    graph, block_table = rest[:5], rest[6]
    _native.cpu.validate_graph(op, q, k, *graph, block_table)


graph_attention = Op(
    "graph_attention(Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor kv_offsets, Tensor edge_offsets, "
    "Tensor edge_sources, Tensor own_segment, *, float? scale=None, Tensor? block_table=None, Tensor? inv_freq=None, "
    "Tensor? q_start=None, Tensor? edge_start=None, Tensor? own_start=None, bool interleaved=False) -> "
    "(Tensor out, Tensor lse)",
    partial(_check_attention, "graph_attention"), _allocate_attention,
    _backends("graph_attention", refuses=_leaves_sequences),
    partial(_validate_attention, "graph_attention"),
)  # fmt: skip


# ---- graph_attention_backward ----


def _check_backward(
    op: str,
    grad_out: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    q_offsets: Any,
    kv_offsets: Any,
    edge_offsets: Any,
    edge_sources: Any,
    own_segment: Any,
    scale: float | None,
    *rotation: Any,
) -> None:
    graph = (q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment)
    dims = _check_graph(op, q, k, v, *graph, None, *rotation[:4])
    _checks.shape(op, dims, grad_out=(grad_out, "Tq Hq Dv"), out=(out, "Tq Hq Dv"), lse=(lse, "Hq Tq"))
    _check_floating(op, q, grad_out=grad_out, out=out)
    _checks.dtype(op, (torch.float32,), lse=lse)
    _checks.same_device(op, q, grad_out=grad_out, out=out, lse=lse)


def _allocate_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _validate_backward(op: str, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
    _native.cpu.validate_graph(op, q, k, *rest[2:7], None)


graph_attention_backward = Op(
    "graph_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor q_offsets, Tensor kv_offsets, Tensor edge_offsets, Tensor edge_sources, Tensor own_segment, *, "
    "float? scale=None, Tensor? inv_freq=None, Tensor? q_start=None, Tensor? edge_start=None, "
    "Tensor? own_start=None, bool interleaved=False) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    partial(_check_backward, "graph_attention_backward"), _allocate_backward,
    _backends("graph_attention_backward", on_cuda=False),
    partial(_validate_backward, "graph_attention_backward"),
)  # fmt: skip


# ---- rope_shift ----


def _check_shift(op: str, k: Any, offsets: Any, delta: Any, inv_freq: Any, interleaved: bool) -> None:
    dims: dict[str, int] = {}
    _checks.shape(op, dims, k=(k, "Tk Hk D"), delta=(delta, "N"))
    _check_offsets(op, dims, "offsets", offsets, "N")
    _check_head_sizes(op, dims)
    dims["D/2"] = dims["D"] // 2
    _checks.shape(op, dims, inv_freq=(inv_freq, "D/2"))
    _check_floating(op, k, k=k)
    _checks.dtype(op, _checks.INDEX, offsets=offsets, delta=delta)
    _checks.dtype(op, FREQUENCIES, inv_freq=inv_freq)
    _checks.same_device(op, k, offsets=offsets, delta=delta, inv_freq=inv_freq)


def _validate_shift(op: str, k: Tensor, offsets: Tensor, *_: Any) -> None:
    _native.cpu.validate_offsets(op, k, offsets)


rope_shift = Op(
    "rope_shift(Tensor k, Tensor offsets, Tensor delta, Tensor inv_freq, *, bool interleaved=False) -> Tensor",
    partial(_check_shift, "rope_shift"), lambda k, *_: (k.new_empty(k.shape),),
    _backends("rope_shift"), partial(_validate_shift, "rope_shift"),
)  # fmt: skip
