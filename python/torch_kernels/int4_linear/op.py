# SPDX-License-Identifier: Apache-2.0
"""Schemas, checks and outputs of the int4 linear ops, which take weights packed for a device.

Two layouts of the packed weight exist, one for the CPU kernels (uint8) and one for the GPU's (int32): see `packing.py`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_kernels import _checks, _native, _registry
from torch_kernels._registry import Backend, Op, native, rows
from torch_kernels.int4_linear import heuristics, layout_cpu, layout_gpu, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256)
MODES = ("exact", "a8", "fast")


def number_of_groups(columns: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-columns // group_size)


def _takes(dtype: torch.dtype, layout: str) -> Callable[..., str | None]:
    """For `Backend.refuses`: the backend reads one layout of the weight, told by its dtype."""

    def refuses(x: Tensor, weight: Tensor, *_: Any) -> str | None:
        return None if weight.dtype == dtype else f"it takes weights in the layout {layout!r}, which is {dtype}"

    return refuses


def _leaves_many_rows(x: Tensor, weight: Tensor, *rest: Any) -> str | None:
    """For the CUDA kernels: in mode fast, Triton's serve many rows unless a backend is forced."""
    if _registry.may_choose_triton() and heuristics.prefers_triton(math.prod(x.shape[:-1]), mode=rest[-1]):
        return "Triton's kernel is faster for so many rows"
    return _takes(torch.int32, "gpu")(x, weight)


def _backends(name: str) -> tuple[Backend, ...]:
    def triton() -> Callable[..., Any]:
        return getattr(importlib.import_module("torch_kernels.int4_linear.triton_kernels"), name)

    cpu, gpu = _takes(torch.uint8, "cpu"), _takes(torch.int32, "gpu")
    return (
        Backend("cpu", native("cpu", name), DTYPES, rows, cpu),
        Backend("cuda", native("cuda", name), DTYPES, rows, _leaves_many_rows if name == "int4_linear" else gpu),
        Backend("triton", triton, DTYPES, rows, gpu),
        Backend("emulator", native("emulator", name), DTYPES, rows, gpu),
        Backend("reference", lambda: getattr(reference, name), DTYPES),
    )


def _op(schema: str, check: Callable[..., None], allocate: Callable[..., Any], validate: Callable[..., None]) -> Op:
    name = schema.partition("(")[0]
    return Op(schema, partial(check, name), allocate, _backends(name), partial(validate, name), indices=("perm",))


def _check_weight(
    op: str,
    first: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    out_features: int,
    in_features: int,
    group_size: int,
) -> None:
    """The packed tensors fit each other and the sizes; ``first`` is the activation or gradient beside them."""
    if group_size not in GROUP_SIZES:
        _checks.fail(op, "group_size", f"one of {', '.join(map(str, GROUP_SIZES))}", group_size)
    _checks.dtype(op, (torch.uint8, torch.int32), weight=weight)
    _checks.dtype(op, DTYPES, scales=scales)
    _checks.dtype(op, (torch.float16, torch.float32), zeros=zeros)
    _checks.dtype(op, (torch.int32,), perm=perm)
    _checks.shape(op, {}, perm=(perm, "columns"))
    columns = in_features if perm is None else perm.shape[0]
    if perm is not None and group_size != -1 and columns % group_size:
        _checks.fail(op, "perm", f"as long as a multiple of group_size={group_size}", f"{columns} columns")
    layout = layout_cpu if weight.dtype == torch.uint8 else layout_gpu
    expected = layout.shape(out_features, columns)
    if tuple(weight.shape) != tuple(expected):
        what = f"{list(expected)} for {out_features} x {columns} weights in this layout"
        _checks.fail(op, "weight", what, f"shape {list(weight.shape)}")
    dimensions = {"G": number_of_groups(columns, group_size), "N": out_features}
    _checks.shape(op, dimensions, scales=(scales, "G N"), zeros=(zeros, "G N"))
    _checks.same_device(op, first, weight=weight, scales=scales, zeros=zeros, perm=perm)


def _check_rows(op: str, **tensor: Tensor) -> None:
    ((name, value),) = tensor.items()
    _checks.dtype(op, DTYPES, **tensor)
    if not 1 <= value.dim() <= _checks.MAX_RANK:
        expected = f"[..., features] with at most {_checks.MAX_RANK} dimensions"
        _checks.fail(op, name, expected, f"shape {list(value.shape)}" if value.dim() else "a tensor without dimensions")


# ---- int4_linear ----


def _check_linear(
    op: str,
    x: Any,
    weight: Any,
    scales: Any,
    zeros: Any,
    perm: Any,
    bias: Any,
    out_features: int,
    group_size: int,
    mode: str,
) -> None:
    _check_rows(op, x=x)
    if mode not in MODES:
        _checks.fail(op, "mode", " or ".join(map(repr, MODES)), repr(mode))
    if out_features < 0:
        _checks.fail(op, "out_features", "at least 0", out_features)
    _check_weight(op, x, weight, scales, zeros, perm, out_features, x.shape[-1], group_size)
    _checks.shape(op, {"N": out_features}, bias=(bias, "N"))
    _checks.dtype(op, (x.dtype, torch.float32), bias=bias)
    _checks.same_device(op, x, bias=bias)


def _allocate_linear(
    x: Tensor, weight: Any, scales: Any, zeros: Any, perm: Any, bias: Any, out_features: int, *_: Any
) -> tuple[Tensor]:
    return (x.new_empty((*x.shape[:-1], out_features)),)


def _validate_linear(op: str, x: Tensor, weight: Any, scales: Any, zeros: Any, perm: Tensor | None, *_: Any) -> None:
    _native.cpu.validate_perm(op, perm, x.shape[-1])


int4_linear = _op(
    "int4_linear(Tensor x, Tensor weight, Tensor scales, Tensor? zeros=None, Tensor? perm=None, Tensor? bias=None, *, "
    "int out_features, int group_size, str mode='exact') -> Tensor",
    _check_linear, _allocate_linear, _validate_linear,
)  # fmt: skip


# ---- int4_linear_backward ----


def _check_backward(
    op: str, grad: Any, weight: Any, scales: Any, zeros: Any, perm: Any, in_features: int, group_size: int
) -> None:
    _check_rows(op, grad=grad)
    if in_features < 0:
        _checks.fail(op, "in_features", "at least 0", in_features)
    _check_weight(op, grad, weight, scales, zeros, perm, grad.shape[-1], in_features, group_size)


def _allocate_backward(
    grad: Tensor, weight: Any, scales: Any, zeros: Any, perm: Any, in_features: int, *_: Any
) -> tuple[Tensor]:
    return (grad.new_empty((*grad.shape[:-1], in_features)),)


def _validate_backward(
    op: str, grad: Any, weight: Any, scales: Any, zeros: Any, perm: Tensor | None, in_features: int, *_: Any
) -> None:
    _native.cpu.validate_perm(op, perm, in_features)


int4_linear_backward = _op(
    "int4_linear_backward(Tensor grad, Tensor weight, Tensor scales, Tensor? zeros=None, Tensor? perm=None, *, "
    "int in_features, int group_size) -> Tensor",
    _check_backward, _allocate_backward, _validate_backward,
)  # fmt: skip
