# SPDX-License-Identifier: Apache-2.0
"""Small calls of every SEA op, for ``python -m torch_kernels selftest``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_kernels.sea import reference


def _run(op: str, arguments: dict[str, Any], device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The op's outputs and the reference's in float64."""
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    exact = {name: x.double() for name, x in tensors.items() if x.is_floating_point()}
    got = getattr(torch.ops.kernels, op)(**arguments | {name: x.to(device) for name, x in tensors.items()})
    truth = getattr(reference, op)(**arguments | exact)
    return (got, truth) if isinstance(got, tuple) else ((got,), (truth,))


def cases() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    batch, rows, keys, heads, num_cells, size, value_size, features = 2, 20, 70, 3, 16, 64, 40, 33

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    widths = (torch.arange(rows) + 1 + keys - rows).expand(batch, rows).contiguous()
    widths[1, 0] = 0
    csr = {"num_heads": heads, "num_cells": num_cells, "max_columns_per_cell": 3}
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        name = str(dtype).removeprefix("torch.")
        scores = normal(batch, heads, rows, num_cells, dtype=dtype)
        select = {"scores": scores, "widths": widths, "k": 12.0}
        yield "sea_select", name, partial(_run, "sea_select", select)
        selection = {"cells": reference.sea_select(**select), "widths": widths}
        if dtype == torch.float32:
            yield "sea_csr", "", partial(_run, "sea_csr", selection | csr)
        q = normal(batch, rows, heads, size, dtype=dtype)
        k = normal(batch, keys, heads, size, dtype=dtype)
        v, grad = normal(batch, keys, heads, value_size, dtype=dtype), normal(batch, rows, heads, value_size)
        gates = {
            "row_gain": normal(batch, heads, rows).sigmoid(),
            "mix": normal(batch, heads, rows).sigmoid(),
            "pooled": normal(batch, rows, heads, value_size, dtype=dtype),
        }
        inputs = {"q": q, "k": k, "v": v, **selection, "num_cells": num_cells, **gates}
        yield "sea_attention", name, partial(_run, "sea_attention", inputs), tolerance
        out, lse = reference.sea_attention(**inputs)
        backward = {"grad_out": grad.to(dtype), "out": out, "lse": lse, **inputs}
        yield "sea_attention_backward", name, partial(_run, "sea_attention_backward", backward), 30 * tolerance
        stretch = {"x": scores, "widths": widths, "length": keys, "fill": -1.0}
        yield "sea_stretch", name, partial(_run, "sea_stretch", stretch)
        narrow = {"grad_out": normal(batch, heads, rows, keys, dtype=dtype), "widths": widths, "num_cells": num_cells}
        yield "sea_stretch_backward", name, partial(_run, "sea_stretch_backward", narrow), 4 * tolerance

        x, proj = 0.3 * normal(batch, keys, heads, size, dtype=dtype), normal(features, size)
        for kind in ("relu", "exp"):
            feature = {"x": x, "proj": proj, "kind": kind, "eps": 1e-3}
            yield "favor_features", f"{name} {kind}", partial(_run, "favor_features", feature), tolerance
        sequence = {"q": reference.favor_features(x, proj, "relu", 1e-3), "v": v}
        sequence["k"] = sequence["q"].flip(1)
        initial = {"initial_state": normal(batch, heads, features, value_size)}
        initial["initial_norm"] = normal(batch, heads, features).abs()
        for causal in (True, False):
            linear = {**sequence, "causal": causal, **initial}
            description = f"{name} {'causal' if causal else 'full'}"
            yield "linear_attention", description, partial(_run, "linear_attention", linear), 50 * tolerance
            linear = {"grad_out": grad[:, :1].expand(-1, keys, -1, -1).to(dtype), **linear}
            run = partial(_run, "linear_attention_backward", linear)
            yield "linear_attention_backward", description, run, 50 * tolerance
        yield "running_mean", name, partial(_run, "running_mean", {"v": v}), tolerance
