# SPDX-License-Identifier: Apache-2.0
"""The CPU's layout of int4 weights: blocks of 64 output features, each a stream along the input features.

A weight is [blocks, spans, 4096] bytes. A span is 128 columns; each of its octets of columns takes 256 bytes, 4 for
every feature of the block in order. csrc/cpu/nibbles.h says what the order of columns within the 4 bytes is good for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

VERSION = 1
FEATURES, SPAN, OCTET = 64, 128, 8
LOW, HIGH = [0, 4, 1, 5], [2, 6, 3, 7]  # the columns of an octet in the low and high nibbles of the 4 bytes


def shape(out_features: int, in_features: int) -> tuple[int, int, int]:
    return -(-out_features // FEATURES), -(-in_features // SPAN), FEATURES * SPAN // 2


def pack(q: Tensor) -> Tensor:
    """q uint8 [N, K] with values 0..15; padded with 8, the value of zero."""
    n, k = q.shape
    blocks, spans, _ = shape(n, k)
    q = pad(q, (0, spans * SPAN - k, 0, blocks * FEATURES - n), value=8)
    octets = q.view(blocks, FEATURES, spans * SPAN // OCTET, OCTET).transpose(1, 2)
    packed = octets[..., LOW] | octets[..., HIGH] << 4
    return packed.reshape(shape(n, k))


def unpack(weight: Tensor, out_features: int, in_features: int) -> Tensor:
    """The q that `pack` got."""
    blocks, spans, _ = weight.shape
    packed = weight.view(blocks, spans * SPAN // OCTET, FEATURES, OCTET // 2)
    octets = torch.empty(*packed.shape[:3], OCTET, dtype=torch.uint8, device=weight.device)
    octets[..., LOW] = packed & 15
    octets[..., HIGH] = packed >> 4
    q = octets.transpose(1, 2).reshape(blocks * FEATURES, spans * SPAN)
    return q[:out_features, :in_features].contiguous()
