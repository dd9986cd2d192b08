# SPDX-License-Identifier: Apache-2.0
"""int4 linear in Triton: for GPUs without our compiled kernels, and for many rows.

Launchers take the outputs first and then all arguments of the op's schema in order. ``aot_cases(arch)`` lists kernel
instances (name, kernel, signature, constants, options) that the tests compile ahead of time for sm_80 .. sm_120 and
gfx942.
"""

from .aot import aot_cases
from .backward import int4_linear_backward
from .linear import int4_linear

__all__ = ["aot_cases", "int4_linear", "int4_linear_backward"]
