# SPDX-License-Identifier: Apache-2.0
"""The module of the lightning attention family."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_kernels import _checks
from torch_kernels.lightning_attention import lightning_attention, lightning_attention_step_, lightning_slopes


def identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": identity,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}
NORMS = ("rms", "srms")


class LightningState(NamedTuple):
    """What a layer remembers of the tokens before; its size does not depend on how many there were."""

    kv: Tensor  # [N, H, K, V], float32, float64 in a float64 layer
    position: Tensor  # tokens so far [N], int64; read where the layer has positions (lrpe)

    def select(self, sequences: Tensor) -> LightningState:
        """A copy of some sequences' states, in the order of the indices; beam search reorders with it."""
        return LightningState(self.kv[sequences], self.position[sequences])


class LightningAttention(nn.Module):
    r"""The token mixer of TransNormerLLM and MiniMax-01 around :func:`torch_kernels.lightning_attention`.

    .. math::
        y = W_o \, (\mathrm{gate}(W_g x) \odot \mathrm{norm}(\mathrm{attention}(\phi(W_q x), \phi(W_k x), \phi(W_v x))))

    The defaults are MiniMax's. TransNormerLLM's layer l of L is ``LightningAttention(embed_dim, H,
    slopes=lightning_slopes(H, l, L), activate_values=False, lrpe=l == 0, norm="srms", gate="identity")``.

    Args:
        embed_dim: the size E of tokens.
        num_heads: H.
        head_dim: the size D of a head's keys and values, ``embed_dim // num_heads`` unless given; a multiple of 8 up to
            256, or 128 with lrpe.
        slopes: decay rates ``[H]``; :func:`torch_kernels.lightning_slopes` of kind ``"alibi"`` unless given.
        activation: of queries, keys and values: ``"silu"``, ``"relu"``, ``"sigmoid"``, ``"identity"`` or a function.
        activate_values: False leaves the values as they are.
        lrpe: a position encoding with learned frequencies theta ``[H, D]``: queries and keys become
            ``[x cos(theta p), x sin(theta p)]`` at position p, twice their size.
        norm: of all heads together: ``"rms"`` with a learned gain, ``"srms"`` without, or None.
        norm_eps: added to the mean square.
        gate: what the gate projection goes through, as ``activation``; None: no gate.
        scale: multiplies the attention; None means 1.
        bias: whether the projections have one.
        device: of the parameters.
        dtype: of the parameters.

    ``layer(x [B, T, E])`` is a whole sequence. With ``state = layer.init_state(B)``, ``layer(x, state)`` returns (y,
    state) and can be called again with what follows; ``layer.step(x_t [B, 1, E], state)`` is one token more. All of
    them agree.

    ``slopes`` is a buffer that stays float32 through ``.to(torch.bfloat16)`` and the like: rounded slopes make a
    slow head another one. ``qkv_proj.weight`` has the rows of a head together: its queries, keys, then values.

    Qin et al., *TransNormerLLM*, arXiv 2307.14995; MiniMax, *MiniMax-01*, arXiv 2501.08313.
    """

    slopes: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        slopes: Tensor | None = None,
        activation: str | Callable[[Tensor], Tensor] = "silu",
        activate_values: bool = True,
        lrpe: bool = False,
        norm: str | None = "rms",
        norm_eps: float = 1e-6,
        gate: str | Callable[[Tensor], Tensor] | None = "sigmoid",
        scale: float | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "LightningAttention"
        if num_heads < 1:
            _checks.fail(name, "num_heads", "at least 1", num_heads)
        if head_dim is None:
            if embed_dim % num_heads:
                _checks.fail(name, "embed_dim", f"a multiple of num_heads={num_heads} without head_dim", embed_dim)
            head_dim = embed_dim // num_heads
        largest = 128 if lrpe else 256
        if head_dim % 8 or not 8 <= head_dim <= largest:
            _checks.fail(name, "head_dim", f"a multiple of 8 up to {largest}", head_dim)
        if norm is not None and norm not in NORMS:
            _checks.fail(name, "norm", "rms, srms or None", repr(norm))
        slopes = lightning_slopes(num_heads, kind="alibi") if slopes is None else slopes
        _checks.is_tensor(name, slopes=slopes)
        _checks.shape(name, {"H": num_heads}, slopes=(slopes, "H"))

        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim
        self.activation, self.activate_values = _function(name, "activation", activation), activate_values
        self.gate = None if gate is None else _function(name, "gate", gate)
        self.scale = scale
        inner = num_heads * head_dim
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv_proj = nn.Linear(embed_dim, 3 * inner, bias, **options)
        self.norm = nn.RMSNorm(inner, norm_eps, norm == "rms", **options) if norm else None
        self.output_gate = None if gate is None else nn.Linear(embed_dim, inner, bias, **options)
        self.out_proj = nn.Linear(inner, embed_dim, bias, **options)
        self.theta: nn.Parameter | None = None
        if lrpe:
            frequencies = 10000.0 ** (-2 / inner * torch.arange(inner)).view(num_heads, head_dim)
            self.theta = nn.Parameter(frequencies.to(**options))
        self.register_buffer("slopes", slopes.detach().to(device=device, dtype=torch.float32, copy=True))

    @classmethod
    def from_minimax(cls, module: nn.Module) -> LightningAttention:
        """The layer that computes what transformers' ``MiniMaxLightningAttention`` does, with the same parameters.

        Its decays come from the layer's index again: their buffers there lose bits in lower precision.
        """
        from_module: Any = module
        heads, weight = from_module.num_attention_heads, from_module.out_proj.weight
        slopes = lightning_slopes(heads, from_module.layer_idx, from_module.num_hidden_layers, "minimax")
        layer = cls(
            weight.shape[0], heads, from_module.head_dim, slopes=slopes, activation=from_module.act_fn,
            norm_eps=from_module.norm.variance_epsilon, device="meta", dtype=weight.dtype,
        )  # fmt: skip
        for name in ("qkv_proj", "norm", "output_gate", "out_proj"):
            layer.get_submodule(name).weight = from_module.get_submodule(name).weight
        layer.slopes = slopes.to(weight.device)
        return layer.train(from_module.training)

    def init_state(self, batch: int) -> LightningState:
        """The state of ``batch`` sequences (with cu_seqlens: as many as are packed) before their first token."""
        device = self.slopes.device
        keys = self.head_dim if self.theta is None else 2 * self.head_dim
        dtype = torch.float64 if self._dtype == torch.float64 else torch.float32
        kv = torch.zeros(batch, self.num_heads, keys, self.head_dim, dtype=dtype, device=device)
        return LightningState(kv, torch.zeros(batch, dtype=torch.int64, device=device))

    def forward(self, x: Tensor, state: LightningState | None = None, *, cu_seqlens: Tensor | None = None) -> Any:
        """Whole sequences, or the next part of sequences whose state is given.

        Args:
            x: ``[B, T, E]``.
            state: what came before; it is left as it is.
            cu_seqlens: where packed sequences begin and end ``[N+1]``, int32 or int64; B must be 1.

        Returns:
            y ``[B, T, E]``; with a state (y, the state after x).
        """
        _checks.shape("LightningAttention", {"E": self.embed_dim}, x=(x, "B T E"))
        q, k, v = self._project(x, None if self.theta is None else _positions(x, state, cu_seqlens))
        out, kv = lightning_attention(
            q, k, v, self.slopes, initial_state=None if state is None else state.kv, cu_seqlens=cu_seqlens,
            scale=self.scale, output_final_state=state is not None,
        )  # fmt: skip
        y = self._finish(x, out)
        if state is None:
            return y
        lengths = x.shape[1] if cu_seqlens is None else cu_seqlens.diff()
        return y, LightningState(kv, state.position + lengths)

    @torch.no_grad()
    def step(self, x_t: Tensor, state: LightningState) -> tuple[Tensor, LightningState]:
        """One token of each sequence, x_t ``[B, 1, E]``: (y, state). The state is updated in place; no gradients."""
        _checks.shape("LightningAttention.step", {"E": self.embed_dim}, x_t=(x_t, "B 1 E"))
        q, k, v = (x[:, 0] for x in self._project(x_t, state.position[:, None]))
        out = lightning_attention_step_(q, k, v, state.kv, self.slopes, scale=self.scale)
        state.position.add_(1)
        return self._finish(x_t, out[:, None]), state

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"lrpe={self.theta is not None}, scale={self.scale}"
        )

    @property
    def _dtype(self) -> torch.dtype | None:
        """Of the parameters, unless the projections were quantised."""
        return self.out_proj.weight.dtype if isinstance(self.out_proj, nn.Linear) else None

    def _project(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x ``[B, T, E]`` at positions ``[B or 1, T]``, which lrpe needs."""
        qkv = self.qkv_proj(x).unflatten(-1, (self.num_heads, 3 * self.head_dim))
        if self.activate_values:
            q, k, v = self.activation(qkv).split(self.head_dim, -1)
        else:
            qk, v = qkv.split((2 * self.head_dim, self.head_dim), -1)
            q, k = self.activation(qk).split(self.head_dim, -1)
        if self.theta is not None and positions is not None:
            # Positions may reach millions: the angle is reduced before it becomes float32.
            angle = self.theta.double() * positions[..., None, None]
            angle = angle if x.dtype == torch.float64 else (angle % (2 * math.pi)).float()
            cos, sin = angle.cos(), angle.sin()
            q, k = (torch.cat([x * cos, x * sin], -1).to(v.dtype) for x in (q, k))
        return q, k, v

    def _finish(self, x: Tensor, out: Tensor) -> Tensor:
        out = out.flatten(-2)
        if self.norm is not None:
            out = self.norm(out.to(self._dtype or x.dtype))  # under autocast in full
        if self.gate is not None and self.output_gate is not None:
            out = self.gate(self.output_gate(x)) * out
        return self.out_proj(out)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LightningAttention:
        before = self.slopes
        super()._apply(fn, recurse)
        if self.slopes.dtype != before.dtype:
            self.slopes = before.to(self.slopes.device)
        return self


def _function(name: str, argument: str, given: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    function = ACTIVATIONS.get(given) if isinstance(given, str) else given
    if not callable(function):
        _checks.fail(name, argument, f"{', '.join(ACTIVATIONS)} or a function", repr(given))
    return function


def _positions(x: Tensor, state: LightningState | None, cu_seqlens: Tensor | None) -> Tensor:
    """Where the tokens of x ``[B, T, E]`` are in their sequences: ``[B or 1, T]``."""
    tokens = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        return tokens[None] if state is None else state.position[:, None] + tokens
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens.to(cu_seqlens.dtype), right=True)
    first = cu_seqlens[:-1] if state is None else cu_seqlens[:-1] - state.position
    return (tokens - first[sequence])[None]
