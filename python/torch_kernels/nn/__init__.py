# SPDX-License-Identifier: Apache-2.0
"""Modules to put into a model."""

from torch_kernels.nn.int4_linear import Int4Linear
from torch_kernels.nn.int8_linear import Int8Linear
from torch_kernels.nn.lightning_attention import LightningAttention, LightningState

__all__ = ["Int4Linear", "Int8Linear", "LightningAttention", "LightningState"]
