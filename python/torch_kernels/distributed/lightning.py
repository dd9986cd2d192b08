# SPDX-License-Identifier: Apache-2.0
"""Lightning attention over a sequence that is spread over ranks, after LASP-2.

What a rank needs of the tokens before its own is one state ``[H, K, V]`` per sequence, however many they were. So every
rank computes the state its part leaves behind from zero, all gather these, and each joins those before its own.
Backward is the same from the other end with the gradients of the states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from torch_kernels import _checks
from torch_kernels.lightning_attention import op as _op


def sequence_parallel_lightning(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    zigzag: tuple[int, int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """:func:`torch_kernels.lightning_attention` over a sequence of which each rank of a group has a part.

    Parts follow each other in the order of the ranks; they may differ in length, or be empty. Every rank must call it,
    and if one needs gradients all must, and all must go backward.

    Each direction takes one all-gather of states: a rank receives ``(W - 1) * B * H * K * V`` numbers of 4 bytes
    (twice that in zigzag order), whatever the length of the sequence. The lengths travel in another, of 8 bytes per
    chunk. Nothing synchronises with the device.

    Args:
        q: this rank's queries ``[B, T, Hq, K]``.
        k: keys ``[B, T, H, K]``.
        v: values ``[B, T, H, V]``.
        slopes: decay rates ``[H]``, the same on every rank.
        group: the ranks; None means all.
        zigzag: lengths of this rank's two chunks in zigzag order, where rank r of W has the r-th and the
            (2W - 1 - r)-th of 2W chunks, one after the other along T. It suits :func:`ring_attention` in the same
            model.
        scale: multiplies the output; None means 1.

    Returns:
        This rank's out ``[B, T, Hq, V]``. Gradients flow to q, k and v, and to slopes as this rank's share, so
        that the sum over the ranks is the whole (data parallelism sums or averages gradients of parameters anyway).

    Raises:
        ValueError, TypeError: as :func:`torch_kernels.lightning_attention`; ``zigzag`` does not sum to T.

    Sun et al., *LASP-2*, arXiv 2502.07563, which has no decay; here states decay by the lengths in between.
    """
    name = "sequence_parallel_lightning"
    _checks.is_tensor(name, q=q, k=k, v=v, slopes=slopes)
    _checks.shape(name, {}, q=(q, "B T Hq K"), k=(k, "B T H K"), v=(v, "B T H V"), slopes=(slopes, "H"))
    lengths = (q.shape[1],) if zigzag is None else tuple(zigzag)
    if zigzag is not None and (len(lengths) != 2 or min(lengths) < 0 or sum(lengths) != q.shape[1]):
        _checks.fail(name, "zigzag", f"two lengths that sum to T={q.shape[1]}", zigzag)
    return _SequenceParallel.apply(q, k, v, slopes, group, lengths, 1.0 if scale is None else scale)


class _SequenceParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        group: dist.ProcessGroup | None,
        lengths: tuple[int, ...],
        scale: float,
    ) -> Tensor:
        ranks = _Ranks(group, q.shape[0], lengths, slopes)
        shape = q.shape
        q, k, v = (_packed(x) for x in (q, k, v))
        states = _op.lightning_chunk_state(k, v, slopes, cu_seqlens=ranks.cu_seqlens)
        before = ranks.join(states)
        out, _ = _op.lightning_attention(
            q, k, v, slopes, initial_state=before, cu_seqlens=ranks.cu_seqlens, scale=scale
        )
        ctx.save_for_backward(q, k, v, slopes, before)
        ctx.ranks, ctx.scale = ranks, scale
        return out.view(*shape[:3], v.shape[3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, before = ctx.saved_tensors
        ranks: _Ranks = ctx.ranks
        shape = grad_out.shape[:2]
        grad_out = _packed(grad_out)
        grad_after = ranks.join(_state_gradient(q, grad_out, slopes, ranks, ctx.scale), backward=True)
        grads = _op.lightning_attention_backward(
            grad_out, q, k, v, slopes, grad_final_state=grad_after, initial_state=before,
            cu_seqlens=ranks.cu_seqlens, scale=ctx.scale,
        )  # fmt: skip
        return *(grad.view(*shape, *grad.shape[2:]) for grad in grads[:3]), grads[3], None, None, None


def _packed(x: Tensor) -> Tensor:
    """[B, T, H, D] as one row of packed sequences."""
    return x.reshape(1, -1, *x.shape[2:])


def _state_gradient(q: Tensor, grad_out: Tensor, slopes: Tensor, ranks: _Ranks, scale: float) -> Tensor:
    """What the outputs of each chunk say about the state before it: ``scale * sum_i e^(-slope (i + 1)) q_i^T do_i``.

    Read from the end, that is the state of keys q and values do, decayed once more. [N, H, K, V]
    """
    heads = len(slopes)
    groups = q.shape[2] // heads
    ends = q.shape[1] - ranks.cu_seqlens.flip(0)
    reversed_ = (x.flip(1) for x in (q, grad_out))
    states = _op.lightning_chunk_state(*reversed_, slopes.repeat_interleave(groups), cu_seqlens=ends).flip(0)
    return _decayed(states.unflatten(1, (heads, groups)).sum(2) * scale, slopes, 1)


def _decayed(state: Tensor, slopes: Tensor, tokens: Tensor | int) -> Tensor:
    """The state ``[..., H, K, V]`` after so many tokens without keys; +inf forgets it by selection."""
    rate = slopes.double()[:, None, None] * tokens
    forgotten = slopes.isposinf()[:, None, None] & (tokens != 0)
    return torch.where(forgotten, 0.0, torch.exp(-rate.nan_to_num(0.0)).to(state.dtype) * state)


class _Ranks:
    """Where this rank's chunks are in the sequence, and how states come from and go to the other chunks.

    With B sequences and C chunks per rank, states are ``[B * C, H, K, V]``, chunks innermost: as packed.
    """

    def __init__(self, group: dist.ProcessGroup | None, batch: int, lengths: Sequence[int], slopes: Tensor) -> None:
        self.group, self.batch, self.slopes = group, batch, slopes.detach()
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        own = torch.cat([torch.full((1,), n, dtype=torch.int64, device=slopes.device) for n in lengths])
        self.cu_seqlens = torch.nn.functional.pad(own.repeat(batch).cumsum(0), (1, 0))
        self.chunks = [
            (rank, 0) for rank in range(self.world)
        ]  # in the sequence's order: rank, and which of its chunks
        if len(lengths) == 2:
            self.chunks += [(rank, 1) for rank in reversed(range(self.world))]
        self.lengths = self._gather(own)

    def _gather(self, x: Tensor) -> Tensor:
        """x of every rank: ``[W, *x.shape]``."""
        gathered = x.new_empty((self.world * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=self.group)
        return gathered.view(self.world, *x.shape)

    def join(self, states: Tensor, backward: bool = False) -> Tensor:
        """From the state that each chunk adds, the state before each of this rank's chunks; backward: after each."""
        gathered = self._gather(states).unflatten(1, (self.batch, -1))
        order = self.chunks[::-1] if backward else self.chunks
        last = max(i for i, (rank, _) in enumerate(order) if rank == self.rank)
        carry = torch.zeros_like(gathered[0, :, 0])
        joined = torch.empty_like(gathered[0])
        for rank, chunk in order[: last + 1]:
            if rank == self.rank:
                joined[:, chunk] = carry
            carry = _decayed(carry, self.slopes, self.lengths[rank, chunk]) + gathered[rank, :, chunk]
        return joined.flatten(0, 1)
