# SPDX-License-Identifier: Apache-2.0
"""Small calls of every tree attention op, for ``python -m torch_kernels selftest``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_kernels.tree_attention import reference


def _to(device: torch.device | None, dtype: torch.dtype | None, arguments: dict[str, Any]) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        wider = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return value.to(device=device, dtype=wider, copy=True)

    return {name: move(value) for name, value in arguments.items()}


def _run(op: str, arguments: dict[str, Any], results: tuple[str, ...], device: torch.device) -> tuple[Any, Any]:
    """The op's outputs and the reference's in float64. ``results`` names arguments changed in place."""
    ours, exact = _to(device, None, arguments), _to(None, torch.float64 if not results else None, arguments)
    if op == "merge_attention_states":
        exact = arguments
    got, truth = getattr(torch.ops.kernels, op)(**ours), getattr(reference, op)(**exact)
    if results:
        return tuple(ours[name] for name in results), tuple(exact[name] for name in results)
    return (got, truth) if isinstance(got, tuple) else ((got,), (truth,))


def _tree(batch: int, nodes: int, generator: torch.Generator) -> Tensor:
    parents = torch.full((batch, nodes), -1, dtype=torch.int32)
    for i in range(1, nodes):
        parents[:, i] = torch.randint(i, (batch,), generator=generator)
    return parents


def cases() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    batch, nodes, prefix, heads, kv_heads, size, vocabulary = 2, 17, 150, 8, 2, 64, 40

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    parents = _tree(batch, nodes, generator)
    prefix_lens = torch.tensor([prefix, 3], dtype=torch.int32)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        cache = {f"{x}_cache": normal(batch, prefix + nodes, kv_heads, size, dtype=dtype) for x in "kv"}
        tree = {f"{x}_tree": normal(batch, nodes, kv_heads, size, dtype=dtype) for x in "kv"}
        q = normal(batch, nodes, heads, size, dtype=dtype)
        arguments = {"q": q, **cache, "prefix_lens": prefix_lens, "parents": parents, **tree}
        for extra in ({}, {"window": 20, "softcap": 20.0}):
            name = f"{str(dtype).removeprefix('torch.')} {' '.join(extra)}"
            yield "tree_attention", name, partial(_run, "tree_attention", arguments | extra, ()), tolerance

    yield "tree_mask", "", partial(_run, "tree_mask", {"parents": parents}, ())
    yield "tree_positions", "", partial(_run, "tree_positions", {"parents": parents, "prefix_lens": prefix_lens}, ())

    drafts = torch.randint(4, (batch, nodes), generator=generator)
    logits = normal(batch, nodes, vocabulary)
    probs, uniforms = torch.softmax(logits, -1), torch.rand(batch, nodes + 1, generator=generator)
    targets = torch.randint(4, (batch, nodes), generator=generator)
    verify: dict[str, dict[str, Any]] = {
        "tree_verify_greedy": {"target_tokens": targets},
        "tree_verify_typical": {"target_logits": logits, "temperature": 0.7, "epsilon": 0.3, "delta": 0.5},
        "tree_verify_sampling": {"target_probs": probs, "uniforms": uniforms},
    }
    for op, arguments in verify.items():
        yield op, "", partial(_run, op, {"draft_tokens": drafts, "parents": parents, **arguments}, ())

    path = torch.full((batch, nodes), -1, dtype=torch.int32)
    path[:, :3] = torch.tensor([0, 2, 3])
    update = {"prefix_lens": prefix_lens, "path": path, "num_accepted": torch.tensor([2, 2], dtype=torch.int32)}
    caches = {f"{x}_cache": normal(batch, prefix + nodes, kv_heads, size) for x in "kv"}
    tree = {f"{x}_tree": normal(batch, nodes, kv_heads, size) for x in "kv"}
    yield "tree_commit_kv_", "", partial(_run, "tree_commit_kv_", {**caches, **tree, **update}, ("k_cache", "v_cache"))
    yield "tree_compact_kv_", "", partial(_run, "tree_compact_kv_", {**caches, **update}, ("k_cache", "v_cache"))

    states = {f"{kind}_{x}": normal(*shape) for x in "ab"
              for kind, shape in (("out", (batch, nodes, heads, size)), ("lse", (batch, heads, nodes)))}  # fmt: skip
    yield "merge_attention_states", "", partial(_run, "merge_attention_states", states, ()), 1e-5
