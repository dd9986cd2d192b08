# SPDX-License-Identifier: Apache-2.0
"""Bad arguments raise ValueError or TypeError that name op and argument, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_kernels
from torch import nn

from ..backends import Backend
from ..calls import Wrong, assert_refused, cast, deeper, name_of, narrower, repeated, sample, scalar, shorter

F64, F32, F16, I8, I32 = torch.float64, torch.float32, torch.float16, torch.int8, torch.int32


WRONG: list[Wrong] = [
    *[(op, 0, name, change, name) for op, name in (
        ("int8_quantize", "x"), ("int8_linear", "x"), ("int8_linear_backward", "grad"), ("hadamard_transform", "x"),
        ("rotate_quantize", "x")) for change in (cast(F64), cast(I8), cast(I32), scalar)],
    *[(op, 0, "threshold", value, "threshold") for op in ("int8_quantize", "int8_linear")
      for value in (-1.0, math.nan)],
    *[("int8_mm", 0, name, change, name) for name in "ab"
      for change in (cast(F32), cast(I32), cast(torch.uint8), deeper, scalar)],
    ("int8_mm", 0, "a", shorter, "a|b"),
    ("int8_mm", 0, "b", shorter, "b"),
    *[("int8_linear", 1, name, change, name) for name, change in (
        ("weight", cast(F32)), ("weight", shorter), ("weight", deeper), ("weight", scalar),
        ("weight_scale", cast(F16)), ("weight_scale", cast(F64)), ("weight_scale", narrower(0)),
        ("weight_scale", deeper), ("bias", cast(F16)), ("bias", cast(F64)), ("bias", narrower(0)), ("bias", deeper))],
    ("int8_linear", 1, "weight", narrower(0), "weight_scale|weight"),
    ("int8_linear", 0, "x", shorter, "weight|x"),
    *[("int8_linear", 2, "x_scale", change, "x_scale") for change in
      (cast(F16), cast(F64), scalar, deeper, repeated(2))],
    ("int8_linear", 2, "threshold", 6.0, "x_scale"),
    ("int8_linear_backward", 0, "grad", shorter, "weight|grad"),
    ("int8_linear_backward", 0, "weight", cast(F32), "weight"),
    ("int8_linear_backward", 0, "weight_scale", cast(F16), "weight_scale"),
    ("int8_linear_backward", 0, "weight_scale", narrower(0), "weight_scale"),
    *[("rotate_quantize", 1, name, change, name) for name in ("signs", "smooth") for change in
      (shorter, deeper, cast(F64), cast(I32))],
    *[("rotate_quantize", 2, "x_scale", change, "x_scale") for change in (cast(F16), scalar, repeated(2))],
    *[("rotate_quantize", 0, "bits", bits, "bits") for bits in (-1, 0, 1, 9, 16)],
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=name_of)
def test_wrong_argument(any_backend: Backend, wrong: Wrong) -> None:
    assert_refused(any_backend, wrong)


@pytest.mark.parametrize("op", ["hadamard_transform", "rotate_quantize"])
@pytest.mark.parametrize("n", [0, 3, 6, 10, 36, 60, 100, 28, 11008])
def test_sizes_without_a_hadamard_matrix(any_backend: Backend, op: str, n: int) -> None:
    with pytest.raises(ValueError, match=rf"{op}: x must be .*2\^p, 12 \* 2\^p or 20 \* 2\^p, got n={n}"):
        any_backend(op, torch.zeros(2, n, device=any_backend.device))


def test_sums_that_could_leave_int32(any_backend: Backend) -> None:
    device = any_backend.device
    with pytest.raises(ValueError, match="int8_linear: x must be .*131071"):
        any_backend("int8_linear", torch.zeros(1, 2**17, device=device),
                    torch.zeros(1, 2**17, dtype=I8, device=device), torch.zeros(1, device=device))  # fmt: skip


def test_public_function_wants_a_weight_object(any_backend: Backend) -> None:
    arguments, _ = sample(any_backend, "int8_linear", 0)
    with pytest.raises(TypeError, match="int8_linear: w must be an Int8Weight, got Tensor"):
        torch_kernels.int8_linear(arguments["x"], arguments["weight"])
    with pytest.raises(TypeError, match="int8_linear: x must be a tensor, got list"):
        torch_kernels.int8_linear([1.0], torch_kernels.Int8Weight(arguments["weight"], arguments["weight_scale"]))


INT8, SCALE = torch.zeros(3, 4, dtype=I8), torch.zeros(3)
LINEAR = nn.Linear(4, 3)
Int8Weight, Int8Linear = torch_kernels.Int8Weight, torch_kernels.nn.Int8Linear
OBJECTS: list[tuple[Callable[[], Any], str]] = [
    (lambda: Int8Weight(INT8.float(), SCALE), "Int8Weight: weight must be int8"),
    (lambda: Int8Weight(INT8[0], SCALE), "Int8Weight: weight must be"),
    (lambda: Int8Weight(INT8, SCALE.double()), "Int8Weight: scale must be float32"),
    (lambda: Int8Weight(INT8, SCALE[:2]), "Int8Weight: scale must be"),
    (lambda: Int8Weight(INT8, 1.0), "Int8Weight: scale must be a tensor, got float"),
    (lambda: Int8Weight(INT8, SCALE.to("meta")), "Int8Weight: scale must be on cpu"),
    (lambda: Int8Weight.quantize(INT8), "Int8Weight.quantize: dense must be float32"),
    (lambda: Int8Weight.quantize(torch.zeros(3)), "Int8Weight.quantize: dense must be"),
    (lambda: Int8Weight.quantize([1.0]), "Int8Weight.quantize: dense must be a tensor"),
    (lambda: Int8Weight.from_state_dict({"weight": INT8}), "Int8Weight.from_state_dict: state_dict must be"),
    (lambda: Int8Weight(INT8, SCALE).to(F16), "Int8Weight.to: device must be a device"),
    (lambda: Int8Linear(INT8), "Int8Linear: weight must be an Int8Weight"),
    (lambda: Int8Linear(Int8Weight(INT8, SCALE), torch.zeros(4)), "Int8Linear: bias must be"),
    (lambda: Int8Linear(Int8Weight(INT8, SCALE), threshold=-1.0), "Int8Linear: threshold must be at least 0"),
    (lambda: Int8Linear(Int8Weight(INT8, SCALE), threshold=6.0, x_scale=torch.ones(1)), "Int8Linear: x_scale must be"),
    (lambda: Int8Linear(Int8Weight(INT8, SCALE), signs=torch.ones(5)), "Int8Linear: signs must be"),
    (lambda: Int8Linear.from_linear(LINEAR, threshold=6.0, rotate=True), "rotate must be False with a threshold"),
    (lambda: Int8Linear.from_linear(LINEAR, smooth=torch.ones(5)), "smooth must be"),
    (lambda: Int8Linear.from_linear(LINEAR, smooth=torch.zeros(4)), "smooth must be positive and finite"),
    (lambda: Int8Linear.from_linear(nn.Linear(7, 3), rotate=True), "in_features must be 2\\^p"),
]


@pytest.mark.parametrize("case", OBJECTS, ids=lambda case: case[1])
def test_wrong_objects(case: tuple[Callable[[], Any], str]) -> None:
    with pytest.raises((ValueError, TypeError), match=case[1]):
        case[0]()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite(value: float) -> None:
    dense = torch.ones(5, 6)
    dense[3, 2] = value
    for dtype in (F32, F16, torch.bfloat16, F64):
        with pytest.raises(ValueError, match="Int8Weight.quantize: dense must be finite.*row 3"):
            Int8Weight.quantize(dense.to(dtype))
