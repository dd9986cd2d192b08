# SPDX-License-Identifier: Apache-2.0
"""Modules to put into a model."""

from torch_kernels.nn.int4_linear import Int4Linear
from torch_kernels.nn.int8_linear import Int8Linear

__all__ = ["Int4Linear", "Int8Linear"]
