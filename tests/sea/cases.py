# SPDX-License-Identifier: Apache-2.0
"""Inputs of sparse attention, drawn as a description and made from a seed."""

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
from . import oracle

F64 = torch.float64


@dataclass(frozen=True)
class Case:
    """Describes one call of sea_attention. ``kept``: the share of cells that rows keep; ``gates``: which are given."""

    batch: int = 2
    heads: int = 2
    rows: int = 7
    keys: int = 20
    num_cells: int = 8
    size: int = 16
    value_size: int = 8
    dtype: torch.dtype = torch.float32
    kept: float = 0.3
    widths: str = "causal"
    limit: int = 0
    gates: str = "none"
    gate_dtype: torch.dtype | None = None
    scale: float | None = None
    layout: str = "contiguous"
    index_dtype: torch.dtype = torch.int32
    seed: int = 0

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)


def make_widths(kind: str, batch: int, rows: int, keys: int, seed: int) -> Tensor:
    """``causal``, ``full``, ``padded`` (each batch entry has its own), or ``any`` per row, empty and negative too."""
    causal = torch.arange(rows) + 1 + keys - rows
    if kind == "causal":
        return causal.expand(batch, rows).clone()
    if kind == "full":
        return torch.full((batch, rows), keys)
    rng = random.Random(seed)
    if kind == "padded":
        return torch.tensor([[rng.randint(0, keys)] * rows for _ in range(batch)], dtype=torch.int64).view(batch, rows)
    some = [[rng.choice([-3, 0, 1, keys, rng.randint(0, keys)]) for _ in range(rows)] for _ in range(batch)]
    return torch.tensor(some, dtype=torch.int64).view(batch, rows)


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of the call, by name."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    batch, heads, rows, keys = case.batch, case.heads, case.rows, case.keys
    gate_dtype = case.gate_dtype or case.dtype
    args: dict[str, Any] = {
        "q": normal(batch, rows, heads, case.size).to(case.dtype),
        "k": normal(batch, keys, heads, case.size).to(case.dtype),
        "v": normal(batch, keys, heads, case.value_size).to(case.dtype),
    }
    bits = torch.rand((batch, rows, heads * case.num_cells), generator=generator) < case.kept
    args["cells"] = oracle.bitset(
        [[row.nonzero().flatten().tolist() for row in b] for b in bits], heads, case.num_cells
    )
    args["cells"] = args["cells"].view(batch, rows, -(-heads * case.num_cells // 32))
    args["widths"] = make_widths(case.widths, batch, rows, keys, case.seed).to(case.index_dtype)
    if case.gates in ("gain", "all", "shared"):
        args["row_gain"] = normal(batch, heads, rows).sigmoid().to(gate_dtype)
    if case.gates in ("mix", "all", "shared"):
        args["mix"] = normal(batch, heads, rows).sigmoid().to(gate_dtype)
        pooled = normal(batch, 1 if case.gates == "shared" else rows, heads, case.value_size)
        args["pooled"] = pooled.to(case.dtype)
    indices = ("cells", "widths")
    plain = case.layout == "expanded"  # would not be each row's any more
    args = {
        name: lay_out(x.to(device), "contiguous" if plain and name in indices else case.layout)
        for name, x in args.items()
    }
    return args | {"num_cells": case.num_cells, "scale": case.scale, "max_columns_per_cell": case.limit}


GATES = ("row_gain", "mix", "pooled")


def run(backend: Backend, args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    positional = ("q", "k", "v", "cells", "widths")
    return backend(
        "sea_attention", *(args[n] for n in positional), **{n: x for n, x in args.items() if n not in positional}
    )


def dense(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the oracle, on the CPU."""
    args = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in args.items()}
    mask = oracle.visible(
        args["cells"], args["widths"], args["q"].shape[2], args["num_cells"], args["k"].shape[1],
        args["max_columns_per_cell"],
    )  # fmt: skip
    kept = ("q", "k", "v", "scale", *GATES)
    return {name: x for name, x in args.items() if name in kept} | {"mask": mask}


@st.composite
def cases(draw: st.DrawFn, backend: Backend, **fixed: Any) -> Case:
    """Every feature is drawn; slow backends get few and short rows."""
    rows = draw(st.sampled_from([1, 3, 16] if backend.slow else [0, 1, 2, 5, 17, 40]))
    sizes = [8, 16, 40, 64] if backend.slow else [8, 24, 40, 64, 80, 128, 256]
    case = Case(
        batch=draw(st.integers(0 if not backend.slow else 1, 2)),
        heads=draw(st.integers(1, 2 if backend.slow else 4)),
        rows=rows,
        keys=rows + draw(st.sampled_from([0, 1, 30] if backend.slow else [0, 1, 30, 150])),
        num_cells=draw(st.sampled_from([1, 8, 17, 32] if backend.slow else [1, 7, 8, 32, 64, 100])),
        size=draw(st.sampled_from(sizes)),
        value_size=draw(st.sampled_from(sizes)),
        dtype=draw(st.sampled_from(backend.dtypes)),
        kept=draw(st.sampled_from([0.0, 0.05, 0.3, 1.0])),
        widths=draw(st.sampled_from(["causal", "full", "padded", "any"])),
        limit=draw(st.sampled_from([0, 0, 1, 3])),
        gates=draw(st.sampled_from(["none", "gain", "mix", "all", "shared"])),
        gate_dtype=draw(st.sampled_from([None, torch.float32])),
        scale=draw(st.sampled_from([None, 0.2, -0.3])),
        layout=draw(st.sampled_from(LAYOUTS)),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        seed=draw(seeds),
    )
    return case.replace(**fixed)
