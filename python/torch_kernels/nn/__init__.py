# SPDX-License-Identifier: Apache-2.0
"""Modules to put into a model, and :class:`GraphKVCache` and :class:`TreeKVCache` to run one with."""

import importlib
from typing import TYPE_CHECKING, Any

from torch_kernels.nn.int4_linear import Int4Linear
from torch_kernels.nn.int8_linear import Int8Linear
from torch_kernels.nn.lightning_attention import LightningAttention, LightningState
from torch_kernels.nn.minimax import replace_lightning_
from torch_kernels.nn.quantized_experts import QuantizedExperts
from torch_kernels.nn.sea_attention import SEAState, SEAttention
from torch_kernels.nn.sea_distillation import sea_distillation_loss

if TYPE_CHECKING:
    from torch_kernels.nn.graph_kv_cache import GraphKVCache as GraphKVCache
    from torch_kernels.nn.tree_kv_cache import TreeKVCache as TreeKVCache

__all__ = [
    "Int4Linear",
    "Int8Linear",
    "LightningAttention",
    "LightningState",
    "QuantizedExperts",
    "SEAState",
    "SEAttention",
    "replace_lightning_",
    "sea_distillation_loss",
]


# Imported when they are first asked for: transformers comes with them.
_LATER = {"GraphKVCache": "graph_kv_cache", "TreeKVCache": "tree_kv_cache"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"torch_kernels.nn.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
