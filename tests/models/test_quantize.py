# SPDX-License-Identifier: Apache-2.0
"""quantize_ on models of transformers, and their experts as linear layers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch_kernels
from torch import nn
from torch_kernels.nn import Int4Linear, Int8Linear, QuantizedExperts

from ..tolerance import assert_bitwise
from .tiny import assert_near, greedy, model_of, tokens_of

TOKENS = tokens_of(2, 11)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def dense_again(model: nn.Module) -> nn.Module:
    """The model with the weights that its layers of 4 bits stand for."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Int4Linear):
                dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
                dense.weight, dense.bias = nn.Parameter(layer.weight.dequantize(torch.float32)), layer.bias
                setattr(parent, name, dense)
    return model


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt_oss"])
def test_four_bits(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The logits are those of the rounded weights, up to the order of sums; the tokens are the same."""
    model = torch_kernels.quantize_(model_of(kind), group_size=16, symmetric=False, skip=["lm_head"])
    layers = {name for name, layer in model.named_modules() if isinstance(layer, Int4Linear)}
    experts = 0 if kind == "llama" else 2 * 4 * 2
    assert len(layers) == {"llama": 14, "mixtral": 8, "gpt_oss": 8}[kind] + experts and "lm_head" not in layers
    out = capsys.readouterr().out
    assert out.startswith(f"quantize_: {len(layers)} linear layers to 4 bits; the model went from ")
    left = "model.embed_tokens.weight (24.8 KB), lm_head.weight (24.8 KB)"
    router = {
        "llama": "",
        "mixtral": ", model.layers.*.mlp.gate.weight",
        "gpt_oss": ", model.layers.*.mlp.router.weight",
    }
    assert f"left as they are: {left}{router[kind]}" in out
    dense = dense_again(copy.deepcopy(model))
    assert_near(logits_of(model), logits_of(dense), units=200)
    assert greedy(model, TOKENS, 10).tolist() == greedy(dense, TOKENS, 10).tolist()


@pytest.mark.parametrize("options", [{}, {"threshold": 6.0}, {"rotate": True}])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_eight_bits(kind: str, options: dict[str, Any]) -> None:
    model = model_of(kind, hidden_size=64, intermediate_size=64)
    expected = logits_of(model)
    torch_kernels.quantize_(model, bits=8, skip="lm_head", **options)
    assert sum(isinstance(layer, Int8Linear) for layer in model.modules()) == {"llama": 14, "mixtral": 24}[kind]
    # Of the usual token: a router near a tie may choose another expert for some.
    errors = (logits_of(model) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < 0.06, errors


def test_both_in_one_model() -> None:
    model = torch_kernels.quantize_(model_of("mixtral"), bits=8, filter=lambda name, _: "self_attn" in name)
    torch_kernels.quantize_(model, group_size=16, skip=["lm_head", "*.down_layers.*"])
    kinds = {name.split(".")[-1]: type(layer) for name, layer in model.model.layers[0].self_attn.named_children()}
    assert kinds == dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), Int8Linear)
    experts = model.model.layers[1].mlp.experts
    assert all(type(layer) is Int4Linear for layer in experts.up_layers)
    assert all(type(layer) is nn.Linear for layer in experts.down_layers)
    assert type(model.lm_head) is nn.Linear
    assert logits_of(model).isfinite().all()


def test_experts_without_a_chosen_layer_stay(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("mixtral")
    before = {name: type(module) for name, module in model.named_modules()}
    seen = []

    def nothing(name: str, layer: nn.Module) -> bool:
        assert type(layer) is nn.Linear
        seen.append(name)
        return False

    torch_kernels.quantize_(model, filter=nothing)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert "model.layers.0.mlp.experts.up_layers.3" in seen and "model.layers.1.self_attn.q_proj" in seen
    with pytest.raises(ValueError, match="group_size"):
        torch_kernels.quantize_(model, group_size=33)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "minimax"])
def test_dense_experts_are_those_of_transformers(kind: str) -> None:
    """With its own gate and biases, and weights the other way round in gpt-oss; tokens and weights of any order."""
    stock = model_of(kind, experts_implementation="eager").model.layers[1].mlp.experts
    assert QuantizedExperts.accepts(stock)
    ours = QuantizedExperts.from_experts(stock)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 64, generator=generator).to(TOKENS.device)
    index = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(9)]).to(TOKENS.device)
    weights = torch.rand(9, 2, generator=generator).to(TOKENS.device)
    with torch.no_grad():
        expected = stock(x, index, weights)
        assert_near(ours(x, index, weights), expected, units=50)
        ours.up_layers[3].weight.fill_(float("nan"))  # the views are of the stock tensors; nobody chose the fourth
        assert_near(ours(x, index, weights), expected, units=50)
        none = index.where(index != 2, 4)  # 4 of 4: no expert
        assert_near(ours(x, none, weights), ours(x, index, weights.where(index != 2, 0.0)), units=50)
        ours.up_layers, ours.down_layers = (
            torch_kernels.quantize_(layers[:3], group_size=16) for layers in (ours.up_layers, ours.down_layers)
        )
        assert_bitwise("one alone", ours(x[:1], index[:1], weights[:1]), ours(x, index, weights)[:1])
    assert not QuantizedExperts.accepts(ours) and not QuantizedExperts.accepts(nn.Linear(2, 2))


def test_copies_of_a_quantised_mixture() -> None:
    model = torch_kernels.quantize_(model_of("mixtral"), group_size=16, skip="lm_head")
    expected = logits_of(model)
    other = torch_kernels.quantize_(model_of("mixtral", initializer_range=0.5), group_size=16, skip="lm_head")
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_bitwise("logits", logits_of(twin), expected)
