# SPDX-License-Identifier: Apache-2.0
"""Schemas, checks and outputs of the int8 linear ops."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_kernels import _checks
from torch_kernels._registry import Backend, Op, may_choose_triton, native, rows, unit_stride
from torch_kernels._triton import architecture
from torch_kernels.int8_linear import heuristics, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRODUCTS = ("int8_mm", "int8_linear")
MAX_IN_FEATURES = 2**17 - 1  # so many products of int8 numbers, -128 included, cannot leave int32


def _accepts(i: int, argument: Tensor) -> bool:
    """Kernels see activations, the first argument, as rows [M, K], and a weight with any distance between rows."""
    return rows(i, argument) if i == 0 else unit_stride(i, argument)


def _leaves_many_rows(x: Tensor, weight: Tensor, *rest: Any) -> str | None:
    """For the CUDA kernels: Triton's serve many rows unless a backend is forced. They give the same bits, but add up
    outlier columns in another order."""
    outliers = len(rest) > 0 and rest[-1] > 0
    if outliers or not may_choose_triton():
        return None
    if heuristics.prefers_triton(math.prod(x.shape[:-1]), architecture(x.device)):
        return "Triton's kernel is faster for so many rows"
    return None


def _backends(name: str) -> tuple[Backend, ...]:
    def triton() -> Callable[..., Any]:
        return getattr(importlib.import_module("torch_kernels.int8_linear.triton_kernels"), name)

    return (
        Backend("cpu", native("cpu", name), DTYPES, _accepts),
        Backend("cuda", native("cuda", name), DTYPES, _accepts, _leaves_many_rows if name in PRODUCTS else None),
        Backend("triton", triton, DTYPES, _accepts),
        Backend("emulator", native("emulator", name), DTYPES, _accepts),
        Backend("reference", lambda: getattr(reference, name), DTYPES),
    )


def _op(
    schema: str,
    check: Callable[..., None],
    allocate: Callable[..., tuple[Tensor, ...]],
    adapt: Callable[[Backend], Backend] = lambda backend: backend,
) -> Op:
    name = schema.partition("(")[0]
    return Op(schema, partial(check, name), allocate, tuple(map(adapt, _backends(name))))


def _check_rows(op: str, **tensor: Tensor) -> None:
    ((name, value),) = tensor.items()
    _checks.is_tensor(op, **tensor)
    _checks.dtype(op, DTYPES, **tensor)
    if not 1 <= value.dim() <= _checks.MAX_RANK:
        expected = f"[..., features] with at most {_checks.MAX_RANK} dimensions"
        _checks.fail(op, name, expected, f"shape {list(value.shape)}" if value.dim() else "a tensor without dimensions")


def _check_threshold(op: str, threshold: float) -> None:
    if not threshold >= 0:
        _checks.fail(op, "threshold", "at least 0", threshold)


def _check_x_scale(op: str, x: Tensor, x_scale: Tensor | None) -> None:
    _checks.shape(op, {}, x_scale=(x_scale, "1"))
    _checks.dtype(op, (torch.float32,), x_scale=x_scale)
    _checks.same_device(op, x, x_scale=x_scale)


# ---- int8_quantize ----


def _check_quantize(op: str, x: Any, threshold: float) -> None:
    _check_rows(op, x=x)
    _check_threshold(op, threshold)


def _allocate_quantize(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scale, x.new_empty(x.shape[-1:], dtype=torch.bool)


int8_quantize = _op(
    "int8_quantize(Tensor x, *, float threshold=0.0) -> (Tensor q, Tensor scale, Tensor outliers)",
    _check_quantize, _allocate_quantize,
)  # fmt: skip


# ---- int8_mm ----


def _check_mm(op: str, a: Any, b: Any) -> None:
    _checks.is_tensor(op, a=a, b=b)
    _checks.dtype(op, (torch.int8,), a=a, b=b)
    _checks.shape(op, {}, a=(a, "M K"), b=(b, "N K"))
    _checks.same_device(op, a, b=b)


def _allocate_mm(a: Tensor, b: Tensor) -> tuple[Tensor]:
    return (a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32),)


int8_mm = _op("int8_mm(Tensor a, Tensor b) -> Tensor", _check_mm, _allocate_mm)


# ---- int8_linear ----


def _check_linear(op: str, x: Any, weight: Any, weight_scale: Any, bias: Any, x_scale: Any, threshold: float) -> None:
    _check_rows(op, x=x)
    _checks.is_tensor(op, weight=weight, weight_scale=weight_scale)
    dims = {"K": x.shape[-1]}
    _checks.dtype(op, (torch.int8,), weight=weight)
    _checks.dtype(op, (torch.float32,), weight_scale=weight_scale)
    _checks.dtype(op, (x.dtype, torch.float32), bias=bias)
    _checks.shape(op, dims, weight=(weight, "N K"), weight_scale=(weight_scale, "N"), bias=(bias, "N"))
    _checks.same_device(op, x, weight=weight, weight_scale=weight_scale, bias=bias)
    _check_x_scale(op, x, x_scale)
    _check_threshold(op, threshold)
    if dims["K"] > MAX_IN_FEATURES:
        _checks.fail(op, "x", f"[..., K] with K at most {MAX_IN_FEATURES}", f"K={dims['K']}")
    if x_scale is not None and threshold > 0:
        _checks.fail(op, "x_scale", "None with a threshold, which needs a scale for each row", "a tensor")


def _allocate_linear(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor]:
    return (x.new_empty((*x.shape[:-1], weight.shape[0])),)


int8_linear = _op(
    "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, *, Tensor? x_scale=None, "
    "float threshold=0.0) -> Tensor",
    _check_linear, _allocate_linear,
)  # fmt: skip


# ---- int8_linear_backward ----


def _check_backward(op: str, grad: Any, weight: Any, weight_scale: Any) -> None:
    _check_rows(op, grad=grad)
    _checks.is_tensor(op, weight=weight, weight_scale=weight_scale)
    _checks.dtype(op, (torch.int8,), weight=weight)
    _checks.dtype(op, (torch.float32,), weight_scale=weight_scale)
    _checks.shape(op, {"N": grad.shape[-1]}, weight=(weight, "N K"), weight_scale=(weight_scale, "N"))
    _checks.same_device(op, grad, weight=weight, weight_scale=weight_scale)


def _allocate_backward(grad: Tensor, weight: Tensor, weight_scale: Tensor) -> tuple[Tensor]:
    return (grad.new_empty((*grad.shape[:-1], weight.shape[1])),)


int8_linear_backward = _op(
    "int8_linear_backward(Tensor grad, Tensor weight, Tensor weight_scale) -> Tensor",
    _check_backward, _allocate_backward,
)  # fmt: skip


# ---- hadamard_transform, rotate_quantize ----


def _check_transform(op: str, x: Any) -> None:
    _check_rows(op, x=x)
    if reference.hadamard_factors(int(x.shape[-1])) is None:
        _checks.fail(op, "x", "[..., n] with n = 2^p, 12 * 2^p or 20 * 2^p", f"n={x.shape[-1]}")


def _check_hadamard(op: str, x: Any, scale: float | None) -> None:
    _check_transform(op, x)


hadamard_transform = _op(
    "hadamard_transform(Tensor x, *, float? scale=None) -> Tensor",
    _check_hadamard, lambda x, scale: (x.new_empty(x.shape),),
)  # fmt: skip


def _check_rotate(op: str, x: Any, signs: Any, smooth: Any, x_scale: Any, bits: int) -> None:
    _check_transform(op, x)
    dims = {"n": x.shape[-1]}
    _checks.dtype(op, (*DTYPES, torch.int8), signs=signs)
    _checks.dtype(op, DTYPES, smooth=smooth)
    _checks.shape(op, dims, signs=(signs, "n"), smooth=(smooth, "n"))
    _checks.same_device(op, x, signs=signs, smooth=smooth)
    _check_x_scale(op, x, x_scale)
    if not 2 <= bits <= 8:
        _checks.fail(op, "bits", "2 to 8", bits)


def _allocate_rotate(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _with_float32_vectors(backend: Backend) -> Backend:
    """Kernels read signs and smooth as float32."""

    def load() -> Callable[..., Any]:
        kernel = backend.load()

        def run(q: Tensor, scale: Tensor, x: Tensor, signs: Any, smooth: Any, *rest: Any) -> None:
            vectors = (None if vector is None else vector.float() for vector in (signs, smooth))
            kernel(q, scale, x, *vectors, *rest)

        return run

    return backend if backend.name == "reference" else replace(backend, load=load)


rotate_quantize = _op(
    "rotate_quantize(Tensor x, *, Tensor? signs=None, Tensor? smooth=None, Tensor? x_scale=None, int bits=8) -> "
    "(Tensor q, Tensor scale)",
    _check_rotate, _allocate_rotate, _with_float32_vectors,
)  # fmt: skip
