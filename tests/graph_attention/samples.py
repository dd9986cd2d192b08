# SPDX-License-Identifier: Apache-2.0
"""One small valid call of every op, as (positional, keyword) arguments by name."""

from __future__ import annotations

from typing import Any

import torch

Call = tuple[dict[str, Any], dict[str, Any]]


def samples(device: str, backend: str = "cpu") -> dict[str, list[Call]]:
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, size, value_size = 4, 2, 16, 8

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def integers(*values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    tokens, lengths = 9, [3, 0, 4, 2]
    offsets = integers(0, 3, 3, 7, 9)
    graph = {
        "q_offsets": offsets,
        "kv_offsets": offsets,
        "edge_offsets": integers(0, 0, 1, 2, 4),
        "edge_sources": integers(0, 0, 0, 2),
        "own_segment": integers(0, 1, -1, 3),
    }
    q, k, v = numbers(tokens, heads, size), numbers(tokens, kv_heads, size), numbers(tokens, kv_heads, value_size)
    pages = {"k": numbers(6, 2, kv_heads, size), "v": numbers(6, 2, kv_heads, value_size)}
    block_table = integers([3, 1], [0, 0], [5, 2], [4, 0])
    inv_freq = torch.logspace(0, -3, size // 2).to(device)
    places = {"inv_freq": inv_freq, "q_start": integers(0, 3, 100, 107), "edge_start": integers(0, 0, 0, 3)}
    attention = {"q": q, "k": k, "v": v} | graph
    decode = {"q": q[: len(lengths)], "k": k, "v": v} | graph | {"q_offsets": integers(0, 1, 2, 3, 4)}
    results = {"out": numbers(tokens, heads, value_size), "lse": numbers(heads, tokens)}
    backward = {"grad_out": numbers(tokens, heads, value_size)} | {"q": q, "k": k, "v": v} | results | graph
    own_start = {"own_start": integers(0, 3, 0, 107)}
    return {
        "graph_attention": [
            (decode, {}),
            (decode | pages, {"block_table": block_table, "scale": 0.3} | places),
            (attention, {}),
            (attention, places | own_start | {"interleaved": True}),
            (attention | pages, {"block_table": block_table, "scale": 0.3} | places),
        ],
        "graph_attention_backward": [(backward, {}), (backward, places | own_start | {"scale": 0.3})],
        "rope_shift": [
            ({"k": k, "offsets": offsets, "delta": integers(5, 0, -3, 1000), "inv_freq": inv_freq}, extra)
            for extra in ({}, {"interleaved": True})
        ],
    }
