# SPDX-License-Identifier: Apache-2.0
"""Gradients against the float64 truth; the dense weight is never made."""

from __future__ import annotations

import pytest
import torch
import torch_kernels
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend, for_all
from ..tolerance import assert_accurate, assert_bitwise
from . import oracle
from .cases import ACT_ORDERS, GROUP_SIZES, Call, Case, cases, make


def dtypes(backend: Backend) -> list[torch.dtype]:
    return [dtype for dtype in backend.dtypes if dtype != torch.float64]


def gradients(backend: Backend, call: Call, grad: Tensor, mode: str = "exact") -> tuple[Tensor, Tensor | None]:
    x = call.x.detach().requires_grad_()
    bias = None if call.bias is None else call.bias.detach().clone().requires_grad_()
    with backend.forced():
        torch_kernels.int4_linear(x, call.weight, bias, mode).backward(grad)
    return x.grad, None if bias is None else bias.grad


def check(backend: Backend, case: Case, mode: str = "exact") -> None:
    call = make(case, backend.device)
    g = torch.Generator().manual_seed(case.seed + 1)
    grad = torch.randn(*case.rows, case.out_features, generator=g).to(call.x)
    dx, dbias = gradients(backend, call, grad, mode)
    assert dx.shape == call.x.shape and dx.dtype == call.x.dtype
    truth = torch.from_numpy(oracle.array(grad) @ call.dense)
    plain = [oracle.plain_formula(grad, call.dense.T, None, backwards) for backwards in (False, True)]
    # Zero points may be taken off sums over the row, which are larger than what they leave.
    sums = float(grad.float().abs().sum(-1).max()) if grad.numel() else 0.0
    largest = float(call.weight.scales.float().abs().max()) * 16 if call.weight.scales.numel() else 0.0
    floor = 0.0 if case.zeros is None else torch.finfo(torch.float32).eps * sums * largest / 4
    assert_accurate("dx", dx, truth, *plain, floor=floor)
    if call.bias is not None:
        assert dbias.dtype == call.bias.dtype
        rows = grad[None] if grad.dim() == 1 else grad.flatten(0, -2)
        assert_accurate("dbias", dbias, rows.double().sum(0), rows.float().sum(0))


@for_all(data=st.data())
def test_matches_truth(backend: Backend, data: st.DataObject) -> None:
    check(backend, data.draw(cases(backend)))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("zeros", [None, "int", "float"])
def test_groups(backend: Backend, group_size: int, zeros: str | None) -> None:
    for dtype in dtypes(backend):
        case = Case(rows=(3,), out_features=45, in_features=96 if backend.slow else 300, group_size=group_size)
        check(backend, case.replace(zeros=zeros, dtype=dtype, bias="same"))


@pytest.mark.parametrize("act_order", ACT_ORDERS[1:])
def test_act_order(backend: Backend, act_order: str) -> None:
    for dtype in dtypes(backend):
        check(backend, Case(in_features=100, group_size=16, zeros="int", act_order=act_order, dtype=dtype))


@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 17, 64, 65])
def test_row_counts(backend: Backend, rows: int) -> None:
    if backend.slow and rows > 17:
        pytest.skip("minutes when interpreted")
    check(backend, Case(rows=(rows,), out_features=33, in_features=50, bias="float32", seed=rows))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (31, 65)])
def test_sizes(backend: Backend, shape: tuple[int, int]) -> None:
    check(backend, Case(out_features=shape[0], in_features=shape[1], bias="same"))


def test_rounded_rows_pass_the_gradient_straight_through(backend: Backend) -> None:
    for dtype in dtypes(backend):
        check(backend, Case(dtype=dtype, zeros="int", bias="same"), mode="a8")


def test_a_row_does_not_depend_on_the_others(backend: Backend) -> None:
    counts = (1, 5, 9) if backend.slow else (1, 2, 5, 16, 33, 70)
    for dtype in dtypes(backend)[-1:] if backend.slow else dtypes(backend):
        call = make(Case(rows=(max(counts),), out_features=70, zeros="int", dtype=dtype), backend.device)
        grad = torch.randn(max(counts), 70, generator=torch.Generator().manual_seed(0)).to(call.x)
        whole, _ = gradients(backend, call, grad)
        for count in counts:
            part = Call(call.x[:count], call.weight, call.bias, call.dense)
            assert_bitwise(f"{count} rows", gradients(backend, part, grad[:count])[0], whole[:count])


def test_only_what_is_asked_for(backend: Backend) -> None:
    call = make(Case(bias="same"), backend.device)
    bias = call.bias.clone().requires_grad_()
    with backend.forced():
        torch_kernels.int4_linear(call.x, call.weight, bias).sum().backward()
        assert call.x.grad is None
        assert_accurate("dbias", bias.grad, torch.full((40,), 3.0, dtype=torch.float64))
        with torch.no_grad():
            assert not torch_kernels.int4_linear(call.x.clone().requires_grad_(), call.weight).requires_grad


def test_layouts_of_the_gradient(backend: Backend) -> None:
    """sum().backward() brings a gradient of stride 0."""
    call = make(Case(rows=(2, 3), zeros="int"), backend.device)
    x = call.x.clone().requires_grad_()
    with backend.forced():
        torch_kernels.int4_linear(x, call.weight).sum().backward()
        expected = gradients(backend, call, torch.ones(2, 3, 40, device=backend.device))[0]
    assert_bitwise("dx", x.grad, expected)


def test_a_gradient_of_the_gradient_is_refused(backend: Backend) -> None:
    call = make(Case(), backend.device)
    x = call.x.clone().requires_grad_()
    with backend.forced(), pytest.raises(ValueError, match="int4_linear_backward: grad requires grad"):
        y = torch_kernels.int4_linear(x, call.weight).square().sum()
        torch.autograd.grad(y, x, create_graph=True)
