# SPDX-License-Identifier: Apache-2.0
"""Rules of GPUs that Triton's interpreter does not know."""

from __future__ import annotations

from typing import Any

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
