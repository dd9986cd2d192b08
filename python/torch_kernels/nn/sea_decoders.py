# SPDX-License-Identifier: Apache-2.0
"""How SEA turns the encoder's output into scores of the cells: small convolutional networks. Heads are the image's
channels, tokens its rows, cells its columns. Channels lie together in memory, which convolutions are fastest with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 2  # of a head, in the causal decoder
HISTORY = 4  # rows before the first that a causal convolution sees

History = tuple[Tensor, Tensor]  # the last rows of the input of both convolutions, [B, 2H, HISTORY, K/4] each


class CausalDecoder(nn.Module):
    """Rows see themselves and rows before them: each of two convolutions has its taps at t - 4, t - 2 and t."""

    widen: Tensor

    def __init__(self, num_heads: int, size: int, num_cells: int, **options: Any) -> None:
        super().__init__()
        width, channels = num_cells // 4, CHANNELS * num_heads
        self.linear = nn.Linear(size, CHANNELS * width, **options)
        self.norm = nn.LayerNorm(width, **options)
        self.conv1 = nn.Conv2d(channels, channels, 3, dilation=2, padding=(HISTORY, 2), **options)
        self.conv2 = nn.Conv2d(channels, channels, 3, dilation=2, padding=(HISTORY, 2), **options)
        self.mix = nn.Linear(channels, num_heads, bias=False, **options)
        self.out_norm = nn.LayerNorm(num_cells, **options)
        # The paper repeats columns four times, mixes channels over one more column of zeros on either side, averages
        # down to K. Mixing can come first, the rest is one matrix, and a bias would be taken out by the norm.
        columns = F.interpolate(torch.eye(width)[None], scale_factor=4.0, mode="nearest")
        widen = F.adaptive_avg_pool1d(F.pad(columns, (1, 1)), num_cells)[0]
        device, dtype = options.get("device"), options.get("dtype")
        self.register_buffer("widen", widen.to(device=device, dtype=dtype))

    def init_history(self, batch: int) -> History:
        shape = (batch, self.conv1.in_channels, HISTORY, self.widen.shape[0])
        return self.widen.new_zeros(shape), self.widen.new_zeros(shape)

    def forward(
        self, z: Tensor, history: History | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, History | None]:
        """z ``[B, T, H, size]``, of whose rows lengths ``[B]`` count if given: scores ``[B, H, T, K]``, and the history
        after these rows if one is given."""
        x = _image(self.norm(self.linear(z).unflatten(-1, (CHANNELS, -1))))  # [B, 2H, T, K/4]
        first, second = (None, None) if history is None else history
        x, first = _causal_convolution(self.conv1, x, first, lengths)
        x, second = _causal_convolution(self.conv2, x.relu_(), second, lengths)
        x = self.mix(x.relu_().permute(0, 2, 3, 1)).transpose(2, 3)  # [B, T, H, K/4]
        scores = self.out_norm(x @ self.widen).transpose(1, 2)
        return scores, None if first is None or second is None else (first, second)


def _causal_convolution(
    conv: nn.Conv2d, x: Tensor, history: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x [B, C, T, W] and its convolution, after some rows or none; with them also the last rows of both."""
    rows = x.shape[2]
    if history is None:
        return conv(x)[:, :, :rows], None
    x = torch.cat([history.to(x.dtype), x], dim=2)
    y = F.conv2d(x, conv.weight, conv.bias, dilation=2, padding=(0, 2))
    if lengths is None:
        return y, x[:, :, rows:].clone()
    last = lengths[:, None] + torch.arange(HISTORY, device=x.device)
    return y, x.take_along_dim(last[:, None, :, None], dim=2)


class BidirectionalDecoder(nn.Module):
    """Three convolutions of 3 x 3, the first two over every other row."""

    def __init__(self, num_heads: int, size: int, num_cells: int, **options: Any) -> None:
        super().__init__()
        self.num_cells = num_cells
        channels = 4 * num_heads
        self.linear = nn.Linear(size, 2 * num_cells, **options)
        self.conv1 = nn.Conv2d(channels, channels, 3, stride=(2, 1), padding=1, **options)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, **options)
        self.conv3 = nn.Conv2d(channels, num_heads, 3, padding=1, **options)

    def forward(self, z: Tensor, lengths: Tensor | None = None) -> Tensor:
        """z ``[B, T, H, size]``, of whose rows lengths ``[B]`` count if given: scores ``[B, H, T, K]``."""
        rows = z.shape[1]
        x = _image(self.linear(z).unflatten(-1, (4, -1)))  # [B, 4H, T, K/2]
        x = self.conv1(_without_padding(x, lengths)).relu_()
        half = None if lengths is None else (lengths + 1) // 2
        x = self.conv2(_without_padding(x, half)).relu_()
        x = self.conv3(_without_padding(x, half).repeat_interleave(2, dim=2))[:, :, :rows]
        return F.interpolate(x, size=(rows, self.num_cells), mode="bilinear", align_corners=False)


def _image(x: Tensor) -> Tensor:
    """x ``[B, T, H, C, W]`` as ``[B, H C, T, W]``, whose channels lie together."""
    return x.flatten(2, 3).transpose(2, 3).contiguous().permute(0, 3, 1, 2)


def _without_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x [B, C, T, W] with zeros in rows that are none, as a convolution sees beyond the image."""
    if lengths is None:
        return x
    padding = torch.arange(x.shape[2], device=x.device) >= lengths[:, None]
    return x.masked_fill(padding[:, None, :, None], 0.0)
