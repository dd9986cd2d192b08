# SPDX-License-Identifier: Apache-2.0
"""Graph-KV attention in Triton.

Launchers take the outputs first and then all arguments of the op's schema in order. ``aot_cases(arch)`` lists kernel
instances (name, kernel, signature, constants, options) that the tests compile ahead of time for sm_80 .. sm_120 and
gfx942.
"""

from .aot import aot_cases
from .attention import graph_attention
from .backward import graph_attention_backward
from .rotation import rope_shift

__all__ = ["aot_cases", "graph_attention", "graph_attention_backward", "rope_shift"]
