# SPDX-License-Identifier: Apache-2.0
"""The int8 linear family in Triton: every op, for large products and for GPUs without our compiled kernels.

Launchers take the outputs first and then all arguments of the op's schema in order. ``aot_cases(arch)`` lists kernel
instances (name, kernel, signature, constants, options) that the tests compile ahead of time for sm_80 .. sm_120 and
gfx942.
"""

from .aot import aot_cases
from .backward import int8_linear_backward
from .product import int8_linear, int8_mm
from .quantize import int8_quantize
from .rotate import hadamard_transform, rotate_quantize

__all__ = [
    "aot_cases",
    "hadamard_transform",
    "int8_linear",
    "int8_linear_backward",
    "int8_mm",
    "int8_quantize",
    "rotate_quantize",
]
