# SPDX-License-Identifier: Apache-2.0
"""Small models of transformers with random weights, large enough that tokens influence each other."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 97
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.25,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "mixtral": ("Mixtral", MIXTURE),
    "gemma2": ("Gemma2", {"sliding_window": 5, "attn_logit_softcapping": 4.0, "query_pre_attn_scalar": 16}),
    "gpt_oss": ("GptOss", MIXTURE | {"sliding_window": 5}),
    "minimax": (
        "MiniMax",
        MIXTURE | {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_hidden_layers": 3,
                   "block_size": 8, "initializer_range": 0.1},
    ),
}  # fmt: skip


def model_of(kind: str, **options: Any) -> Any:
    name, own = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON | own | options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().to(DEVICE)
    model.generation_config.pad_token_id = 0
    for name, parameter in model.named_parameters():
        if name.endswith(("sinks", "bias")):
            torch.nn.init.normal_(parameter)
    return model


def tokens_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def greedy(model: Any, prompt: Tensor, count: int, mask: Tensor | None = None, **options: Any) -> Tensor:
    """The next tokens of prompts ``[B, P]``, by transformers itself."""
    mask = torch.ones_like(prompt) if mask is None else mask
    written = model.generate(prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, **options)
    return written[:, prompt.shape[1] :]


def with_cache(model: Any, cache: object) -> dict[str, Any]:
    """The arguments for a cache, whatever this version of transformers calls it."""
    names = inspect.signature(type(model.base_model).forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}


def assert_near(actual: Tensor, expected: Tensor, units: int) -> None:
    """Within so many units in the last place of float32 of the largest value."""
    difference, largest = float((actual - expected).abs().max()), float(expected.abs().max())
    assert difference <= units * 2**-24 * largest, f"differ by {difference / largest * 2**24:.0f} units of {largest}"
