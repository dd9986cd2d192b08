# SPDX-License-Identifier: Apache-2.0
"""Decay rates of the model families in use."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _geometric(count: int) -> list[float]:
    return [2 ** (-8 * (h + 1) / count) for h in range(count)]


def _alibi(heads: int) -> list[float]:
    """Between powers of two: the slopes of the next lower one, then every other slope of the next higher."""
    lower = 2 ** int(math.log2(heads))
    return _geometric(lower) + _geometric(2 * lower)[::2][: heads - lower]


def lightning_slopes(num_heads: int, layer: int = 0, num_layers: int = 1, kind: str = "transnormer") -> Tensor:
    """The slopes of one layer, for :func:`torch_kernels.lightning_attention`.

    With H heads h = 0, 1, …, and layer l of L:

    - ``"transnormer"``: ``(8 h / H) (1 - l / L)``, as in the TransNormerLLM paper; head 0 never decays;
    - ``"alibi"``: ALiBi's ``2^(-8 (h + 1) / H)``, interpolated where H is no power of two, times
      ``1 - l / (L - 1) + 1e-5`` (``1 + 1e-5`` for L = 1), as in Lightning Attention's own code, LASP, vLLM and SGLang;
    - ``"minimax"``: ``2^(-8 (h + 1) / H)`` for any H times ``1 - l / (L - 1 + 1e-5) + 1e-5``, as in transformers;
    - ``"retnet"``: ``-ln(1 - 2^(-5 - h))``, the same in every layer. Retention is lightning attention with these.

    Args:
        num_heads: H.
        layer: l, from 0.
        num_layers: L.
        kind: one of the above.

    Returns:
        float32 ``[H]``, on the CPU. Keep slopes float32 in models of lower precision, as slow heads need it.

    Raises:
        ValueError: an unknown kind, no heads, or a layer outside ``[0, num_layers)``.

    Qin et al., *TransNormerLLM*, arXiv 2307.14995; Press et al., *ALiBi*, arXiv 2108.12409; Sun et al., *RetNet*,
    arXiv 2307.08621.
    """
    if num_heads < 1:
        raise ValueError(f"lightning_slopes: num_heads must be at least 1, got {num_heads}")
    if not 0 <= layer < num_layers:
        raise ValueError(f"lightning_slopes: layer must be in [0, num_layers={num_layers}), got {layer}")
    if kind == "transnormer":
        slopes = [8 * h / num_heads * (1 - layer / num_layers) for h in range(num_heads)]
    elif kind == "alibi":
        factor = 1 - layer / max(1, num_layers - 1) + 1e-5
        slopes = [slope * factor for slope in _alibi(num_heads)]
    elif kind == "minimax":
        factor = 1 - layer / (num_layers - 1 + 1e-5) + 1e-5
        slopes = [slope * factor for slope in _geometric(num_heads)]
    elif kind == "retnet":
        slopes = [-math.log1p(-(2.0 ** (-5 - h))) for h in range(num_heads)]
    else:
        raise ValueError(f"lightning_slopes: kind must be transnormer, alibi, minimax or retnet, got {kind!r}")
    return torch.tensor(slopes, dtype=torch.float32)
