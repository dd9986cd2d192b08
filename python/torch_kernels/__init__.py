# SPDX-License-Identifier: Apache-2.0
"""Kernels for the parts of language models that dense attention and 16-bit GEMM do not cover.

Every op exists twice under one name: as ``torch.ops.kernels.<op>`` and as ``torch_kernels.<op>``, which carries the
documentation and, where the op has them, gradients.
"""

import importlib
from typing import Any

from torch_kernels import nn, trees
from torch_kernels._registry import SlowPathWarning, set_validation, use_backend
from torch_kernels.calibrate import Calibration, calibrate
from torch_kernels.graph_attention import SegmentGraph, graph_attention, rope_shift
from torch_kernels.int4_linear import Int4Weight, int4_linear
from torch_kernels.int8_linear import (
    Int8Weight,
    hadamard_transform,
    int8_linear,
    int8_mm,
    int8_quantize,
    rotate_quantize,
)
from torch_kernels.lightning_attention import (
    lightning_apply_state,
    lightning_attention,
    lightning_attention_backward,
    lightning_attention_commit_,
    lightning_attention_step_,
    lightning_attention_verify,
    lightning_chunk_state,
    lightning_slopes,
    simple_gla,
    simple_gla_backward,
)
from torch_kernels.quantize import quantize_
from torch_kernels.sea import (
    favor_features,
    linear_attention,
    linear_attention_backward,
    running_mean,
    sea_attention,
    sea_attention_backward,
    sea_csr,
    sea_select,
    sea_stretch,
    sea_stretch_backward,
)
from torch_kernels.tree_attention import (
    merge_attention_states,
    tree_attention,
    tree_commit_kv_,
    tree_compact_kv_,
    tree_mask,
    tree_positions,
    tree_verify_greedy,
    tree_verify_sampling,
    tree_verify_typical,
)

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Int4Weight",
    "Int8Weight",
    "SegmentGraph",
    "SlowPathWarning",
    "calibrate",
    "favor_features",
    "graph_attention",
    "hadamard_transform",
    "int4_linear",
    "int8_linear",
    "int8_mm",
    "int8_quantize",
    "lightning_apply_state",
    "lightning_attention",
    "lightning_attention_backward",
    "lightning_attention_commit_",
    "lightning_attention_step_",
    "lightning_attention_verify",
    "lightning_chunk_state",
    "lightning_slopes",
    "linear_attention",
    "linear_attention_backward",
    "merge_attention_states",
    "nn",
    "quantize_",
    "rope_shift",
    "rotate_quantize",
    "running_mean",
    "sea_attention",
    "sea_attention_backward",
    "sea_csr",
    "sea_select",
    "sea_stretch",
    "sea_stretch_backward",
    "set_validation",
    "simple_gla",
    "simple_gla_backward",
    "tree_attention",
    "tree_commit_kv_",
    "tree_compact_kv_",
    "tree_mask",
    "tree_positions",
    "tree_verify_greedy",
    "tree_verify_sampling",
    "tree_verify_typical",
    "trees",
    "use_backend",
]


_LATER = ("distributed", "transformers")  # imported when first asked for: torch's DTensor, transformers come with them


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return importlib.import_module(f"torch_kernels.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
