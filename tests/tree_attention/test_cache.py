# SPDX-License-Identifier: Apache-2.0
"""tree_commit_kv_ and tree_compact_kv_: the accepted path ends up in the cache, and nothing else changes."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend, for_all
from ..guards import Guards
from ..strategies import bits, lay_out, rooted, seeds
from ..tolerance import assert_bitwise
from . import oracle
from .cases import FP8

LAYOUTS = ("contiguous", "transposed", "sliced", "misaligned", "strided")


@dataclass
class Cache:
    k_cache: Tensor
    v_cache: Tensor
    k_tree: Tensor
    v_tree: Tensor
    prefix_lens: Tensor
    path: Tensor
    num_accepted: Tensor
    block_table: Tensor | None

    def commit(self, backend: Backend, **scales: Tensor) -> None:
        backend("tree_commit_kv_", self.k_cache, self.v_cache, self.k_tree, self.v_tree, self.prefix_lens, self.path,
                self.num_accepted, block_table=self.block_table, **scales)  # fmt: skip

    def compact(self, backend: Backend) -> None:
        backend("tree_compact_kv_", self.k_cache, self.v_cache, self.prefix_lens, self.path, self.num_accepted,
                block_table=self.block_table)  # fmt: skip

    def slot(self, b: int, s: int) -> tuple[int, int]:
        """Indices of a row's slot in the caches' first two dimensions."""
        if self.block_table is None:
            return b, s
        page = self.k_cache.shape[1]
        return int(self.block_table[b, s // page]), s % page

    def clone(self) -> Cache:
        copies = {name: bits(x).clone().view(x.dtype) if isinstance(x, Tensor) else x for name, x in vars(self).items()}
        return Cache(**copies)


def make(backend: Backend, seed: int, *, dtype: torch.dtype, page: int = 0, layout: str = "contiguous", batch: int = 3,
         nodes: int = 9, sizes: tuple[int, int] = (16, 24), cache_dtype: torch.dtype | None = None,
         index_dtype: torch.dtype = torch.int32) -> Cache:  # fmt: skip
    """Random paths from the root down random trees; caches full of random numbers; one row in four without a tree."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    heads, spare = 2, 4
    prefixes = [rng.choice([0, 1, 7, 16, 30]) for _ in range(batch)]
    slots = max(prefixes, default=0) + nodes + spare
    paths, accepted = [], []
    for b in range(batch):
        ways = oracle.paths(rooted(nodes, seed + b))
        way = rng.choice(ways) if ways and rng.random() < 0.8 else []
        paths.append(way + [-1] * (nodes - len(way)))
        accepted.append(max(len(way) - 1, 0))
    pages = -(-slots // page) if page else 0
    shape = (batch * pages + 1, page) if page else (batch, slots)
    table = (
        torch.randperm(batch * pages + 1, generator=generator)[: batch * pages].reshape(batch, pages) if page else None
    )

    def numbers(*lead: int, size: int, kind: torch.dtype) -> Tensor:
        x = 4 * torch.randn(*lead, heads, size, generator=generator)
        return (x.round() if kind == torch.int8 else x).to(kind)

    tensors = dict(
        k_cache=numbers(*shape, size=sizes[0], kind=cache_dtype or dtype),
        v_cache=numbers(*shape, size=sizes[1], kind=cache_dtype or dtype),
        k_tree=numbers(batch, nodes, size=sizes[0], kind=dtype),
        v_tree=numbers(batch, nodes, size=sizes[1], kind=dtype),
        prefix_lens=torch.tensor(prefixes, dtype=index_dtype),
        path=torch.tensor(paths, dtype=torch.int32).reshape(batch, nodes),
        num_accepted=torch.tensor(accepted, dtype=torch.int32),
        block_table=table if table is None else table.to(index_dtype),
    )
    return Cache(**{name: x if x is None else lay_out(x.to(backend.device), layout) for name, x in tensors.items()})


def expected(cache: Cache, kind: str) -> tuple[Tensor, Tensor]:
    """The caches as they must be; for compaction, the tree's later slots are set to what the op left there."""
    result = []
    for name in ("k", "v"):
        before = getattr(cache, f"{name}_cache")
        after = bits(before).clone().view(before.dtype)
        for b in range(len(cache.path)):
            if cache.path.shape[1] == 0 or int(cache.path[b, 0]) < 0:
                continue
            prefix = int(cache.prefix_lens[b])
            for j in range(int(cache.num_accepted[b]) + 1):
                node = int(cache.path[b, j])
                source = (
                    getattr(cache, f"{name}_tree")[b, node]
                    if kind == "commit"
                    else before[cache.slot(b, prefix + node)]
                )
                bits(after)[cache.slot(b, prefix + j)] = bits(source)
        result.append(after)
    return result[0], result[1]


drawn = {
    "page": st.sampled_from([0, 0, 1, 3, 16]),
    "layout": st.sampled_from(LAYOUTS),
    "batch": st.integers(0, 4),
    "nodes": st.sampled_from([0, 1, 2, 9, 17, 65]),
    "sizes": st.sampled_from([(8, 8), (40, 16), (128, 64), (256, 96)]),
    "index_dtype": st.sampled_from([torch.int32, torch.int64]),
}


@for_all(data=st.data(), options=st.fixed_dictionaries(drawn), seed=seeds)
def test_commit(backend: Backend, data: st.DataObject, options: dict, seed: int) -> None:
    cache = make(backend, seed, dtype=data.draw(st.sampled_from(backend.dtypes)), **options)
    k, v = expected(cache, "commit")
    cache.commit(backend)
    assert_bitwise("k_cache", cache.k_cache, k)
    assert_bitwise("v_cache", cache.v_cache, v)


@for_all(data=st.data(), options=st.fixed_dictionaries(drawn), seed=seeds)
def test_compact(backend: Backend, data: st.DataObject, options: dict, seed: int) -> None:
    dtype = data.draw(st.sampled_from(backend.dtypes))
    cache_dtype = data.draw(st.sampled_from([None, torch.int8, FP8]))
    cache = make(backend, seed, dtype=dtype, cache_dtype=cache_dtype, **options)
    k, v = expected(cache, "compact")
    cache.compact(backend)
    for b, (prefix, count) in enumerate(zip(cache.prefix_lens.tolist(), cache.num_accepted.tolist(), strict=True)):
        if (
            options["nodes"] and int(cache.path[b, 0]) == 0
        ):  # unspecified: the slots of the tree behind the accepted path
            for s in range(prefix + count + 1, prefix + options["nodes"]):
                bits(k)[cache.slot(b, s)] = bits(cache.k_cache)[cache.slot(b, s)]
                bits(v)[cache.slot(b, s)] = bits(cache.v_cache)[cache.slot(b, s)]
    assert_bitwise("k_cache", cache.k_cache, k)
    assert_bitwise("v_cache", cache.v_cache, v)


def test_compact_survives_overlapping_moves(backend: Backend) -> None:
    # parents [-1, 0, 0, 2], path [0, 2, 3]: slot 2 is read for slot 1 and written from slot 3.
    for size in (8, 256):
        for repeats in (1, 64):
            batch = 2 if backend.slow else 4 * repeats
            numbers = torch.arange(7.0, device=backend.device).view(1, 7, 1, 1).repeat(batch, 1, 2, size)
            path = torch.tensor([[0, 2, 3, -1]], dtype=torch.int32, device=backend.device).expand(batch, 4)
            two = torch.full((batch,), 2, dtype=torch.int32, device=backend.device)
            k_cache, v_cache = numbers.clone(), -numbers
            backend("tree_compact_kv_", k_cache, v_cache, two, path, two)
            for cache, sign in ((k_cache, 1), (v_cache, -1)):
                assert (
                    sign * cache[:, :5] == torch.tensor([0.0, 1, 2, 4, 5], device=backend.device).view(1, 5, 1, 1)
                ).all()
                assert (sign * cache[:, 6] == 6).all()


@for_all(seed=seeds, page=st.sampled_from([0, 3, 16]))
def test_commit_and_compact_agree(backend: Backend, seed: int, page: int) -> None:
    # A tree whose keys already sit in the cache, compacted, and the same tree beside the cache, committed.
    inside = make(backend, seed, dtype=torch.float32, page=page)
    for b, prefix in enumerate(inside.prefix_lens.tolist()):
        for i in range(inside.path.shape[1]):
            inside.k_cache[inside.slot(b, prefix + i)] = inside.k_tree[b, i]
            inside.v_cache[inside.slot(b, prefix + i)] = inside.v_tree[b, i]
    beside = inside.clone()
    inside.compact(backend)
    beside.commit(backend)
    for b, (prefix, count) in enumerate(zip(inside.prefix_lens.tolist(), inside.num_accepted.tolist(), strict=True)):
        for s in range(prefix + count + 1 if int(inside.path[b, 0]) == 0 else prefix):
            assert_bitwise(
                f"k of row {b} slot {s}", inside.k_cache[inside.slot(b, s)], beside.k_cache[beside.slot(b, s)]
            )
            assert_bitwise(
                f"v of row {b} slot {s}", inside.v_cache[inside.slot(b, s)], beside.v_cache[beside.slot(b, s)]
            )


@pytest.mark.parametrize("cache_dtype", [torch.int8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("per_head", [False, True])
def test_commit_quantises(backend: Backend, cache_dtype: torch.dtype, per_head: bool) -> None:
    limit = 127.0 if cache_dtype == torch.int8 else 448.0
    for dtype in backend.dtypes:
        cache = make(backend, 5, dtype=dtype, cache_dtype=cache_dtype, batch=1, nodes=4, sizes=(64, 64))
        cache.path, cache.num_accepted = cache.path.clone(), cache.num_accepted.clone()
        cache.path[0] = torch.tensor([0, 1, 3, -1])
        cache.num_accepted[0] = 2
        # Powers of two keep x / scale exact: only the final rounding remains. Values on, between and beyond the grid.
        scales = torch.tensor([0.25, 0.5] if per_head else [0.5], device=backend.device)
        grid = torch.cat([torch.arange(-20, 20) / 8, torch.tensor([63.4, -63.4, 64, -64, 1e4, -1e4, 0.0, -0.0])])
        grid = torch.cat([grid, torch.linspace(-70, 70, 64 - len(grid))]).to(dtype)
        cache.k_tree[:] = grid.to(backend.device)
        cache.v_tree[:] = -2 * grid.to(backend.device)
        before = cache.clone()
        cache.commit(backend, k_scale=scales, v_scale=scales)
        prefix = int(cache.prefix_lens[0])
        for name in ("k", "v"):
            stored = getattr(cache, f"{name}_cache")
            x = getattr(cache, f"{name}_tree")[0, [0, 1, 3]].double() / scales.double()[:, None]
            x = x.clamp(-limit, limit)
            wanted = x.round().to(torch.int8) if cache_dtype == torch.int8 else x.float().to(FP8)
            assert_bitwise(f"{name}_cache", stored[0, prefix : prefix + 3], wanted)
            untouched = torch.ones(stored.shape[1], dtype=torch.bool)
            untouched[prefix : prefix + 3] = False
            assert_bitwise("the rest", bits(stored)[0, untouched], bits(getattr(before, f"{name}_cache"))[0, untouched])


def test_commit_rounds_to_nearest(backend: Backend) -> None:
    # With scales that are no powers of two: every stored value lies within half a step of x / scale.
    cache = make(backend, 6, dtype=torch.float32, cache_dtype=torch.int8, batch=1, nodes=1, sizes=(256, 256))
    cache.path[:], cache.num_accepted[:] = 0, 0
    scale = torch.tensor([0.0937], device=backend.device)
    cache.commit(backend, k_scale=scale, v_scale=scale)
    stored = cache.k_cache[0, int(cache.prefix_lens[0])].double()
    exact = (cache.k_tree[0, 0].double() / scale.double()).clamp(-127, 127)
    assert (stored - exact).abs().max() <= 0.5 + 1e-5 and stored.abs().max() <= 127


@pytest.mark.parametrize("op", ["commit", "compact"])
def test_nothing_else_is_written(backend: Backend, op: str) -> None:
    for page in (0, 3):
        cache = make(backend, 11, dtype=torch.float32, page=page, sizes=(40, 24))
        guards = Guards()
        for name, x in list(vars(cache).items()):
            if isinstance(x, Tensor):
                setattr(cache, name, guards.copy(x))
        inputs = {name: x.clone() for name, x in vars(cache).items() if isinstance(x, Tensor) and "cache" not in name}
        cache.commit(backend) if op == "commit" else cache.compact(backend)
        guards.check()
        for name, x in inputs.items():
            assert_bitwise(name, getattr(cache, name), x)


def test_a_whole_step(backend: Backend) -> None:
    """Attend, verify, commit: the cache then shows the next step what the tree showed the accepted leaf."""
    generator = torch.Generator().manual_seed(0)
    nodes, prefix, heads, size = 6, 11, 2, 16
    parents = torch.tensor([[-1, 0, 0, 2, 2, 4]], dtype=torch.int32, device=backend.device)
    k_cache, v_cache, k_tree, v_tree = (
        torch.randn(1, n, heads, size, generator=generator).to(backend.device) for n in (24, 24, nodes, nodes)
    )
    q = torch.randn(1, nodes, heads, size, generator=generator).to(backend.device)
    lengths = torch.tensor([prefix], dtype=torch.int32, device=backend.device)
    out, lse = backend("tree_attention", q, k_cache, v_cache, lengths, parents, k_tree=k_tree, v_tree=v_tree)
    draft = torch.tensor([[0, 1, 2, 3, 4, 5]], device=backend.device)
    target = torch.tensor([[2, 0, 4, 0, 9, 9]], device=backend.device)
    path, num_accepted, tokens = backend("tree_verify_greedy", draft, target, parents)
    assert path[0, :3].tolist() == [0, 2, 4] and tokens[0, :3].tolist() == [2, 4, 9]
    backend("tree_commit_kv_", k_cache, v_cache, k_tree, v_tree, lengths, path, num_accepted)
    # Node 4 again, now as the last token of the sequence: its own key at slot prefix + 2 is read from the cache.
    again, again_lse = backend("tree_attention", q[:, 4:5], k_cache, v_cache, lengths + 2, parents[:, :1])
    torch.testing.assert_close(again, out[:, 4:5], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again_lse, lse[:, :, 4:5], rtol=1e-5, atol=1e-6)
