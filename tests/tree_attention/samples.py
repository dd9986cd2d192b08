# SPDX-License-Identifier: Apache-2.0
"""One small valid call of every op, as (positional, keyword) arguments by name."""

from __future__ import annotations

from typing import Any

import torch

from .cases import FP8

Call = tuple[dict[str, Any], dict[str, Any]]


def samples(device: str, backend: str = "cpu") -> dict[str, list[Call]]:
    generator = torch.Generator().manual_seed(0)
    batch, nodes, slots, heads, kv_heads, size, value_size, vocabulary = 2, 5, 12, 4, 2, 16, 8, 7

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def integers(values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    parents = integers([[-1, 0, 0, 2, -2], [-1, 0, 1, 2, 3]])
    prefix_lens = integers([3, 6])
    block_table = integers([[2, 0, 1], [5, 4, 3]])
    path, num_accepted = integers([[0, 2, 3, -1, -1], [0, 1, -1, -1, -1]]), integers([2, 1])
    draft = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]], device=device)
    probabilities = numbers(batch, nodes, vocabulary).softmax(-1)
    uniforms = torch.rand(batch, nodes + 1, generator=generator).to(device)
    q = numbers(batch, nodes, heads, size)
    k_tree, v_tree = numbers(batch, nodes, kv_heads, size), numbers(batch, nodes, kv_heads, value_size)
    k_cache, v_cache = numbers(batch, slots, kv_heads, size), numbers(batch, slots, kv_heads, value_size)
    k_pages, v_pages = numbers(6, 4, kv_heads, size), numbers(6, 4, kv_heads, value_size)
    one = torch.ones(1, device=device)
    lse = numbers(batch, heads, nodes)

    attention = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "prefix_lens": prefix_lens, "parents": parents}
    own = {"k_tree": k_tree, "v_tree": v_tree}
    paged = {"k_cache": k_pages, "v_cache": v_pages}
    quantised = {"k_cache": k_cache.to(torch.int8), "v_cache": v_cache.to(torch.int8)}
    eight_bit = {"k_cache": k_cache.to(FP8), "v_cache": v_cache.to(FP8)}
    scales = {"k_scale": one, "v_scale": one.expand(kv_heads)}
    options = {"scale": 0.3, "softcap": 20.0, "window": 4, "sinks": numbers(heads)}
    step = {"prefix_lens": prefix_lens, "path": path, "num_accepted": num_accepted}
    return {
        "tree_attention": [
            (attention, own),
            (attention, {}),
            (attention | paged, own | {"block_table": block_table} | options),
            (attention | quantised, own | scales),
            (attention | eight_bit, scales),
        ],
        "tree_mask": [({"parents": parents}, {})],
        "tree_positions": [({"parents": parents, "prefix_lens": prefix_lens}, {})],
        "tree_verify_greedy": [({"draft_tokens": draft, "target_tokens": draft.roll(-1, 1), "parents": parents}, {})],
        "tree_verify_typical": [
            (
                {"draft_tokens": draft, "target_logits": numbers(batch, nodes, vocabulary), "parents": parents},
                {"temperature": 0.7, "epsilon": 0.1, "delta": 0.3} | extra,
            )
            for extra in ({}, {"uniforms": uniforms})
        ],
        "tree_verify_sampling": [
            ({"draft_tokens": draft, "target_probs": probabilities, "parents": parents, "uniforms": uniforms}, extra)
            for extra in ({}, {"draft_probs": probabilities.flip(-1), "replacement": False})
        ],
        "tree_commit_kv_": [
            ({"k_cache": k_cache.clone(), "v_cache": v_cache.clone()} | own | step, {}),
            ({"k_cache": k_pages.clone(), "v_cache": v_pages.clone()} | own | step, {"block_table": block_table}),
            (quantised | own | step, scales),
        ],
        "tree_compact_kv_": [
            ({"k_cache": k_cache.clone(), "v_cache": v_cache.clone()} | step, {}),
            ({"k_cache": k_pages.clone(), "v_cache": v_pages.clone()} | step, {"block_table": block_table}),
        ],
        "merge_attention_states": [({"out_a": q, "lse_a": lse, "out_b": q.flip(0), "lse_b": lse.flip(0)}, {})],
    }
