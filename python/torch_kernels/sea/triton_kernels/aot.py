# SPDX-License-Identifier: Apache-2.0
"""The instances of this family's kernels that the tests compile ahead of time."""

from torch_kernels._triton import aot_case

from ..heuristics import SPAN, attention_tile, features_tile, key_gradient_tile, linear_tile, query_gradient_tile
from .attention import attention_kernel
from .features import features_kernel
from .key_gradient import key_gradient_kernel, summary_kernel
from .linear import attend_kernel, states_kernel
from .mean import BLOCK, PART, mean_kernel
from .query_gradient import query_gradient_kernel
from .stretch import CSR_CELLS, csr_columns_kernel
from .tiles import head_blocks

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
CELLS = {"CELLS": 256, "WORDS": 96}
TENSORS = (
    "out", "q", "k", "v", "pooled", "grad_q", "grad_k", "grad_v", "grad_pooled", "g", "x", "proj", "a", "b", "c",
    "partner",
)  # fmt: skip
FLOAT32 = (
    "lse", "row_gain", "mix", "grad_row_gain", "grad_mix", "along", "states", "norms", "final", "initial", "state",
    "norm", "factor", "weight", "row_factor", "row_weight", "column_factor", "column_weight", "inverses", "dots",
)  # fmt: skip
INTEGERS = ("cells", "widths", "counts", "extents", "alarms")
TYPES = dict.fromkeys(FLOAT32, "*fp32") | dict.fromkeys(INTEGERS, "*i32")
TYPES |= {"scale": "fp32", "eps": "fp32", "shift": "*fp32"}


def _case(name, kernel, kind, constants, absent=(), options=None, types=None):
    types = dict.fromkeys(TENSORS, f"*{kind}") | TYPES | (types or {})
    return aot_case(name, kernel, types, constants, absent, options)


def _options(tile):
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _sparse(name, kernel, kind, size, value_size, tile, clip, absent, repair):
    sizes = CELLS | head_blocks(size, value_size, BYTES[kind]) | {"CLIP": int(clip), "M": tile.rows, "N": tile.columns}
    sizes["REPAIR"] = repair
    name = f"{name}_{kind}_{size}x{value_size}{'_clip' * clip}{'_repair' * repair}"
    return _case(name, kernel, kind, sizes, absent, _options(tile))


def _attention(arch, kind, size, value_size, rows=4096, clip=False, gates=True, repair=False):
    tile = attention_tile(rows, max(size, value_size), BYTES[kind], arch, clip)
    name = "attention_few" if rows < 64 else "attention"
    absent = () if gates else ("row_gain", "mix", "pooled")
    return _sparse(name, attention_kernel, kind, size, value_size, tile, clip, absent, repair)


def _backward(arch, kernel, kind, size, value_size, clip=False, gates=True, repair=False):
    arguments = max(size, value_size), BYTES[kind], arch, clip
    of_queries = kernel is query_gradient_kernel
    tile = query_gradient_tile(*arguments) if of_queries else key_gradient_tile(*arguments)
    absent = ("row_gain", "mix", "pooled", "grad_row_gain", "grad_mix", "grad_pooled")
    absent = () if gates else tuple(name for name in absent if name in kernel.arg_names)
    return _sparse(kernel.__name__.removesuffix("_kernel"), kernel, kind, size, value_size, tile, clip, absent, repair)


def _features(arch, kind, proj, exponential):
    tile = features_tile(BYTES[proj], arch)
    sizes = {"D": 64, "EXPONENTIAL": exponential, "M": tile.rows, "N": tile.columns, "CHUNK": 32}
    types = {"proj": f"*{proj}", "factor": "fp32"}
    name = f"features_{'exp' if exponential else 'relu'}_{kind}_{proj}"
    return _case(name, features_kernel, kind, sizes, () if exponential else ("shift",), _options(tile), types)


def _linear(arch, kind, columns, mode, repair=False):
    """mode: which of the products with states."""
    tile = linear_tile(BYTES[kind], columns, arch)
    factors = ("row_factor", "row_weight", "column_factor", "column_weight")
    absent = {
        "out": (*factors, "inverses", "dots", "partner"),
        "inverses": (*factors, "out"),
        "grad_q": ("column_factor", "column_weight", "inverses", "dots", "partner"),
        "grad_k": ("row_factor", "row_weight", "inverses", "dots", "partner"),
        "grad_v": ("row_factor", "row_weight", "column_weight", "norm", "inverses", "dots", "partner"),
    }[mode]
    sizes = {
        "DIVIDE": mode in ("out", "inverses"), "REVERSE": mode in ("grad_k", "grad_v"),
        "TRANSPOSED": mode in ("grad_q", "grad_k"), "CAUSAL": True, "REPAIR": repair, "SPAN": SPAN,
        "T": tile.rows, "V": tile.columns,
    }  # fmt: skip
    return _case(
        f"linear_{mode}_{kind}_{columns}{'_repair' * repair}", attend_kernel, kind, sizes, absent, _options(tile)
    )


def _states(arch, kind, columns, factors=False):
    tile = linear_tile(BYTES[kind], columns, arch)
    sizes = {"SPAN": SPAN, "T": tile.rows, "F": tile.rows, "V": tile.columns}
    absent = () if factors else ("factor", "weight")
    name = f"states_{kind}_{columns}{'_factors' * factors}"
    return _case(name, states_kernel, kind, sizes, absent, _options(tile))


def _mean(arch):
    types = {"mean": "*bf16", "sums": "*fp64", "count": "*i64"}
    return _case("mean_bf16", mean_kernel, "bf16", {"PART": PART, "BLOCK": BLOCK}, (), {"num_warps": 4}, types)


def _csr(arch):
    sizes = CELLS | {"BLOCK": CSR_CELLS}
    return _case(
        "csr_columns", csr_columns_kernel, "fp32", sizes, (), {"num_warps": 1}, {"col": "*i32", "crow": "*i32"}
    )


def aot_cases(arch: str):
    return [
        _attention(arch, "bf16", 64, 64),
        _attention(arch, "fp16", 128, 128, clip=True),
        _attention(arch, "fp32", 64, 64, repair=True),
        _backward(arch, query_gradient_kernel, "bf16", 64, 64),
        _backward(arch, key_gradient_kernel, "bf16", 128, 128),
        _case("summary", summary_kernel, "fp32", CELLS | {"M": 64}),
        _features(arch, "bf16", "bf16", True),
        _linear(arch, "bf16", 128, "out"),
        _linear(arch, "bf16", 272, "grad_k"),
        _states(arch, "bf16", 128, factors=True),
        _mean(arch),
        _csr(arch),
    ]
