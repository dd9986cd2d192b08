# SPDX-License-Identifier: Apache-2.0
"""What the SEA ops mean, in PyTorch one can read.

A row i of width w sees keys 0 .. w-1, in K cells: cell m owns the columns from v_m up to v_{m+1},

    v_m = (2 m w + K) // (2 K)

in exact integers; column j < w is in cell (K (2 j + 1) - 1) // (2 w). Arithmetic is in float64, so that only results
are rounded. Rows are computed one by one over exactly the columns that they keep, so nothing else has any influence.
Whatever widths hold, they count as at most the number of keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# ---- cells and columns ----


def boundaries(width: int, num_cells: int, device: torch.device | None = None) -> Tensor:
    """v_0 .. v_K of a row, int64."""
    cells = torch.arange(num_cells + 1, device=device)
    return (2 * cells * max(width, 0) + num_cells) // (2 * num_cells)


def cell_of_column(widths: Tensor, num_cells: int, length: int) -> Tensor:
    """The cell of each column ``[..., length]``, -1 from the row's width on."""
    columns = torch.arange(length, device=widths.device)
    widths = widths.long()[..., None]
    cells = (num_cells * (2 * columns + 1) - 1) // (2 * widths.clamp(min=1))
    return torch.where(columns < widths, cells, -1)


def unpack(cells: Tensor, num_heads: int, num_cells: int) -> Tensor:
    """A bitset ``[B, Tq, words]`` as bool ``[B, Tq, H, K]``."""
    bits = (cells[..., None] >> torch.arange(32, device=cells.device)) & 1
    return bits.flatten(-2)[..., : num_heads * num_cells].bool().unflatten(-1, (num_heads, num_cells))


def pack(kept: Tensor) -> Tensor:
    """bool ``[B, Tq, H, K]`` as a bitset ``[B, Tq, words]``."""
    bits = kept.flatten(-2).long()
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 32)).unflatten(-1, (-1, 32))
    words = (bits << torch.arange(32, device=kept.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def kept_columns(kept: Tensor, bounds: list[int], max_columns_per_cell: int) -> Tensor:
    """The columns, ascending, of the cells that a row keeps (bool ``[K]``)."""
    columns: list[int] = []
    for m in kept.nonzero().flatten().tolist():
        start, end = bounds[m], bounds[m + 1]
        count = min(end - start, max_columns_per_cell or end - start)
        columns += (end - 1 - t * (end - start) // count for t in reversed(range(count)))
    return torch.tensor(columns, dtype=torch.int64, device=kept.device)


def _rows(
    cells: Tensor, widths: Tensor, num_heads: int, num_cells: int, max_columns_per_cell: int, keys: int
) -> Iterator[tuple[tuple[int, int, int], Tensor]]:
    """(batch, row, head), in that order, and the columns that it keeps."""
    kept = unpack(cells, num_heads, num_cells)
    for b, of_rows in enumerate(widths.tolist()):
        for i, width in enumerate(of_rows):
            bounds = boundaries(min(width, keys), num_cells).tolist()
            for h in range(num_heads):
                yield (b, i, h), kept_columns(kept[b, i, h], bounds, max_columns_per_cell)


def sea_csr(
    cells: Tensor, widths: Tensor, num_heads: int, num_cells: int, max_columns_per_cell: int = 0
) -> tuple[Tensor, Tensor]:
    rows = _rows(cells, widths, num_heads, num_cells, max_columns_per_cell, 2**31 - 1)
    col = [columns for _, columns in rows]
    crow = torch.tensor([0, *map(len, col)], device=cells.device).cumsum(0)
    if int(crow[-1]) >= 2**31:
        raise ValueError(f"sea_csr: widths must give fewer than 2**31 columns in all, got {int(crow[-1])}")
    return crow.to(torch.int32), torch.cat([cells.new_empty(0, dtype=torch.int64), *col]).to(torch.int32)


def sea_stretch(x: Tensor, widths: Tensor, length: int, fill: float = 0.0) -> Tensor:
    cells = cell_of_column(widths.clamp(max=length), x.shape[3], length)[:, None].expand(*x.shape[:3], length)
    return torch.where(cells >= 0, x.gather(-1, cells.clamp(min=0)), fill).to(x.dtype)


def sea_stretch_backward(grad_out: Tensor, widths: Tensor, num_cells: int) -> Tensor:
    """Each cell's sum over its columns."""
    grad = torch.zeros((*grad_out.shape[:3], num_cells + 1), dtype=torch.float64, device=grad_out.device)
    cells = cell_of_column(widths.clamp(max=grad_out.shape[3]), num_cells, grad_out.shape[3])
    cells = torch.where(cells < 0, num_cells, cells)[:, None].expand(grad_out.shape)
    return grad.scatter_add_(-1, cells, grad_out.double())[..., :num_cells].to(grad_out.dtype)


# ---- selection ----


def budgets(widths: Tensor, num_heads: int, num_cells: int, k: float) -> Tensor:
    """How many cells each row keeps, over all its heads."""
    wanted = torch.tensor(num_heads * k * num_cells, dtype=torch.float64, device=widths.device)
    count = (wanted / widths.clamp(min=1).double()).round().clamp(1, num_heads * num_cells)
    return torch.where(widths > 0, count.long(), 0)


def sea_select(scores: Tensor, widths: Tensor, k: float) -> Tensor:
    heads, num_cells = scores.shape[1], scores.shape[3]
    flat = scores.transpose(1, 2).flatten(2)
    flat = torch.where(flat.isnan(), -math.inf, flat)
    order = flat.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.arange(heads * num_cells, device=scores.device) < budgets(widths, heads, num_cells, k)[..., None]
    return pack(torch.zeros_like(kept).scatter(-1, order, kept).unflatten(-1, (heads, num_cells)))


# ---- sparse attention ----


def sea_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cells: Tensor,
    widths: Tensor,
    num_cells: int,
    scale: float | None = None,
    max_columns_per_cell: int = 0,
    row_gain: Tensor | None = None,
    mix: Tensor | None = None,
    pooled: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, size = q.shape
    scale = size**-0.5 if scale is None else scale
    context = torch.zeros((batch, tokens, heads, v.shape[3]), dtype=torch.float64, device=q.device)
    lse = torch.full((batch, heads, tokens), -math.inf, dtype=torch.float32, device=q.device)
    for (b, i, h), columns in _rows(cells, widths, heads, num_cells, max_columns_per_cell, k.shape[1]):
        if len(columns):
            scores = scale * (k[b, columns, h].double() @ q[b, i, h].double())
            lse[b, h, i] = total = scores.logsumexp(0)
            if not total.isneginf():  # else the row attends to nothing
                context[b, i, h] = scores.softmax(0) @ v[b, columns, h].double()
    if row_gain is not None:
        context = row_gain.double().transpose(1, 2)[..., None] * context
    if mix is not None and pooled is not None:
        share = mix.double().transpose(1, 2)[..., None]
        context = share * context + (1 - share) * pooled.double()
    return context.to(q.dtype), lse


def sea_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cells: Tensor,
    widths: Tensor,
    num_cells: int,
    scale: float | None = None,
    max_columns_per_cell: int = 0,
    row_gain: Tensor | None = None,
    mix: Tensor | None = None,
    pooled: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """From probabilities computed again; out and lse would spare that at less precision."""
    batch, tokens, heads, size = q.shape
    scale = size**-0.5 if scale is None else scale
    grad_out = grad_out.double()
    ones = torch.ones((batch, tokens, heads), dtype=torch.float64, device=q.device)
    gain = ones if row_gain is None else row_gain.double().transpose(1, 2)
    share = ones if mix is None else mix.double().transpose(1, 2)
    along = torch.zeros_like(ones)  # grad_out along the context
    grad_context = (gain * share)[..., None] * grad_out
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v))
    for (b, i, h), columns in _rows(cells, widths, heads, num_cells, max_columns_per_cell, k.shape[1]):
        if not len(columns):
            continue
        query, keys, values = q[b, i, h].double(), k[b, columns, h].double(), v[b, columns, h].double()
        p = (scale * (keys @ query)).softmax(0)
        along[b, i, h] = p @ (values @ grad_out[b, i, h])
        grad_p = values @ grad_context[b, i, h]
        grad_scores = scale * p * (grad_p - p @ grad_p)
        grad_q[b, i, h] = grad_scores @ keys
        grad_k[b, columns, h] += grad_scores[:, None] * query
        grad_v[b, columns, h] += p[:, None] * grad_context[b, i, h]
    grads = [grad_q.to(q.dtype), grad_k.to(q.dtype), grad_v.to(q.dtype)]
    empty = q.new_empty(0)
    grads += [empty if row_gain is None else (share * along).transpose(1, 2).to(row_gain.dtype).contiguous()]
    if mix is None or pooled is None:
        return *grads, empty, empty.clone()
    grad_mix = gain * along - (grad_out * pooled.double()).sum(-1)
    grad_pooled = (1 - share)[..., None] * grad_out
    if pooled.shape[1] == 1:
        grad_pooled = grad_pooled.sum(1, keepdim=True)
    return *grads, grad_mix.transpose(1, 2).to(mix.dtype).contiguous(), grad_pooled.to(pooled.dtype)


# ---- the estimator ----


def favor_features(x: Tensor, proj: Tensor, kind: str, eps: float, shift: Tensor | None = None) -> Tensor:
    scaled = x.shape[-1] ** -0.25 * x.double()
    projected = scaled @ proj.double().T
    if kind == "relu":
        return (projected.relu() + eps).to(x.dtype)
    exponent = projected - scaled.square().sum(-1, keepdim=True) / 2
    if shift is not None:
        exponent = exponent - shift.double()
    return (proj.shape[0] ** -0.5 * (exponent.exp() + eps)).to(x.dtype)


def _float64(q: Tensor, v: Tensor, state: Tensor | None, norm: Tensor | None) -> tuple[Tensor, Tensor]:
    """A state ``[B, H, m, Dv]`` and a norm ``[B, H, m]``, zero where they are None."""
    shape = (q.shape[0], *q.shape[2:])
    state = q.new_zeros((*shape, v.shape[3])) if state is None else state
    norm = q.new_zeros(shape) if norm is None else norm
    return state.double(), norm.double()


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator ``[..., Dv]`` / denominator ``[...]``, 0 where that is 0."""
    return torch.where(denominator[..., None] == 0, 0.0, numerator / denominator[..., None])


def _states(
    k: Tensor, v: Tensor, before: tuple[Tensor, Tensor], causal: bool
) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """The state and norm that each token reads: the sums up to itself, or all of them."""
    state, norm = before
    tokens = range(k.shape[1])
    if causal:
        for t in tokens:
            key = k[:, t].double()
            state, norm = state + key[..., None] * v[:, t].double()[..., None, :], norm + key
            yield t, (state, norm)
        return
    keys = k.double().transpose(1, 2)
    everything = state + keys.mT @ v.double().transpose(1, 2), norm + keys.sum(2)
    yield from ((t, everything) for t in tokens)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    initial_state: Tensor | None = None,
    initial_norm: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    before = state, norm = _float64(q, v, initial_state, initial_norm)
    out = torch.zeros_like(v)
    for t, (state, norm) in _states(k, v, before, causal):
        query = q[:, t].double()
        out[:, t] = _quotient((query[..., None, :] @ state)[..., 0, :], (query * norm).sum(-1) + eps)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, state.to(dtype, copy=True), norm.to(dtype, copy=True)


def linear_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_state: Tensor | None = None,
    grad_norm: Tensor | None = None,
    causal: bool = True,
    initial_state: Tensor | None = None,
    initial_norm: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two walks: forward with the states for grad_q, backward with the gradients of states for grad_k and grad_v."""
    before = _float64(q, v, initial_state, initial_norm)
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
    grad_numerator = torch.zeros_like(v, dtype=torch.float64)
    grad_denominator = q.new_zeros(q.shape[:3], dtype=torch.float64)
    for t, (state, norm) in _states(k, v, before, causal):
        query, grad = q[:, t].double(), grad_out[:, t].double()
        denominator = (query * norm).sum(-1) + eps
        out = _quotient((query[..., None, :] @ state)[..., 0, :], denominator)
        grad_numerator[:, t] = _quotient(grad, denominator)
        grad_denominator[:, t] = -(grad_numerator[:, t] * out).sum(-1)
        grad_q[:, t] = (state @ grad_numerator[:, t, ..., None])[..., 0] + grad_denominator[:, t, :, None] * norm
    carry, carry_norm = _float64(q, v, grad_state, grad_norm)
    queries = q.double()
    if not causal:
        carry = carry + queries.transpose(1, 2).mT @ grad_numerator.transpose(1, 2)
        carry_norm = carry_norm + (queries * grad_denominator[..., None]).sum(1)
    for t in reversed(range(q.shape[1])):
        if causal:
            carry = carry + queries[:, t, ..., None] * grad_numerator[:, t, :, None]
            carry_norm = carry_norm + queries[:, t] * grad_denominator[:, t, :, None]
        grad_k[:, t] = (carry @ v[:, t].double()[..., None])[..., 0] + carry_norm
        grad_v[:, t] = (k[:, t].double()[..., None, :] @ carry)[..., 0, :]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    wanted = slice(0 if initial_state is None else None)
    return grad_q, grad_k, grad_v, carry.to(dtype)[wanted].clone(), carry_norm.to(dtype)[wanted].clone()


def running_mean(v: Tensor, sum: Tensor | None = None, count: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    if sum is None or count is None:
        sum = v.new_zeros((v.shape[0], *v.shape[2:]), dtype=torch.float64)
        count = v.new_zeros(v.shape[0], dtype=torch.int64)
    sums = torch.cat([sum[:, None], v.double()], 1).cumsum(1)
    tokens = torch.arange(1, v.shape[1] + 1, device=v.device)
    counts = (count[:, None] + tokens)[..., None, None]
    return (sums[:, 1:] / counts).to(v.dtype), sums[:, -1].clone(), count + v.shape[1]
