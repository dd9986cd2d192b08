# SPDX-License-Identifier: Apache-2.0
"""The module of the SEA family."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_kernels import _checks
from torch_kernels.nn.sea_decoders import BidirectionalDecoder, CausalDecoder, History
from torch_kernels.nn.sea_performer import Performer, Rows
from torch_kernels.sea import running_mean, sea_attention, sea_select, sea_stretch

# Rows computed together where no gradients are wanted, so that what lies between the stages stays small: in a CPU's
# cache, and in a GPU's memory, where more rows share a launch.
CPU_ROWS, GPU_ROWS = 512, 8192


class SEAState(NamedTuple):
    """What a causal layer remembers of the tokens before. Beside keys and values its size does not grow."""

    k: Tensor  # [B, max_length, H, D], of which `length` count
    v: Tensor
    features: Tensor  # of the linear attention [B, H, m, 2D], float32, float64 in a float64 layer
    norm: Tensor  # [B, H, m]
    value_sum: Tensor  # [B, H, D], float64
    history: History  # the last rows that the convolutions saw
    length: Tensor  # tokens so far [B], int64, without padding
    filled: int  # tokens so far, padding included: no length is larger

    def select(self, sequences: Tensor) -> SEAState:
        """A copy of some sequences' states, in the order of the indices; beam search reorders with it."""
        k, v, features, norm, value_sum, first, second, length = (
            part[sequences] for part in (*self[:5], *self.history, self.length)
        )
        return SEAState(k, v, features, norm, value_sum, (first, second), length, self.filled)


class SEAttention(nn.Module):
    r"""Attention that is estimated in linear time first, then computed where the estimate is largest.

    1. A Performer averages positional values and values over the keys that a token sees.
    2. From these averages a small network estimates the attention of each row, compressed to K cells: cell m of a row
       that sees w keys stands for those from m w / K to (m + 1) w / K.
    3. Each row keeps the cells with the largest estimates, over all heads together, so many that about k keys remain
       per head, and softmax attention is computed over exactly those (:func:`torch_kernels.sea_attention`).
    4. Gates of each token and head weigh that, and mix it with an average of all values that the token sees.

    Time and memory are linear in T. A row with w <= k keeps all its keys: its attention is dense.

    Args:
        embed_dim: the size E of tokens.
        num_heads: H; the head size D = E / H is a multiple of 8 up to 128.
        num_cells: K, a multiple of 4. It need not grow with T.
        k: keys per row and head. The attribute ``k`` may be changed at any time, after training too.
        causal: whether a token sees itself and what comes before (SEA for OPT), or all tokens (SEA for BERT).
        num_features: random features m of the Performer; unless given ``D ln(D) / 8``, to the nearest multiple of 8.
        bias: whether the projections of tokens have one.
        device: of the parameters.
        dtype: of the parameters.

    ``layer(x [B, T, E])`` is a whole sequence. For decoding, ``state = layer.init_state(B, max_length)``; ``layer(x,
    state=state)`` returns (y, state) and can be called again with what follows; ``layer.step(x_t [B, 1, E], state)`` is
    one token more. All of them agree; in float32 on a GPU, where torch rounds what convolutions read to TF32 unless
    ``torch.backends.cudnn.allow_tf32`` is False, as far as those ten bits go.

    The choice of cells has no gradient: the estimate learns from :func:`sea_distillation_loss`, which compares the map
    in ``y, map = layer(x, return_map=True)`` with a teacher's attention.

    ``qkv_proj.weight`` has all queries' rows, then the keys', then the values'. ``performer.projection`` is a buffer;
    the paper redraws it every 1000 training steps, which is ``performer.redraw()``.

    Lee et al., *SEA: Sparse Linear Attention with Estimated Attention Mask*, arXiv 2310.01777. What differs from it:
    positional values of the causal layer are computed, where the paper trains a table of them, so that no length is the
    largest; padding has no influence, wherever it stands; the bidirectional layer's average has weights that sum to 1.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_cells: int = 256,
        k: float = 64,
        causal: bool = True,
        *,
        num_features: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "SEAttention"
        if num_heads < 1:
            _checks.fail(name, "num_heads", "at least 1", num_heads)
        if embed_dim % (8 * num_heads) or not 8 <= embed_dim // num_heads <= 128:
            expected = f"num_heads={num_heads} times a head size that is a multiple of 8 up to 128"
            _checks.fail(name, "embed_dim", expected, embed_dim)
        if num_cells < 4 or num_cells % 4:
            _checks.fail(name, "num_cells", "a positive multiple of 4", num_cells)
        if not 0 <= k < math.inf:
            _checks.fail(name, "k", "finite and at least 0", k)
        size = embed_dim // num_heads
        if num_features is None:
            num_features = max(8, 8 * round(size * math.log(size) / 64))
        if num_features < 1:
            _checks.fail(name, "num_features", "at least 1", num_features)

        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, size
        self.num_cells, self.k, self.causal = num_cells, k, causal
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv_proj = nn.Linear(embed_dim, 3 * embed_dim, bias, **options)
        self.performer = Performer(size, num_cells, num_features, causal, **options)
        self.encoder = nn.Sequential(
            nn.Linear(3 * size, 2 * size, **options), nn.LayerNorm(2 * size, **options), nn.GELU()
        )
        self.gates = nn.Linear(2 * size, 2, **options)
        decoder = CausalDecoder if causal else BidirectionalDecoder
        self.decoder = decoder(num_heads, 2 * size, num_cells, **options)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **options)

    def init_state(self, batch: int, max_length: int) -> SEAState:
        """The state of ``batch`` sequences before their first token, with room for max_length tokens, padding included.

        Raises:
            ValueError: the layer is not causal.
        """
        if not isinstance(self.decoder, CausalDecoder):
            _checks.fail("SEAttention.init_state", "the layer", "causal", "a bidirectional one")
        weight, heads, size = self.qkv_proj.weight, self.num_heads, self.head_dim
        features = self.performer.projection.shape[0]
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return SEAState(
            # A head's keys lie together: a row looks at many of one head.
            k=weight.new_zeros(batch, heads, max_length, size).transpose(1, 2),
            v=weight.new_zeros(batch, heads, max_length, size).transpose(1, 2),
            features=weight.new_zeros(batch, heads, features, 2 * size, dtype=wide),
            norm=weight.new_zeros(batch, heads, features, dtype=wide),
            value_sum=weight.new_zeros(batch, heads, size, dtype=torch.float64),
            history=self.decoder.init_history(batch),
            length=weight.new_zeros(batch, dtype=torch.int64),
            filled=0,
        )

    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        state: SEAState | None = None,
        return_map: bool = False,
    ) -> Any:
        """Whole sequences, or the next part of sequences whose state is given.

        Args:
            x: ``[B, T, E]``.
            padding_mask: bool ``[B, T]``, True where a token is padding. It may stand anywhere and has no influence:
                other tokens get what they would get without it. Padding gets 0.
            state: what came before, of a causal layer. Keys and values are written to places of it that are free; the
                rest is left as it is. No gradients are recorded.
            return_map: whether to return the estimated attention, too.

        Returns:
            y ``[B, T, E]``; with return_map (y, map), where map ``[B, H, T, K]`` is differentiable and has rows that
            sum to 1; with a state (y, state after x) or (y, map, state after x).
        """
        name, dims = "SEAttention", {"E": self.embed_dim}
        _checks.shape(name, dims, x=(x, "B T E"), padding_mask=(padding_mask, "B T"))
        _checks.dtype(name, (torch.bool,), padding_mask=padding_mask)
        if state is None:
            rows = CPU_ROWS if x.device.type == "cpu" else GPU_ROWS
            if not self.causal or dims["T"] <= rows or self._wants_gradients(x):
                y, cells, _ = self._forward(x, padding_mask, None)
            else:
                y, cells = self._in_parts(x, padding_mask, rows, return_map)
            return (y, cells) if return_map else y
        if not self.causal:
            _checks.fail(name, "state", "None in a bidirectional layer", "a state")
        _checks.shape(name, dims, state=(state.length, "B"))
        if state.filled + dims["T"] > state.k.shape[1]:
            room = f"room for T={dims['T']} tokens after {state.filled}"
            _checks.fail(name, "state", f"one with {room}", f"max_length={state.k.shape[1]}")
        with torch.no_grad():
            y, cells, after = self._forward(x, padding_mask, state)
        return (y, cells, after) if return_map else (y, after)

    def step(self, x_t: Tensor, state: SEAState) -> tuple[Tensor, SEAState]:
        """One token of each sequence, x_t ``[B, 1, E]``: (y, state after it), as the layer itself. No gradients."""
        _checks.shape("SEAttention.step", {"E": self.embed_dim}, x_t=(x_t, "B 1 E"))
        return self(x_t, state=state)

    def dense_attention(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Softmax attention of the layer's queries and keys ``[B, H, T, T]``, which distillation compares with the
        teacher's. Time and memory are quadratic in T. Rows of padding are 0."""
        name = "SEAttention.dense_attention"
        _checks.shape(name, {"E": self.embed_dim}, x=(x, "B T E"), padding_mask=(padding_mask, "B T"))
        q, k, _ = self._project(x)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        seen = seen.tril() if self.causal else seen
        if padding_mask is not None:
            seen = seen & ~(padding_mask[:, None, None, :] | padding_mask[:, None, :, None])
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * self.head_dim**-0.5
        # Rows that see nothing: finite first, so that their gradient is 0 and not NaN.
        return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~seen, 0.0)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_cells={self.num_cells}, k={self.k}, "
            f"causal={self.causal}, num_features={self.performer.projection.shape[0]}"
        )

    def _wants_gradients(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters()))

    @torch.no_grad()
    def _in_parts(self, x: Tensor, padding_mask: Tensor | None, rows: int, return_map: bool) -> tuple[Tensor, Tensor]:
        """Some rows after the others, as decoding does it."""
        state: SEAState | None = self.init_state(len(x), x.shape[1])
        outputs, maps = [], []
        for first in range(0, x.shape[1], rows):
            part = slice(first, first + rows)
            y, cells, state = self._forward(x[:, part], None if padding_mask is None else padding_mask[:, part], state)
            outputs.append(y)
            maps.append(cells if return_map else cells[:, :, :0])
        return torch.cat(outputs, 1), torch.cat(maps, 2)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of x ``[B, T, E]``: ``[B, T, H, D]`` each."""
        return self.qkv_proj(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)

    def _forward(
        self, x: Tensor, padding_mask: Tensor | None, state: SEAState | None
    ) -> tuple[Tensor, Tensor, SEAState | None]:
        if x.shape[1] == 0:  # torch has no convolutions of that
            return self.out_proj(x), x.new_zeros(len(x), self.num_heads, 0, self.num_cells), state
        rows = Rows.of(x, padding_mask, None if state is None else state.length)
        q, k, v = self._project(rows.pack(x))
        v = rows.cleared(v)
        carried = None if state is None else (state.features, state.norm)
        found, features, norm = self.performer(q, k, v, rows, carried)
        z = self.encoder(found)
        gain, mix = self.gates(z).sigmoid().permute(3, 0, 2, 1)

        lengths = None if padding_mask is None else rows.lengths
        if isinstance(self.decoder, CausalDecoder):
            scores, history = self.decoder(z, None if state is None else state.history, lengths)
        else:
            scores, history = self.decoder(z, lengths), None
        estimate = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        estimate = rows.cleared(estimate.transpose(1, 2)).transpose(1, 2)
        widths = rows.widths(self.causal)
        cells = sea_select(estimate.detach(), widths, k=self.k)

        keys, values, value_sum = k, v, None
        if not self.causal:
            pooled = _average(estimate, v, rows)
        elif state is None:
            pooled, _, _ = running_mean(v)
        else:
            pooled, value_sum, _ = running_mean(v, sum=state.value_sum, count=state.length)
            keys, values = state.k, state.v
            places = (torch.arange(len(x), device=x.device)[:, None], rows.positions)
            keys[places], values[places] = k, v
        out, _ = sea_attention(
            q, keys, values, cells, widths, num_cells=self.num_cells, row_gain=gain, mix=mix, pooled=pooled
        )
        y = rows.unpack(self.out_proj(out.flatten(-2)))
        estimate = rows.unpack(estimate.transpose(1, 2)).transpose(1, 2)
        if state is None or value_sum is None or history is None:
            return y, estimate, None
        length, filled = state.length + rows.lengths, state.filled + x.shape[1]
        return y, estimate, SEAState(keys, values, features, norm, value_sum, history, length, filled)


def _average(estimate: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """Values v ``[B, T, H, D]`` weighed as rows attend to them on average, by the estimate ``[B, H, T, K]``."""
    cells = estimate.sum(2, keepdim=True)
    weights = sea_stretch(cells, rows.lengths[:, None], length=v.shape[1])
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return torch.einsum("bhqj,bjhd->bqhd", weights.to(v.dtype), v)
