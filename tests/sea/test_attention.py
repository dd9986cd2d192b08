# SPDX-License-Identifier: Apache-2.0
"""Sparse attention against dense formulas under the mask of the column view, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch_kernels
from hypothesis import strategies as st
from torch import Tensor

from ..backends import BF16, F16, F32, F64, Backend, for_all, need, serves
from ..tolerance import assert_accurate, assert_bitwise, ulp
from . import oracle
from .cases import GATES, Case, cases, dense, make, run

INPUTS = ("q", "k", "v", *GATES)


@pytest.fixture(autouse=True)
def serving(backend: Backend) -> None:
    need(backend, "sea_attention")


def in_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {n: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in arguments.items()}


def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Gates in q's dtype, as the plain formula has them."""
    return in_dtype(arguments, arguments["q"].dtype)


def floor_of(truth: Tensor, dtype: torch.dtype) -> float:
    """Where the truth itself is rounded."""
    return 8 * ulp(float(truth.abs().max()), F64) if dtype == F64 and truth.numel() else 0.0


def check(backend: Backend, case: Case) -> None:
    args = make(case, backend.device)
    out, lse = run(backend, args)
    arguments = dense(args)
    truth, true_lse = oracle.attention(**in_dtype(arguments, F64))
    baseline, plain_lse = oracle.attention(**plain(arguments))
    assert out.dtype == case.dtype and lse.dtype == F32
    assert_accurate("out", out, truth, baseline, floor=floor_of(truth, case.dtype))
    assert_accurate("lse", lse, true_lse, plain_lse)
    empty = ~arguments["mask"].any(-1)
    assert torch.equal(lse.cpu() == -math.inf, empty)
    if case.gates == "none":
        assert bool((out.cpu().transpose(1, 2)[empty] == 0).all())


def gradients(arguments: dict[str, Any], grad: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    arguments = in_dtype(arguments, dtype) if dtype else plain(arguments)
    leaves = {n: arguments[n].detach().clone().requires_grad_() for n in INPUTS if n in arguments}
    out, _ = oracle.attention(**(arguments | leaves))
    loss = (out * grad.to(out.dtype)).sum() + sum((x * 0).sum() for x in leaves.values())
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))


def run_backward(backend: Backend, args: dict[str, Any], grad: Tensor) -> dict[str, Tensor]:
    out, lse = run(backend, args)
    positional = [args[n] for n in ("q", "k", "v")] + [out, lse, args["cells"], args["widths"]]
    keywords = {n: args.get(n) for n in ("num_cells", "scale", "max_columns_per_cell", *GATES)}
    found = dict(zip(INPUTS, backend("sea_attention_backward", grad, *positional, **keywords), strict=True))
    for name in GATES:
        if name not in args:
            assert found.pop(name).shape == (0,)
    return found


def check_backward(backend: Backend, case: Case) -> None:
    args = make(case, backend.device)
    generator = torch.Generator().manual_seed(case.seed + 1)
    shape = (*args["q"].shape[:3], case.value_size)
    grad = torch.randn(shape, generator=generator).to(case.dtype)
    found = run_backward(backend, args, grad.to(backend.device))
    arguments = dense(args)
    truth, baseline = gradients(arguments, grad, F64), gradients(arguments, grad, None)
    for name, x in found.items():
        assert x.dtype == args[name].dtype and x.shape == args[name].shape
        assert_accurate(
            f"gradient of {name}", x, truth[name], baseline[name], floor=floor(name, truth, arguments, grad)
        )


def floor(name: str, truth: dict[str, Tensor], arguments: dict[str, Any], grad: Tensor) -> float:
    """What rounding of g = grad_out . v and of probabilities costs, when few of them are added up."""
    dtype = arguments["q"].dtype
    if not grad.numel() or not arguments["v"].numel():
        return 0.0
    eps = torch.finfo(F64 if dtype == F64 else F32).eps
    g = float(grad.double().norm(dim=-1).max() * arguments["v"].double().norm(dim=-1).max())
    other = max(float(arguments[n].double().norm(dim=-1).max()) for n in ("q", "k"))
    return 4 * eps * g * (max(other, 1.0) if name in ("q", "k") else 1.0)


@for_all(data=st.data(), examples=30)
def test_matches_dense(backend: Backend, data: st.DataObject) -> None:
    check(backend, data.draw(cases(backend)))


@for_all(data=st.data(), examples=20)
def test_gradients_match_dense(backend: Backend, data: st.DataObject) -> None:
    need(backend, "sea_attention_backward")
    check_backward(backend, data.draw(cases(backend)))


LONG = Case(batch=1, heads=2, rows=3, keys=2300, num_cells=64, size=64, value_size=64, kept=0.2, gates="all")


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16])
def test_rows_of_several_ranges(backend: Backend, dtype: torch.dtype) -> None:
    if dtype not in backend.dtypes:
        pytest.skip("not served")
    case = LONG.replace(dtype=dtype)
    check(backend, case.replace(rows=2, keys=150, heads=1) if backend.slow else case)
    if not backend.slow:
        packed = case.replace(rows=80, keys=1100, widths="full", kept=0.05)  # keys and values are copied for all rows
        check(backend, packed)
        check_backward(backend, packed.replace(gates="shared"))


@pytest.mark.parametrize("causal", [True, False])
def test_keeping_everything_is_dense_attention(backend: Backend, causal: bool) -> None:
    """k >= T: with gradients."""
    need(backend, "sea_attention_backward", "sea_select")
    tokens, heads, size, num_cells = (9 if backend.slow else 33), 2, 16, 12
    generator = torch.Generator().manual_seed(5)
    q, k, v, grad = (torch.randn(2, tokens, heads, size, generator=generator) for _ in range(4))
    widths = (torch.arange(tokens) + 1 if causal else torch.full((tokens,), tokens)).expand(2, tokens).contiguous()
    on = backend.device
    cells = backend("sea_select", torch.randn(2, heads, tokens, num_cells).to(on), widths.to(on), k=float(tokens))
    leaves = [x.to(on).requires_grad_() for x in (q, k, v)]
    with backend.forced():
        out, _ = torch_kernels.sea_attention(*leaves, cells, widths.to(on), num_cells=num_cells)
        found = torch.autograd.grad(out, leaves, grad.to(on))

    def sdpa(dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        heads_first = [x.transpose(1, 2) for x in inputs]
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)
        return out, *torch.autograd.grad(out, inputs, grad.to(dtype))

    for name, x, truth, baseline in zip(("out", "q", "k", "v"), (out, *found), sdpa(F64), sdpa(F32), strict=True):
        assert_accurate(name, x, truth, baseline)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_what_a_row_does_not_keep_has_no_influence(backend: Backend, value: float) -> None:
    """To the bit: later keys of causal attention, and cells that no row keeps."""
    case = Case(rows=12, keys=12, num_cells=4, kept=0.4, gates="all", seed=2)
    args = make(case, backend.device)
    before, lse = run(backend, args)
    mask = dense(args)["mask"]
    row = 6
    kept = mask[:, :, :row].any(2).transpose(1, 2)[..., None].to(backend.device)  # by rows before
    args["k"] = torch.where(kept, args["k"], value)
    args["v"] = torch.where(kept, args["v"], value)
    after, lse_after = run(backend, args)
    assert_bitwise("out", after[:, :row], before[:, :row])
    assert_bitwise("lse", lse_after[:, :, :row], lse[:, :, :row])


def test_gradients_of_what_is_not_kept(backend: Backend) -> None:
    need(backend, "sea_attention_backward")
    case = Case(rows=8, keys=12, num_cells=4, kept=0.3, gates="all", seed=3)
    args = make(case, backend.device)
    grad = torch.randn(*args["q"].shape[:3], case.value_size).to(backend.device)
    before = run_backward(backend, args, grad)
    kept = dense(args)["mask"].any(2).transpose(1, 2)[..., None].to(backend.device)
    assert not bool(kept.all())
    args["k"], args["v"] = (torch.where(kept, args[n], math.nan) for n in "kv")
    after = run_backward(backend, args, grad)
    for name, x in after.items():
        assert_bitwise(name, x, before[name])
    for name in "kv":
        assert bool((torch.where(kept, 0.0, after[name]) == 0).all())


def test_nan_stays_in_its_row(backend: Backend) -> None:
    case = Case(rows=6, keys=9, num_cells=4, kept=1.0)
    args = make(case, backend.device)
    before, _ = run(backend, args)
    args["q"][0, 3, 1] = math.nan
    after, lse = run(backend, args)
    assert bool(after[0, 3, 1].isnan().all()) and bool(lse[0, 1, 3].isnan())
    after[0, 3, 1] = before[0, 3, 1]
    assert_bitwise("out", after, before)


def test_one_head_may_keep_everything(backend: Backend) -> None:
    """No buffer is cut for the average head."""
    case = Case(batch=1, heads=4, rows=5, keys=50 if backend.slow else 400, num_cells=16, size=16, gates="all")
    args = make(case, backend.device)
    cells = torch.zeros_like(args["cells"])
    cells[..., 1] = 0xFFFF  # head 2
    check_args(backend, case, args | {"cells": cells})


def check_args(backend: Backend, case: Case, args: dict[str, Any]) -> None:
    out, lse = run(backend, args)
    arguments = dense(args)
    truth, true_lse = oracle.attention(**in_dtype(arguments, F64))
    baseline, plain_lse = oracle.attention(**arguments)
    assert_accurate("out", out, truth, baseline)
    assert_accurate("lse", lse, true_lse, plain_lse)


def test_rows_are_computed_alone(backend: Backend) -> None:
    """The same bits in any batch, and for a last row that decodes against the cache."""
    case = Case(batch=2, rows=5 if backend.slow else 100, keys=40, num_cells=8, kept=0.5, gates="all", size=32)
    if not backend.slow:
        case = case.replace(keys=1100, kept=0.1)
    args = make(case, backend.device)
    together, lse = run(backend, args)
    for b, i in ((0, 0), (1, case.rows - 1)):
        one = dict(args)
        for name in ("q", "cells", "widths", "pooled"):
            one[name] = args[name][b : b + 1, i : i + 1]
        for name in ("row_gain", "mix"):
            one[name] = args[name][b : b + 1, :, i : i + 1]
        one["k"], one["v"] = args["k"][b : b + 1], args["v"][b : b + 1]
        out, one_lse = run(backend, one)
        assert_accurate("out", out, together[b : b + 1, i : i + 1].double())
        if backend.name == "cpu":
            assert_bitwise("out", out, together[b : b + 1, i : i + 1])
            assert_bitwise("lse", one_lse, lse[b : b + 1, :, i : i + 1])


def test_threads_change_no_bit() -> None:
    case = LONG.replace(batch=2, kept=0.5)
    args = make(case)
    grad = torch.randn(*args["q"].shape[:3], case.value_size)
    backend = Backend("cpu", "cpu", (F32,))
    results = []
    for threads in (1, 3, 8):
        torch.set_num_threads(threads)
        try:
            results.append([*run(backend, args), *run_backward(backend, args, grad).values()])
        finally:
            torch.set_num_threads(1)
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert_bitwise("result", x, y)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0, 0)])
def test_empty(backend: Backend, shape: tuple[int, int, int]) -> None:
    batch, rows, keys = shape
    case = Case(batch=batch, rows=rows, keys=keys, widths="full", gates="all")
    check(backend, case)
    if serves(backend, "sea_attention_backward"):
        check_backward(backend, case)


def test_gradcheck() -> None:
    case = Case(batch=1, rows=4, keys=6, num_cells=4, size=8, kept=0.6, dtype=F64, gates="all", limit=1)
    args = make(case)
    names = [n for n in INPUTS if n in args]
    rest = {n: x for n, x in args.items() if n not in names}

    def function(*leaves: Tensor) -> Tensor:
        return torch_kernels.sea_attention(**dict(zip(names, leaves)), **rest)[0]

    assert torch.autograd.gradcheck(function, [args[n].requires_grad_() for n in names], fast_mode=True)


def test_lse_has_no_gradient() -> None:
    args = make(Case())
    args["q"].requires_grad_()
    out, lse = torch_kernels.sea_attention(**args)
    assert out.requires_grad and not lse.requires_grad
