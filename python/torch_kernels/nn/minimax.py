# SPDX-License-Identifier: Apache-2.0
"""The lightning attention of MiniMax in transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_kernels import _checks
from torch_kernels.nn.lightning_attention import LightningAttention, LightningState


def replace_lightning_(model: nn.Module) -> nn.Module:
    """Replaces the lightning attention of a MiniMax model of transformers by :class:`LightningAttention`, in place.

    >>> model = AutoModelForCausalLM.from_pretrained("MiniMaxAI/MiniMax-Text-01-hf")     # doctest: +SKIP
    >>> replace_lightning_(model).generate(**inputs)

    The parameters are the same tensors under the same names. Padding, the cache, ``generate`` and gradients work as
    before; the cached state is float32 whatever the model's dtype. ``output_attentions=True`` no longer returns these
    layers' states.

    Args:
        model: the model, or a part of one.

    Returns:
        The model.

    Raises:
        ValueError: there is no such layer in it.

    MiniMax, *MiniMax-01*, arXiv 2501.08313.
    """
    made = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "MiniMaxLightningAttention":
                setattr(parent, name, _MiniMaxLightning.from_minimax(child))
                made += 1
    if not made:
        _checks.fail("replace_lightning_", "model", "one with MiniMaxLightningAttention layers", type(model).__name__)
    return model


class _MiniMaxLightning(LightningAttention):
    """Called as transformers calls its own layer."""

    layer_idx: int

    @classmethod
    def from_minimax(cls, module: nn.Module) -> LightningAttention:
        layer: Any = super().from_minimax(module)
        layer.layer_idx = module.layer_idx
        if bool(layer.activation(torch.zeros(())) != 0):
            _checks.fail("replace_lightning_", "the activation", "0 at 0, as silu is", layer.activation)
        return layer

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,  # the cache's name in earlier versions
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        x = hidden_states
        cache = past_key_values if cache is None else cache
        kv = None if cache is None else cache.get_linear_cache(self.layer_idx)
        if attention_mask is not None and x.shape[1] > 1:
            # No projection has a bias and silu(0) is 0: a token of zeros adds nothing to the state and reads nothing.
            x = x.masked_fill(~attention_mask[:, -x.shape[1] :, None].bool(), 0)
        if cache is None:
            return super().forward(x), None
        if kv is None:
            state = self.init_state(len(x))
        else:
            exact = torch.float64 if kv.dtype == torch.float64 else torch.float32
            state = LightningState(kv.to(exact), torch.zeros(len(x), dtype=torch.int64, device=x.device))
        if kv is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
            y, state = self.step(x, state)
        else:
            y, state = super().forward(x, state)
        cache.set_linear_cache(self.layer_idx, state.kv)
        return y, state.kv
