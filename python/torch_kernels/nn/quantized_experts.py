# SPDX-License-Identifier: Apache-2.0
"""The experts of a mixture, each with linear layers of its own."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


class QuantizedExperts(nn.Module):
    r"""The experts of a layer of transformers, which keeps all of them in tensors ``[E, N, K]``, as linear layers.

    For token n with its chosen experts :math:`e_{nk}` and their weights :math:`w_{nk}`:

    .. math::
        y_n = \sum_k w_{nk} \, \mathrm{down}_{e_{nk}}(\mathrm{gate}(\mathrm{up}_{e_{nk}}(x_n)))

    :func:`torch_kernels.quantize_` puts it in the place of the experts of Mixtral, MiniMax, Qwen-MoE, DeepSeek,
    gpt-oss and others, with layers of 4 or 8 bits. Experts that no token chose are not read. Which ones are, the host
    asks the device, so a call waits for it and breaks the graph of ``torch.compile``. The sum over k has a fixed order.

    Attributes:
        up_layers: the first layer of each expert, gate and up together where it has a gate.
        down_layers: the second one.
    """

    def __init__(self, experts: nn.Module, up_layers: nn.ModuleList, down_layers: nn.ModuleList) -> None:
        super().__init__()
        self.up_layers, self.down_layers = up_layers, down_layers
        like: Any = copy.copy(experts)  # it knows how the gate goes; without weights
        like._parameters = {}
        self._like = (like,)  # no submodule: transformers must not initialise the weights that it no longer has
        self.train(experts.training)

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether the module is one of transformers' experts, in a form that is known here."""
        experts: Any = module
        if not all(hasattr(experts, name) for name in ("_apply_gate", "has_gate", "has_bias", "is_transposed")):
            return False
        names = _names(experts)
        return (
            not getattr(experts, "has_post_expert_norm", False)
            and not list(experts.buffers())
            and {name for name, _ in experts.named_parameters()} == {name for pair in names for name in pair if name}
            and all(getattr(experts, name).dim() == 3 for name, _ in names)
        )

    @classmethod
    def from_experts(cls, experts: nn.Module) -> QuantizedExperts:
        """The same experts with dense linear layers, whose weights are views of the tensors."""
        return cls(experts, *(_layers(experts, *names) for names in _names(experts)))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The outputs ``[T, H]`` of tokens ``[T, H]``, with their experts and those's weights ``[T, k]``."""
        (like,) = self._like
        parts = hidden_states.new_zeros(*top_k_index.shape, hidden_states.shape[-1])
        for expert in top_k_index.unique().tolist():
            if expert < len(self.up_layers):  # a larger number means none
                token, place = (top_k_index == expert).nonzero(as_tuple=True)
                hidden = self.up_layers[expert](hidden_states[token])
                hidden = like._apply_gate(hidden) if like.has_gate else like.act_fn(hidden)
                part = self.down_layers[expert](hidden) * top_k_weights[token, place, None]
                parts[token, place] = part.to(parts.dtype)
        return parts.sum(1)


def _names(experts: Any) -> list[tuple[str, str | None]]:
    """Of the tensors of both layers, and of their biases."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    biases = experts.has_bias
    return [(name, f"{name}_bias" if biases else None) for name in (first, "down_proj")]


def _layers(experts: nn.Module, weight: str, bias: str | None) -> nn.ModuleList:
    weights = experts.get_parameter(weight)
    layers = nn.ModuleList()
    for i, w in enumerate(weights.mT if experts.is_transposed else weights):
        layer = nn.Linear(w.shape[1], w.shape[0], bias is not None, device="meta")
        layer.weight = nn.Parameter(w.detach(), weights.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(experts.get_parameter(bias)[i].detach(), weights.requires_grad)
        layers.append(layer.train(experts.training))
    return layers
