# SPDX-License-Identifier: Apache-2.0
"""Garbage in index tensors that nobody checked: calls end, and touch nothing outside their tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend, for_all, unchecked
from ..guards import Guards
from ..strategies import seeds
from ..tolerance import assert_bitwise

EXTREMES = torch.tensor(
    [-(2**31), -(2**30), -1000, -3, -2, -1, 0, 1, 2, 3, 5, 7, 8, 100, 1000, 2**20, 2**30, 2**31 - 1]
)


@pytest.fixture(autouse=True)
def compiled_only(backend: Backend) -> None:
    if backend.name == "cpu":
        pytest.skip("on the CPU indices are always checked")


class Garbage:
    def __init__(self, backend: Backend, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.guards = Guards()
        self.device = backend.device

    def indices(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Small numbers and extremes, mixed."""
        small = torch.randint(-3, 10, shape, generator=self.generator)
        wild = EXTREMES[torch.randint(0, len(EXTREMES), shape, generator=self.generator)]
        use_wild = torch.rand(shape, generator=self.generator) < 0.4
        return self.guards.copy(torch.where(use_wild, wild, small).to(dtype).to(self.device))

    def numbers(self, *shape: int) -> Tensor:
        return self.guards.copy(torch.randn(*shape, generator=self.generator).to(self.device))


shared = {"seed": seeds, "paged": st.booleans(), "dtype": st.sampled_from([torch.int32, torch.int64])}


@for_all(**shared, own_keys=st.booleans(), window=st.sampled_from([0, 3]))
def test_attention(backend: Backend, seed: int, paged: bool, dtype: torch.dtype, own_keys: bool, window: int) -> None:
    g = Garbage(backend, seed)
    batch, nodes, slots = 2, 7, 12
    cache = (5, 4) if paged else (batch, slots)
    args = [g.numbers(batch, nodes, 4, 16), g.numbers(*cache, 2, 16), g.numbers(*cache, 2, 8)]
    args += [g.indices(batch, dtype=dtype), g.indices(batch, nodes, dtype=dtype)]
    options = {"window": window}
    if own_keys:
        options |= {"k_tree": g.numbers(batch, nodes, 2, 16), "v_tree": g.numbers(batch, nodes, 2, 8)}
    if paged:
        options["block_table"] = g.indices(batch, 3, dtype=dtype)
    with unchecked("tree_attention"), g.guards.allocations():
        out, lse = backend("tree_attention", *args, **options)
    g.guards.check()
    # All numbers inside the tensors are finite and all around them NaN: a NaN here was read outside.
    assert out.isfinite().all() and not lse.isnan().any()


@for_all(**shared)
def test_structure(backend: Backend, seed: int, paged: bool, dtype: torch.dtype) -> None:
    g = Garbage(backend, seed)
    parents, prefix_lens = g.indices(3, 33, dtype=dtype), g.indices(3, dtype=dtype)
    with unchecked("tree_mask"), unchecked("tree_positions"), g.guards.allocations():
        mask = backend("tree_mask", parents)
        backend("tree_positions", parents, prefix_lens)
    g.guards.check()
    assert not mask.triu(1).any(), "a node sees a later one"


@for_all(**shared, sampled=st.booleans())
def test_verification(backend: Backend, seed: int, paged: bool, dtype: torch.dtype, sampled: bool) -> None:
    g = Garbage(backend, seed)
    batch, nodes, vocabulary = 3, 9, 11
    draft, target, parents = (g.indices(batch, nodes, dtype=dtype) for _ in range(3))
    parents[0, 0] = parents[1, 0] = -1
    numbers = g.guards.copy(g.numbers(batch, nodes, vocabulary).softmax(-1))
    uniforms = g.guards.copy(g.numbers(batch, nodes + 1) * 3)  # not even in [0, 1)
    ops = ("tree_verify_greedy", "tree_verify_typical", "tree_verify_sampling")
    with unchecked(ops[0]), unchecked(ops[1]), unchecked(ops[2]), g.guards.allocations():
        results = [
            backend(ops[0], draft, target, parents),
            backend(ops[1], draft, numbers, parents, temperature=1.0, epsilon=0.1, delta=0.1,
                    uniforms=uniforms if sampled else None),
            backend(ops[2], draft, numbers, parents, uniforms),
            backend(ops[2], draft, numbers, parents, uniforms, draft_probs=numbers, replacement=sampled),
        ]  # fmt: skip
    g.guards.check()
    for kind, (path, num_accepted, tokens) in enumerate(results):
        assert ((path >= -1) & (path < nodes)).all() and ((num_accepted >= 0) & (num_accepted < nodes)).all()
        assert (path[2] == -1).all() or parents[2, 0] == -1
        if kind:
            assert ((tokens >= -1) & (tokens < vocabulary)).all()


@for_all(seed=seeds)
def test_senseless_probabilities(backend: Backend, seed: int) -> None:
    # NaN, infinities, negative and all-zero distributions: tokens stay in the vocabulary or are -1.
    g = Garbage(backend, seed)
    batch, nodes, vocabulary = 4, 5, 7
    numbers = g.numbers(batch, nodes, vocabulary)
    numbers[0] = float("nan")
    numbers[1] = 0.0
    numbers[2, :, ::2] = float("inf")
    draft = g.indices(batch, nodes, dtype=torch.int64)
    parents = torch.tensor([[-1, 0, 0, 1, 2]] * batch, dtype=torch.int32, device=backend.device)
    uniforms = torch.rand(batch, nodes + 1, generator=g.generator).to(backend.device)
    for result in (
        backend("tree_verify_sampling", draft, numbers, parents, uniforms),
        backend("tree_verify_sampling", draft, numbers, parents, uniforms, draft_probs=numbers.flip(-1)),
        backend("tree_verify_typical", draft, numbers, parents, temperature=1.0, epsilon=0.1, delta=0.1),
        backend(
            "tree_verify_typical", draft, numbers, parents, temperature=1.0, epsilon=0.1, delta=0.1, uniforms=uniforms
        ),
    ):
        path, num_accepted, tokens = result
        assert ((path >= -1) & (path < nodes)).all() and ((num_accepted >= 0) & (num_accepted < nodes)).all()
        assert ((tokens >= -1) & (tokens < vocabulary)).all()


@for_all(**shared, op=st.sampled_from(["tree_commit_kv_", "tree_compact_kv_"]))
def test_cache(backend: Backend, seed: int, paged: bool, dtype: torch.dtype, op: str) -> None:
    g = Garbage(backend, seed)
    batch, nodes, slots = 3, 6, 12
    cache = (5, 4) if paged else (batch, slots)
    caches = [g.numbers(*cache, 2, 16), g.numbers(*cache, 2, 8)]
    trees = [g.numbers(batch, nodes, 2, 16), g.numbers(batch, nodes, 2, 8)] if op == "tree_commit_kv_" else []
    rest = [g.indices(batch, dtype=dtype), g.indices(batch, nodes, dtype=dtype), g.indices(batch, dtype=dtype)]
    rest[1][0, 0] = rest[1][1, 0] = 0
    table = g.indices(batch, 3, dtype=dtype) if paged else None
    before = [x.clone() for x in (*trees, *rest)]
    with unchecked(op), g.guards.allocations():
        backend(op, *caches, *trees, *rest, block_table=table)
    g.guards.check()
    for x, y in zip((*trees, *rest), before, strict=True):
        assert_bitwise("input", x, y)
    assert all(x.isfinite().all() for x in caches), "something was read from outside"
