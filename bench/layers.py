# SPDX-License-Identifier: Apache-2.0
"""Linear layers of published models, and what any of them can be held against: the same layer with dense weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Call, Inputs

# Output and input features.
LAYERS = {
    "llama2-7b-qkv": (12288, 4096),
    "llama2-7b-gate": (11008, 4096),
    "llama2-7b-down": (4096, 11008),
    "llama3-8b-qkv": (6144, 4096),
    "llama3-8b-gate": (14336, 4096),
    "llama2-70b-gate": (28672, 8192),
    "llama2-70b-down": (8192, 28672),
    "falcon-180b-in": (75264, 14848),  # query, key, value and the first of its MLP in one
    "falcon-180b-out": (14848, 74240),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

Dense = Callable[[Inputs], torch.Tensor]  # the weight [N, K] that the layer stands for, in float32


def dense(weight: Dense, dtype: torch.dtype, inputs: Inputs) -> Call:
    """F.linear with weights that are not compressed."""
    x, w = inputs["x"].to(dtype), weight(inputs).to(dtype)
    return lambda: F.linear(x, w)


def onednn(weight: Dense, inputs: Inputs) -> Call:
    """The same in oneDNN's own order of the weights, which torch's compiler would prepare."""
    x, w = inputs["x"], weight(inputs).to(inputs["x"].dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(w, len(x))
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def truth(weight: Dense, inputs: Inputs) -> torch.Tensor:
    """Float64, a part of the features at a time."""
    x = inputs["x"].double()
    return torch.cat([x @ part.double().T for part in weight(inputs).split(1024)], 1)
