# SPDX-License-Identifier: Apache-2.0
"""Rules of GPUs that Triton's interpreter does not know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch_kernels._registry import interpreting_triton, triton_version
from torch_kernels._triton import BLOCKS


def least_of_product(left: Any, right: Any) -> tuple[int, int, int]:
    """Rows, columns, and what is summed over, at least. Triton 3.9 takes 8 of float32, 3.6 does not."""
    return 1, 1, 32 if left.scalar.primitive_bitwidth == 8 else 16


def be_strict() -> None:
    """From now on the interpreter refuses what a GPU would."""
    if not interpreting_triton() or triton_version() is None:
        return
    from triton.runtime.interpreter import interpreter_builder

    interpreter_builder.codegen_fns["min_dot_size"] = least_of_product
    set_grid_dim = interpreter_builder.set_grid_dim

    def checked(x: int, y: int, z: int) -> None:
        if max(y, z) > BLOCKS:
            raise ValueError(f"a grid of {x} x {y} x {z} blocks, but GPUs have at most {BLOCKS} along y and z")
        set_grid_dim(x, y, z)

    interpreter_builder.set_grid_dim = checked


@contextmanager
def fences_watched() -> Iterator[None]:
    """Within, a program may load only after a barrier what it has stored: on a GPU another of its threads may have."""
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

    builder.create_masked_load, builder.create_masked_store = checked_load, noted_store
    builder.create_barrier, builder.set_grid_idx = stored.clear, from_new_program
    try:
        yield
    finally:
        for name in ("create_masked_load", "create_masked_store", "create_barrier", "set_grid_idx"):
            delattr(builder, name)
