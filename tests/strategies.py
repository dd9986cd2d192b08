# SPDX-License-Identifier: Apache-2.0
"""What hypothesis draws: small descriptions (a size, a layout, a kind of tree, a seed). Data come from the seed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor

seeds = st.integers(0, 2**31 - 1)

LAYOUTS = ("contiguous", "transposed", "sliced", "misaligned", "expanded", "strided")
TREES = ("random", "recent", "chain", "star", "forest", "padded", "tail")

DATA = json.loads((Path(__file__).parent / "data" / "trees.json").read_text())
PUBLISHED = {name: tree["counts"] for name, tree in DATA.items() if not name.startswith("_")}


def published(name: str) -> list[int]:
    """A tree from a paper's repository; the file stores the child counts of the nodes, breadth-first."""
    parents = [-1]
    for node, count in enumerate(PUBLISHED[name]):
        parents += [node] * count
    assert len(parents) == DATA[name]["nodes"]
    return parents


def grow(kind: str, nodes: int, seed: int) -> list[int]:
    """Parents of a tree: ``forest`` has several roots, ``padded`` padding anywhere, ``tail`` padding at the end."""
    rng = random.Random(seed)
    parents: list[int] = []
    real: list[int] = []
    end = rng.randint(0, nodes) if kind == "tail" else nodes
    for i in range(nodes):
        if i >= end or (kind == "padded" and rng.random() < 0.3):
            parents.append(-2)
            continue
        if not real or (kind in ("forest", "padded") and rng.random() < 0.2):
            parents.append(-1)
        elif kind == "chain":
            parents.append(real[-1])
        elif kind == "star":
            parents.append(real[0])
        elif kind == "recent":
            parents.append(rng.choice(real[-3:]))
        else:
            parents.append(rng.choice(real))
        real.append(i)
    return parents


def rooted(nodes: int, seed: int, padding: float = 0.2) -> list[int]:
    """One root at node 0 and padding anywhere else, as verification wants it."""
    rng = random.Random(seed)
    parents, real = [-1], [0]
    for i in range(1, nodes):
        if rng.random() < padding:
            parents.append(-2)
        else:
            parents.append(rng.choice(real[-4:]))
            real.append(i)
    return parents[:nodes]


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout, surrounded by NaN or by the largest integer.

    ``expanded`` repeats the first entry of the first dimension with stride 0, the only layout that changes values.
    """
    if layout == "contiguous" or x.dim() == 0:
        return x.contiguous()
    if layout == "transposed":
        return x.movedim(0, -2 if x.dim() > 2 else -1).contiguous().movedim(-2 if x.dim() > 2 else -1, 0)
    if layout == "expanded":
        return x[:1].expand(x.shape) if len(x) else x
    if layout == "misaligned":
        buffer = _surroundings((x.numel() + 1,), x)
        view = buffer[1:].view(x.shape)
    elif layout == "strided":
        buffer = _surroundings((*x.shape[:-1], 2 * x.shape[-1]), x)
        view = buffer[..., ::2]
    else:
        # Every dimension is a part of a longer one, with an offset.
        buffer = _surroundings(tuple(size + 3 for size in x.shape), x)
        view = buffer
        for dim, size in enumerate(x.shape):
            view = view.narrow(dim, 2, size)
    bits(view).copy_(bits(x))
    return view


def _surroundings(shape: tuple[int, ...], like: Tensor) -> Tensor:
    if like.dtype == torch.float8_e4m3fn:
        return torch.full(shape, 0x7F, dtype=torch.uint8, device=like.device).view(torch.float8_e4m3fn)  # NaN
    value = float("nan") if like.dtype.is_floating_point else torch.iinfo(like.dtype).max
    return torch.full(shape, value, dtype=like.dtype, device=like.device)


def bits(x: Tensor) -> Tensor:
    """float8 as bytes: torch copies, compares and indexes those everywhere."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
