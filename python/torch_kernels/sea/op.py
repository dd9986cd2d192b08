# SPDX-License-Identifier: Apache-2.0
"""Schemas, checks and outputs of the SEA ops."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_kernels import _checks, _native
from torch_kernels._registry import Backend, Op, may_choose_triton, native, triton_version, unit_stride
from torch_kernels.sea import heuristics, reference
from torch_kernels.sea.csr import in_two_steps

MAX_HEAD_SIZE = 256
MAX_CELLS = 1 << 20  # of a row and head, so that boundaries are exact in 64 bits
ON_GPU = (torch.float32, torch.float16, torch.bfloat16)


# What serves an op on a GPU: gathers and bit tricks are CUDA C++, dense tiles and streams Triton.
IN_CUDA = ("sea_select", "sea_attention")
NOT_IN_TRITON = ("sea_select",)


def _leaves_many_rows(q: Tensor, *others: Any) -> str | None:
    """For the CUDA kernel of sea_attention: Triton's serves many rows unless a backend is forced."""
    serves = may_choose_triton() and _not_in_triton("sea_attention", q, *others) is None
    if serves and heuristics.prefers_triton(q.shape[1]):
        return "Triton's kernel shares columns between so many rows"
    return None


def _not_in_triton(name: str, *arguments: Any) -> str | None:
    """Loops are told not to move what they repeat out of themselves, where it would take the registers."""
    version = tuple(map(int, (triton_version() or "0.0").split(".")[:2]))
    if version < (3, 5):
        return "it needs Triton 3.5 or later"
    if name.startswith("sea_attention"):
        num_cells = next(argument for argument in arguments if isinstance(argument, int))
        if num_cells > heuristics.MAX_CELLS:
            return f"it serves up to {heuristics.MAX_CELLS} cells"
        values = arguments[2 if name == "sea_attention" else 3]
        if num_cells * values.shape[1] >= heuristics.MAX_CELLS_TIMES_KEYS:
            return f"it serves up to {heuristics.MAX_CELLS_TIMES_KEYS // num_cells} keys with so many cells"
    return None


def _backends(name: str) -> tuple[Backend, ...]:
    def cpu() -> Callable[..., Any]:
        if name == "sea_csr":
            return in_two_steps(_native.cpu.sea_csr_rows, _native.cpu.sea_csr_columns)
        return native("cpu", name)()

    def triton() -> Callable[..., Any]:
        return getattr(importlib.import_module("torch_kernels.sea.triton_kernels"), name)

    in_cuda, in_triton = name in IN_CUDA, name not in NOT_IN_TRITON
    leaves = _leaves_many_rows if in_cuda and in_triton else None
    return (
        Backend("cpu", cpu, _checks.FLOATING, unit_stride),
        *((Backend("cuda", native("cuda", name), ON_GPU, unit_stride, leaves),) if in_cuda else ()),
        *((Backend("triton", triton, ON_GPU, unit_stride, partial(_not_in_triton, name)),) if in_triton else ()),
        *((Backend("emulator", native("emulator", name), ON_GPU, unit_stride),) if in_cuda else ()),
        Backend("reference", lambda: getattr(reference, name), _checks.FLOATING),
    )


def _op(
    schema: str,
    check: Callable[..., Any],
    allocate: Callable[..., tuple[Tensor, ...]],
    validate: Callable[..., None] | None = None,
    sized_by_data: bool = False,
) -> Op:
    name = schema.partition("(")[0]
    return Op(
        schema, partial(check, name), allocate, _backends(name), validate and partial(validate, name),
        indices=("widths",), sized_by_data=sized_by_data,
    )  # fmt: skip


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States are float32, and float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- checks that ops share ----


def _check_floating(op: str, **tensors: Tensor) -> None:
    """float32, float16 or bfloat16, float64 on the CPU, and all the same."""
    first, reference = next(iter(tensors.items()))
    _checks.dtype(op, _checks.FLOATING if reference.device.type == "cpu" else ON_GPU, **{first: reference})
    _checks.dtype(op, (reference.dtype,), **tensors)


def _check_factors(op: str, dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """What a tensor of the dtype is multiplied by: in its dtype, or float32."""
    _checks.dtype(op, tuple(dict.fromkeys((dtype, torch.float32))), **tensors)


def _check_not_empty(op: str, dims: dict[str, int], *names: str) -> None:
    for name in names:
        if dims[name] < 1:
            _checks.fail(op, name, "at least 1", dims[name])


def _check_head_sizes(op: str, dims: dict[str, int]) -> None:
    for name in ("D", "Dv"):
        if dims[name] % 8 or not 8 <= dims[name] <= MAX_HEAD_SIZE:
            _checks.fail(op, f"head size {name}", f"a multiple of 8 up to {MAX_HEAD_SIZE}", dims[name])


def _check_number(op: str, name: str, value: float, least: float = -math.inf) -> None:
    if not (math.isfinite(value) and value >= least):
        _checks.fail(op, name, "finite" if least == -math.inf else f"finite and at least {least:g}", value)


def _check_num_cells(op: str, num_cells: int, max_columns_per_cell: int = 0) -> None:
    if not 1 <= num_cells <= MAX_CELLS:
        _checks.fail(op, "num_cells", f"from 1 to {MAX_CELLS}", num_cells)
    if max_columns_per_cell < 0:
        _checks.fail(op, "max_columns_per_cell", "at least 0 (0: no limit)", max_columns_per_cell)


def _check_together(op: str, **tensors: Tensor | None) -> None:
    (first, a), (second, b) = tensors.items()
    if (a is None) != (b is None):
        _checks.fail(op, first if a is None else second, f"given together with {second if a is None else first}", None)


def words(num_heads: int, num_cells: int) -> int:
    """int32 words of a row's bitset."""
    return -(-num_heads * num_cells // 32)


# ---- favor_features ----


def _check_favor_features(op: str, x: Any, proj: Any, kind: str, eps: float, shift: Any) -> dict[str, int]:
    dims: dict[str, int] = {}
    _checks.shape(op, dims, x=(x, "B T H D"), proj=(proj, "m D"))
    _check_floating(op, x=x)
    _check_factors(op, x.dtype, proj=proj, shift=shift)
    _checks.same_device(op, x, proj=proj, shift=shift)
    _check_not_empty(op, dims, "H", "D", "m")
    if kind not in ("relu", "exp"):
        _checks.fail(op, "kind", '"relu" or "exp"', repr(kind))
    _check_number(op, "eps", eps)
    if shift is not None:
        if kind == "relu":
            _checks.fail(op, "shift", 'None with kind "relu"', "a tensor")
        wanted = (*x.shape[:3], 1)
        leading = (1,) * (4 - shift.dim()) + tuple(shift.shape)
        if shift.dim() > 4 or any(size not in (1, most) for size, most in zip(leading, wanted)):
            _checks.fail(op, "shift", f"broadcastable to {list(wanted)}", f"shape {list(shift.shape)}")
    return dims


favor_features = _op(
    "favor_features(Tensor x, Tensor proj, *, str kind, float eps, Tensor? shift=None) -> Tensor",
    _check_favor_features,
    lambda x, proj, *_: (x.new_empty((*x.shape[:3], proj.shape[0])),),
)


# ---- linear_attention ----


def _check_linear_attention(
    op: str, q: Any, k: Any, v: Any, causal: bool, initial_state: Any, initial_norm: Any, eps: float
) -> dict[str, int]:
    dims: dict[str, int] = {}
    _checks.shape(op, dims, q=(q, "B T H m"), k=(k, "B T H m"), v=(v, "B T H Dv"))
    _check_together(op, initial_state=initial_state, initial_norm=initial_norm)
    _checks.shape(op, dims, initial_state=(initial_state, "B H m Dv"), initial_norm=(initial_norm, "B H m"))
    _check_floating(op, q=q, k=k, v=v)
    _checks.dtype(op, (state_dtype(q.dtype),), initial_state=initial_state, initial_norm=initial_norm)
    _checks.same_device(op, q, k=k, v=v, initial_state=initial_state, initial_norm=initial_norm)
    _check_not_empty(op, dims, "H", "m", "Dv")
    _check_number(op, "eps", eps)
    return dims


def _allocate_linear_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, _tokens, heads, size = q.shape
    dtype = state_dtype(q.dtype)
    state = q.new_empty((batch, heads, size, v.shape[3]), dtype=dtype)
    return q.new_empty(v.shape), state, q.new_empty((batch, heads, size), dtype=dtype)


linear_attention = _op(
    "linear_attention(Tensor q, Tensor k, Tensor v, *, bool causal=True, Tensor? initial_state=None, "
    "Tensor? initial_norm=None, float eps=0.0) -> (Tensor out, Tensor state, Tensor norm)",
    _check_linear_attention, _allocate_linear_attention,
)  # fmt: skip


def _check_linear_attention_backward(
    op: str, grad_out: Any, q: Any, k: Any, v: Any, grad_state: Any, grad_norm: Any, *rest: Any
) -> None:
    dims = _check_linear_attention(op, q, k, v, *rest)
    _checks.shape(op, dims, grad_out=(grad_out, "B T H Dv"))
    _checks.shape(op, dims, grad_state=(grad_state, "B H m Dv"), grad_norm=(grad_norm, "B H m"))
    _checks.dtype(op, (q.dtype,), grad_out=grad_out)
    _checks.dtype(op, (state_dtype(q.dtype),), grad_state=grad_state, grad_norm=grad_norm)
    _checks.same_device(op, q, grad_out=grad_out, grad_state=grad_state, grad_norm=grad_norm)


def _allocate_linear_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, grad_state: Any, grad_norm: Any, causal: bool, state: Any, *_
) -> tuple[Tensor, ...]:  # fmt: skip
    initial = _allocate_linear_attention(q[:0] if state is None else q, k, v)[1:]
    return *(x.new_empty(x.shape) for x in (q, k, v)), *initial


linear_attention_backward = _op(
    "linear_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, *, Tensor? grad_state=None, "
    "Tensor? grad_norm=None, bool causal=True, Tensor? initial_state=None, Tensor? initial_norm=None, float eps=0.0) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_initial_state, Tensor grad_initial_norm)",
    _check_linear_attention_backward, _allocate_linear_attention_backward,
)  # fmt: skip


# ---- sea_select ----


def _check_select(op: str, scores: Any, widths: Any, k: float) -> None:
    dims: dict[str, int] = {}
    _checks.shape(op, dims, scores=(scores, "B H Tq K"), widths=(widths, "B Tq"))
    _check_floating(op, scores=scores)
    _checks.dtype(op, _checks.INDEX, widths=widths)
    _checks.same_device(op, scores, widths=widths)
    _check_not_empty(op, dims, "H", "K")
    _check_num_cells(op, dims["K"])
    _check_number(op, "k", k, 0.0)


def _allocate_select(scores: Tensor, *_: Any) -> tuple[Tensor]:
    batch, heads, rows, num_cells = scores.shape
    return (scores.new_empty((batch, rows, words(heads, num_cells)), dtype=torch.int32),)


sea_select = _op(
    "sea_select(Tensor scores, Tensor widths, *, float k) -> Tensor",
    _check_select, _allocate_select,
)  # fmt: skip


# ---- sea_attention ----


def _check_cells(op: str, dims: dict[str, int], cells: Any, widths: Any, num_cells: int, max_columns: int) -> None:
    _check_num_cells(op, num_cells, max_columns)
    dims["words"] = words(dims["H"], num_cells)
    _checks.shape(op, dims, cells=(cells, "B Tq words"), widths=(widths, "B Tq"))
    _checks.dtype(op, (torch.int32,), cells=cells)
    _checks.dtype(op, _checks.INDEX, widths=widths)


def _check_attention(
    op: str, q: Any, k: Any, v: Any, cells: Any, widths: Any, num_cells: int, scale: float | None,
    max_columns_per_cell: int, row_gain: Any, mix: Any, pooled: Any,
) -> dict[str, int]:  # fmt: skip
    dims: dict[str, int] = {}
    _checks.shape(op, dims, q=(q, "B Tq H D"), k=(k, "B Tk H D"), v=(v, "B Tk H Dv"))
    _check_not_empty(op, dims, "H")
    _check_cells(op, dims, cells, widths, num_cells, max_columns_per_cell)
    _check_together(op, mix=mix, pooled=pooled)
    _checks.shape(op, dims, row_gain=(row_gain, "B H Tq"), mix=(mix, "B H Tq"))
    one = pooled is not None and pooled.dim() == 4 and pooled.shape[1] == 1
    _checks.shape(op, dims, pooled=(pooled, "B 1 H Dv" if one else "B Tq H Dv"))
    _check_floating(op, q=q, k=k, v=v)
    _checks.dtype(op, (q.dtype,), pooled=pooled)
    _check_factors(op, q.dtype, row_gain=row_gain, mix=mix)
    tensors = {"k": k, "v": v, "cells": cells, "widths": widths, "row_gain": row_gain, "mix": mix, "pooled": pooled}
    _checks.same_device(op, q, **tensors)
    _check_head_sizes(op, dims)
    return dims


def _allocate_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _size = q.shape
    return q.new_empty((batch, rows, heads, v.shape[3])), q.new_empty((batch, heads, rows), dtype=torch.float32)


def _validate_attention(op: str, q: Tensor, k: Tensor, v: Tensor, cells: Tensor, widths: Tensor, *_: Any) -> None:
    _native.cpu.validate_widths(op, widths, k.shape[1], "Tk")


GATES = "Tensor? row_gain=None, Tensor? mix=None, Tensor? pooled=None"

sea_attention = _op(
    "sea_attention(Tensor q, Tensor k, Tensor v, Tensor cells, Tensor widths, *, int num_cells, float? scale=None, "
    f"int max_columns_per_cell=0, {GATES}) -> (Tensor out, Tensor lse)",
    _check_attention, _allocate_attention, _validate_attention,
)  # fmt: skip


def _check_attention_backward(op: str, grad_out: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any) -> None:
    dims = _check_attention(op, q, k, v, *rest)
    _checks.shape(op, dims, grad_out=(grad_out, "B Tq H Dv"), out=(out, "B Tq H Dv"), lse=(lse, "B H Tq"))
    _checks.dtype(op, (q.dtype,), grad_out=grad_out, out=out)
    _checks.dtype(op, (torch.float32,), lse=lse)
    _checks.same_device(op, q, grad_out=grad_out, out=out, lse=lse)


def _allocate_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cells: Tensor, widths: Tensor,
    num_cells: int, scale: Any, max_columns_per_cell: int, *gates: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    of_gates = (q.new_empty(0) if gate is None else gate.new_empty(gate.shape) for gate in gates)
    return *(x.new_empty(x.shape) for x in (q, k, v)), *of_gates


def _validate_attention_backward(
    op: str, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> None:
    _validate_attention(op, q, k, v, *rest)


sea_attention_backward = _op(
    "sea_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cells, "
    f"Tensor widths, *, int num_cells, float? scale=None, int max_columns_per_cell=0, {GATES}) -> (Tensor grad_q, "
    "Tensor grad_k, Tensor grad_v, Tensor grad_row_gain, Tensor grad_mix, Tensor grad_pooled)",
    _check_attention_backward, _allocate_attention_backward, _validate_attention_backward,
)  # fmt: skip


# ---- sea_stretch ----


def _check_stretch_widths(op: str, dims: dict[str, int], x: Any, widths: Any, length: int) -> None:
    _checks.shape(op, dims, widths=(widths, "B Tq"))
    _checks.dtype(op, _checks.INDEX, widths=widths)
    _checks.same_device(op, x, widths=widths)
    if length < 0:
        _checks.fail(op, "length", "at least 0", length)


def _check_stretch(op: str, x: Any, widths: Any, length: int, fill: float) -> None:
    dims: dict[str, int] = {}
    _checks.shape(op, dims, x=(x, "B H Tq K"))
    _check_floating(op, x=x)
    _check_num_cells(op, dims["K"])
    _check_stretch_widths(op, dims, x, widths, length)


sea_stretch = _op(
    "sea_stretch(Tensor x, Tensor widths, *, int length, float fill=0.0) -> Tensor",
    _check_stretch,
    lambda x, widths, length, *_: (x.new_empty((*x.shape[:3], length)),),
    lambda op, x, widths, length, *_: _native.cpu.validate_widths(op, widths, length, "length"),
)


def _check_stretch_backward(op: str, grad_out: Any, widths: Any, num_cells: int) -> None:
    dims: dict[str, int] = {}
    _checks.shape(op, dims, grad_out=(grad_out, "B H Tq length"))
    _check_floating(op, grad_out=grad_out)
    _check_num_cells(op, num_cells)
    _check_stretch_widths(op, dims, grad_out, widths, dims["length"])


sea_stretch_backward = _op(
    "sea_stretch_backward(Tensor grad_out, Tensor widths, *, int num_cells) -> Tensor",
    _check_stretch_backward,
    lambda grad_out, widths, num_cells: (grad_out.new_empty((*grad_out.shape[:3], num_cells)),),
    lambda op, grad_out, widths, num_cells: _native.cpu.validate_widths(op, widths, grad_out.shape[3], "length"),
)


# ---- sea_csr ----


def _check_csr(op: str, cells: Any, widths: Any, num_heads: int, num_cells: int, max_columns_per_cell: int) -> None:
    if num_heads < 1:
        _checks.fail(op, "num_heads", "at least 1", num_heads)
    _check_cells(op, {"H": num_heads}, cells, widths, num_cells, max_columns_per_cell)
    _checks.same_device(op, cells, widths=widths)


def _fake_csr(cells: Tensor, widths: Tensor, num_heads: int, *_: Any) -> tuple[Tensor, Tensor]:
    rows = cells.shape[0] * cells.shape[1] * num_heads
    entries = torch.library.get_ctx().new_dynamic_size()
    return cells.new_empty(rows + 1), cells.new_empty(entries)


sea_csr = _op(
    "sea_csr(Tensor cells, Tensor widths, *, int num_heads, int num_cells, int max_columns_per_cell=0) -> "
    "(Tensor crow, Tensor col)",
    _check_csr, _fake_csr, sized_by_data=True,
)  # fmt: skip


# ---- running_mean ----


def _check_running_mean(op: str, v: Any, sum: Any, count: Any) -> None:
    dims: dict[str, int] = {}
    _checks.shape(op, dims, v=(v, "B T H Dv"))
    _check_together(op, sum=sum, count=count)
    _checks.shape(op, dims, sum=(sum, "B H Dv"), count=(count, "B"))
    _check_floating(op, v=v)
    _checks.dtype(op, (torch.float64,), sum=sum)
    _checks.dtype(op, (torch.int64,), count=count)
    _checks.same_device(op, v, sum=sum, count=count)


def _allocate_running_mean(v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, _tokens, heads, size = v.shape
    total = v.new_empty((batch, heads, size), dtype=torch.float64)
    return v.new_empty(v.shape), total, v.new_empty(batch, dtype=torch.int64)


running_mean = _op(
    "running_mean(Tensor v, *, Tensor? sum=None, Tensor? count=None) -> (Tensor mean, Tensor sum, Tensor count)",
    _check_running_mean, _allocate_running_mean,
)  # fmt: skip
