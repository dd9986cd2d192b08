# SPDX-License-Identifier: Apache-2.0
"""The part of SEA that looks at all keys: averages of positional values and values under a linear attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_kernels.sea import favor_features, linear_attention

RELU_EPS, EXP_EPS = 1e-3, 1e-4  # added to features
SLOWEST = 0.25  # the lowest frequency of positional values: radians per e-fold of the position


@dataclass(frozen=True)
class Rows:
    """Which tokens a call has. Padding is moved behind the others, so that it is nothing that these could see."""

    positions: Tensor  # of the moved tokens in their sequences, [B or 1, T]
    lengths: Tensor  # tokens that are no padding [B]
    padding: Tensor | None = None  # of the moved tokens [B, T]
    order: Tensor | None = None  # moved token i was token order[b, i]

    @classmethod
    def of(cls, x: Tensor, padding_mask: Tensor | None, before: Tensor | None) -> Rows:
        """x [B, T, E] and its padding, after as many tokens as before [B] says."""
        batch, count = x.shape[:2]
        positions = torch.arange(count, device=x.device)[None]
        lengths, padding, order = torch.full((batch,), count, device=x.device), None, None
        if padding_mask is not None:
            order = padding_mask.to(torch.uint8).argsort(dim=1, stable=True)
            lengths = padding_mask.logical_not().sum(1)
            padding = positions >= lengths[:, None]
        return cls(positions if before is None else positions + before[:, None], lengths, padding, order)

    def pack(self, x: Tensor) -> Tensor:
        """x [B, T, ...] with padding moved to the end, where it is 0."""
        return self.cleared(x if self.order is None else x.take_along_dim(_like(self.order, x), 1))

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse, 0 where there is padding."""
        x = self.cleared(x)
        return x if self.order is None else x.take_along_dim(_like(self.order.argsort(1), x), 1)

    def cleared(self, x: Tensor) -> Tensor:
        """x [B, T, ...], already moved, with 0 for padding."""
        return x if self.padding is None else x.masked_fill(_like(self.padding, x), 0)

    def widths(self, causal: bool) -> Tensor:
        """How many keys each row sees [B, T], int64."""
        shape = (len(self.lengths), self.positions.shape[1])
        return self.cleared((self.positions + 1 if causal else self.lengths[:, None]).expand(shape))


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *(1,) * (x.dim() - 2))


class Performer(nn.Module):
    """FAVOR+ with positive features over all keys, or with ReLU features over those up to a row."""

    projection: Tensor
    frequencies: Tensor

    def __init__(self, size: int, num_cells: int, num_features: int, causal: bool, **options: Any) -> None:
        super().__init__()
        self.causal = causal
        self.register_buffer("projection", torch.empty(num_features, size, **options))
        # The fastest makes half a turn over a cell at the end of its row.
        exponents = math.log(math.pi * num_cells / SLOWEST) * torch.linspace(0, 1, size // 2)
        self.register_buffer("frequencies", (SLOWEST * exponents.exp()).to(options.get("device")))
        self.redraw()

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draws the projection anew: rows that are orthogonal in blocks of D, and as long as Gaussian vectors are."""
        count, size = self.projection.shape
        device = self.projection.device if generator is None else generator.device
        options: dict[str, Any] = {"generator": generator, "device": device}
        lengths = torch.randn(count, size, **options).norm(dim=1, keepdim=True)
        if not self.projection.is_meta:
            blocks = torch.linalg.qr(torch.randn(-(-count // size), size, size, **options))[0]
            self.projection.copy_(blocks.mT.flatten(0, 1)[:count] * lengths)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v ``[B, T, H, D]``: averages of positional values and values ``[B, T, H, 2D]``, and the state."""
        if self.causal:
            q, k = (favor_features(x, self.projection, kind="relu", eps=RELU_EPS) for x in (q, k))
        else:
            q, k = self._positive_features(q, k, rows)
        places, relative = self._by_logarithm(rows, v) if self.causal else _by_rank(rows, v)
        initial_state, initial_norm = (None, None) if state is None else state
        average, features, norm = linear_attention(
            q, rows.cleared(k), torch.cat([rows.cleared(places.expand(v.shape)), v], -1),
            causal=self.causal, initial_state=initial_state, initial_norm=initial_norm,
        )  # fmt: skip
        of_places, of_values = average.chunk(2, -1)
        return torch.cat([relative(of_places), of_values], -1), features, norm

    def _positive_features(self, q: Tensor, k: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Exponentials, relative to the largest of a query, and to the largest of a sequence's and head's keys."""
        with torch.no_grad():
            exponent_q, exponent_k = (F.linear(x, self.projection) * x.shape[-1] ** -0.25 for x in (q, k))
            highest_q = exponent_q.amax(-1, keepdim=True)
            highest_k = exponent_k.amax(-1, keepdim=True)
            if rows.padding is not None:
                highest_k = highest_k.masked_fill(_like(rows.padding, highest_k), torch.finfo(k.dtype).min)
            highest_k = highest_k.amax(1, keepdim=True)
        return (
            favor_features(q, self.projection, kind="exp", eps=EXP_EPS, shift=highest_q),
            favor_features(k, self.projection, kind="exp", eps=EXP_EPS, shift=highest_k),
        )

    def _by_logarithm(self, rows: Rows, like: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Positions as sines and cosines of their logarithms, and what turns an average of them by the row's own.

        After that it tells of ratios: where, as a fraction of the keys that a row sees, those are that it attends to.
        """
        angles = rows.positions.add(1).double().log()[..., None] * self.frequencies.double()
        angles = angles if like.dtype == torch.float64 else angles.remainder(2 * math.pi).float()
        cos, sin = (x.to(like.dtype)[:, :, None] for x in (angles.cos(), angles.sin()))

        def relative(places: Tensor) -> Tensor:
            c, s = places.chunk(2, -1)
            return torch.cat([c * cos + s * sin, s * cos - c * sin], -1)

        return torch.cat([cos, sin], -1), relative

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Performer:
        before = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype != before.dtype:  # rounded they would be other ones
            self.frequencies = before.to(self.frequencies.device)
        return self


def _by_rank(rows: Rows, like: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The identity matrix of size D, stretched over the tokens of each sequence by linear interpolation."""
    size = like.shape[-1]
    last = (rows.lengths - 1).clamp(min=1)[:, None]
    y = rows.positions.to(torch.float64) * (size - 1) / last
    hat = 1 - (y[..., None] - torch.arange(size, device=y.device)).abs()
    return hat.clamp(min=0).to(like.dtype)[:, :, None], lambda places: places
