# SPDX-License-Identifier: Apache-2.0
"""Lightning attention in Triton: every op of the family.

Launchers take the outputs first and then all arguments of the op's schema in order. ``aot_cases(arch)`` lists kernel
instances (name, kernel, signature, constants, options) that the tests compile ahead of time for sm_80 .. sm_120 and
gfx942.
"""

from .aot import aot_cases
from .attention import lightning_attention, simple_gla
from .backward import lightning_attention_backward, simple_gla_backward
from .decode import lightning_attention_commit_, lightning_attention_step_, lightning_attention_verify
from .states import lightning_apply_state, lightning_chunk_state

__all__ = [
    "aot_cases",
    "lightning_apply_state",
    "lightning_attention",
    "lightning_attention_backward",
    "lightning_attention_commit_",
    "lightning_attention_step_",
    "lightning_attention_verify",
    "lightning_chunk_state",
    "simple_gla",
    "simple_gla_backward",
]
