# SPDX-License-Identifier: Apache-2.0
"""Inputs of tree attention, drawn as a description and made from a seed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend
from ..strategies import LAYOUTS, TREES, bits, grow, lay_out, seeds

HEAD_SIZES = (8, 40, 64, 80, 96, 128, 192, 256)
GROUPS = (1, 2, 4, 7, 8)
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """Describes one call. ``page = 0`` is a contiguous cache; ``cache_dtype = None`` the dtype of q."""

    prefixes: tuple[int, ...] = (17, 5)
    nodes: int = 9
    kv_heads: int = 2
    group: int = 2
    head_size: int = 64
    value_size: int = 64
    dtype: torch.dtype = torch.float32
    tree: str = "random"
    own_keys: bool = True
    page: int = 0
    cache_dtype: torch.dtype | None = None
    scale_per_head: bool = False
    scale: float | None = None
    softcap: float = 0.0
    window: int = 0
    sinks: bool = False
    layout: str = "contiguous"
    index_dtype: torch.dtype = torch.int32
    seed: int = 0

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)


def trees(case: Case) -> Tensor:
    rows = [grow(case.tree, case.nodes, case.seed + 31 * b) for b in range(len(case.prefixes))]
    return torch.tensor(rows, dtype=case.index_dtype).reshape(len(rows), case.nodes)


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of the call, by name. Slots that nobody may look at hold NaN (float) or the largest value."""
    if case.layout == "expanded":  # the same row again and again
        case = case.replace(prefixes=case.prefixes[:1] * len(case.prefixes))
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch, heads = len(case.prefixes), case.kv_heads * case.group
    used = [prefix + (0 if case.own_keys else case.nodes) for prefix in case.prefixes]
    slots = max(used, default=0) + (3 if case.seed % 2 else 0)
    cache_dtype = case.cache_dtype or case.dtype
    quantised = cache_dtype in (torch.int8, FP8)

    args: dict[str, Any] = {"q": normal(batch, case.nodes, heads, case.head_size).to(case.dtype)}
    page = case.page or slots
    pages = -(-slots // case.page) if case.page else 1
    # The same values whatever the page size: pages are shuffled by a generator of their own.
    order = torch.randperm(batch * pages + 2, generator=torch.Generator().manual_seed(case.seed))
    order = order[: batch * pages].reshape(batch, pages)
    for name, size in (("k_cache", case.head_size), ("v_cache", case.value_size)):
        step = {torch.int8: 127 / 4, FP8: 448 / 4}.get(cache_dtype, 1.0)
        content = (normal(batch, slots, case.kv_heads, size) * step).clamp(-4 * step, 4 * step)
        content = content.round() if cache_dtype == torch.int8 else content
        cache = unused(content.shape, cache_dtype)
        for b, n in enumerate(used):
            bits(cache)[b, :n] = bits(content[b, :n].to(cache_dtype))
        if case.page:
            pool = unused((batch * pages + 2, page, case.kv_heads, size), cache_dtype)
            slot = torch.arange(slots)
            bits(pool)[order[:, slot // page], slot % page] = bits(cache)
            cache = pool
        args[name] = cache
    args["prefix_lens"] = torch.tensor(case.prefixes, dtype=case.index_dtype)
    args["parents"] = trees(case)
    if case.own_keys:
        args["k_tree"] = normal(batch, case.nodes, case.kv_heads, case.head_size).to(case.dtype)
        args["v_tree"] = normal(batch, case.nodes, case.kv_heads, case.value_size).to(case.dtype)
    if case.sinks:
        args["sinks"] = normal(heads).float()
    if quantised:
        shape = (case.kv_heads,) if case.scale_per_head else (1,)
        for name in ("k_scale", "v_scale"):
            args[name] = (
                (1 + torch.rand(shape, generator=generator)) / (127 / 4 if cache_dtype == torch.int8 else 448 / 4)
            ).float()
    if case.page:
        # Entries behind the used pages are anything at all.
        for b, n in enumerate(used):
            order[b, -(-n // page) :] = (-1, 10**6)[case.seed % 2]
        args["block_table"] = order.to(case.index_dtype)
    for name, value in args.items():
        paging = name == "block_table" or (case.page and name in ("k_cache", "v_cache"))
        args[name] = lay_out(value.to(device), "sliced" if paging and case.layout == "expanded" else case.layout)
    args |= {"scale": case.scale, "softcap": case.softcap, "window": case.window}
    return args


def unused(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype == FP8:
        return torch.full(shape, 0x7F, dtype=torch.uint8).view(FP8)
    return torch.full(shape, 127 if dtype == torch.int8 else float("nan"), dtype=dtype)


def run(backend: Backend, args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    rest = dict(args)
    positional = [rest.pop(name) for name in ("q", "k_cache", "v_cache", "prefix_lens", "parents")]
    return backend("tree_attention", *positional, **rest)


@st.composite
def cases(draw: st.DrawFn, backend: Backend, **fixed: Any) -> Case:
    """Every feature is drawn; slow backends get few and short rows."""
    lengths = [0, 1, 5, 15, 16, 17, 31, 33] if backend.slow else [0, 1, 7, 31, 63, 64, 65, 127, 129, 300]
    sizes = [1, 2, 7, 15, 16, 17, 23] if backend.slow else [1, 2, 7, 16, 31, 63, 64, 65, 97]
    batch = draw(st.integers(1, 2 if backend.slow else 3))
    dtype = draw(st.sampled_from(backend.dtypes))
    case = Case(
        prefixes=tuple(draw(st.lists(st.sampled_from(lengths), min_size=batch, max_size=batch))),
        nodes=draw(st.sampled_from(sizes)),
        kv_heads=draw(st.integers(1, 2 if backend.slow else 3)),
        group=draw(st.sampled_from(GROUPS[:3] if backend.slow else GROUPS)),
        head_size=draw(st.sampled_from(HEAD_SIZES[:4] if backend.slow else HEAD_SIZES)),
        value_size=draw(st.sampled_from(HEAD_SIZES[:4] if backend.slow else HEAD_SIZES)),
        dtype=dtype,
        tree=draw(st.sampled_from(TREES)),
        own_keys=draw(st.booleans()),
        page=draw(st.sampled_from([0, 0, 1, 3, 16, 64, 256])),
        cache_dtype=draw(st.sampled_from([None, None, torch.int8, FP8])),
        scale_per_head=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.05, 0.3])),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.5, 30.0])),
        window=draw(st.sampled_from([0, 0, 1, 3, 20])),
        sinks=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        seed=draw(seeds),
    )
    return case.replace(**fixed)
