# SPDX-License-Identifier: Apache-2.0
"""The instances of this family's kernels that the tests compile ahead of time, as the launchers would make them."""

from torch_kernels._triton import aot_case

from .. import heuristics
from .backward import int4_linear_backward_kernel
from .linear import SUM_BLOCK, dequantise_kernel, int4_linear_kernel, launch_options, sum_splits_kernel
from .rows import BLOCK_M, rows_kernel

MULTIPROCESSORS = 132
ELEMENT_SIZES = {"*i8": 1, "*bf16": 2, "*fp16": 2, "*fp32": 4}


def _case(name, kernel, pointers, constants, optional=(), options=None):
    """Optional pointers that are not given are None."""
    return aot_case(name, kernel, pointers, constants, [x for x in optional if x not in pointers], options)


def _rows(name, group, **pointers):
    constants = {"GROUP": group, "BLOCK_M": BLOCK_M}
    return _case(name, rows_kernel, pointers, constants, ("out", "scale", "total", "perm"))


def _constants(plan, group_size, arch):
    tile = plan.tile
    constants = {"GROUP": max(group_size, 0), "SEQUENCE": plan.sequence}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return constants, {"num_warps": tile.num_warps, "num_stages": tile.num_stages} | launch_options(arch)


def _forward(name, arch, dtype, shape, group_size, *, sums=False, **given):
    """shape is M, N, K."""
    plan = heuristics.forward_plan(*shape, group_size, ELEMENT_SIZES[dtype], "exact", arch, MULTIPROCESSORS)
    constants, options = _constants(plan, group_size, arch)
    partial = plan.splits > 1 and not plan.sequence
    pointers = {"out": "*fp32" if partial else "*bf16" if dtype == "*i8" else dtype, "x": dtype, "weight": "*i32"}
    pointers |= {"scales": "*fp16"} | given
    if dtype == "*i8":
        pointers["row_scales"] = "*fp32"
    if dtype == "*i8" or sums:
        pointers["row_sums"] = "*fp32"
    optional = ("row_scales", "row_sums", "zeros", "bias")
    return _case(name, int4_linear_kernel, pointers, constants | {"EVEN": True, "STEP": plan.step}, optional, options)


def _backward(name, arch, dtype, shape, group_size, **given):
    plan = heuristics.backward_plan(*shape, ELEMENT_SIZES[dtype], arch, MULTIPROCESSORS)
    constants, options = _constants(plan, group_size, arch)
    partial = plan.splits > 1 and not plan.sequence
    pointers = {"out": "*fp32" if partial else dtype, "grad": dtype, "weight": "*i32", "scales": "*fp16"} | given
    constants |= {"PARTIAL": partial}
    return _case(name, int4_linear_backward_kernel, pointers, constants, ("zeros", "perm"), options)


def aot_cases(arch: str):
    partials = {"out": "*bf16", "partial": "*fp32", "bias": "*bf16"}
    dense = {"out": "*bf16", "weight": "*i32", "scales": "*fp16", "zeros": "*fp16"}
    quantised = {"out": "*i8", "scale": "*fp32", "total": "*fp32", "x": "*bf16"}
    few, some, many = (16, 4096, 4096), (64, 16384, 4096), (1024, 16384, 4096)
    return [
        _rows("rows_bf16_int8_g128", 128, **quantised),
        _rows("rows_bf16_int8_g16_perm", 16, **quantised, perm="*i32"),
        _rows("rows_fp16_perm_sums_g64", 64, out="*fp16", total="*fp32", x="*fp16", perm="*i32"),
        _forward("linear_bf16_g128_m16_split", arch, "*bf16", few, 128),
        _forward("linear_bf16_g128_m32_zeros_bias", arch, "*bf16", (32, 16384, 4096), 128, zeros="*fp16", bias="*bf16"),
        _forward("linear_bf16_g128_m64", arch, "*bf16", some, 128),
        _forward("linear_bf16_g128_m1024_bias", arch, "*bf16", many, 128, bias="*bf16"),
        _forward("linear_fp16_g64_m1024_zeros", arch, "*fp16", many, 64, zeros="*fp16"),
        _forward("linear_bf16_m1024_sequence", arch, "*bf16", (1024, 4096, 4096), -1),
        _forward("linear_fp16_g32_m16_split", arch, "*fp16", few, 32),
        _forward("linear_fp16_g16_m16_split", arch, "*fp16", few, 16),
        _forward("linear_bf16_g64_m16_float_zeros_split", arch, "*bf16", few, 64, zeros="*fp32", sums=True),
        _forward("linear_fp32_g128_m16_split", arch, "*fp32", few, 128, zeros="*fp32"),
        _forward("linear_fp32_g128_m1024_sequence", arch, "*fp32", (1024, 4096, 4096), 128),
        _forward("linear_a8_g128_m16_split", arch, "*i8", few, 128),
        _forward("linear_a8_g128_m1024", arch, "*i8", many, 128),
        _forward("linear_a8_g64_m1024_zeros_sequence", arch, "*i8", (1024, 4096, 4096), 64, zeros="*fp16"),
        _forward("linear_a8_g16_m16_split", arch, "*i8", few, 16),
        _backward("backward_bf16_g128_m16_split", arch, "*bf16", few, 128),
        _backward(
            "backward_bf16_g32_m1024_zeros_perm", arch, "*bf16", (1024, 4096, 16384), 32, zeros="*fp16", perm="*i32"
        ),
        _backward("backward_fp16_g128_m1024_sequence", arch, "*fp16", (1024, 4096, 4096), 128),
        _backward("backward_fp32_g128_m1024", arch, "*fp32", (1024, 4096, 16384), 128),
        _case("sum_splits_bf16", sum_splits_kernel, partials, {"HAS_PERM": False, "BLOCK": SUM_BLOCK}, ("perm",)),
        _case("dequantise_bf16_g128", dequantise_kernel, dense, {"GROUP": 128, "BLOCK_N": 64, "BLOCK_K": 64}),
    ]
