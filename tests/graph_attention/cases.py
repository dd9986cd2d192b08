# SPDX-License-Identifier: Apache-2.0
"""Inputs of Graph-KV attention, drawn as a description and made from a seed."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend
from ..strategies import LAYOUTS, lay_out, seeds

HEAD_SIZES = (8, 40, 64, 80, 96, 128, 192, 256)
GROUPS = (1, 2, 4, 7, 8)
GRAPH = ("q_offsets", "kv_offsets", "edge_offsets", "edge_sources", "own_segment")


@dataclass(frozen=True)
class Case:
    """Describes one call. ``page = 0`` is packed keys. ``own``: whether query segments have a key segment of their own
    (``some``: some have), which may be shorter or longer than they are."""

    q_lengths: tuple[int, ...] = (5, 9, 17)
    kv_lengths: tuple[int, ...] = (9, 20, 3, 17)
    density: float = 0.6  # of edges
    own: str = "some"  # all, some, none
    kv_heads: int = 2
    group: int = 2
    head_size: int = 64
    value_size: int = 64
    dtype: torch.dtype = torch.float32
    rope: str = ""  # "", half, interleaved
    shared_starts: bool = False
    own_start: bool = False
    longest_position: int = 264_000
    page: int = 0
    scale: float | None = None
    layout: str = "contiguous"
    index_dtype: torch.dtype = torch.int32
    seed: int = 0

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)


def graph_of(case: Case) -> tuple[list[list[int]], list[int]]:
    """The sources of each query segment in any order, and its own segment."""
    rng = random.Random(case.seed)
    numbers = range(len(case.kv_lengths))
    sources, own = [], []
    for _ in case.q_lengths:
        mine = -1
        if numbers and case.own != "none" and (case.own == "all" or rng.random() < 0.7):
            mine = rng.choice(numbers)
        chosen = [s for s in numbers if s != mine and rng.random() < case.density]
        if rng.random() < 0.5:
            rng.shuffle(chosen)
        sources.append(chosen)
        own.append(mine)
    return sources, own


def offsets(lengths: tuple[int, ...] | list[int], first: int = 0) -> Tensor:
    return torch.tensor([first, *lengths]).cumsum(0)


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of the call, by name. Keys that nobody may look at are NaN."""
    generator = torch.Generator().manual_seed(case.seed)
    rng = random.Random(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sources, own = graph_of(case)
    edges, tokens = sum(map(len, sources)), sum(case.kv_lengths)
    before, after = (0, 0) if case.page else (case.seed % 3, case.seed % 2)
    args: dict[str, Any] = {"q": normal(sum(case.q_lengths), case.kv_heads * case.group, case.head_size)}
    kv_offsets = offsets(case.kv_lengths, before)
    pages = max((-(-length // case.page) for length in case.kv_lengths), default=0) if case.page else 0
    order = torch.randperm(len(case.kv_lengths) * pages + 2, generator=torch.Generator().manual_seed(case.seed))
    order = order[: len(case.kv_lengths) * pages].reshape(len(case.kv_lengths), pages)
    for name, size in (("k", case.head_size), ("v", case.value_size)):
        content = normal(tokens, case.kv_heads, size)
        if case.page:
            pool = torch.full((order.numel() + 2, case.page, case.kv_heads, size), float("nan"), dtype=torch.float64)
            for s, length in enumerate(case.kv_lengths):
                place = torch.arange(length)
                pool[order[s, place // case.page], place % case.page] = content[kv_offsets[s] : kv_offsets[s + 1]]
            args[name] = pool
        else:
            around = [torch.full((n, *content.shape[1:]), float("nan"), dtype=torch.float64) for n in (before, after)]
            args[name] = torch.cat([around[0], content, around[1]])
    args = {name: x.to(case.dtype) for name, x in args.items()}
    index: dict[str, Any] = {
        "q_offsets": offsets(case.q_lengths),
        "kv_offsets": kv_offsets,
        "edge_offsets": offsets([len(x) for x in sources]),
        "edge_sources": torch.tensor([s for chosen in sources for s in chosen], dtype=torch.int64),
        "own_segment": torch.tensor(own, dtype=torch.int64),
    }
    if case.page:
        # Entries behind the used pages are anything at all.
        for s, length in enumerate(case.kv_lengths):
            order[s, -(-length // case.page) :] = (-1, 10**6)[case.seed % 2]
        index["block_table"] = order
    if case.rope:
        # Llama's frequencies; float64 ones are taken as well.
        inv_freq = 500_000.0 ** -(torch.arange(0, case.head_size, 2, dtype=torch.float64) / case.head_size)
        args["inv_freq"] = inv_freq if case.dtype == torch.float64 else inv_freq.float()

        def positions(count: int) -> Tensor:
            return torch.tensor([rng.randint(0, case.longest_position) for _ in range(count)], dtype=torch.int64)

        index["q_start"] = positions(len(case.q_lengths))
        index["edge_start"] = positions(1).expand(edges).clone() if case.shared_starts else positions(edges)
        if case.own_start:
            index["own_start"] = positions(len(case.q_lengths))
    args |= {name: x.to(case.index_dtype) for name, x in index.items()}
    for name, value in args.items():
        expandable = name in ("q",) or (name in ("k", "v") and not case.page)
        layout = "sliced" if case.layout == "expanded" and not expandable else case.layout
        if layout == "expanded" and name in ("k", "v") and before:
            layout = "sliced"  # row 0 is NaN
        args[name] = lay_out(value.to(device), layout)
    return args | {"scale": case.scale, "interleaved": case.rope == "interleaved"}


def run(backend: Backend, args: dict[str, Any], op: str = "graph_attention") -> Any:
    rest = dict(args)
    names = ("q", "k", "v", *GRAPH)
    return backend(op, *(rest.pop(name) for name in names), **rest)


@st.composite
def cases(draw: st.DrawFn, backend: Backend, **fixed: Any) -> Case:
    """Every feature is drawn; slow backends get few and short segments."""
    lengths = [0, 1, 2, 5, 15, 16, 17, 33] if backend.slow else [0, 1, 3, 16, 31, 64, 65, 127, 128, 130, 200]
    one_token = draw(st.integers(0, 3)) == 0 or "decode" in fixed and fixed.pop("decode")
    many = 3 if backend.slow else 4
    q_lengths = st.sampled_from([1] if one_token else lengths)
    sizes = HEAD_SIZES[:4] if backend.slow else HEAD_SIZES
    case = Case(
        q_lengths=tuple(draw(st.lists(q_lengths, min_size=0, max_size=many))),
        kv_lengths=tuple(draw(st.lists(st.sampled_from(lengths), min_size=0, max_size=many + 1))),
        density=draw(st.sampled_from([0.0, 0.4, 0.8, 1.0])),
        own=draw(st.sampled_from(["all", "some", "none"])),
        kv_heads=draw(st.integers(1, 2 if backend.slow else 3)),
        group=draw(st.sampled_from(GROUPS[:3] if backend.slow else GROUPS)),
        head_size=draw(st.sampled_from(sizes)),
        value_size=draw(st.sampled_from(sizes)),
        dtype=draw(st.sampled_from(backend.dtypes)),
        rope=draw(st.sampled_from(["", "half", "interleaved"])),
        shared_starts=draw(st.booleans()),
        own_start=draw(st.booleans()),
        page=draw(st.sampled_from([0, 0, 1, 3, 16, 64])),
        scale=draw(st.sampled_from([None, 0.05, 0.3])),
        layout=draw(st.sampled_from(LAYOUTS)),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        seed=draw(seeds),
    )
    return case.replace(**fixed)
