# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: cases, interleaved timing, the machine's ceilings, tables, JSON and plots."""

from .case import Call, Case, Curve, Inputs, Prepare
from .cli import main

__all__ = ["Call", "Case", "Curve", "Inputs", "Prepare", "main"]
