# SPDX-License-Identifier: Apache-2.0
"""tree_mask and tree_positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from ..backends import Backend, for_all
from ..strategies import PUBLISHED, TREES, grow, lay_out, published, seeds
from . import oracle

SIZES = (0, 1, 2, 7, 31, 32, 33, 63, 64, 65, 97, 128)


@for_all(
    kind=st.sampled_from(TREES),
    nodes=st.sampled_from(SIZES),
    batch=st.integers(0, 3),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "misaligned", "strided"]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=seeds,
)
def test_mask_and_positions(
    backend: Backend, kind: str, nodes: int, batch: int, layout: str, dtype: torch.dtype, seed: int
) -> None:
    rows = [grow(kind, nodes, seed + b) for b in range(batch)]
    parents = lay_out(torch.tensor(rows, dtype=dtype).reshape(batch, nodes).to(backend.device), layout)
    prefix_lens = torch.arange(batch, dtype=dtype, device=backend.device) * 1000
    mask = backend("tree_mask", parents)
    positions = backend("tree_positions", parents, prefix_lens)
    assert mask.dtype == torch.bool and mask.shape == (batch, nodes, nodes)
    assert positions.dtype == torch.int32 and positions.shape == (batch, nodes)
    for b, row in enumerate(rows):
        ways = [oracle.way_up(row, i) for i in range(nodes)]
        assert [set(m.nonzero().flatten().tolist()) for m in mask[b].cpu()] == [set(way) for way in ways]
        assert positions[b].tolist() == [1000 * b + len(way) - 1 if way else 0 for way in ways]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_trees(backend: Backend, name: str) -> None:
    parents = torch.tensor([published(name)], dtype=torch.int32, device=backend.device)
    depth = backend("tree_positions", parents, torch.zeros(1, dtype=torch.int32, device=backend.device))[0].cpu()
    mask = backend("tree_mask", parents)[0].cpu()
    assert (mask.sum(1) == depth + 1).all() and mask[:, 0].all()
    if name == "medusa_mc_sim_7b_63":  # published: 10 heads' first candidates, at most four deep
        assert depth.max() == 4 and (depth == 1).sum() == 10


def test_a_thousand_nodes(backend: Backend) -> None:
    nodes = 100 if backend.slow else 1024
    parents = torch.arange(-1, nodes - 1, dtype=torch.int32, device=backend.device)[None]
    assert (backend("tree_mask", parents)[0].cpu() == torch.ones(nodes, nodes).tril().bool()).all()
    start = torch.tensor([7], dtype=torch.int32, device=backend.device)
    assert (backend("tree_positions", parents, start)[0].cpu() == torch.arange(7, nodes + 7)).all()
