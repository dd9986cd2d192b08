# SPDX-License-Identifier: Apache-2.0
"""Bad arguments raise ValueError or TypeError that name op and argument, before anything is written."""

from __future__ import annotations

import pytest
import torch
import torch_kernels
from torch import Tensor
from torch_kernels import Int4Weight

from ..backends import Backend, unchecked
from ..calls import Wrong, assert_refused, cast, deeper, flat, name_of, narrower, put, sample, samples, scalar, shorter
from ..guards import Guards
from ..tolerance import assert_bitwise
from .cases import Case, make

F16, F32, F64, I32 = torch.float16, torch.float32, torch.float64, torch.int32


def longer(x: Tensor) -> Tensor:
    return torch.cat([x, x[..., :1]], -1)


WRONG: list[Wrong] = [
    ("int4_linear", 0, "x", cast(F64), "x must be float32 or float16 or bfloat16, got torch.float64"),
    ("int4_linear", 0, "x", cast(I32), "x must be"),
    ("int4_linear", 0, "x", scalar, "x must be"),
    ("int4_linear", 0, "x", lambda x: x[..., :47], "weight|scales"),
    ("int4_linear", 0, "out_features", 41, "weight|scales"),
    ("int4_linear", 0, "out_features", 39, "weight|scales"),
    ("int4_linear", 0, "out_features", -1, "out_features must be at least 0, got -1"),
    ("int4_linear", 1, "mode", "a4", "mode must be 'exact' or 'a8' or 'fast', got 'a4'"),
    ("int4_linear", 1, "bias", shorter, r"bias must be \[N=40\], got shape \[39\]"),
    ("int4_linear", 1, "bias", cast(torch.bfloat16), "bias must be float16 or float32, got torch.bfloat16"),
    ("int4_linear", 2, "bias", cast(F16), "bias"),
    ("int4_linear_backward", 0, "grad", cast(F64), "grad must be float32 or float16 or bfloat16, got torch.float64"),
    ("int4_linear_backward", 0, "grad", scalar, "grad must be"),
    ("int4_linear_backward", 0, "grad", shorter, "weight|scales"),
    ("int4_linear_backward", 0, "in_features", -1, "in_features must be at least 0, got -1"),
    ("int4_linear_backward", 0, "in_features", 5000, "weight|scales"),
    *[(op, sample, *case) for op in ("int4_linear", "int4_linear_backward") for sample, *case in (
        (0, "weight", cast(F32), "weight must be uint8 or int32, got torch.float32"),
        (0, "weight", flat, "weight must be"),
        (0, "weight", narrower(0), "weight must be"),
        (1, "scales", cast(F64), "scales must be"),
        (1, "scales", shorter, "scales must be"),
        (1, "scales", narrower(0), "scales must be"),
        (1, "scales", flat, "scales must be"),
        (1, "zeros", cast(torch.uint8), "zeros must be float16 or float32, got torch.uint8"),
        (1, "zeros", shorter, "zeros must be"),
        (1, "group_size", 24, "group_size must be one of -1, 16, 32, 64, 128, 256, got 24"),
        (1, "group_size", 0, "group_size must be"),
        (1, "group_size", 64, "scales must be"),
        (3, "perm", cast(torch.int64), "perm must be int32, got torch.int64"),
        (3, "perm", deeper, "perm must be"),
        (3, "perm", longer, "perm must be as long as a multiple of group_size"),
        (3, "perm", None, "weight|scales"),
        (3, "perm", put(50, 3), r"perm\[3\] must be in \[-1, 50\), got 50"),
        (3, "perm", put(-2, 3), r"perm\[3\] must be in \[-1, 50\), got -2"))],
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=name_of)
def test_wrong_argument(any_backend: Backend, wrong: Wrong) -> None:
    assert_refused(any_backend, wrong)


def test_float64_is_a_type_error(any_backend: Backend) -> None:
    example = make(Case(), any_backend.device)
    with any_backend.forced(), pytest.raises(TypeError, match="int4_linear: x must be .*got torch.float64"):
        torch_kernels.int4_linear(example.x.double(), example.weight)


def test_public_function(any_backend: Backend) -> None:
    example = make(Case(rows=(3,)), any_backend.device)
    x, w = example.x, example.weight
    for arguments, error, message in (
        ((x[:, :-1], w), ValueError, r"x must be \[\.\.\., K=96\], got shape \[3, 95\]"),
        ((x.tolist(), w), TypeError, "x must be a tensor, got list"),
        ((x, w.qweight), TypeError, "w must be an Int4Weight, got Tensor"),
        ((x[0, 0], w), ValueError, "x must be"),
        ((x, w, x[:1]), ValueError, "bias"),
        ((x, w, None, "a4"), ValueError, "mode"),
    ):
        with any_backend.forced(), pytest.raises(error, match=f"int4_linear: {message}"):
            torch_kernels.int4_linear(*arguments)


@pytest.mark.parametrize("op", ["int4_linear", "int4_linear_backward"])
def test_the_other_layout_is_refused(backend: Backend, op: str) -> None:
    if backend.name == "reference":
        pytest.skip("it reads both")
    other = "cuda" if backend.name == "cpu" else "cpu"
    positional, keywords = samples(backend.device, other)[op][0]
    named = "'cpu'" if backend.name == "cpu" else "'gpu'"
    with pytest.raises(ValueError, match=f"{backend.name}: it takes weights in the layout {named}"):
        backend(op, *positional.values(), **keywords)


def test_the_reference_reads_both_layouts(any_backend: Backend) -> None:
    reference = Backend("reference", any_backend.device, any_backend.dtypes)
    for op in ("int4_linear", "int4_linear_backward"):
        results = []
        for name in ("cpu", "cuda"):
            for positional, keywords in samples(any_backend.device, name)[op]:
                results.append(reference(op, *positional.values(), **keywords))
        for x, y in zip(results[: len(results) // 2], results[len(results) // 2 :], strict=True):
            assert_bitwise("other layout", x, y)


@pytest.mark.parametrize("op", ["int4_linear", "int4_linear_backward"])
def test_garbage_in_perm_stays_inside_the_tensors(backend: Backend, op: str) -> None:
    """Nobody checked: what names no column counts as padding."""
    positional, keywords = sample(backend, op, 3)
    perm = positional["perm"].clone()
    perm[:8] = torch.tensor([-2, 50, 2**31 - 1, -(2**31), 51, 1000, -3, 2**20], device=perm.device)
    padded = perm.clone()
    padded[:8] = -1
    expected = backend(op, *(positional | {"perm": padded}).values(), **keywords)
    guards = Guards()
    guarded = {name: guards.copy(x) if isinstance(x, Tensor) else x for name, x in positional.items()}
    with unchecked(op), guards.allocations():
        out = backend(op, *(guarded | {"perm": guards.copy(perm)}).values(), **keywords)
    guards.check()
    assert_bitwise("out", out, expected)


@pytest.mark.parametrize("op", ["int4_linear", "int4_linear_backward"])
def test_outputs_are_filled_and_nothing_else_is(backend: Backend, op: str) -> None:
    for positional, keywords in samples(backend.device, backend.name)[op]:
        if op == "int4_linear" and "mode" not in keywords:
            keywords = keywords | {"mode": "exact"}
        expected = backend(op, *positional.values(), **keywords)
        guards = Guards()
        guarded = {name: guards.copy(x) if isinstance(x, Tensor) else x for name, x in positional.items()}
        before = {name: x.clone() for name, x in guarded.items() if isinstance(x, Tensor)}
        with guards.allocations():
            out = backend(op, *guarded.values(), **keywords)
        guards.check()
        assert_bitwise("out", out, expected)
        for name, x in before.items():
            assert_bitwise(f"input {name}", guarded[name], x)


def test_a_weight_on_another_device(any_backend: Backend) -> None:
    if any_backend.device == "cpu":
        pytest.skip("needs a second device")
    w = Int4Weight.quantize(torch.zeros(4, 16))
    with pytest.raises(ValueError, match="int4_linear.*weight"):
        torch_kernels.int4_linear(torch.zeros(2, 16, device="cuda"), w)
