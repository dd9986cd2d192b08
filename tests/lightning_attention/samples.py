# SPDX-License-Identifier: Apache-2.0
"""One small valid call of every op, as (positional, keyword) arguments by name."""

from __future__ import annotations

from typing import Any

import torch

Call = tuple[dict[str, Any], dict[str, Any]]


def samples(device: str, backend: str = "cpu") -> dict[str, list[Call]]:
    generator = torch.Generator().manual_seed(0)
    batch, tokens, heads, group, size, value_size = 2, 5, 2, 2, 16, 8

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def integers(values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    q, k, v = (
        numbers(batch, tokens, heads * group, size),
        numbers(batch, tokens, heads, size),
        numbers(batch, tokens, heads, value_size),
    )
    slopes, gates = numbers(heads).abs(), -numbers(batch, tokens, heads).abs()
    inputs = {"q": q, "k": k, "v": v}
    one = {name: x[:1] for name, x in inputs.items()}
    states = numbers(3, heads, size, value_size)
    packed = {"initial_state": states, "cu_seqlens": integers([0, 2, 2, 5]), "scale": 0.3}
    grad = numbers(batch, tokens, heads * group, value_size)
    token = {"q": q[:, 0].clone(), "k": k[:, 0].clone(), "v": v[:, 0].clone()}
    indexed = {"state_indices": integers([2, -1])}
    parents = integers([[-1, 0, 0, 2, -2], [-1, 0, 1, 2, 3]])
    path = {"path": integers([[0, 2, 3, -1, -1], [0, 1, -1, -1, -1]]), "num_accepted": integers([2, 1])}
    calls: dict[str, list[Call]] = {}
    for op, decay, first in (
        ("lightning_attention", {"slopes": slopes}, {"slopes": slopes}),
        ("simple_gla", {"g": gates}, {"g": gates[:1]}),
    ):
        calls[op] = [(inputs | decay, {}), (one | first, packed | {"output_final_state": True})]
        calls[f"{op}_backward"] = [
            ({"grad_out": grad} | inputs | decay, {}),
            ({"grad_out": grad[:1]} | one | first, packed | {"grad_final_state": states.flip(0)}),
        ]
    return calls | {
        "lightning_chunk_state": [
            ({"k": k, "v": v, "slopes": slopes}, {}),
            ({"k": k[:1], "v": v[:1], "slopes": slopes}, {"cu_seqlens": packed["cu_seqlens"]}),
        ],
        "lightning_apply_state": [
            ({"q": q, "state": states[:2], "slopes": slopes}, {}),
            ({"q": q[:1], "state": states, "slopes": slopes}, {"cu_seqlens": packed["cu_seqlens"], "scale": 0.3}),
        ],
        "lightning_attention_step_": [
            (token | {"state": states[:2].clone(), "slopes": slopes}, {}),
            (token | {"state": states.clone(), "slopes": slopes}, indexed | {"scale": 0.3}),
        ],
        "lightning_attention_verify": [
            (inputs | {"state": states[:2], "slopes": slopes}, {}),
            (inputs | {"state": states, "slopes": slopes}, indexed | {"parents": parents, "scale": 0.3}),
        ],
        "lightning_attention_commit_": [
            ({"k": k, "v": v, "state": states[:2].clone(), "slopes": slopes} | path, {}),
            ({"k": k, "v": v, "state": states.clone(), "slopes": slopes} | path, indexed),
        ],
    }
