# SPDX-License-Identifier: Apache-2.0
"""Modules to put into a model, and :class:`GraphKVCache` to run one with."""

from typing import TYPE_CHECKING, Any

from torch_kernels.nn.int4_linear import Int4Linear
from torch_kernels.nn.int8_linear import Int8Linear
from torch_kernels.nn.lightning_attention import LightningAttention, LightningState
from torch_kernels.nn.sea_attention import SEAState, SEAttention
from torch_kernels.nn.sea_distillation import sea_distillation_loss

if TYPE_CHECKING:
    from torch_kernels.nn.graph_kv_cache import GraphKVCache as GraphKVCache

__all__ = [
    "Int4Linear",
    "Int8Linear",
    "LightningAttention",
    "LightningState",
    "SEAState",
    "SEAttention",
    "sea_distillation_loss",
]


def __getattr__(name: str) -> Any:
    """Imports `GraphKVCache` when it is first asked for: transformers comes with it."""
    if name == "GraphKVCache":
        from torch_kernels.nn.graph_kv_cache import GraphKVCache

        return GraphKVCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "GraphKVCache"})
