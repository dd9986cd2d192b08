# SPDX-License-Identifier: Apache-2.0
"""Which columns cells own, as lists (sea_csr) and as maps (sea_stretch)."""

from __future__ import annotations

import pytest
import torch
import torch_kernels
from torch import Tensor

from ..backends import F16, F32, F64, Backend, need, serves, unchecked
from ..guards import Guards
from ..strategies import lay_out
from ..tolerance import assert_accurate, assert_bitwise
from . import oracle
from .cases import make_widths

I32, I64 = torch.int32, torch.int64


def random_cells(batch: int, rows: int, heads: int, num_cells: int, kept: float, seed: int = 0) -> Tensor:
    bits = torch.rand(batch, rows, heads * num_cells, generator=torch.Generator().manual_seed(seed)) < kept
    return oracle.bitset([[row.nonzero().flatten().tolist() for row in b] for b in bits], heads, num_cells)


def csr(backend: Backend, cells: Tensor, widths: Tensor, heads: int, num_cells: int, limit: int = 0) -> list[list[int]]:
    """The columns of each row and head."""
    keywords = {"num_heads": heads, "num_cells": num_cells, "max_columns_per_cell": limit}
    crow, col = backend("sea_csr", cells.to(backend.device), widths.to(backend.device), **keywords)
    assert crow.dtype == col.dtype == I32
    assert crow.shape == (cells.shape[0] * cells.shape[1] * heads + 1,) and crow[0] == 0 and crow[-1] == len(col)
    ends = crow.tolist()
    return [col[begin:end].tolist() for begin, end in zip(ends, ends[1:])]


@pytest.mark.parametrize("limit", [0, 1, 2, 5])
def test_columns(backend: Backend, limit: int) -> None:
    """Exactly those of the column view, ascending."""
    need(backend, "sea_csr")
    for heads, num_cells, keys in [(2, 4, 6), (3, 17, 40), (1, 64, 300)][: 2 if backend.slow else 3]:
        for kept in (0.3, 1.0):
            cells = random_cells(2, 5, heads, num_cells, kept)
            widths = make_widths("any", 2, 5, keys, seed=heads)
            mask = oracle.visible(cells, widths, heads, num_cells, keys, limit)
            expected = [row.nonzero().flatten().tolist() for row in mask.transpose(1, 2).flatten(0, 2)]
            assert csr(backend, cells, widths, heads, num_cells, limit) == expected


def test_worked_example(backend: Backend) -> None:
    """K = 4, w = 6: boundaries 0, 2, 3, 5, 6."""
    need(backend, "sea_csr")
    cells = torch.tensor([[[1 << m] for m in range(4)]], dtype=I32)
    assert csr(backend, cells, torch.full((1, 4), 6), 1, 4) == [[0, 1], [2], [3, 4], [5]]


@pytest.mark.parametrize("num_cells", [64, 100, 128, 256])
def test_cells_own_every_column_once(backend: Backend, num_cells: int) -> None:
    need(backend, "sea_csr")
    widths = torch.tensor([[*range(8), 63, 100, 257] if backend.slow else [*range(0, 1100, 7), 4095, 32768, 131072]])
    cells = torch.full((1, widths.shape[1], -(-num_cells // 32)), -1, dtype=I32)
    for width, columns in zip(widths[0].tolist(), csr(backend, cells, widths, 1, num_cells)):
        assert columns == list(range(width))


def test_long_rows_are_exact(backend: Backend) -> None:
    """2**31 - 1 keys, of which each cell keeps its last: v_(m+1) - 1."""
    if backend.name != "cpu":
        pytest.skip("the others count in the tensors' sizes")
    width, num_cells = 2**31 - 1, 100
    columns = csr(backend, random_cells(1, 1, 1, num_cells, 1.0), torch.tensor([[width]]), 1, num_cells, 1)
    assert columns == [[oracle.boundary(m + 1, width, num_cells) - 1 for m in range(num_cells)]]
    with pytest.raises(ValueError, match="sea_csr: widths"):
        csr(backend, random_cells(1, 2, 1, num_cells, 1.0), torch.tensor([[width, width]]), 1, num_cells)


def test_bits_beyond_the_last_cell_mean_nothing(backend: Backend) -> None:
    need(backend, "sea_csr")
    cells = torch.full((1, 1, 1), -1, dtype=I32)
    assert csr(backend, cells, torch.tensor([[9]]), 2, 3) == [list(range(9))] * 2


def test_no_rows(backend: Backend) -> None:
    need(backend, "sea_csr")
    assert csr(backend, torch.zeros(0, 3, 1, dtype=I32), torch.zeros(0, 3, dtype=I64), 2, 4) == []
    assert csr(backend, torch.zeros(2, 0, 1, dtype=I32), torch.zeros(2, 0, dtype=I64), 2, 4) == []


# ---- maps ----


def stretched(x: Tensor, widths: Tensor, length: int, fill: float) -> Tensor:
    out = x.new_full((*x.shape[:3], length), fill)
    for b, of_rows in enumerate(widths.tolist()):
        for i, width in enumerate(of_rows):
            if width > 0:
                out[b, :, i, :width] = x[b, :, i, oracle.kept_cells(width, x.shape[3], 0)]
    return out


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_stretch(backend: Backend, layout: str) -> None:
    need(backend, "sea_stretch")
    for num_cells, length, kind in [(4, 6, "causal"), (17, 40, "any"), (64, 30, "padded"), (3, 0, "full")]:
        for dtype in backend.dtypes:
            rows = min(5, length)
            x = torch.randn(2, 3, rows, num_cells, generator=torch.Generator().manual_seed(1)).to(dtype)
            widths = make_widths(kind, 2, rows, length, seed=2)
            args = [lay_out(t.to(backend.device), layout) for t in (x, widths)]
            for fill in (0.0, -7.5):
                out = backend("sea_stretch", *args, length=length, fill=fill)
                assert_bitwise("out", out, stretched(x, widths, length, fill))


def test_stretch_keeps_what_is_not_finite_where_it_is(backend: Backend) -> None:
    need(backend, "sea_stretch")
    x = torch.tensor([float("nan"), 1.0, float("inf"), -0.0], device=backend.device).view(1, 1, 1, 4)
    widths = torch.tensor([[6]], device=backend.device)
    expected = x[..., [0, 0, 1, 2, 2, 3]].cpu()
    assert_bitwise("out", backend("sea_stretch", x, widths, length=8, fill=5.0)[..., :6], expected)


def test_stretch_backward(backend: Backend) -> None:
    """Each cell's sum over its columns; what the fill covers, NaN too, has no influence."""
    need(backend, "sea_stretch_backward")
    for dtype in backend.dtypes:
        for num_cells, length in [(4, 40), (16, 9)]:
            generator = torch.Generator().manual_seed(3)
            grad = torch.randn(2, 3, 5, length, generator=generator).to(dtype)
            widths = make_widths("any", 2, 5, length, seed=4)
            grad = torch.where(torch.arange(length) < widths[:, None, :, None], grad, float("nan"))
            x = torch.zeros(2, 3, 5, num_cells, dtype=F64, requires_grad=True)
            (truth,) = torch.autograd.grad(stretched(x, widths, length, 0.0), x, grad.double().nan_to_num(0.0))
            on = grad.to(backend.device), widths.to(backend.device)
            assert_accurate("gradient", backend("sea_stretch_backward", *on, num_cells=num_cells), truth)


def test_gradcheck() -> None:
    x = torch.randn(1, 2, 3, 4, dtype=F64, requires_grad=True)
    widths = torch.tensor([[5, 0, 3]])
    assert torch.autograd.gradcheck(lambda x: torch_kernels.sea_stretch(x, widths, length=5, fill=2.0), (x,))


# ---- garbage ----


@pytest.mark.parametrize("width", [2**31 - 1, -(2**31), 2**40, -(2**62), 2**62])
def test_garbage_widths_stay_inside(backend: Backend, width: int) -> None:
    """Unchecked, they count as the number of keys."""
    dtype = I32 if abs(width) <= 2**31 else I64
    if dtype == I64 and backend.name == "triton":
        width %= 2**31
    widths = torch.tensor([[width, 3]], dtype=dtype, device=backend.device)
    likely = torch.tensor([[6 if width > 0 else 0, 3]], device=backend.device)
    x = torch.randn(1, 2, 2, 4, device=backend.device)
    q, k = torch.randn(1, 2, 2, 8, device=backend.device), torch.randn(1, 6, 2, 8, device=backend.device)
    cells = random_cells(1, 2, 2, 4, 0.6).to(backend.device)
    calls = {
        "sea_stretch": lambda w: backend("sea_stretch", x, w, length=6),
        "sea_stretch_backward": lambda w: backend(
            "sea_stretch_backward", x.repeat(1, 1, 1, 2)[..., :6], w, num_cells=4
        ),
        "sea_attention": lambda w: backend("sea_attention", q, k, k, cells, w, num_cells=4)[0],
    }
    for op, call in calls.items():
        if serves(backend, op):
            guards = Guards()
            with unchecked(op), guards.allocations():
                assert_bitwise(op, call(widths), call(likely))
            guards.check()


@pytest.mark.parametrize("dtype", [F32, F16])
def test_selecting_with_any_width_ends(backend: Backend, dtype: torch.dtype) -> None:
    need(backend, "sea_select")
    widths = torch.tensor([[2**62, -(2**62), 2**31, 1]], device=backend.device)
    cells = backend("sea_select", torch.randn(1, 2, 4, 8).to(dtype).to(backend.device), widths, k=3.0)
    assert [bin(word & 0xFFFFFFFF).count("1") for word in cells.flatten().tolist()] == [1, 0, 1, 16]
