# SPDX-License-Identifier: Apache-2.0
"""int4_linear against the float64 truth, in all shapes and with all kinds of weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch_kernels
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch_kernels import Int4Weight

from ..backends import Backend, for_all
from ..strategies import lay_out
from ..tolerance import assert_accurate, assert_bitwise
from . import oracle
from .cases import ACT_ORDERS, BF16, F16, F32, GROUP_SIZES, Call, Case, cases, make, rounding, run
from .samples import samples


def dtypes(backend: Backend) -> list[torch.dtype]:
    return [dtype for dtype in backend.dtypes if dtype != torch.float64]


def check(backend: Backend, case: Case, mode: str = "exact") -> None:
    call = make(case, backend.device)
    out = run(backend, call, mode)
    assert out.dtype == case.dtype and out.shape == (*case.rows, case.out_features) and out.device == call.x.device
    check_values(call, out)


def check_values(call: Call, out: torch.Tensor) -> None:
    plain = [oracle.plain_formula(call.x, call.dense, call.bias, backwards) for backwards in (False, True)]
    truth = oracle.linear(call.x, call.dense, call.bias)
    assert_accurate("out", out, truth, *plain, floor=rounding(call) if truth.numel() else 0.0)


@for_all(data=st.data(), examples=60)
def test_matches_truth(backend: Backend, data: st.DataObject) -> None:
    check(backend, data.draw(cases(backend)), data.draw(st.sampled_from(["exact", "fast"])))


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_row_counts(backend: Backend, rows: int) -> None:
    if backend.slow and rows not in (0, 1, 8, 9, 17, 33, 65):
        pytest.skip("minutes when interpreted")
    for dtype in dtypes(backend)[-1:] if backend.slow else dtypes(backend):
        small = {"out_features": 17, "in_features": 48} if backend.slow else {"out_features": 70, "in_features": 200}
        check(backend, Case(rows=(rows,), dtype=dtype, zeros="int", bias="same", seed=rows, **small))


@pytest.mark.parametrize("size", [1, 2, 3, 15, 17, 31, 32, 33, 47, 63, 64, 65, 127, 129, 255, 257])
def test_odd_sizes(backend: Backend, size: int) -> None:
    if backend.slow and size > 65:
        pytest.skip("minutes when interpreted")
    for dtype in dtypes(backend):
        check(backend, Case(rows=(2,), out_features=size, in_features=33, dtype=dtype, seed=size))
        check(backend, Case(rows=(2,), out_features=19, in_features=size, dtype=dtype, group_size=16, seed=size))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("zeros", [None, "int", "float"])
def test_groups(backend: Backend, group_size: int, zeros: str | None) -> None:
    widths = (96,) if backend.slow else (96, 256, 300, 512)  # partial last groups among them
    for dtype in dtypes(backend):
        for in_features in widths:
            case = Case(rows=(3,), out_features=24, in_features=in_features, group_size=group_size, zeros=zeros)
            check(backend, case.replace(dtype=dtype, bias="float32", seed=in_features))


def test_partial_last_group(backend: Backend) -> None:
    for group_size, in_features in ((128, 144), (256, 272), (64, 65)):
        check(backend, Case(rows=(2,), out_features=9, in_features=in_features, group_size=group_size, zeros="float"))


def test_scale_dtypes(backend: Backend) -> None:
    for dtype in dtypes(backend):
        for scale_dtype in (F32, F16, BF16):
            check(backend, Case(dtype=dtype, scale_dtype=scale_dtype, zeros="int", bias="same"))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "misaligned", "strided", "expanded"])
@pytest.mark.parametrize("rows", [(5,), (2, 3), (2, 1, 3)])
def test_layouts(backend: Backend, layout: str, rows: tuple[int, ...]) -> None:
    for dtype in dtypes(backend):
        check(backend, Case(rows=rows, dtype=dtype, layout=layout, bias="same"))


@pytest.mark.parametrize("act_order", ACT_ORDERS[1:])
@pytest.mark.parametrize("zeros", [None, "int", "float"])
def test_act_order(backend: Backend, act_order: str, zeros: str | None) -> None:
    for dtype in dtypes(backend):
        case = Case(rows=(3,), out_features=21, in_features=100, group_size=16, zeros=zeros, act_order=act_order)
        check(backend, case.replace(dtype=dtype, bias="same"))


def test_consecutive_groups_need_no_permutation() -> None:
    call = make(Case(in_features=100, group_size=32))
    w = call.weight
    g_idx = torch.arange(100) // 32
    same = Int4Weight(w.qweight, w.scales, w.zeros, g_idx, in_features=100, group_size=32)
    assert same.pack("cpu").perm is None
    assert_bitwise("weight", same.pack("cpu").weight, w.pack("cpu").weight)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("rows", [(), (0,), (3,), (2, 0)])
def test_empty(backend: Backend, shape: tuple[int, int], rows: tuple[int, ...]) -> None:
    for group_size in (-1, 32):
        for bias in (None, "same"):
            check(
                backend, Case(rows=rows, out_features=shape[0], in_features=shape[1], group_size=group_size, bias=bias)
            )


def test_extreme_scales(backend: Backend) -> None:
    """Scales at both ends of float16's range; the weights themselves leave it."""
    for dtype in dtypes(backend):
        for magnitude in (4e4, 7e-8):
            call = make(Case(rows=(4,), dtype=dtype, magnitude=magnitude, zeros="int", in_features=64), backend.device)
            call.x = call.x / 256 if dtype == F16 and magnitude > 1 else call.x
            check_values(call, run(backend, call))
        # Sums that only their scale brings back into float16's range.
        call = make(Case(rows=(4,), dtype=dtype, magnitude=1e-4, in_features=256, group_size=128), backend.device)
        call.x = torch.full_like(call.x, 3e3)
        check_values(call, run(backend, call))


@pytest.mark.parametrize("mode", ["exact", "a8", "fast"])
def test_nothing_gives_exactly_the_bias(backend: Backend, mode: str) -> None:
    for dtype in dtypes(backend):
        for zeros in (None, "int", "float"):
            case = Case(
                rows=(4,), dtype=dtype, zeros=zeros, bias="same", act_order="unequal" if zeros == "int" else None
            )
            call = make(case, backend.device)
            call.x[1] = 0
            out = run(backend, call, mode)
            assert_bitwise("zero row", out[1], call.bias)
            w = call.weight
            scales = w.scales.clone()
            scales[:, 3] = 0
            call.weight = Int4Weight(
                w.qweight, scales, w.zeros, w.g_idx, in_features=w.in_features, group_size=w.group_size
            )
            assert_bitwise("zero scales", run(backend, call, mode)[:, 3], call.bias[3].expand(4))


@pytest.mark.parametrize("mode", ["exact", "a8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_stays_in_its_row(backend: Backend, mode: str, value: float) -> None:
    size = 20 if backend.slow else 100
    for dtype in dtypes(backend)[-1:] if backend.slow else dtypes(backend):
        for zeros in (None, "float"):
            case = Case(rows=(9,), out_features=size, in_features=size, dtype=dtype, zeros=zeros, bias="same")
            call = make(case, backend.device)
            clean = run(backend, call, mode)
            for row, column in ((4, size // 2), (8, size - 1)) if backend.slow else ((0, 0), (4, 63), (8, 99)):
                x = call.x.clone()
                x[row, column] = value
                out = run(backend, Call(x, call.weight, call.bias, call.dense), mode)
                assert not out[row].isfinite().any()
                out[row] = clean[row]
                assert_bitwise("other rows", out, clean)


# ---- a8 ----


def block_size(group_size: int) -> int:
    return 128 if group_size == -1 else min(group_size, 128)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("zeros", [None, "int", "float"])
def test_a8_is_as_good_as_rounding_rows(backend: Backend, group_size: int, zeros: str | None) -> None:
    """Blocks may be finer than the definition's; never coarser."""
    for dtype in dtypes(backend):
        case = Case(rows=(6,), out_features=33, in_features=96 if backend.slow else 300, group_size=group_size)
        call = make(case.replace(zeros=zeros, dtype=dtype, bias="float32"), backend.device)
        out = run(backend, call, "a8").cpu().double()
        truth = oracle.linear(call.x, call.dense, call.bias)
        x = oracle.array(call.x)
        expected = x.copy()
        expected = oracle.round_to_int8(expected, block_size(group_size))
        expected = torch.from_numpy(expected @ call.dense.T) + call.bias.cpu().double()
        # No element moves by more than half a step, and together they move as much as the definition's.
        steps = np.zeros_like(x)
        for start in range(0, x.shape[1], block_size(group_size)):
            part = slice(start, start + block_size(group_size))
            steps[:, part] = np.abs(x[:, part]).max(-1, keepdims=True) / 127
        bound = torch.from_numpy(steps / 2 @ np.abs(call.dense).T) + truth.abs() * torch.finfo(dtype).eps
        assert ((out - truth).abs() <= bound * 1.01 + rounding(call)).all()
        ours, definition = ((y - truth).square().mean().sqrt() for y in (out, expected))
        assert ours <= 1.3 * definition + truth.abs().max() * torch.finfo(dtype).eps


def test_a8_is_exact_for_integers(backend: Backend) -> None:
    """Where 127 occurs in every 16 columns any block has the step 1, and nothing is rounded."""
    for dtype in dtypes(backend):
        for act_order in (None, "shuffled"):
            case = Case(rows=(5,), in_features=96, group_size=32, zeros="int", bias="float32", act_order=act_order)
            call = make(case.replace(dtype=dtype, scale_dtype=F32), backend.device)
            g = torch.Generator().manual_seed(1)
            x = torch.randint(-127, 128, call.x.shape, generator=g)
            x[:, ::2] = 127
            call.x = x.to(call.x)
            check_values(call, run(backend, call, "a8"))


# ---- rows, runs, layouts: to the bit ----


@pytest.mark.parametrize("mode", ["exact", "a8"])
def test_a_row_does_not_depend_on_the_others(backend: Backend, mode: str) -> None:
    counts = (1, 5, 9, 17) if backend.slow else (1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 33, 64, 65, 100)
    width = 80 if backend.slow else 150
    for dtype in dtypes(backend)[-1:] if backend.slow else dtypes(backend):
        for zeros, act_order in ((None, None), ("int", "unequal"), ("float", None))[backend.slow :]:
            case = Case(rows=(max(counts),), out_features=35, in_features=width, zeros=zeros, act_order=act_order)
            call = make(case.replace(dtype=dtype, bias="same", group_size=64), backend.device)
            whole = run(backend, call, mode)
            for count in counts:
                for start in {0, max(counts) - count}:
                    part = Call(call.x[start : start + count], call.weight, call.bias, call.dense)
                    assert_bitwise(f"{count} rows", run(backend, part, mode), whole[start : start + count])


@pytest.mark.parametrize("mode", ["exact", "a8", "fast"])
def test_runs_agree(backend: Backend, mode: str) -> None:
    for dtype in dtypes(backend):
        call = make(Case(rows=(7,), in_features=200, zeros="int", dtype=dtype), backend.device)
        assert_bitwise("second run", run(backend, call, mode), run(backend, call, mode))


def test_layout_changes_nothing(backend: Backend) -> None:
    for dtype in dtypes(backend)[-1:] if backend.slow else dtypes(backend):
        case = Case(rows=(2, 5), dtype=dtype, zeros="int")
        expected = run(backend, make(case, backend.device))
        for layout in ("transposed", "sliced", "misaligned", "strided"):
            assert_bitwise(layout, run(backend, make(case.replace(layout=layout), backend.device)), expected)


def test_packed_tensors_may_begin_anywhere(backend: Backend) -> None:
    for op, calls in samples(backend.device, backend.name).items():
        for positional, keywords in calls:
            expected = backend(op, *positional.values(), **keywords)
            moved = {name: None if x is None else lay_out(x, "misaligned") for name, x in positional.items()}
            assert_bitwise(op, backend(op, *moved.values(), **keywords), expected)


def test_triton_copies_nothing_from_the_host() -> None:
    """Neither where there is nothing to multiply: a copy waits, and cannot be captured in a graph."""
    triton_kernels = pytest.importorskip("torch_kernels.int4_linear.triton_kernels")

    class OneDevice(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert all(x.is_meta for x in tree_leaves(args) if isinstance(x, torch.Tensor)), func
            return func(*args, **(kwargs or {}))

    x, weight, scales, out = (torch.empty(size, device="meta") for size in ((2, 0), (1, 0, 2, 32, 4), (1, 3), (2, 3)))
    for bias in (None, scales[0]):
        with OneDevice():
            triton_kernels.int4_linear(out, x, weight, scales, None, None, bias, 3, -1, "exact")


def test_number_of_threads_changes_nothing(backend: Backend) -> None:
    if backend.name != "cpu":
        pytest.skip("only the CPU kernels have threads of their own")
    for mode in ("exact", "a8"):
        for rows in (1, 70):
            call = make(Case(rows=(rows,), out_features=300, in_features=500, group_size=128, zeros="int"))
            expected = run(backend, call, mode)
            torch.set_num_threads(3)
            try:
                assert_bitwise("three threads", run(backend, call, mode), expected)
            finally:
                torch.set_num_threads(1)


def test_autocast(backend: Backend) -> None:
    low = F16 if F16 in backend.dtypes and backend.device == "cuda" else BF16
    if low not in backend.dtypes:
        pytest.skip("no such dtype here")
    call = make(Case(rows=(3,), bias="same"), backend.device)
    x = call.x.clone().requires_grad_()
    with backend.forced(), torch.autocast(backend.device, dtype=low):
        out = torch_kernels.int4_linear(x, call.weight, call.bias)
    assert out.dtype == low
    call.x = call.x.to(low)
    assert_bitwise("out", out, run(backend, call))
    with backend.forced():
        out.float().sum().backward()
    assert x.grad.dtype == F32
