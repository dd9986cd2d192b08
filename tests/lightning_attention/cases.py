# SPDX-License-Identifier: Apache-2.0
"""Inputs of the lightning attention ops, drawn as a description and made from a seed."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend
from ..strategies import LAYOUTS, lay_out, seeds

HEAD_SIZES = (8, 40, 64, 80, 96, 128, 192, 256)
SEQUENCE_OPS = ("lightning_attention", "simple_gla")
DECAYS = ("slopes", "slow", "none", "infinite", "gates", "resets")


@dataclass(frozen=True)
class Case:
    """Describes one call over sequences. ``packed``: the lengths are those of cu_seqlens, else all are the first."""

    lengths: tuple[int, ...] = (70, 70)
    packed: bool = False
    heads: int = 2
    group: int = 1
    key_size: int = 32
    value_size: int = 32
    dtype: torch.dtype = torch.float32
    decay: str = "slopes"
    initial: bool = True
    scale: float | None = None
    layout: str = "contiguous"
    index_dtype: torch.dtype = torch.int32
    seed: int = 0

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    @property
    def op(self) -> str:
        return "simple_gla" if self.decay in ("gates", "resets", "harsh") else "lightning_attention"


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_decay(case: Case, batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Slopes [H], or gates [B, T, H]."""
    uniform = torch.rand(batch, tokens, case.heads, generator=generator, dtype=torch.float64)
    if case.decay == "gates":
        rate = -0.3 * uniform
    elif case.decay == "resets":
        rate = torch.where(torch.rand(uniform.shape, generator=generator) < 0.05, -math.inf, -0.1 * uniform)
    elif case.decay == "harsh":
        kinds = torch.tensor([0.0, -1e-6, -0.5, -30.0, -1e4, -1e30, -math.inf], dtype=torch.float64)
        rate = kinds[torch.randint(len(kinds), uniform.shape, generator=generator)]
    else:
        slow = torch.rand(case.heads, generator=generator, dtype=torch.float64)
        rate = {"slopes": slow, "slow": slow * 1e-4, "none": slow * 0, "infinite": slow + math.inf}[case.decay]
        if case.decay == "infinite" and case.heads > 1:
            rate[-1] = 0.1
    return rate.to(wide(case.dtype))


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of the call, by name."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch = 1 if case.packed else len(case.lengths)
    tokens = sum(case.lengths) if case.packed else (case.lengths or (0,))[0]
    size, value_size = case.key_size, case.value_size
    args: dict[str, Any] = {
        "q": (normal(batch, tokens, case.heads * case.group, size) / size**0.5).to(case.dtype),
        "k": normal(batch, tokens, case.heads, size).to(case.dtype),
        "v": normal(batch, tokens, case.heads, value_size).to(case.dtype),
        "g" if case.op == "simple_gla" else "slopes": make_decay(case, batch, tokens, generator),
    }
    if case.initial:
        states = len(case.lengths) if case.packed else batch
        args["initial_state"] = normal(states, case.heads, size, value_size).to(wide(case.dtype))
    if case.packed:
        offsets = torch.tensor([0, *case.lengths]).cumsum(0)
        args["cu_seqlens"] = offsets.to(case.index_dtype)
    for name, x in args.items():
        plain = name == "cu_seqlens" and case.layout == "expanded"  # would not be offsets any more
        args[name] = lay_out(x.to(device), "contiguous" if plain else case.layout)
    return args | {"scale": case.scale}


def run(backend: Backend, case: Case, args: dict[str, Any], final: bool = True) -> tuple[Tensor, Tensor]:
    positional = [args[name] for name in ("q", "k", "v", "g" if "g" in args else "slopes")]
    keywords = {name: args.get(name) for name in ("initial_state", "cu_seqlens", "scale")}
    return backend(case.op, *positional, **keywords, output_final_state=final)


@st.composite
def cases(draw: st.DrawFn, backend: Backend, **fixed: Any) -> Case:
    """Every feature is drawn; slow backends get few and short rows."""
    lengths = [0, 1, 5, 33, 64, 70] if backend.slow else [0, 1, 2, 16, 31, 63, 64, 65, 127, 128, 129, 200, 300]
    packed = draw(st.booleans())
    count = draw(st.integers(1, 2 if backend.slow else 4 if packed else 2))
    chosen = draw(st.lists(st.sampled_from(lengths), min_size=count, max_size=count))
    sizes = HEAD_SIZES[:3] if backend.slow else HEAD_SIZES
    case = Case(
        lengths=tuple(chosen) if packed else (chosen[0],) * count,
        packed=packed,
        heads=draw(st.integers(1, 2 if backend.slow else 3)),
        group=draw(st.sampled_from([1, 1, 2, 3])),
        key_size=draw(st.sampled_from(sizes)),
        value_size=draw(st.sampled_from(sizes)),
        dtype=draw(st.sampled_from(backend.dtypes)),
        decay=draw(st.sampled_from(DECAYS)),
        initial=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.3])),
        layout=draw(st.sampled_from(LAYOUTS)),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        seed=draw(seeds),
    )
    return case.replace(**fixed)
