# SPDX-License-Identifier: Apache-2.0
"""Which cells rows keep: exactly, in number and in the order of ties."""

from __future__ import annotations

import math

import pytest
import torch
import torch_kernels
from hypothesis import strategies as st
from torch import Tensor

from ..backends import F32, Backend, for_all, need
from ..strategies import LAYOUTS, lay_out, seeds
from ..tolerance import assert_bitwise
from . import oracle
from .cases import make_widths


@pytest.fixture(autouse=True)
def serving(backend: Backend) -> None:
    need(backend, "sea_select")


def check(backend: Backend, scores: Tensor, widths: Tensor, k: float) -> list[list[list[int]]]:
    """What is chosen, which is what the oracle chooses."""
    cells = backend("sea_select", scores, widths, k=k)
    chosen = oracle.select(scores.cpu(), widths.cpu(), k)
    assert_bitwise("cells", cells, oracle.bitset(chosen, scores.shape[1], scores.shape[3]).view(cells.shape))
    return chosen


def scores_of(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "distinct":
        return torch.randn(shape, generator=generator)
    values = {
        "ties": [0.0, -0.0, 1.0, 1.5, -2.0],
        "specials": [math.nan, -math.inf, math.inf, 0.0, -0.0, 1e-45, -1e-45, -3e38],
        "equal": [0.25],
        "lost": [math.nan, -math.inf],
    }[kind]
    return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]


@for_all(data=st.data(), examples=15)
def test_matches_sorting(backend: Backend, data: st.DataObject) -> None:
    draw = data.draw
    heads, rows = draw(st.integers(1, 3 if backend.slow else 12)), draw(st.integers(0, 2))
    num_cells = draw(st.sampled_from([1, 8, 33] if backend.slow else [1, 7, 32, 100]))
    shape = (draw(st.integers(0, 2)), heads, rows, num_cells)
    scores = scores_of(draw(st.sampled_from(["distinct", "ties", "specials", "equal", "lost"])), shape, draw(seeds))
    scores = scores.to(draw(st.sampled_from(backend.dtypes)))
    widths = make_widths("any", shape[0], rows, draw(st.sampled_from([1, 20, 300, 8192])), draw(seeds))
    layout = draw(st.sampled_from(LAYOUTS))
    widths = widths.to(draw(st.sampled_from([torch.int32, torch.int64])))
    check(
        backend,
        lay_out(scores.to(backend.device), layout),
        widths.to(backend.device),
        draw(st.sampled_from([0.0, 0.1, 1.0, 2.5, 7.0, 64.0, 1e9])),
    )


def test_budget_rounds_half_to_even(backend: Backend) -> None:
    """H K k / w of 0.5, 1.5, 2.5, 3.5 and so on."""
    scores = torch.randn(1, 2, 8, 16, device=backend.device)
    widths = torch.tensor([[64, 64, 64, 64, 32, 32, 1, 0]], device=backend.device)
    for k in (1.0, 3.0, 5.0, 7.0):
        chosen = check(backend, scores, widths, k)
        assert len(chosen[0][0]) == max(1, round(32 * k / 64)) and len(chosen[0][-1]) == 0


def test_ties_go_to_the_smaller_index_across_heads(backend: Backend) -> None:
    scores = torch.zeros(1, 3, 1, 16, device=backend.device)
    scores[0, 1, 0, ::2] = -0.0
    chosen = check(backend, scores, torch.tensor([[12]], device=backend.device), 5.0)
    assert chosen[0][0] == list(range(20))
    scores[0, 2, 0, 15] = 1.0
    assert check(backend, scores, torch.tensor([[12]], device=backend.device), 5.0)[0][0] == [*range(19), 47]


def test_one_head_may_take_everything(backend: Backend) -> None:
    """The rows' budget is shared by all heads."""
    heads, num_cells = 4, 16
    scores = torch.rand(1, heads, 1, num_cells, device=backend.device)
    scores[0, 2] += 10
    chosen = check(backend, scores, torch.tensor([[32]], device=backend.device), 8.0)
    assert chosen[0][0] == list(range(2 * num_cells, 3 * num_cells))


def test_many_cells(backend: Backend) -> None:
    """As many as a model has; few and most of them kept."""
    scores = torch.randn(1, 12, 4, 256, generator=torch.Generator().manual_seed(6)).to(backend.device)
    scores[0, :, 2] = scores[0, :, 2].round()
    check(backend, scores, torch.tensor([[8192, 2048, 300, 70]], device=backend.device), 64.0)


def test_rows_are_chosen_alone(backend: Backend) -> None:
    """The same bits whatever else is in the batch."""
    scores = torch.randn(3, 2, 5, 24, device=backend.device)
    widths = make_widths("any", 3, 5, 50, seed=1).to(backend.device)
    together = backend("sea_select", scores, widths, k=4.0)
    for b in range(3):
        for i in range(5):
            alone = backend("sea_select", scores[b : b + 1, :, i : i + 1], widths[b : b + 1, i : i + 1], k=4.0)
            assert_bitwise("cells", alone[0, 0], together[b, i])


def test_scores_may_require_grad(any_backend: Backend) -> None:
    scores = torch.randn(1, 1, 2, 8, dtype=F32, device=any_backend.device, requires_grad=True)
    widths = torch.tensor([[3, 4]], device=any_backend.device)
    assert not torch_kernels.sea_select(scores, widths, k=2).requires_grad
