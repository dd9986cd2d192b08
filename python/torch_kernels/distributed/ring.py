# SPDX-License-Identifier: Apache-2.0
"""Causal softmax attention over a sequence that is spread over ranks: keys and values go round, queries stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torch_kernels import _checks
from torch_kernels.tree_attention import merge_attention_states

aten = torch.ops.aten


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup | None = None, *, scale: float | None = None
) -> Tensor:
    r"""Causal softmax attention over a sequence of which each rank of a group has a part in zigzag order.

    Of 2W chunks, rank r of W has the r-th and the (2W - 1 - r)-th (:func:`zigzag_shard` takes them). Keys and values
    go round the ring. In every step but the first, a rank either attends with all its queries to the first chunk of
    what came, or with its second chunk to both: always half a square, without a mask, so that all ranks take the
    same time. Partial results are joined by :func:`torch_kernels.merge_attention_states`. While a step is computed,
    the next keys and values are on their way.

    **Communication.** With T tokens in all, a rank sends :math:`2 B T H_k D \frac{W-1}{W}` numbers in k's dtype
    forward; backward the same again, and :math:`2 B T H_k D` float32 numbers of gradients that follow their keys. In
    bfloat16 that is at most :math:`4 B T H_k D` bytes forward and :math:`12 B T H_k D` backward, whatever W is.
    Forward it is hidden as long as a step, :math:`B H_q D (T/W)^2` multiply-adds, takes longer than its
    :math:`2 B H_k D \, T/W` numbers on the wire: while a rank's part is long.

    Args:
        q: this rank's queries ``[B, T/W, Hq, D]``, float32, float16 or bfloat16; the same even number of tokens on
            every rank.
        k: keys ``[B, T/W, Hk, D]``, in q's dtype; Hq is a multiple of Hk.
        v: values, shaped like k.
        group: the ranks; None means all.
        scale: of the scores; None means ``1 / sqrt(D)``.

    Returns:
        This rank's out ``[B, T/W, Hq, D]``. Gradients flow to q, k and v; if one rank needs them all must, and all
        must go backward. Partial results are kept in float32 and rounded once.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device.

    Li et al., *DistFlashAttn* (LightSeq), arXiv 2310.03294; Liu et al., *Ring Attention*, arXiv 2310.01889. The order
    is that of zigzag ring attention and of PyTorch's context parallelism.
    """
    name = "ring_attention"
    _checks.is_tensor(name, q=q, k=k, v=v)
    dims: dict[str, int] = {}
    _checks.shape(name, dims, q=(q, "B T Hq D"), k=(k, "B T Hk D"), v=(v, "B T Hk D"))
    _checks.dtype(name, (torch.float32, torch.float16, torch.bfloat16), q=q)
    _checks.dtype(name, (q.dtype,), k=k, v=v)
    _checks.same_device(name, q, k=k, v=v)
    if dims["T"] % 2:
        _checks.fail(name, "q", "an even number of tokens", dims["T"])
    if dims["Hk"] == 0 or dims["Hq"] % dims["Hk"]:
        _checks.fail(name, "Hq", f"a multiple of Hk={dims['Hk']}", dims["Hq"])
    return _RingAttention.apply(q, k, v, group, dims["D"] ** -0.5 if scale is None else scale)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup | None, scale: float) -> Tensor:
        ring = _Ring(group)
        kv = torch.stack([k, v])
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        lse = out.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
        for step in range(ring.world if q.numel() else 0):
            arriving = ring.pass_on(kv) if step < ring.world - 1 else None
            rows, keys = ring.meeting(step, q.shape[1])
            part, part_lse = block_attention(q[:, rows], kv[:, :, keys], causal=step == 0, scale=scale)
            out[:, rows], lse[:, :, rows] = merge_attention_states(
                out[:, rows], lse[:, :, rows], part.float(), part_lse
            )
            kv = kv if arriving is None else arriving()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring, ctx.scale = ring, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        ring: _Ring = ctx.ring
        kv = torch.stack([k, v])
        grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        grad_kv = torch.zeros(kv.shape, dtype=torch.float32, device=q.device)
        arriving_grad: Callable[[], Tensor] | None = None
        for step in range(ring.world if q.numel() else 0):
            arriving = ring.pass_on(kv) if step < ring.world - 1 else None
            rows, keys = ring.meeting(step, q.shape[1])
            part_q, part_kv = block_attention_backward(
                grad_out[:, rows], q[:, rows], kv[:, :, keys], out[:, rows], lse[:, :, rows], causal=step == 0,
                scale=ctx.scale,
            )  # fmt: skip
            grad_q[:, rows] += part_q
            if arriving_grad is not None:
                grad_kv = arriving_grad()  # of the keys at hand, from the ranks that had them before
            grad_kv[:, :, keys] += part_kv
            arriving_grad = ring.pass_on(grad_kv)  # after the last step, home
            kv = kv if arriving is None else arriving()
        grad_kv = grad_kv if arriving_grad is None else arriving_grad()
        return grad_q.to(q.dtype), *grad_kv.to(k.dtype), None, None


class _Ring:
    """Neighbours of this rank, and which queries meet which keys."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group: dist.ProcessGroup = group or dist.distributed_c10d._get_default_group()
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)

    def pass_on(self, x: Tensor) -> Callable[[], Tensor]:
        """Begins to send x to the next rank; what the previous one sends is the result of the function returned."""
        if self.world == 1:
            return lambda: x
        arriving = torch.empty_like(x)
        following, previous = (
            dist.get_global_rank(self.group, (self.rank + offset) % self.world) for offset in (1, -1)
        )
        transfers = dist.batch_isend_irecv([
            dist.P2POp(dist.isend, x, following, self.group), dist.P2POp(dist.irecv, arriving, previous, self.group),
        ])  # fmt: skip

        def wait() -> Tensor:
            for transfer in transfers:
                transfer.wait()
            x.numel()  # it must outlive its transfer
            return arriving

        return wait

    def meeting(self, step: int, tokens: int) -> tuple[slice, slice]:
        """The queries that see something of the keys at hand in a step, and which of these they see."""
        first, second = slice(0, tokens // 2), slice(tokens // 2, tokens)
        source = (self.rank - step) % self.world
        if source == self.rank:
            return slice(0, tokens), slice(0, tokens)  # one after the other, so causal as they stand
        return (slice(0, tokens), first) if source < self.rank else (second, slice(0, tokens))


# ---- attention of one block, by PyTorch's kernels: torch.nn.functional keeps their log-sum-exp to itself ----


def _by_heads(kv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """[2, B, T, Hk, D] as k and v [B, heads, T, D], each key head once per query head."""
    k, v = kv.repeat_interleave(heads // kv.shape[3], dim=3).transpose(2, 3)
    return k, v


def block_attention(q: Tensor, kv: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, Tq, Hq, D], kv [2, B, Tk, Hk, D] -> out like q, and the log-sum-exp [B, Hq, Tq] in float32."""
    k, v = _by_heads(kv, q.shape[2])
    q = q.transpose(1, 2)
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    elif q.dtype == torch.float32:  # the kernel that has it; it uses TF32 only where torch allows that everywhere
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out.transpose(1, 2), lse[:, :, : q.shape[2]]


def block_attention_backward(
    grad_out: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """With out and lse over all keys: the gradient of q, and this block's part of those of k and v."""
    k, v = _by_heads(kv, q.shape[2])
    grad_out, q, out = (x.transpose(1, 2) for x in (grad_out, q, out))
    lse = lse.contiguous()
    if q.device.type == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    elif q.dtype == torch.float32:
        lse = F.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
        seed = torch.zeros((), dtype=torch.int64)  # of a dropout that there is not
        grads = aten._scaled_dot_product_efficient_attention_backward(
            grad_out, q, k, v, None, out, lse, seed, seed, 0.0, [True, True, True, False], causal, scale=scale
        )
    else:
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        grads = aten._scaled_dot_product_flash_attention_backward(
            grad_out, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, seed, scale=scale
        )
    grad_q, *grad_kv = (grad.transpose(1, 2) for grad in grads[:3])
    groups = (kv.shape[3], q.shape[1] // kv.shape[3])
    return grad_q, torch.stack(grad_kv).unflatten(3, groups).sum(4, dtype=torch.float32)
