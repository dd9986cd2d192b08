# SPDX-License-Identifier: Apache-2.0
"""Linear layers of published models, and what any of them can be held against: the same layer with dense weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Call, Inputs
from presets import MODELS

# Output and input features.
LAYERS = {
    f"{name}-{layer}": shape
    for name, model in MODELS.items()
    if "int4_linear" in model.ops
    for layer, shape in model.layers.items()
} | {
    "falcon-180b-in": (75264, 14848),  # query, key, value and the first of its MLP in one
    "falcon-180b-out": (14848, 74240),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
FEW_ROWS = (1, 4, 16, 64, 256)  # of a model's layers

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
