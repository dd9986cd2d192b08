# SPDX-License-Identifier: Apache-2.0
"""Schemas, checks and outputs of the lightning attention ops."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_kernels import _checks, _native
from torch_kernels._registry import Backend, Op, native, triton_version, unit_stride
from torch_kernels._triton import beyond_a_grid
from torch_kernels.lightning_attention import reference

MAX_HEAD_SIZE = 256
MAX_NODES = 1024
ON_GPU = (torch.float32, torch.float16, torch.bfloat16)


def _needs_newer_triton(*_: Any) -> str | None:
    """Loops are told not to move what they repeat out of themselves, where it would take the registers."""
    version = tuple(map(int, (triton_version() or "0.0").split(".")[:2]))
    return None if version >= (3, 5) else "it needs Triton 3.5 or later"


def _too_many(rows: Tensor, *_: Any) -> str | None:
    """For Triton's kernels of decoding, which have the rows along an axis of limited length."""
    return beyond_a_grid(rows.shape[0])


def _backends(name: str, compiled_for_cuda: bool) -> tuple[Backend, ...]:
    """The backends of an op. Products of dense tiles are Triton's on a GPU, what streams states is CUDA C++ too."""

    def triton() -> Callable[..., Any]:
        return getattr(importlib.import_module("torch_kernels.lightning_attention.triton_kernels"), name)

    refuses = _too_many if compiled_for_cuda else _needs_newer_triton
    cuda = [Backend(kind, native(kind, name), ON_GPU, accepts=unit_stride) for kind in ("cuda", "emulator")]
    return (
        Backend("cpu", native("cpu", name), _checks.FLOATING, accepts=unit_stride),
        *(cuda[:1] if compiled_for_cuda else ()),
        Backend("triton", triton, ON_GPU, unit_stride, refuses),
        *(cuda[1:] if compiled_for_cuda else ()),
        Backend("reference", lambda: getattr(reference, name), _checks.FLOATING),
    )


def _op(
    schema: str,
    check: Callable[..., Any],
    allocate: Callable[..., tuple[Tensor, ...]],
    validate: Callable[..., None],
    compiled_for_cuda: bool = False,
) -> Op:
    name = schema.partition("(")[0]
    backends = _backends(name, compiled_for_cuda)
    return Op(schema, partial(check, name), allocate, backends, partial(validate, name))


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States are float32, and float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- checks that ops share ----


def _check_floating(op: str, reference: Tensor, **tensors: Tensor) -> None:
    """float32, float16 or bfloat16, float64 on the CPU, and all the same."""
    first = next(iter(tensors))
    _checks.dtype(op, _checks.FLOATING if reference.device.type == "cpu" else ON_GPU, **{first: tensors[first]})
    _checks.dtype(op, (tensors[first].dtype,), **tensors)


def _check_decay(op: str, dtype: torch.dtype, **decay: Tensor) -> None:
    allowed = (torch.float32, torch.float64) if dtype == torch.float64 else (torch.float32,)
    _checks.dtype(op, allowed, **decay)


def _check_sizes(op: str, dims: dict[str, int]) -> None:
    for name in ("K", "V"):
        if name in dims and (dims[name] % 8 or not 8 <= dims[name] <= MAX_HEAD_SIZE):
            _checks.fail(op, f"head size {name}", f"a multiple of 8 up to {MAX_HEAD_SIZE}", dims[name])
    heads = dims.get("Hq", dims["H"])
    if heads == 0 or dims["H"] == 0 or heads % dims["H"]:
        _checks.fail(op, "Hq", f"a positive multiple of H={dims['H']}", heads)


def _check_sequences(op: str, dims: dict[str, int], cu_seqlens: Tensor | None) -> None:
    """Leaves the number of sequences in dims["N"]."""
    if cu_seqlens is None:
        dims["N"] = dims["B"]
        return
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        _checks.fail(op, "cu_seqlens", "[N+1]", f"shape {list(cu_seqlens.shape)}")
    _checks.dtype(op, _checks.INDEX, cu_seqlens=cu_seqlens)
    if dims["B"] != 1:
        _checks.fail(op, "B", "1 with cu_seqlens", dims["B"])
    dims["N"] = len(cu_seqlens) - 1


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _validate_sequences(op: str, tokens: int, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        _native.cpu.validate_sequences(op, cu_seqlens, tokens)


# ---- whole sequences ----

SEQUENCES = "Tensor? initial_state=None, Tensor? cu_seqlens=None, float? scale=None"


def _check_forward(
    decay: str, op: str, q: Any, k: Any, v: Any, rate: Any, initial_state: Any, cu_seqlens: Any, *_: Any
) -> dict[str, int]:
    dims: dict[str, int] = {}
    _checks.shape(op, dims, q=(q, "B T Hq K"), k=(k, "B T H K"), v=(v, "B T H V"))
    _checks.shape(op, dims, **{decay: (rate, "H" if decay == "slopes" else "B T H")})
    _check_sequences(op, dims, cu_seqlens)
    _checks.shape(op, dims, initial_state=(initial_state, "N H K V"))
    _check_floating(op, q, q=q, k=k, v=v)
    _check_decay(op, q.dtype, **{decay: rate})
    _checks.dtype(op, (state_dtype(q.dtype),), initial_state=initial_state)
    tensors = {"k": k, "v": v, decay: rate, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    _checks.same_device(op, q, **tensors)
    _check_sizes(op, dims)
    return dims


def _allocate_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    states = _sequences(q, cu_seqlens) if output_final_state else 0
    state = q.new_empty((states, k.shape[2], k.shape[3], v.shape[3]), dtype=state_dtype(q.dtype))
    return q.new_empty((*q.shape[:3], v.shape[3])), state


def _validate_forward(op: str, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, *rest: Any) -> None:
    _validate_sequences(op, q.shape[1], rest[1])


lightning_attention = _op(
    f"lightning_attention(Tensor q, Tensor k, Tensor v, Tensor slopes, *, {SEQUENCES}, bool output_final_state=False) "
    "-> (Tensor out, Tensor final_state)",
    partial(_check_forward, "slopes"), _allocate_forward, _validate_forward,
)  # fmt: skip

simple_gla = _op(
    f"simple_gla(Tensor q, Tensor k, Tensor v, Tensor g, *, {SEQUENCES}, bool output_final_state=False) "
    "-> (Tensor out, Tensor final_state)",
    partial(_check_forward, "g"), _allocate_forward, _validate_forward,
)  # fmt: skip


def _check_backward(
    decay: str,
    op: str,
    grad_out: Any,
    q: Any,
    k: Any,
    v: Any,
    rate: Any,
    grad_final_state: Any,
    initial_state: Any,
    cu_seqlens: Any,
    scale: Any,
    decay_gradient: Any,
) -> None:
    dims = _check_forward(decay, op, q, k, v, rate, initial_state, cu_seqlens)
    _checks.shape(op, dims, grad_out=(grad_out, "B T Hq V"), grad_final_state=(grad_final_state, "N H K V"))
    _checks.dtype(op, (q.dtype,), grad_out=grad_out)
    _checks.dtype(op, (state_dtype(q.dtype),), grad_final_state=grad_final_state)
    _checks.same_device(op, q, grad_out=grad_out, grad_final_state=grad_final_state)


def _allocate_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, grad_final_state: Any, initial_state: Any,
    cu_seqlens: Any, scale: Any, decay_gradient: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    states = 0 if initial_state is None else initial_state.shape[0]
    grad_state = q.new_empty((states, k.shape[2], k.shape[3], v.shape[3]), dtype=state_dtype(q.dtype))
    grad_rate = rate.new_empty(rate.shape if decay_gradient else 0)
    return *(x.new_empty(x.shape) for x in (q, k, v)), grad_rate, grad_state


def _validate_backward(op: str, grad_out: Tensor, *rest: Any) -> None:
    _validate_sequences(op, grad_out.shape[1], rest[6])


BACKWARD = (
    "Tensor? grad_final_state=None, Tensor? initial_state=None, Tensor? cu_seqlens=None, float? scale=None, "
    "bool decay_gradient=True"
)

lightning_attention_backward = _op(
    f"lightning_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor slopes, *, {BACKWARD}) -> "
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_slopes, Tensor grad_initial_state)",
    partial(_check_backward, "slopes"), _allocate_backward, _validate_backward,
)  # fmt: skip

simple_gla_backward = _op(
    f"simple_gla_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor g, *, {BACKWARD}) -> "
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_g, Tensor grad_initial_state)",
    partial(_check_backward, "g"), _allocate_backward, _validate_backward,
)  # fmt: skip


# ---- the state of a sequence, and what a state adds to one ----


def _check_chunk_state(op: str, k: Any, v: Any, slopes: Any, cu_seqlens: Any) -> None:
    dims: dict[str, int] = {}
    _checks.shape(op, dims, k=(k, "B T H K"), v=(v, "B T H V"), slopes=(slopes, "H"))
    _check_sequences(op, dims, cu_seqlens)
    _check_floating(op, k, k=k, v=v)
    _check_decay(op, k.dtype, slopes=slopes)
    _checks.same_device(op, k, v=v, slopes=slopes, cu_seqlens=cu_seqlens)
    _check_sizes(op, dims)


def _allocate_chunk_state(k: Tensor, v: Tensor, slopes: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor]:
    shape = (_sequences(k, cu_seqlens), *k.shape[2:], v.shape[3])
    return (k.new_empty(shape, dtype=state_dtype(k.dtype)),)


def _validate_chunk_state(op: str, k: Tensor, v: Tensor, slopes: Tensor, cu_seqlens: Tensor | None) -> None:
    _validate_sequences(op, k.shape[1], cu_seqlens)


lightning_chunk_state = _op(
    "lightning_chunk_state(Tensor k, Tensor v, Tensor slopes, *, Tensor? cu_seqlens=None) -> Tensor",
    _check_chunk_state, _allocate_chunk_state, _validate_chunk_state,
)  # fmt: skip


def _check_apply_state(op: str, q: Any, state: Any, slopes: Any, cu_seqlens: Any, scale: Any) -> None:
    dims: dict[str, int] = {}
    _checks.shape(op, dims, q=(q, "B T Hq K"), slopes=(slopes, "H"))
    _check_sequences(op, dims, cu_seqlens)
    _checks.shape(op, dims, state=(state, "N H K V"))
    _check_floating(op, q, q=q)
    _check_decay(op, q.dtype, slopes=slopes)
    _checks.dtype(op, (state_dtype(q.dtype),), state=state)
    _checks.same_device(op, q, state=state, slopes=slopes, cu_seqlens=cu_seqlens)
    _check_sizes(op, dims)


def _allocate_apply_state(q: Tensor, state: Tensor, *_: Any) -> tuple[Tensor]:
    return (q.new_empty((*q.shape[:3], state.shape[3])),)


def _validate_apply_state(
    op: str, q: Tensor, state: Tensor, slopes: Tensor, cu_seqlens: Tensor | None, scale: float | None
) -> None:
    _validate_sequences(op, q.shape[1], cu_seqlens)


lightning_apply_state = _op(
    "lightning_apply_state(Tensor q, Tensor state, Tensor slopes, *, Tensor? cu_seqlens=None, float? scale=None) "
    "-> Tensor",
    _check_apply_state, _allocate_apply_state, _validate_apply_state,
)  # fmt: skip


# ---- decoding: a pool of states ----


def _check_pool(
    op: str, dims: dict[str, int], dtype: torch.dtype, state: Any, slopes: Any, state_indices: Any, on: Tensor
) -> None:
    rows = "N" if state_indices is None else "P"
    _checks.shape(op, dims, state=(state, f"{rows} H K V"), slopes=(slopes, "H"), state_indices=(state_indices, "N"))
    _checks.dtype(op, (state_dtype(dtype),), state=state)
    _check_decay(op, dtype, slopes=slopes)
    _checks.dtype(op, _checks.INDEX, state_indices=state_indices)
    _checks.same_device(op, on, state=state, slopes=slopes, state_indices=state_indices)
    _check_sizes(op, dims)


def _check_step(
    op: str, q: Any, k: Any, v: Any, state: Any, slopes: Any, state_indices: Any, scale: float | None
) -> None:
    dims: dict[str, int] = {}
    _checks.shape(op, dims, q=(q, "N Hq K"), k=(k, "N H K"), v=(v, "N H V"))
    _check_floating(op, q, q=q, k=k, v=v)
    _checks.same_device(op, q, k=k, v=v)
    _check_pool(op, dims, q.dtype, state, slopes, state_indices, q)


def _allocate_token_outputs(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor]:
    return (q.new_empty((*q.shape[:-1], v.shape[-1])),)


def _validate_step(op: str, q: Tensor, k: Tensor, v: Tensor, state: Tensor, slopes: Tensor, *rest: Any) -> None:
    if rest[0] is not None:
        _native.cpu.validate_state_indices(op, rest[0], state.shape[0])


lightning_attention_step_ = _op(
    "lightning_attention_step_(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor slopes, *, "
    "Tensor? state_indices=None, float? scale=None) -> Tensor",
    _check_step, _allocate_token_outputs, _validate_step, compiled_for_cuda=True,
)  # fmt: skip


def _check_verify(
    op: str, q: Any, k: Any, v: Any, state: Any, slopes: Any, parents: Any, state_indices: Any, scale: float | None
) -> None:
    dims: dict[str, int] = {}
    _checks.shape(op, dims, q=(q, "N T Hq K"), k=(k, "N T H K"), v=(v, "N T H V"), parents=(parents, "N T"))
    _check_floating(op, q, q=q, k=k, v=v)
    _checks.dtype(op, _checks.INDEX, parents=parents)
    _checks.same_device(op, q, k=k, v=v, parents=parents)
    _check_pool(op, dims, q.dtype, state, slopes, state_indices, q)
    if dims["T"] > MAX_NODES:
        _checks.fail(op, "T", f"at most {MAX_NODES} nodes", dims["T"])


def _validate_verify(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    slopes: Tensor,
    parents: Tensor | None,
    state_indices: Tensor | None,
    scale: float | None,
) -> None:
    if parents is not None:
        _native.cpu.validate_parents(op, parents)
    if state_indices is not None:
        _native.cpu.validate_state_indices(op, state_indices, state.shape[0])


lightning_attention_verify = _op(
    "lightning_attention_verify(Tensor q, Tensor k, Tensor v, Tensor state, Tensor slopes, *, Tensor? parents=None, "
    "Tensor? state_indices=None, float? scale=None) -> Tensor",
    _check_verify, _allocate_token_outputs, _validate_verify, compiled_for_cuda=True,
)  # fmt: skip


def _check_commit(
    op: str, k: Any, v: Any, state: Any, slopes: Any, path: Any, num_accepted: Any, state_indices: Any
) -> None:
    dims: dict[str, int] = {}
    _checks.shape(op, dims, k=(k, "N T H K"), v=(v, "N T H V"))
    _checks.shape(op, dims, path=(path, "N T"), num_accepted=(num_accepted, "N"))
    _check_floating(op, k, k=k, v=v)
    _checks.dtype(op, _checks.INDEX, path=path, num_accepted=num_accepted)
    _checks.same_device(op, k, v=v, path=path, num_accepted=num_accepted)
    _check_pool(op, dims, k.dtype, state, slopes, state_indices, k)


def _validate_commit(
    op: str,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    slopes: Tensor,
    path: Tensor,
    num_accepted: Tensor,
    state_indices: Tensor | None,
) -> None:
    _native.cpu.validate_state_path(op, path, num_accepted)
    if state_indices is not None:
        _native.cpu.validate_state_indices(op, state_indices, state.shape[0])


lightning_attention_commit_ = _op(
    "lightning_attention_commit_(Tensor k, Tensor v, Tensor(a!) state, Tensor slopes, Tensor path, "
    "Tensor num_accepted, *, Tensor? state_indices=None) -> ()",
    _check_commit, lambda *_: (), _validate_commit, compiled_for_cuda=True,
)  # fmt: skip
