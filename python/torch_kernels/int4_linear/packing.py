# SPDX-License-Identifier: Apache-2.0
"""From the portable form of a weight to what the kernels read.

The portable form is in the order of the model's columns. Kernels want each group's columns next to each other, zero
points as offsets from 8, and the 4-bit values in the order in which their instructions use them. The last is a layout:
`layout_cpu` for the CPU kernels, `layout_gpu` for all others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_kernels import _registry
from torch_kernels.int4_linear import layout_cpu, layout_gpu

LAYOUTS = {"cpu": layout_cpu, "gpu": layout_gpu}
PACKING_GROUPS = (256, 128, 64, 32, 16)


class Packed(NamedTuple):
    """The arguments of the op ``int4_linear`` that come from the weight."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    in_features: int
    out_features: int
    group_size: int


def layout_for(device: torch.device) -> str:
    """The layout that the backend reads which serves tensors on the device, :func:`use_backend` respected."""
    forced = _registry._State.forced
    if forced in ("cuda", "triton", "emulator"):
        return "gpu"
    return "cpu" if forced == "cpu" or device.type == "cpu" else "gpu"


def to_nibbles(q: Tensor) -> Tensor:
    """``[N, K]`` values 0..15 to ``[N, ceil(K / 2)]`` bytes, even columns in the low half."""
    if q.shape[1] % 2:
        q = torch.nn.functional.pad(q, (0, 1))
    return q[:, 0::2] | (q[:, 1::2] << 4)


def from_nibbles(qweight: Tensor, in_features: int) -> Tensor:
    return torch.stack([qweight & 15, qweight >> 4], -1).flatten(1)[:, :in_features]


def pack(
    layout: str, qweight: Tensor, scales: Tensor, zeros: Tensor | None, g_idx: Tensor | None, in_features: int,
    group_size: int,
) -> Packed:  # fmt: skip
    """Packs the portable tensors of a weight for a layout."""
    q = from_nibbles(qweight, in_features)
    offsets = None if zeros is None else _offsets(zeros)
    perm = None
    if g_idx is not None and not _is_consecutive(g_idx, group_size, len(scales)):
        perm, groups, group_size = _sort_by_group(g_idx, scales, offsets)
        q = torch.where(perm < 0, 8, q[:, perm.clamp(min=0)]) if in_features else q
        scales = scales[groups]
        offsets = None if offsets is None else offsets[groups]
    weight = LAYOUTS[layout].pack(q)
    offsets = None if offsets is None else offsets.contiguous()
    return Packed(weight, scales.contiguous(), offsets, perm, in_features, len(q), group_size)


def unpack(layout: str, packed: Packed) -> Tensor:
    """The portable qweight again."""
    columns = packed.in_features if packed.perm is None else len(packed.perm)
    q = LAYOUTS[layout].unpack(packed.weight, packed.out_features, columns)
    if packed.perm is not None:
        q = q[:, packed.perm.argsort()[columns - packed.in_features :]]  # padding, -1, comes first
    return to_nibbles(q)


def _offsets(zeros: Tensor) -> Tensor | None:
    """zeros - 8: float16 holds integer ones exactly; None if all are 8, which spares the kernels a correction."""
    if zeros.dtype != torch.uint8:
        return zeros - 8
    if not zeros.is_meta and bool((zeros == 8).all()):
        return None
    return zeros.to(torch.float16) - 8


def _is_consecutive(g_idx: Tensor, group_size: int, groups: int) -> bool:
    """Whether g_idx says what holds without one."""
    if groups <= 1:
        return True
    if group_size == -1:
        return False
    natural = torch.arange(len(g_idx), device=g_idx.device) // group_size
    return groups == -(-len(g_idx) // group_size) and bool((g_idx == natural).all())


def _sort_by_group(g_idx: Tensor, scales: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """perm, the group of each packing group, and the packing group size.

    Columns are sorted by group, stable, and every group is filled up to whole packing groups. Large packing groups
    waste columns on filling up, small ones repeat scales: the size that takes the fewest bytes is best, because memory
    traffic is what decodes.
    """
    counts = torch.bincount(g_idx, minlength=len(scales)).cpu()
    per_group = scales.element_size() + (0 if offsets is None else offsets.element_size())

    def cost(size: int) -> float:
        packing_groups = int((-(-counts // size)).sum())
        return packing_groups * (size / 2 + per_group)

    size = min(PACKING_GROUPS, key=cost)
    pieces = -(-counts // size)
    first = (pieces.cumsum(0) - pieces) * size - (counts.cumsum(0) - counts)
    order = torch.argsort(g_idx, stable=True).cpu()
    place = torch.arange(len(order)) + first.repeat_interleave(counts)
    perm = torch.full((int(pieces.sum()) * size,), -1, dtype=torch.int32)
    perm[place] = order.to(torch.int32)
    groups = torch.arange(len(counts)).repeat_interleave(pieces)
    return perm.to(g_idx.device), groups.to(g_idx.device), size
