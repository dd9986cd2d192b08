# SPDX-License-Identifier: Apache-2.0
"""Poison and guard bands: memory a kernel gets is full of NaN, and what lies around it must stay as it was, and, in
Triton's interpreter, is not even read."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch_kernels import _registry

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


def watch_interpreter() -> None:
    """From now on a kernel fails that reads or writes outside its tensors. A GPU may have no memory there."""
    if not _registry.interpreting_triton() or _registry.triton_version() is None:
        return
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    spans: list[tuple[int, int]] = []  # of the running kernel's tensors: the first byte, and that after the last

    def span(x: Tensor) -> tuple[int, int]:
        elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
        return x.data_ptr(), x.data_ptr() + elements * x.element_size()

    def convert(self: Any, args: Any, keywords: dict[str, Any], original: Any = executor._init_args_hst) -> Any:
        spans[:] = [span(x) for x in (*args, *keywords.values()) if isinstance(x, Tensor) and x.numel()]
        return original(self, args, keywords)

    def check(what: str, pointers: Any, mask: Any) -> None:
        first, last = (int(end) for end in _ends(pointers.data, mask.data))
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        if first <= last and not any(begin <= first and last + size <= end for begin, end in spans):
            near = min(spans, key=lambda x: abs(x[0] - first) + abs(x[1] - last))
            raise IndexError(f"{what} bytes {first - near[0]} to {last + size - near[0]} of {near[1] - near[0]}")

    def load(pointers: Any, mask: Any, *rest: Any, original: Any = builder.create_masked_load) -> Any:
        check("loads", pointers, mask)
        return original(pointers, mask, *rest)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any, original: Any = builder.create_masked_store) -> Any:
        check("stores", pointers, mask)
        return original(pointers, value, mask, *rest)

    executor._init_args_hst, builder.create_masked_load, builder.create_masked_store = convert, load, store


def _ends(pointers: Any, mask: Any) -> tuple[int, int]:
    """The lowest and the highest of the pointers whose mask is set; the other way round where there is none."""
    chosen = pointers[mask != 0]
    return (chosen.min(), chosen.max()) if chosen.size else (1, 0)
