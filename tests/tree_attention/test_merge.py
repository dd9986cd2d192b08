# SPDX-License-Identifier: Apache-2.0
"""merge_attention_states."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend, for_all
from ..strategies import lay_out, seeds
from ..tolerance import assert_accurate, assert_bitwise, ulp

SHAPES = [
    (2, 3, 4, 8),
    (5, 2, 16),
    (0, 2, 8),
    (1, 1, 1, 1),
    (2, 0, 3, 8),
    (3, 2, 7, 5, 40),
    (33, 8, 128),
    (2, 65, 3, 96),
]
LAYOUTS = ("contiguous", "transposed", "sliced", "misaligned", "strided")


def states(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """An out ``[.., T, H, Dv]`` and its lse ``[.., H, T]``; one in five saw nothing, and its out is NaN."""
    generator = torch.Generator().manual_seed(seed)
    *lead, rows, heads, _ = shape
    out = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    lse = 5 * torch.randn(*lead, heads, rows, generator=generator)
    lse[torch.rand(lse.shape, generator=generator) < 0.2] = -math.inf
    out[(lse == -math.inf).transpose(-1, -2)] = math.nan
    return out, lse


def truth(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Weights by ordinary logic, element by element."""
    out = np.zeros(out_a.shape)
    lse = np.full(lse_a.shape, -np.inf)
    a, b, la, lb = (x.double().numpy() for x in (out_a, out_b, lse_a, lse_b))
    for index in np.ndindex(*lse.shape):
        place = (*index[:-2], index[-1], index[-2])
        parts = [(v[place], s[index]) for v, s in ((a, la), (b, lb)) if s[index] != -np.inf]
        if parts:
            top = max(s for _, s in parts)
            total = sum(math.exp(s - top) for _, s in parts)
            lse[index] = top + math.log(total)
            out[place] = sum(v * (math.exp(s - top) / total) for v, s in parts)
    return torch.from_numpy(out), torch.from_numpy(lse)


@for_all(data=st.data(), shape=st.sampled_from(SHAPES), layout=st.sampled_from(LAYOUTS), seed=seeds)
def test_matches_truth(backend: Backend, data: st.DataObject, shape: tuple[int, ...], layout: str, seed: int) -> None:
    dtype = data.draw(st.sampled_from(backend.dtypes))
    a, b = states(shape, dtype, seed), states(shape, dtype, seed + 1)
    out, lse = backend("merge_attention_states", *(lay_out(x.to(backend.device), layout) for x in (*a, *b)))
    assert out.dtype == dtype and lse.dtype == torch.float32
    true_out, true_lse = truth(*a, *b)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    assert_accurate("out", out, true_out, floor=2 * ulp(16.0, accumulate))
    assert_accurate("lse", lse, true_lse, floor=2 * ulp(16.0, torch.float32))


def test_one_side_empty_returns_the_other_exactly(backend: Backend) -> None:
    for dtype in backend.dtypes:
        out, lse = (x.to(backend.device) for x in states((3, 5, 2, 16), dtype, 0))
        lse = lse.nan_to_num(neginf=0.5)
        out = out.nan_to_num(1.0)
        nothing = torch.full_like(out, math.nan), torch.full_like(lse, -math.inf)
        for got_out, got_lse in (
            backend("merge_attention_states", out, lse, *nothing),
            backend("merge_attention_states", *nothing, out, lse),
        ):
            assert_bitwise("out", got_out, out)
            assert_bitwise("lse", got_lse, lse)
        empty_out, empty_lse = backend("merge_attention_states", *nothing, *nothing)
        assert (empty_out == 0).all() and (empty_lse == -math.inf).all()


@for_all(seed=seeds)
def test_order_does_not_matter(backend: Backend, seed: int) -> None:
    a, b = ([x.to(backend.device) for x in states((2, 5, 3, 16), torch.float32, seed + i)] for i in (0, 1))
    ab, ba = backend("merge_attention_states", *a, *b), backend("merge_attention_states", *b, *a)
    torch.testing.assert_close(ab[0], ba[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ab[1], ba[1], rtol=1e-6, atol=1e-6)


def test_far_apart_states_do_not_overflow(backend: Backend) -> None:
    out = torch.ones(1, 1, 1, 8, device=backend.device)
    for high, low in ((1e4, -1e4), (3e38, -3e38), (88.0, -88.0)):
        lse = torch.full((1, 1, 1), high, device=backend.device)
        got, got_lse = backend("merge_attention_states", 3 * out, lse, out, torch.full_like(lse, low))
        assert_bitwise("out", got, 3 * out)
        assert_bitwise("lse", got_lse, lse)
