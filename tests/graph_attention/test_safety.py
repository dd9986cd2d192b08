# SPDX-License-Identifier: Apache-2.0
"""Garbage in index tensors that nobody checked: calls end, and touch nothing outside their tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend, for_all, need, unchecked
from ..guards import Guards
from ..strategies import seeds

EXTREMES = torch.tensor([-(2**31), -(2**30), -1000, -2, -1, 0, 1, 2, 5, 8, 100, 1000, 2**20, 2**30, 2**31 - 1])


@pytest.fixture(autouse=True)
def unvalidated(backend: Backend) -> None:
    if backend.name == "cpu":
        pytest.skip("on the CPU indices are always checked")


class Garbage:
    def __init__(self, backend: Backend, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.guards, self.device, self.dtype = Guards(), backend.device, dtype

    def indices(self, *shape: int) -> Tensor:
        """Small numbers and extremes, mixed."""
        small = torch.randint(-2, 12, shape, generator=self.generator)
        wild = EXTREMES[torch.randint(0, len(EXTREMES), shape, generator=self.generator)]
        use_wild = torch.rand(shape, generator=self.generator) < 0.4
        return self.guards.copy(torch.where(use_wild, wild, small).to(self.dtype).to(self.device))

    def numbers(self, *shape: int) -> Tensor:
        return self.guards.copy(torch.randn(*shape, generator=self.generator).to(self.device))


shared = {"seed": seeds, "dtype": st.sampled_from([torch.int32, torch.int64]), "rope": st.booleans()}


@for_all(**shared, paged=st.booleans())
def test_attention(backend: Backend, seed: int, dtype: torch.dtype, rope: bool, paged: bool) -> None:
    g = Garbage(backend, seed, dtype)
    segments, tokens, edges = 4, 11, 6
    keys = (5, 4) if paged else (12,)
    args = [g.numbers(tokens, 4, 16), g.numbers(*keys, 2, 16), g.numbers(*keys, 2, 8)]
    args += [g.indices(segments + 1), g.indices(4), g.indices(segments + 1), g.indices(edges), g.indices(segments)]
    options = {"block_table": g.indices(3, 3)} if paged else {}
    if rope:
        options |= {"inv_freq": g.guards.copy(torch.rand(8).to(backend.device)), "q_start": g.indices(segments)}
        options |= {"edge_start": g.indices(edges), "own_start": g.indices(segments)}
    with unchecked("graph_attention"), g.guards.allocations():
        backend("graph_attention", *args, **options)
    g.guards.check()


@for_all(**shared)
def test_backward(backend: Backend, seed: int, dtype: torch.dtype, rope: bool) -> None:
    need(backend, "graph_attention_backward")
    g = Garbage(backend, seed, dtype)
    segments, tokens, edges, keys = 4, 11, 6, 12
    args = [g.numbers(tokens, 4, 8), g.numbers(tokens, 4, 16), g.numbers(keys, 2, 16), g.numbers(keys, 2, 8)]
    args += [g.numbers(tokens, 4, 8), g.numbers(4, tokens)]
    args += [g.indices(segments + 1), g.indices(4), g.indices(segments + 1), g.indices(edges), g.indices(segments)]
    options = {}
    if rope:
        options |= {"inv_freq": g.guards.copy(torch.rand(8).to(backend.device)), "q_start": g.indices(segments)}
        options |= {"edge_start": g.indices(edges)}
    with unchecked("graph_attention_backward"), g.guards.allocations():
        backend("graph_attention_backward", *args, **options)
    g.guards.check()


@for_all(**shared)
def test_rope_shift(backend: Backend, seed: int, dtype: torch.dtype, rope: bool) -> None:
    g = Garbage(backend, seed, dtype)
    args = [g.numbers(11, 2, 16), g.indices(5), g.indices(4), g.guards.copy(torch.rand(8).to(backend.device))]
    with unchecked("rope_shift"), g.guards.allocations():
        backend("rope_shift", *args, interleaved=rope)
    g.guards.check()
