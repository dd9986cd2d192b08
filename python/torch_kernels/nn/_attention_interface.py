# SPDX-License-Identifier: Apache-2.0
"""Attention that layers of transformers call by its name."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from torch_kernels import _checks

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise ImportError("this class runs models of transformers: pip install transformers") from error

OPTIONS = ("sliding_window", "softcap", "s_aux")  # what some layers want of their attention


def register(name: str, keyword: str, owner: str, supported: Collection[str] = ()) -> None:
    """Gives transformers the attention ``name``.

    A call of the model with ``keyword=call`` goes to ``call.attend(layer, q, k, v, scale, **options)``, in every layer
    with q ``[B, T, Hq, D]``, and k and v of the new tokens ``[B, T, Hk, D]``; the options that the owner supports are
    there where the layer has them. Every other call is ``"sdpa"``.
    """
    unsupported = [option for option in OPTIONS if option not in supported]

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        call = options.pop(keyword, None)
        if call is None:
            options |= {"scaling": scaling, "dropout": dropout}
            return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **options)
        if dropout:
            _checks.fail(owner, "model", "in evaluation mode, without dropout", f"dropout {dropout}")
        for option in unsupported:
            if options.get(option) is not None:
                _checks.fail(owner, "model", f"one whose attention has no {option}", options[option])
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        given = {option: options[option] for option in supported if options.get(option) is not None}
        return call.attend(module.layer_idx, q, k, v, scale, **given), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, AttentionMaskInterface()["sdpa"])
