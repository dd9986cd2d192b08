# SPDX-License-Identifier: Apache-2.0
"""The truth, by columns: whether a row keeps one, decided for each alone in Python's integers; then dense formulas.

None of it uses the package. The formulas are differentiable, and compute in float64 or, for the errors of the plain
formula, in any dtype.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

F64 = torch.float64


def boundary(m: int, width: int, num_cells: int) -> int:
    return (2 * m * width + num_cells) // (2 * num_cells)


def cell_of(column: int, width: int, num_cells: int) -> int:
    """The one that owns the column; bisection over boundaries."""
    low, high = 0, num_cells
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if boundary(middle, width, num_cells) <= column else (low, middle)
    return low


def keeps(column: int, cell: int, width: int, num_cells: int, limit: int) -> bool:
    """Whether a kept cell keeps one of its columns."""
    first, end = boundary(cell, width, num_cells), boundary(cell + 1, width, num_cells)
    if limit == 0 or end - first <= limit:
        return True
    return column in {end - 1 - (t * (end - first)) // limit for t in range(limit)}


@functools.cache
def kept_cells(width: int, num_cells: int, limit: int) -> Tensor:
    """For each column of a row the cell that keeps it, or -1."""
    cells = [cell_of(column, width, num_cells) for column in range(width)]
    return torch.tensor([m if keeps(j, m, width, num_cells, limit) else -1 for j, m in enumerate(cells)] or [-1])


def visible(cells: Tensor, widths: Tensor, heads: int, num_cells: int, keys: int, limit: int = 0) -> Tensor:
    """bool ``[B, H, Tq, keys]``."""
    mask = torch.zeros(len(cells), heads, cells.shape[1], keys, dtype=torch.bool)
    for b, rows in enumerate(cells.tolist()):
        for i, row in enumerate(rows):
            width = min(int(widths[b, i]), keys)
            if width > 0:
                bits = [bool(row[j // 32] >> (j % 32) & 1) for j in range(heads * num_cells)]
                of_columns = kept_cells(width, num_cells, limit)
                mask[b, :, i, :width] = torch.tensor(bits).view(heads, -1)[:, of_columns] & (of_columns >= 0)
    return mask


def select(scores: Tensor, widths: Tensor, k: float) -> list[list[list[int]]]:
    """The indices ``h * K + m`` that each row keeps, ascending."""
    batch, heads, rows, num_cells = scores.shape
    chosen: list[list[list[int]]] = []
    for b in range(batch):
        chosen.append([])
        for i in range(rows):
            width, values = int(widths[b, i]), scores[b, :, i].double().flatten().tolist()
            count = min(max(round(heads * k * num_cells / width), 1), len(values)) if width > 0 else 0
            values = [-math.inf if math.isnan(x) else x for x in values]
            order = sorted(range(len(values)), key=lambda j: (-values[j], j))
            chosen[-1].append(sorted(order[:count]))
    return chosen


def bitset(chosen: list[list[list[int]]], heads: int, num_cells: int) -> Tensor:
    words = -(-heads * num_cells // 32)
    cells = torch.zeros(len(chosen), len(chosen[0]) if chosen else 0, words, dtype=torch.int32)
    for b, rows in enumerate(chosen):
        for i, row in enumerate(rows):
            for w in range(words):
                value = sum(1 << (j % 32) for j in row if j // 32 == w)
                cells[b, i, w] = value - (1 << 32) if value >= 1 << 31 else value
    return cells


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float | None = None,
    row_gain: Tensor | None = None,
    mix: Tensor | None = None,
    pooled: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense, in the tensors' dtype: out ``[B, Tq, H, Dv]`` and lse ``[B, H, Tq]``."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.where(mask, scale * (q @ k.mT), -math.inf)
    some = mask.any(-1, keepdim=True)
    lse = torch.where(some, torch.where(some, scores, 0.0).logsumexp(-1, keepdim=True), -math.inf)
    p = torch.where(mask, (scores - torch.where(some, lse, 0.0)).exp(), 0.0).to(v.dtype)
    context = p @ v
    if row_gain is not None:
        context = context * row_gain[..., None]
    if mix is not None and pooled is not None:
        context = mix[..., None] * context + (1 - mix[..., None]) * pooled.transpose(1, 2)
    return context.transpose(1, 2).to(v.dtype), lse[..., 0]


def features(x: Tensor, proj: Tensor, kind: str, eps: float, shift: Tensor | None = None) -> Tensor:
    factor = x.shape[-1] ** -0.25
    projected = factor * (x @ proj.T)
    if kind == "relu":
        return torch.clamp(projected, min=0) + eps
    exponent = projected - factor**2 * (x * x).sum(-1, keepdim=True) / 2
    if shift is not None:
        exponent = exponent - shift
    return len(proj) ** -0.5 * (torch.exp(exponent) + eps)


def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    state: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The quadratic form, in the tensors' dtype; states wider where the inputs have 16 bits."""
    wide = torch.float64 if q.dtype == F64 else torch.float32
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    weights = qh @ kh.mT
    if causal:
        weights = weights.tril()
    numerator, denominator = (weights @ vh).to(wide), weights.to(wide).sum(-1)
    total, total_norm = (kh.mT @ vh).to(wide), kh.to(wide).sum(2)
    if state is not None and norm is not None:
        numerator = numerator + qh.to(wide) @ state
        denominator = denominator + (qh.to(wide) @ norm[..., None])[..., 0]
        total, total_norm = total + state, total_norm + norm
    out = numerator / (denominator + eps)[..., None]
    return out.transpose(1, 2).to(q.dtype), total, total_norm
