# SPDX-License-Identifier: Apache-2.0
"""SEA in Triton.

Launchers take the outputs first and then all arguments of the op's schema in order. ``aot_cases(arch)`` lists kernel
instances (name, kernel, signature, constants, options) that the tests compile ahead of time for sm_80 .. sm_120 and
gfx942.
"""

from .aot import aot_cases
from .attention import sea_attention
from .attention_backward import sea_attention_backward
from .features import favor_features
from .linear import linear_attention, linear_attention_backward
from .mean import running_mean
from .stretch import sea_csr, sea_stretch, sea_stretch_backward

__all__ = [
    "aot_cases",
    "favor_features",
    "linear_attention",
    "linear_attention_backward",
    "running_mean",
    "sea_attention",
    "sea_attention_backward",
    "sea_csr",
    "sea_stretch",
    "sea_stretch_backward",
]
