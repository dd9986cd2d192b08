# SPDX-License-Identifier: Apache-2.0
"""SegmentGraph: constructors, positions, masks and pictures; and rope_shift against complex numbers."""

from __future__ import annotations

import doctest
import importlib

import numpy as np
import pytest
import torch
from torch_kernels import SegmentGraph

from ..backends import Backend
from ..tolerance import assert_accurate, assert_bitwise
from . import oracle


def test_edges_are_deduplicated_and_sorted() -> None:
    graph = SegmentGraph([2, 0, 3], [(2, 0), (0, 2), (1, 2), (0, 2)])
    assert graph.edges == ((2, 0), (0, 2), (1, 2))
    assert graph.edge_offsets.tolist() == [0, 1, 1, 3] and graph.edge_sources.tolist() == [2, 0, 1]
    assert graph.q_offsets.tolist() == graph.kv_offsets.tolist() == [0, 2, 2, 5]
    assert graph.own_segment.tolist() == [0, 1, 2]
    assert all(x.dtype == torch.int32 for x in graph.arguments)


def test_shapes_of_graphs() -> None:
    lengths = [3, 4, 5, 6]
    assert SegmentGraph.star(lengths).edges == ((0, 3), (1, 3), (2, 3))
    assert SegmentGraph.bipartite(lengths, 2).edges == ((0, 2), (1, 2), (0, 3), (1, 3))
    assert SegmentGraph.bipartite(lengths, 0).edges == SegmentGraph.bipartite(lengths, 4).edges == ()
    assert SegmentGraph.chain(lengths).edges == ((0, 1), (1, 2), (2, 3))
    assert SegmentGraph([], []).edges == SegmentGraph.star([]).edges == ()


def test_from_networkx() -> None:
    networkx = pytest.importorskip("networkx")
    graph = networkx.DiGraph([("b", "a"), ("c", "a"), ("a", "a")])
    made = SegmentGraph.from_networkx(graph, {"a": 2, "b": 3, "c": 4})
    assert made.lengths == (3, 2, 4) and made.edges == ((0, 1), (2, 1))
    assert SegmentGraph.from_networkx(networkx.path_graph(3), [1, 1, 1]).edges == ((1, 0), (0, 1), (2, 1), (1, 2))
    with pytest.raises(ValueError, match="lengths"):
        SegmentGraph.from_networkx(graph, [1])


@pytest.mark.parametrize(
    ("lengths", "edges", "culprit"),
    [([-1], [], "lengths"), ([1, 1], [(0, 2)], "edges"), ([1, 1], [(-1, 0)], "edges"), ([1, 1], [(1, 1)], "edges")],
)
def test_impossible_graphs(lengths: list[int], edges: list[tuple[int, int]], culprit: str) -> None:
    with pytest.raises(ValueError, match=culprit):
        SegmentGraph(lengths, edges)


def test_positions() -> None:
    graph = SegmentGraph([3, 5, 2, 4], [(0, 2), (1, 2), (2, 3), (0, 3)])
    assert graph.levels() == [0, 0, 1, 2]
    q_start, edge_start, own_start = graph.positions()
    assert q_start.tolist() == own_start.tolist() == [0, 0, 5, 7]
    assert edge_start.tolist() == [0, 0, 0, 5]
    q_start, edge_start, own_start = graph.positions(shared=False)
    assert q_start.tolist() == own_start.tolist() == [0, 3, 8, 10]
    assert edge_start.tolist() == [0, 3, 0, 8]
    cycle = SegmentGraph([1, 1, 1], [(0, 1), (1, 0)])
    with pytest.raises(ValueError, match=r"cycle among segments \[0, 1\]"):
        cycle.positions()
    assert cycle.positions(shared=False)[0].tolist() == [0, 1, 2]


def test_mask_and_picture() -> None:
    graph = SegmentGraph([2, 1, 2], [(0, 2), (2, 1)])
    assert graph.dense_mask().int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert graph.draw().splitlines() == ["  0 1 2", "0 ◣ · ·", "1 · ◣ ■", "2 ■ · ◣"]
    figures = pytest.importorskip("matplotlib.figure")
    axes = figures.Figure().subplots()
    assert graph.plot(axes) is axes and len(axes.patches) == 2 + 3


def test_examples_in_docstrings() -> None:
    module = importlib.import_module("torch_kernels.graph_attention.graph")
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [8, 40, 128, 256])
def test_rope_shift(backend: Backend, interleaved: bool, size: int) -> None:
    offsets, deltas = [2, 5, 5, 70, 90], [7, 1, -264_000, 264_000]
    inv_freq = 500_000.0 ** -(torch.arange(0, size, 2) / size)
    for dtype in backend.dtypes:
        for index in (torch.int32, torch.int64):
            k = torch.randn(93, 2, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64).to(dtype)
            out = backend(
                "rope_shift",
                *(x.to(backend.device) for x in (k, torch.tensor(offsets, dtype=index))),
                *(x.to(backend.device) for x in (torch.tensor(deltas, dtype=index), inv_freq)),
                interleaved=interleaved,
            ).cpu()
            expected = oracle.array(k)
            for begin, end, delta in zip(offsets, offsets[1:], deltas):
                place = np.full(end - begin, delta)
                expected[begin:end] = oracle.rotate(expected[begin:end], place, inv_freq, interleaved)
            for rows in (slice(0, 2), slice(90, 93)):
                assert_bitwise("rows of no segment", out[rows], k[rows])
            assert_accurate(
                "out",
                out,
                torch.from_numpy(expected),
                floor=torch.finfo(torch.float32).eps * 4 * (dtype != torch.float64),
            )
