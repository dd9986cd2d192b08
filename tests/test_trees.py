# SPDX-License-Identifier: Apache-2.0
"""Building trees: from_choices, from_scores, add_chains, draw."""

from __future__ import annotations

import doctest
import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_kernels import trees

from .strategies import PUBLISHED, grow, published, seeds

NAN = float("nan")


def test_examples_in_the_documentation() -> None:
    assert doctest.testmod(trees).attempted >= 3 and doctest.testmod(trees).failed == 0


def choices_of(parents: list[int]) -> list[list[int]]:
    """The rank paths of a tree whose siblings are ranked in order."""
    paths: list[list[int]] = [[]]
    count = dict.fromkeys(range(len(parents)), 0)
    for parent in parents[1:]:
        paths.append([*paths[parent], count[parent]])
        count[parent] += 1
    return paths[1:]


@pytest.mark.parametrize("name", PUBLISHED)
def test_from_choices_rebuilds_published_trees(name: str) -> None:
    parents = published(name)
    choices = choices_of(parents)
    random.Random(0).shuffle(choices)
    built = trees.from_choices(choices)
    assert built.dtype == torch.int32 and built.tolist() == parents


@given(nodes=st.integers(1, 40), seed=seeds)
def test_from_choices_is_breadth_first(nodes: int, seed: int) -> None:
    choices = choices_of(grow("random", nodes, seed))
    parents = trees.from_choices(choices).tolist()
    ordered = [()] + sorted(map(tuple, choices), key=lambda c: (len(c), c))
    assert parents == [-1] + [ordered.index(c[:-1]) for c in ordered[1:]]


def test_from_choices_without_choices_is_the_root() -> None:
    assert trees.from_choices([]).tolist() == [-1]
    assert trees.from_choices([(0,), (7,)]).tolist() == [-1, 0, 0]  # ranks need not be dense


@pytest.mark.parametrize("choices", [[[0, 0]], [[0], [1, 0]], [[0], [0]], [[]], [[-1]], [[0.5]], [[0], [0, 1, 2]]])
def test_from_choices_refuses(choices: list) -> None:
    with pytest.raises(ValueError, match="from_choices"):
        trees.from_choices(choices)


def best_first(scores: list[float], parent: list[int], num_nodes: int) -> set[int]:
    """Grow the tree one node at a time: the best candidate whose parent is in it already."""
    clean = [-math.inf if math.isnan(s) else s for s in scores]
    chosen: set[int] = set()
    while len(chosen) < num_nodes - 1:
        frontier = [
            i
            for i in range(len(scores))
            if i not in chosen and parent[i] != -2 and (parent[i] == -1 or parent[i] in chosen)
        ]
        if not frontier:
            break
        chosen.add(max(frontier, key=lambda i: (clean[i], -i)))
    return chosen


def pool(seed: int, size: int, kind: str) -> tuple[list[float], list[int]]:
    """Cumulative log-probabilities along random parents; ``ties`` rounds them, ``wild`` breaks all their rules."""
    rng = random.Random(seed)
    parent = [rng.choice([-1, *range(i)]) for i in range(size)]
    scores: list[float] = []
    for i in range(size):
        step = -rng.random() if kind == "strict" else -float(rng.randint(0, 1))
        scores.append((scores[parent[i]] if parent[i] >= 0 else 0.0) + step)
    if kind == "wild":
        parent = [p if rng.random() < 0.9 else -2 for p in parent]
        scores = [rng.choice([s, rng.gauss(0, 3), NAN, math.inf, -math.inf, 0.0]) for s in scores]
    return scores, parent


@given(
    kind=st.sampled_from(["strict", "ties", "wild"]), size=st.integers(0, 40), num_nodes=st.integers(1, 45), seed=seeds
)
def test_from_scores(kind: str, size: int, num_nodes: int, seed: int) -> None:
    rows = [pool(seed + b, size, kind) for b in range(3)]
    scores = torch.tensor([r[0] for r in rows]).reshape(3, size)
    parent_index = torch.tensor([r[1] for r in rows], dtype=torch.int64).reshape(3, size)
    parents, selected = trees.from_scores(scores, parent_index, num_nodes)
    assert parents.dtype == selected.dtype == torch.int32 and parents.shape == selected.shape == (3, num_nodes)
    for b in range(3):
        p, s = parents[b].tolist(), selected[b].tolist()
        count = sum(x != -2 for x in s)
        assert p[0] == s[0] == -1 and p[count:] == s[count:] == [-2] * (num_nodes - count)
        chosen = s[1:count]
        assert chosen == sorted(set(chosen)) and all(0 <= x < size for x in chosen)
        # The tree's edges are the pool's edges, so every chosen node's parent is chosen too.
        assert [s[x] for x in p[1:count]] == [rows[b][1][x] for x in chosen]
        expected = best_first(*rows[b], num_nodes)
        assert len(chosen) == len(expected)
        if kind == "strict":
            assert set(chosen) == expected == set(sorted(range(size), key=lambda i: -rows[b][0][i])[: num_nodes - 1])
    alone, _ = trees.from_scores(scores[1:2], parent_index[1:2], num_nodes)
    assert torch.equal(alone, parents[1:2])


def test_from_scores_breaks_ties_by_pool_index_and_puts_nan_last() -> None:
    scores = torch.tensor([[0.0, 0.0, NAN, 0.0, -9.0]])
    parent_index = torch.tensor([[-1, -1, -1, 0, 2]])
    assert trees.from_scores(scores, parent_index, 3)[1].tolist() == [[-1, 0, 1]]
    assert trees.from_scores(scores, parent_index, 4)[1].tolist() == [[-1, 0, 1, 3]]
    # The child of a NaN ranks with it, behind its parent.
    assert trees.from_scores(scores, parent_index, 5)[1].tolist() == [[-1, 0, 1, 2, 3]]


def test_from_scores_on_the_pool_of_eagle() -> None:
    # top-10, depth 7: 10 + 7 * 100 candidates, of which 59 join the root.
    generator = torch.Generator().manual_seed(0)
    parent_index = torch.full((2, 710), -1)
    for level in range(7):
        first = 10 + level * 100
        parent_index[:, first : first + 100] = (first - 100 if level else 0) + torch.arange(10).repeat_interleave(10)
    logs = torch.rand(2, 710, generator=generator).log()
    scores = logs.clone()
    for i in range(10, 710):
        scores[:, i] += scores.gather(1, parent_index[:, i : i + 1])[:, 0]
    parents, selected = trees.from_scores(scores, parent_index, 60)
    for b in range(2):
        assert set(selected[b, 1:].tolist()) == set(scores[b].topk(59).indices.tolist())
    assert (parents[:, 1:] < torch.arange(1, 60)).all() and (parents[:, 1:] >= 0).all()


@pytest.mark.parametrize(
    ("scores", "parent_index", "num_nodes"),
    [([[0.0]], [[-1, -1]], 2), ([0.0], [-1], 2), ([[0.0]], [[0]], 2), ([[0.0]], [[-3]], 2), ([[0.0]], [[-1]], 0)],
)
def test_from_scores_refuses(scores: list, parent_index: list, num_nodes: int) -> None:
    with pytest.raises(ValueError, match="from_scores"):
        trees.from_scores(torch.tensor(scores), torch.tensor(parent_index), num_nodes)


@given(nodes=st.integers(0, 20), batch=st.integers(0, 3), seed=seeds)
def test_add_chains(nodes: int, batch: int, seed: int) -> None:
    rng = random.Random(seed)
    rows = [grow("padded", nodes, seed + b) for b in range(batch)]
    lengths = [[0 if p == -2 else rng.randint(0, 3) for p in row] for row in rows]
    grown = trees.add_chains(
        torch.tensor(rows, dtype=torch.int32).reshape(batch, nodes), torch.tensor(lengths).reshape(batch, nodes).long()
    )
    for row, length, result in itertools.zip_longest(rows, lengths, grown.tolist()):
        expected = list(row)
        for node, count in enumerate(length):
            for _ in range(count):
                expected.append(node)
                node = len(expected) - 1
        assert result == expected + [-2] * (len(result) - len(expected))
    assert grown.shape[1] == max((nodes + sum(length) for length in lengths), default=nodes)


def test_add_chains_makes_the_published_ppd_shape() -> None:
    grown = trees.add_chains(torch.tensor([-1, 0, 0]), [3, 1, 2])
    assert grown.tolist() == [-1, 0, 0, 0, 3, 4, 1, 2, 7]


@pytest.mark.parametrize(
    ("parents", "lengths"), [([-1, 0], [1]), ([-1, -2], [0, 1]), ([-1, 0], [0, -1]), ([-1, 1], [0, 0])]
)
def test_add_chains_refuses(parents: list[int], lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="add_chains"):
        trees.add_chains(torch.tensor(parents), lengths)


@given(nodes=st.integers(0, 40), kind=st.sampled_from(["random", "chain", "star", "padded"]), seed=seeds)
def test_draw_shows_every_node_once_below_its_parent(nodes: int, kind: str, seed: int) -> None:
    parents = grow(kind, nodes, seed)
    accepted = [i for i in range(nodes) if parents[i] != -2][:3] + [-1]
    lines = trees.draw(parents, accepted).splitlines()
    trail: list[int] = []
    seen = []
    for line in lines:
        if line.startswith("padding: "):
            assert list(map(int, line.split()[1:])) == [i for i in range(nodes) if parents[i] == -2]
            continue
        label = line.lstrip("│├└─ ")
        depth = (len(line) - len(label)) // 3
        node = int(label.split()[0])
        assert ("●" in label) == (node in accepted)
        trail = [*trail[:depth], node]
        assert parents[node] == (trail[-2] if depth else -1)
        seen.append(node)
    assert sorted(seen) == [i for i in range(nodes) if parents[i] != -2]


def test_draw_a_batch_and_a_deep_chain() -> None:
    assert trees.draw(torch.tensor([[-1, 0], [-1, -1]])) == "0\n└─ 1\n\n0\n1"
    assert len(trees.draw([-1, *range(1023)]).splitlines()) == 1024
    with pytest.raises(ValueError, match="draw"):
        trees.draw([0, 1])
