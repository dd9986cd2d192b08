# SPDX-License-Identifier: Apache-2.0
"""Small calls of the int4 linear ops, for ``python -m torch_kernels selftest``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_kernels.int4_linear import packing, reference
from torch_kernels.int4_linear.weight import Int4Weight


def _run(op: str, arguments: dict[str, Any], sizes: tuple[int, int], device: torch.device) -> tuple[Any, Any]:
    """The op's output and the reference's in float64; the weight goes into the layout of the backend that runs."""
    exact = {name: x.double() if name in ("x", "grad", "bias") else x for name, x in arguments.items()}
    truth = getattr(reference, op)(**{"bias": None, "mode": "exact"} | exact if op == "int4_linear" else exact)
    ours = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    layouts = packing.LAYOUTS
    ours["weight"] = layouts[packing.layout_for(device)].pack(layouts["cpu"].unpack(ours["weight"], *sizes))
    return (getattr(torch.ops.kernels, op)(**ours),), (truth,)


def cases() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    rows, out_features, in_features = 5, 136, 300

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    dense = normal(out_features, in_features, dtype=torch.float16)
    g_idx = torch.randint(3, (in_features,), generator=generator)
    plain = Int4Weight.quantize(dense, group_size=128)
    weights = {
        "": plain,
        "zeros": Int4Weight.quantize(dense, group_size=128, symmetric=False),
        "act-order": Int4Weight(plain.qweight, plain.scales, None, g_idx, in_features=in_features, group_size=128),
    }
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 0.06), (torch.bfloat16, 0.5)):
        for name, weight in weights.items():
            packed = weight.pack("cpu")
            columns = in_features if packed.perm is None else len(packed.perm)
            sizes = (out_features, columns)
            tensors = {"weight": packed.weight, "scales": packed.scales, "zeros": packed.zeros, "perm": packed.perm}
            options = {"out_features": out_features, "group_size": packed.group_size}
            x, bias = normal(rows, in_features, dtype=dtype), normal(out_features, dtype=dtype)
            described = f"{str(dtype).removeprefix('torch.')} {name}".strip()
            for mode in ("exact", "a8"):
                arguments = {"x": x, **tensors, "bias": bias, **options, "mode": mode}
                # An activation at a tie may round either way: one step of 8 bits times a weight.
                allowed = tolerance + (0.05 if mode == "a8" else 0.0)
                yield "int4_linear", f"{described} {mode}", partial(_run, "int4_linear", arguments, sizes), allowed
            options = {"in_features": in_features, "group_size": packed.group_size}
            arguments = {"grad": normal(rows, out_features, dtype=dtype), **tensors, **options}
            run = partial(_run, "int4_linear_backward", arguments, sizes)
            yield "int4_linear_backward", described, run, tolerance
