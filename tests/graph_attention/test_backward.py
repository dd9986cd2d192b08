# SPDX-License-Identifier: Apache-2.0
"""Gradients against the float64 truth, and gradcheck."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_kernels
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend, for_all, need
from ..tolerance import assert_accurate, assert_bitwise
from . import oracle
from .cases import Case, cases, make
from .test_bits import packed_together

DIFFERENTIABLE = ("q", "k", "v")


@pytest.fixture(autouse=True)
def has_a_backward_kernel(backend: Backend) -> None:
    need(backend, "graph_attention_backward")


def gradients(backend: Backend, args: dict[str, Any], grad: Tensor) -> list[Tensor]:
    inputs = [args[name].detach().requires_grad_() for name in DIFFERENTIABLE]
    with backend.forced():
        out, lse = torch_kernels.graph_attention(**args | dict(zip(DIFFERENTIABLE, inputs)))
        assert not lse.requires_grad
        return list(torch.autograd.grad(out, inputs, grad))


def check(backend: Backend, case: Case) -> None:
    if case.dtype == torch.float64:  # the truth's own angles are float64: far positions would test them
        case = case.replace(longest_position=100)
    args = make(case, backend.device)
    shape = (*args["q"].shape[:2], case.value_size)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(case.seed)).to(args["q"])
    got = gradients(backend, args, grad)
    args = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in args.items()}
    truth = oracle.plain_formula(torch.float64, False, **args | {"q": args["q"]}, grad_out=grad, exact=True)
    plain = [oracle.plain_formula(case.dtype, backwards, **args, grad_out=grad) for backwards in (False, True)]
    for i, name in enumerate(DIFFERENTIABLE):
        assert got[i].dtype == case.dtype
        floor = (
            64 * torch.finfo(torch.float64).eps if case.dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
        )
        floor *= max(1.0, float(truth[i].abs().max()) if truth[i].numel() else 1.0)
        assert_accurate(f"gradient of {name}", got[i], truth[i], *(x[i] for x in plain), floor=floor)


@for_all(data=st.data(), examples=30)
def test_matches_truth(backend: Backend, data: st.DataObject) -> None:
    check(backend, data.draw(cases(backend, page=0)))


def test_shared_sources_and_long_segments(backend: Backend) -> None:
    q_lengths, kv_lengths = ((5, 20), (33, 7)) if backend.slow else ((70, 3, 200), (300, 130, 400))
    for dtype in backend.dtypes[:1] if backend.slow else backend.dtypes:
        case = Case(q_lengths=q_lengths, kv_lengths=kv_lengths, density=1.0, own="all", head_size=32, value_size=16)
        check(backend, case.replace(dtype=dtype, rope="half"))


@pytest.mark.parametrize("sizes", [(136, 16), (16, 136)])
def test_large_heads(backend: Backend, sizes: tuple[int, int]) -> None:
    """In Triton the gradients of keys and of values have launches of their own."""
    case = Case(q_lengths=(5, 9), kv_lengths=(17, 7), density=1.0, own="all", rope="half", dtype=torch.float16)
    check(backend, case.replace(head_size=sizes[0], value_size=sizes[1]))


def test_gradcheck(backend: Backend) -> None:
    if torch.float64 not in backend.dtypes:
        pytest.skip("no float64")
    for rope in ("", "half", "interleaved"):
        case = Case(q_lengths=(2, 0, 1), kv_lengths=(2, 1), head_size=8, value_size=8, kv_heads=1, dtype=torch.float64)
        args = make(case.replace(rope=rope, density=1.0, seed=0), backend.device)
        inputs = [args[name].detach().requires_grad_() for name in DIFFERENTIABLE]
        with backend.forced():
            assert torch.autograd.gradcheck(
                lambda *x: torch_kernels.graph_attention(**args | dict(zip(DIFFERENTIABLE, x)))[0],  # noqa: B023
                inputs,
            )


def test_runs_repeat_to_the_bit(backend: Backend) -> None:
    args = make(Case(density=1.0, rope="half", dtype=torch.float16), backend.device)
    grad = torch.ones(len(args["q"]), 4, 64, device=backend.device, dtype=torch.float16)
    first, second = gradients(backend, args, grad), gradients(backend, args, grad)
    for name, x, y in zip(DIFFERENTIABLE, first, second):
        assert_bitwise(name, x, y)


def test_packing_requests_changes_nothing(backend: Backend) -> None:
    case = Case(density=1.0, rope="half", kv_lengths=(9, 20, 33), kv_heads=1, head_size=16, value_size=16)
    # Seeds without rows around the segments, so that the requests' keys are neighbours.
    a, b = make(case, backend.device), make(case.replace(seed=6, q_lengths=(4, 1)), backend.device)
    both = packed_together(a, b)
    grad = torch.randn(len(both["q"]), 2, 16, generator=torch.Generator().manual_seed(0)).to(backend.device)
    together = gradients(backend, both, grad)
    for x, rows, place in ((a, grad[: len(a["q"])], 0), (b, grad[len(a["q"]) :], 1)):
        for name, alone, packed in zip(DIFFERENTIABLE, gradients(backend, x, rows), together):
            begin = len(a[name]) * place
            assert_bitwise(f"gradient of {name}", packed[begin : begin + len(alone)], alone)


def test_keys_that_nobody_sees(backend: Backend) -> None:
    args = make(Case(density=0.0, own="none", seed=5), backend.device)  # seed 5: there are rows around the segments
    grad = torch.ones(len(args["q"]), 4, 64, device=backend.device)
    for x in gradients(backend, args, grad):
        assert (x == 0).all()


@pytest.mark.parametrize("size", [64, 136])
def test_a_hidden_nan_never_leaks(backend: Backend, size: int) -> None:
    """The last own keys and the gradients of the last rows are NaN: what comes before keeps its bits."""
    case = Case(q_lengths=(21,), kv_lengths=(21,), own="all", density=0.0, seed=0, head_size=size, value_size=size)
    args = make(case, backend.device)
    grad = torch.randn(21, 4, size, generator=torch.Generator().manual_seed(0)).to(args["q"])
    zero = grad.clone()
    zero[16:] = 0
    clean = gradients(backend, args, zero)
    dirty = args | {name: args[name].clone() for name in DIFFERENTIABLE}
    for name in DIFFERENTIABLE:
        dirty[name][16:] = float("nan")
    grad[16:] = float("nan")
    dq, dk, dv = gradients(backend, dirty, grad)
    assert_bitwise("dq", dq[:16], clean[0][:16])
    assert dk[16:].isnan().all() and dv[16:].isnan().all()


def test_pages_have_no_gradient(backend: Backend) -> None:
    args = make(Case(page=4), backend.device)
    args["q"].requires_grad_()
    with backend.forced(), pytest.raises(ValueError, match="block_table"):
        torch_kernels.graph_attention(**args)


def test_rope_shift(backend: Backend) -> None:
    if torch.float64 not in backend.dtypes:
        pytest.skip("no float64")
    k = torch.randn(7, 2, 8, dtype=torch.float64, device=backend.device, requires_grad=True)
    offsets, delta = (torch.tensor(x, device=backend.device) for x in ([1, 3, 6], [5, -1000]))
    inv_freq = torch.logspace(0, -3, 4, device=backend.device)
    with backend.forced():
        assert torch.autograd.gradcheck(lambda k: torch_kernels.rope_shift(k, offsets, delta, inv_freq), (k,))
