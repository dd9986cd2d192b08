# SPDX-License-Identifier: Apache-2.0
"""Small calls of every lightning attention op, for ``python -m torch_kernels selftest``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_kernels.lightning_attention import reference


def _run(op: str, arguments: dict[str, Any], device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The op's outputs and the reference's in float64; the state instead for an op that only changes that."""

    def copied(to: torch.device | torch.dtype) -> dict[str, Any]:
        floating = {n: x for n, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()}
        moved = (
            floating if isinstance(to, torch.dtype) else {n: x for n, x in arguments.items() if isinstance(x, Tensor)}
        )
        return arguments | {name: x.to(to, copy=True) for name, x in moved.items()}

    ours, exact = copied(device), copied(torch.float64)
    got, truth = getattr(torch.ops.kernels, op)(**ours), getattr(reference, op)(**exact)
    if op.endswith("_"):
        return (ours["state"],), (exact["state"],)
    return (got, truth) if isinstance(got, tuple) else ((got,), (truth,))


def cases() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    tokens, heads, groups, size, value_size = 150, 2, 2, 64, 40

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    slopes = torch.tensor([0.02, 0.5])
    offsets = torch.tensor([0, 60, 60, tokens], dtype=torch.int32)
    state = normal(3, heads, size, value_size)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        q, grad = normal(1, tokens, heads * groups, size, dtype=dtype), normal(1, tokens, heads * groups, value_size)
        k, v = normal(1, tokens, heads, size, dtype=dtype), normal(1, tokens, heads, value_size, dtype=dtype)
        packed = {"initial_state": state, "cu_seqlens": offsets}
        name = str(dtype).removeprefix("torch.")
        for op, decay in (
            ("lightning_attention", {"slopes": slopes}),
            ("simple_gla", {"g": -normal(1, tokens, heads).abs()}),
        ):
            inputs = {"q": q, "k": k, "v": v, **decay, **packed}
            yield op, name, partial(_run, op, inputs | {"output_final_state": True}), tolerance
            backward = {"grad_out": grad.to(dtype), **inputs, "grad_final_state": state.flip(0)}
            yield f"{op}_backward", name, partial(_run, f"{op}_backward", backward), 30 * tolerance
        chunk = {"k": k, "v": v, "slopes": slopes, "cu_seqlens": offsets}
        yield "lightning_chunk_state", name, partial(_run, "lightning_chunk_state", chunk), tolerance
        apply = {"q": q, "state": state, "slopes": slopes, "cu_seqlens": offsets}
        yield "lightning_apply_state", name, partial(_run, "lightning_apply_state", apply), tolerance

        pool = {"state": state, "slopes": slopes, "state_indices": torch.tensor([2, -1], dtype=torch.int32)}
        step = {"q": q[0, :2], "k": k[0, :2], "v": v[0, :2], **pool}
        yield "lightning_attention_step_", name, partial(_run, "lightning_attention_step_", step), tolerance
        tree = {name: x[0, :10].unflatten(0, (2, 5)) for name, x in (("k", k), ("v", v))}
        parents = torch.tensor([[-1, 0, 0, 2, -2]] * 2, dtype=torch.int32)
        verify = {"q": q[0, :10].unflatten(0, (2, 5)), **tree, **pool, "parents": parents}
        yield "lightning_attention_verify", name, partial(_run, "lightning_attention_verify", verify), tolerance
        path = {"path": torch.tensor([[0, 2, 3, -1, -1]] * 2), "num_accepted": torch.tensor([2, 1])}
        commit = {**tree, **pool, **path}
        yield "lightning_attention_commit_", name, partial(_run, "lightning_attention_commit_", commit), tolerance
