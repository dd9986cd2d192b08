# SPDX-License-Identifier: Apache-2.0
"""Tree attention in Triton: every op of the family, for GPUs without our compiled kernels and for large tiles on those with.

Launchers take the outputs first and then all arguments of the op's schema in order. ``AOT_CASES`` lists kernel instances
(name, kernel, signature, constants, options) that the tests compile ahead of time for every architecture.
"""

from . import attention, cache, tree, verify
from .attention import tree_attention
from .cache import merge_attention_states, tree_commit_kv_, tree_compact_kv_
from .tree import tree_mask, tree_positions
from .verify import tree_verify_greedy, tree_verify_sampling, tree_verify_typical

AOT_CASES = [*tree.AOT_CASES, *attention.AOT_CASES, *verify.AOT_CASES, *cache.AOT_CASES]

__all__ = [
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
