# SPDX-License-Identifier: Apache-2.0
"""Poison and guard bands: memory a kernel gets is full of NaN, and what lies around it must stay as it was."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from .strategies import bits

BAND = 64  # elements before and after
POISON = {
    torch.bool: True,
    torch.float32: math.nan,
    torch.float16: math.nan,
    torch.bfloat16: math.nan,
    torch.float64: math.nan,
}


class Guards:
    """Tensors with guard bands, and a check that the bands are intact."""

    def __init__(self) -> None:
        self.allocated = 0
        self._bands: list[tuple[Tensor, Tensor]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
        numel = math.prod(shape)
        poison = POISON.get(dtype, 0x5A)
        buffer = torch.full((numel + 2 * BAND,), poison, dtype=dtype, device=device)
        bands = torch.cat([buffer[:BAND], buffer[BAND + numel :]])
        self._bands.append((buffer, bands.clone()))
        self.allocated += 1
        return buffer[BAND : BAND + numel].view(shape)

    def copy(self, x: Tensor) -> Tensor:
        """The same values, contiguous, in a guarded tensor."""
        if x.dtype == torch.float8_e4m3fn:
            return self.copy(bits(x)).view(x.dtype)
        guarded = self.empty(tuple(x.shape), x.dtype, x.device)
        return guarded.copy_(x)

    def check(self) -> None:
        for buffer, before in self._bands:
            now = torch.cat([buffer[:BAND], buffer[len(buffer) - BAND :]])
            same = (now == before) | (now.isnan() & before.isnan()) if now.is_floating_point() else now == before
            assert bool(same.all()), f"written outside a tensor of {len(buffer) - 2 * BAND} {buffer.dtype} elements"

    @contextlib.contextmanager
    def allocations(self) -> Iterator[None]:
        """Within the context what makes empty tensors hands out guarded, poisoned memory."""

        def shape_of(size: tuple[object, ...]) -> tuple[int, ...]:
            return tuple(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)

        def empty(*size: object, dtype: torch.dtype | None = None, device: object = None, **_: object) -> Tensor:
            return self.empty(shape_of(size), dtype or torch.get_default_dtype(), device or "cpu")

        def empty_like(x: Tensor, *, dtype: torch.dtype | None = None, **_: object) -> Tensor:
            return self.empty(tuple(x.shape), dtype or x.dtype, x.device)

        def new_empty(x: Tensor, *size: object, dtype: torch.dtype | None = None, **_: object) -> Tensor:
            return self.empty(shape_of(size), dtype or x.dtype, x.device)

        def new_empty_strided(
            x: Tensor, size: tuple[int, ...], stride: tuple[int, ...], *, dtype: torch.dtype
        ) -> Tensor:
            guarded = self.empty(tuple(size), dtype, x.device)
            assert guarded.stride() == tuple(stride), "an output that is not contiguous"
            return guarded

        with (
            mock.patch.object(torch, "empty", empty),
            mock.patch.object(torch, "empty_like", empty_like),
            mock.patch.object(Tensor, "new_empty", new_empty),
            mock.patch.object(Tensor, "new_empty_strided", new_empty_strided),
        ):
            yield
