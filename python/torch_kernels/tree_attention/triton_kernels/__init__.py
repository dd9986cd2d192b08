# SPDX-License-Identifier: Apache-2.0
"""Tree attention in Triton: every op of the family, for GPUs without our compiled kernels and for large tiles.

Launchers take the outputs first and then all arguments of the op's schema in order. ``aot_cases(arch)`` lists kernel
instances (name, kernel, signature, constants, options) that the tests compile ahead of time for sm_80 .. sm_120 and
gfx942.
"""

from .aot import aot_cases
from .attention import tree_attention
from .cache import merge_attention_states, tree_commit_kv_, tree_compact_kv_
from .tree import tree_mask, tree_positions
from .verify import tree_verify_greedy, tree_verify_sampling, tree_verify_typical

__all__ = [
    "aot_cases",
    "merge_attention_states",
    "tree_attention",
    "tree_commit_kv_",
    "tree_compact_kv_",
    "tree_mask",
    "tree_positions",
    "tree_verify_greedy",
    "tree_verify_sampling",
    "tree_verify_typical",
]
