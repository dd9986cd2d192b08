# SPDX-License-Identifier: Apache-2.0
"""Modules to put into a model."""

from torch_kernels.nn.int4_linear import Int4Linear
from torch_kernels.nn.int8_linear import Int8Linear
from torch_kernels.nn.lightning_attention import LightningAttention, LightningState
from torch_kernels.nn.sea_attention import SEAState, SEAttention
from torch_kernels.nn.sea_distillation import sea_distillation_loss

__all__ = [
    "Int4Linear",
    "Int8Linear",
    "LightningAttention",
    "LightningState",
    "SEAState",
    "SEAttention",
    "sea_distillation_loss",
]
