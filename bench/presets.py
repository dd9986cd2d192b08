# SPDX-License-Identifier: Apache-2.0
"""Shapes of published models, and the ops that each has work for."""

from __future__ import annotations

import re
from dataclasses import dataclass

TREE, GRAPH, LIGHTNING, SEA = ("tree_attention",), ("graph_attention",), ("lightning_attention",), ("sea",)
LINEAR = ("int4_linear", "int8_linear")
TRANSFORMER = TREE + GRAPH + LINEAR


@dataclass(frozen=True)
class Model:
    repository: str  # on huggingface.co
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int  # hidden features of the MLP, in a mixture of experts those of one
    ops: tuple[str, ...]
    window: int = 0  # of the layers that have one
    sinks: bool = False

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Output and input features of the linear layers; q, k and v in one."""
        width = self.heads * self.head_size
        qkv = width + 2 * self.kv_heads * self.head_size
        return {
            "qkv": (qkv, self.hidden),
            "out": (self.hidden, width),
            "gate": (self.mlp, self.hidden),
            "down": (self.hidden, self.mlp),
        }


# From config.json in each repository; TransNormerLLM's from its README.md, which does not tell its MLP's.
MODELS = {
    "llama2-7b": Model("meta-llama/Llama-2-7b-hf", 4096, 32, 32, 128, 11008, TRANSFORMER),
    "llama2-70b": Model("meta-llama/Llama-2-70b-hf", 8192, 64, 8, 128, 28672, TRANSFORMER),
    "llama3-8b": Model("meta-llama/Llama-3.1-8B", 4096, 32, 8, 128, 14336, TRANSFORMER),
    "llama3-70b": Model("meta-llama/Llama-3.3-70B-Instruct", 8192, 64, 8, 128, 28672, TRANSFORMER),
    "qwen3-0.6b": Model("Qwen/Qwen3-0.6B", 1024, 16, 8, 128, 3072, TRANSFORMER),
    "qwen3-8b": Model("Qwen/Qwen3-8B", 4096, 32, 8, 128, 12288, TRANSFORMER),
    "qwen3-30b-a3b": Model("Qwen/Qwen3-30B-A3B", 2048, 32, 4, 128, 768, TRANSFORMER),
    "mixtral-8x7b": Model("mistralai/Mixtral-8x7B-v0.1", 4096, 32, 8, 128, 14336, TRANSFORMER),
    "gemma3-12b": Model("google/gemma-3-12b-pt", 3840, 16, 8, 256, 15360, TREE + LINEAR, window=1024),
    "gpt-oss-20b": Model("openai/gpt-oss-20b", 2880, 64, 8, 64, 2880, TREE, window=128, sinks=True),
    "minimax-text-01": Model("MiniMaxAI/MiniMax-Text-01", 6144, 64, 8, 128, 9216, TREE + LIGHTNING),
    "transnormerllm3-15b": Model(
        "OpenNLPLab/TransNormerLLM3-15B-Intermediate-Checkpoints", 5120, 40, 40, 128, 0, LIGHTNING
    ),
    "opt-125m": Model("facebook/opt-125m", 768, 12, 12, 64, 3072, SEA + LINEAR),
    "opt-1.3b": Model("facebook/opt-1.3b", 2048, 32, 32, 64, 8192, SEA + LINEAR),
}


def find(name: str) -> str:
    """The key of a model by its key or its repository's name, whatever the case and punctuation: Llama-3.1-8B."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    for key, model in MODELS.items():
        if plain(name) in (plain(key), plain(model.repository), plain(model.repository.partition("/")[2])):
            return key
    raise KeyError(f"no preset {name!r}; there are {', '.join(MODELS)}")
