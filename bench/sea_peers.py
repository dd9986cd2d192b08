# SPDX-License-Identifier: Apache-2.0
"""What SEA's attention and selection are measured on, and what they are held against."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Call, Inputs

SMOOTH = 16  # rows over which the map changes
CHECKED = 32  # rows, spread over all, that are held against the truth


@dataclasses.dataclass(frozen=True)
class Workload:
    """OPT-125M's, unless told otherwise."""

    tokens: int
    heads: int = 12
    size: int = 64
    cells: int = 256
    k: int = 64
    dtype: torch.dtype = torch.float32
    rough: bool = False

    @property
    def name(self) -> str:
        return f"t{self.tokens}-{short(self.dtype)}{'-rough' if self.rough else ''}"

    @property
    def width(self) -> int:
        return self.heads * self.size

    @property
    def features(self) -> int:
        """Of the layer's Performer."""
        return max(8, 8 * round(self.size * math.log(self.size) / 64))

    @property
    def budgets(self) -> torch.Tensor:
        """How many cells each row keeps."""
        widths = torch.arange(1, self.tokens + 1, dtype=torch.float64)
        return (self.heads * self.k * self.cells / widths).round().clamp(1, self.heads * self.cells)

    @property
    def pairs(self) -> int:
        """Of queries and keys that attention is computed over, to within the rounding of cells to keys."""
        widths = torch.arange(1, self.tokens + 1, dtype=torch.float64)
        return int((self.budgets * widths / self.cells).sum())

    def tokens_of(self, seed: int, device: str) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        shape = (1, self.tokens, self.width)
        return {"x": torch.randn(shape, generator=generator, device=device, dtype=self.dtype)}

    def map_of(self, seed: int, device: str) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        rows = self.tokens if self.rough else -(-self.tokens // SMOOTH) + 1
        noise = torch.randn(1, self.heads, rows, self.cells, generator=generator, device=device)
        if not self.rough:
            noise = F.interpolate(noise, size=(self.tokens, self.cells), mode="bilinear")
        widths = torch.arange(1, self.tokens + 1, device=device)[None]
        return {"map": (3 * noise).softmax(-1), "widths": widths}

    def make_inputs(self, seed: int, device: str) -> Inputs:
        from torch_kernels import sea_select

        of_map = self.map_of(seed, device)
        generator = torch.Generator(device).manual_seed(seed + 1)
        shape = (3, 1, self.tokens, self.heads, self.size)
        q, k, v = torch.randn(shape, generator=generator, device=device, dtype=self.dtype).unbind()
        cells = sea_select(of_map["map"], of_map["widths"], k=self.k)
        return {"q": q, "k": k, "v": v, "cells": cells, "widths": of_map["widths"]}


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def checked_rows(inputs: Inputs, output: torch.Tensor) -> torch.Tensor:
    return output[:, :: max(1, output.shape[1] // CHECKED)]


def heads_first(inputs: Inputs) -> list[torch.Tensor]:
    return [inputs[name].transpose(1, 2).contiguous() for name in "qkv"]


# ---- attention over the cells that were kept ----


def unpacked(workload: Workload, cells: torch.Tensor) -> torch.Tensor:
    """A bitset [1, T, words] as bool [1, T, H, K]."""
    bits = (cells[..., None] >> torch.arange(32, device=cells.device, dtype=torch.int32)) & 1
    flat = bits.flatten(-2)[..., : workload.heads * workload.cells].bool()
    return flat.unflatten(-1, (workload.heads, workload.cells))


def cell_of(workload: Workload, widths: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The cell that a column is in, in exact integers; only of columns below the width."""
    return (workload.cells * (2 * columns + 1) - 1) // (2 * widths)


def attention_truth(workload: Workload, inputs: Inputs) -> torch.Tensor:
    """The checked rows in float64."""
    widths, bits = (checked_rows(inputs, inputs[name]) for name in ("widths", "cells"))
    q, k, v = (x.double() for x in (checked_rows(inputs, inputs["q"]), inputs["k"], inputs["v"]))
    columns = torch.arange(workload.tokens, device=q.device)
    cell = cell_of(workload, widths[0, :, None], columns).clamp(max=workload.cells - 1)[None, :, None]
    kept = unpacked(workload, bits).gather(-1, cell.expand(-1, -1, workload.heads, -1))
    kept &= (columns < widths[..., None])[:, :, None]
    scores = torch.einsum("bihd,bjhd->bihj", q, k) * workload.size**-0.5
    probabilities = scores.masked_fill(~kept, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bihj,bjhd->bihd", probabilities, v)


def only_checked(workload: Workload, inputs: Inputs, output: torch.Tensor) -> torch.Tensor:
    return output if output.shape[1] < workload.tokens else checked_rows(inputs, output)


def sdpa(inputs: Inputs) -> Call:
    """Causal attention over all keys: another function, which users would call otherwise."""
    q, k, v = heads_first(inputs)
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


@functools.cache
def compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(workload: Workload, inputs: Inputs) -> Call:
    """flex_attention over the same keys. The block mask is ready: making it takes longer than attention does."""
    from torch.nn.attention.flex_attention import create_block_mask

    kept = unpacked(workload, inputs["cells"])[0]  # [T, H, K]
    cells = workload.cells

    def mask(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        cell = (cells * (2 * j + 1) - 1) // (2 * (i + 1))
        return (j <= i) & kept[i, h, cell.clamp(max=cells - 1)]

    count, device = workload.tokens, inputs["q"].device
    blocks = create_block_mask(mask, 1, workload.heads, count, count, device=device.type)
    q, k, v = heads_first(inputs)
    return lambda: compiled_flex()(q, k, v, block_mask=blocks).transpose(1, 2)


def csr(workload: Workload, inputs: Inputs) -> Call:
    """Products sampled at the entries of a ready sparse matrix, a softmax over each row, and another product. Rows are
    tokens and heads, much as in the paper's FlatCSR."""
    import torch_kernels

    heads, count, size = workload.heads, workload.tokens, workload.size
    crow, col = torch_kernels.sea_csr(
        inputs["cells"], inputs["widths"], num_heads=heads, num_cells=workload.cells
    )  # rows in the order of (token, head)
    lengths = crow.diff()
    row = torch.arange(len(lengths), device=crow.device).repeat_interleave(lengths)
    col = col + (row % heads * count).to(col.dtype)
    crow, col, shape = crow.long(), col.long(), (count * heads, heads * count)
    q = inputs["q"].reshape(-1, size) * size**-0.5
    k, v = (inputs[name].transpose(1, 2).reshape(-1, size) for name in "kv")
    pattern = torch.sparse_csr_tensor(crow, col, torch.zeros(len(col), dtype=q.dtype, device=q.device), shape)

    def call() -> torch.Tensor:
        scores = torch.sparse.sampled_addmm(pattern, q, k.mT, beta=0.0).values()
        highest = scores.new_full((len(q),), -torch.inf).scatter_reduce_(0, row, scores, "amax")
        weights = (scores - highest[row]).exp_()
        weights /= torch.zeros_like(highest).index_add_(0, row, weights)[row]
        return (torch.sparse_csr_tensor(crow, col, weights, shape) @ v).view(1, count, heads, size)

    return call


# ---- selection ----


def select_torch(workload: Workload, inputs: Inputs) -> Call:
    """topk of as many as any row keeps, ranks scattered back and compared, as in the authors' code."""
    scores, budgets = inputs["map"], workload.budgets.to(inputs["map"].device)[None, :, None]
    most = int(budgets.max())
    ranks = torch.arange(most, device=scores.device)

    def call() -> torch.Tensor:
        flat = scores.transpose(1, 2).flatten(2)
        best = flat.topk(most, dim=-1).indices
        return torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, best, ranks < budgets)

    return call


def select_truth(workload: Workload, inputs: Inputs) -> torch.Tensor:
    flat = checked_rows(inputs, inputs["map"].transpose(1, 2)).flatten(2)
    budgets = checked_rows(inputs, workload.budgets[None].to(flat.device))[..., None]
    order = flat.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.arange(flat.shape[-1], device=flat.device) < budgets
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def selected(workload: Workload, inputs: Inputs, output: torch.Tensor) -> torch.Tensor:
    output = only_checked(workload, inputs, output)
    return unpacked(workload, output).flatten(2) if output.dtype == torch.int32 else output
