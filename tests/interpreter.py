# SPDX-License-Identifier: Apache-2.0
"""Rules of GPUs that Triton's interpreter does not know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from torch_kernels._registry import interpreting_triton, triton_version
from torch_kernels._triton import BLOCKS

from .backends import Backend


def least_of_product(left: Any, right: Any) -> tuple[int, int, int]:
    """Rows, columns, and what is summed over, at least. Triton 3.9 takes 8 of float32, 3.6 does not."""
    return 1, 1, 32 if left.scalar.primitive_bitwidth == 8 else 16


def be_strict() -> None:
    """From now on the interpreter refuses what a GPU would: small products, wide grids, addresses outside tensors."""
    if not interpreting_triton() or triton_version() is None:
        return
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    interpreter_builder.codegen_fns["min_dot_size"] = least_of_product
    set_grid_dim = interpreter_builder.set_grid_dim

    def checked(x: int, y: int, z: int) -> None:
        if max(y, z) > BLOCKS:
            raise ValueError(f"a grid of {x} x {y} x {z} blocks, but GPUs have at most {BLOCKS} along y and z")
        set_grid_dim(x, y, z)

    interpreter_builder.set_grid_dim = checked
    _stay_inside(GridExecutor, interpreter_builder)


def _stay_inside(executor: Any, builder: Any) -> None:
    """A kernel fails that loads or stores outside its tensors: a GPU may have no memory there."""
    spans: list[tuple[int, int]] = []  # of the running kernel's tensors: the first byte, and that after the last
    to_host, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store

    def span(x: Tensor) -> tuple[int, int]:
        elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
        return x.data_ptr(), x.data_ptr() + elements * x.element_size()

    def note_tensors(self: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        spans[:] = [span(x) for x in (*arguments, *keywords.values()) if isinstance(x, Tensor) and x.numel()]
        return to_host(self, arguments, keywords)

    def check(what: str, pointers: Any, mask: Any) -> None:
        chosen = pointers.data[mask.data != 0]
        if not chosen.size:
            return
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        first, end = int(chosen.min()), int(chosen.max()) + size
        if not any(begin <= first and end <= after for begin, after in spans):
            begin, after = min(spans, key=lambda x: abs(x[0] - first) + abs(x[1] - end), default=(0, 0))
            raise IndexError(f"{what} bytes {first - begin} to {end - begin} of {after - begin}")

    def checked_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        check("loads", pointers, mask)
        return load(pointers, mask, *rest)

    def checked_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("stores", pointers, mask)
        return store(pointers, value, mask, *rest)

    executor._init_args_hst, builder.create_masked_load, builder.create_masked_store = (
        note_tensors, checked_load, checked_store,
    )  # fmt: skip


@contextmanager
def fences_watched(backend: Backend) -> Iterator[None]:
    """Within, a program may load only after a barrier what it has stored: on a GPU another of its threads may have.
    For backends that are interpreted."""
    if not (backend.name == "triton" and backend.slow):
        yield
        return
    from triton.runtime.interpreter import interpreter_builder as builder

    stored: list[Any] = []
    load, store, next_program = builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx

    def checked_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        if stored and np.isin(pointers.data[mask.data], np.concatenate(stored)).any():
            raise RuntimeError("a program loads what it has stored, with no barrier between")
        return load(pointers, mask, *rest)

    def noted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        stored.append(pointers.data[mask.data].ravel())
        return store(pointers, value, mask, *rest)

    def from_new_program(*place: int) -> None:
        stored.clear()
        next_program(*place)

    watched = {
        "create_masked_load": checked_load, "create_masked_store": noted_store,
        "create_barrier": stored.clear, "set_grid_idx": from_new_program,
    }  # fmt: skip
    with mock.patch.multiple(builder, **watched):
        yield
