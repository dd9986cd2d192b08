# SPDX-License-Identifier: Apache-2.0
"""What SEA layers learn from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_kernels import _checks
from torch_kernels.nn.sea_performer import Rows
from torch_kernels.sea import sea_stretch

UNSEEN = -1e30  # a logarithm of no probability that is finite, so that gradients are


def sea_distillation_loss(
    map: Tensor,
    teacher: Tensor,
    *,
    student: Tensor | None = None,
    outputs: Iterable[tuple[Tensor, Tensor]] = (),
    causal: bool = True,
    padding_mask: Tensor | None = None,
    kl_weight: float = 0.1,
) -> Tensor:
    r"""The loss by which an :class:`SEAttention` learns to estimate a teacher's attention.

    .. math::
        \lambda \, \mathrm{KL}(A \| \hat A) + \mathrm{MSE}(A, \hat A)
        + \lambda \, \mathrm{KL}(A \| S) + \mathrm{MSE}(A, S) + \sum \mathrm{MSE}(\mathrm{outputs})

    with the teacher's attention A, the map stretched over the keys that each row sees :math:`\hat A`, and the student's
    own dense attention S. Divergences are means over rows, heads and sequences, squared errors over all entries. Time
    and memory are quadratic in T. A model adds its task's loss and the divergence of its predictions.

    Args:
        map: ``[B, H, T, K]`` of ``layer(x, return_map=True)``.
        teacher: attention probabilities ``[B, H, T, T]``.
        student: ``layer.dense_attention(x)`` ``[B, H, T, T]``; None leaves its part out.
        outputs: pairs of tensors, the student's and the teacher's, such as outputs of the layer or hidden states.
        causal: as the layer.
        padding_mask: as the layer was given; padding does not count. Not for outputs.
        kl_weight: :math:`\lambda`.

    Returns:
        The loss, a scalar.
    """
    name = "sea_distillation_loss"
    dims: dict[str, int] = {}
    _checks.shape(
        name, dims, map=(map, "B H T K"), teacher=(teacher, "B H T T"), student=(student, "B H T T"),
        padding_mask=(padding_mask, "B T"),
    )  # fmt: skip
    _checks.dtype(name, (torch.bool,), padding_mask=padding_mask)
    rows = Rows.of(map[:, 0], padding_mask, None)
    widths, teacher = rows.widths(causal), _packed(teacher.detach(), rows)
    smallest = torch.finfo(map.dtype).tiny
    logarithms = rows.pack(map.transpose(1, 2)).transpose(1, 2).clamp(min=smallest).log()
    stretched = sea_stretch(logarithms, widths, length=dims["T"], fill=UNSEEN).log_softmax(-1)
    loss = _difference(stretched, teacher, widths, kl_weight)
    if student is not None:
        attention = _packed(student, rows)
        loss = loss + _difference(attention.clamp(min=smallest).log(), teacher, widths, kl_weight)
    for ours, theirs in outputs:
        loss = loss + F.mse_loss(ours, theirs.detach())
    return loss


def _packed(attention: Tensor, rows: Rows) -> Tensor:
    """attention ``[B, H, T, T]`` with padding moved behind the other rows and columns."""
    columns = rows.pack(attention.permute(0, 3, 1, 2))  # [B, columns, H, rows]
    return rows.pack(columns.permute(0, 3, 2, 1)).transpose(1, 2)


def _difference(logarithms: Tensor, teacher: Tensor, widths: Tensor, kl_weight: float) -> Tensor:
    """Of attention, given by its logarithms, and the teacher's, both ``[B, H, T, T]``, in the keys that rows see."""
    seen = torch.arange(teacher.shape[-1], device=widths.device) < widths[:, None, :, None]
    heads, teacher = teacher.shape[1], teacher.to(logarithms.dtype)
    divergence = torch.xlogy(teacher, teacher) - teacher * logarithms
    error = (logarithms.exp() - teacher).square()
    count_of_rows, count = ((widths > 0).sum() * heads).clamp(min=1), (widths.sum() * heads).clamp(min=1)
    kl = torch.where(seen, divergence, 0.0).sum() / count_of_rows
    return kl_weight * kl + torch.where(seen, error, 0.0).sum() / count
