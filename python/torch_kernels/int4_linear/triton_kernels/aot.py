# SPDX-License-Identifier: Apache-2.0
"""Instances of the kernels as the launchers make them, for compilation ahead of time."""

from .. import heuristics
from . import rows
from .backward import int4_linear_backward_kernel
from .linear import SUM_BLOCK, dequantise_kernel, int4_linear_kernel, launch_options, sum_splits_kernel

ELEMENT_SIZES = {"*i8": 1, "*bf16": 2, "*fp16": 2, "*fp32": 4}


def _case(name, kernel, pointers, constants, optional, options):
    """Integers are i32; optional pointers that are not given are None."""
    signature = dict.fromkeys(kernel.arg_names, "i32") | pointers
    absent = {argument: None for argument in optional if argument not in pointers}
    return name, kernel, signature, constants | absent, options


def _tiles(tile, arch):
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return blocks, {"num_warps": tile.num_warps, "num_stages": tile.num_stages} | launch_options(arch)


def _forward(name, arch, dtype, rows, group_size, *, partial=False, sequence=False, sums=False, **given):
    tile = heuristics.forward_tile(rows, group_size, ELEMENT_SIZES[dtype], arch)
    blocks, options = _tiles(tile, arch)
    pointers = {"out": "*fp32" if partial else "*bf16" if dtype == "*i8" else dtype, "x": dtype, "weight": "*i32"}
    pointers |= {"scales": "*fp16"} | given
    if dtype == "*i8":
        pointers["row_scales"] = "*fp32"
    if dtype == "*i8" or sums:
        pointers["row_sums"] = "*fp32"
    constants = blocks | {"GROUP": max(group_size, 0), "SEQUENCE": sequence}
    return _case(name, int4_linear_kernel, pointers, constants, ("row_scales", "row_sums", "zeros", "bias"), options)


def _backward(name, arch, dtype, rows, group_size, *, partial=False, sequence=False, **given):
    blocks, options = _tiles(heuristics.backward_tile(rows, ELEMENT_SIZES[dtype], arch), arch)
    pointers = {"out": "*fp32" if partial else dtype, "grad": dtype, "weight": "*i32", "scales": "*fp16"} | given
    constants = blocks | {"GROUP": max(group_size, 0), "SEQUENCE": sequence, "PARTIAL": partial}
    return _case(name, int4_linear_backward_kernel, pointers, constants, ("zeros", "perm"), options)


def aot_cases(arch: str):
    partials = {"out": "*bf16", "partial": "*fp32", "bias": "*bf16"}
    dense = {"out": "*bf16", "weight": "*i32", "scales": "*fp16", "zeros": "*fp16"}
    return [
        *rows.aot_cases(arch),
        _forward("linear_bf16_g128_m16_split", arch, "*bf16", 16, 128, partial=True),
        _forward("linear_bf16_g128_m32_zeros_bias", arch, "*bf16", 32, 128, zeros="*fp16", bias="*bf16"),
        _forward("linear_bf16_g128_m64", arch, "*bf16", 64, 128),
        _forward("linear_bf16_g128_m1024", arch, "*bf16", 1024, 128, bias="*bf16"),
        _forward("linear_fp16_g64_m1024_zeros_sequence", arch, "*fp16", 1024, 64, zeros="*fp16", sequence=True),
        _forward("linear_bf16_m64_sequence", arch, "*bf16", 64, -1, sequence=True),
        _forward("linear_fp16_g32_m16_split", arch, "*fp16", 16, 32, partial=True),
        _forward("linear_fp16_g16_m16", arch, "*fp16", 16, 16),
        _forward("linear_bf16_g64_m16_float_zeros", arch, "*bf16", 16, 64, zeros="*fp32", sums=True),
        _forward("linear_fp32_g128_m16", arch, "*fp32", 16, 128, zeros="*fp32"),
        _forward("linear_fp32_g128_m64_sequence", arch, "*fp32", 64, 128, sequence=True),
        _forward("linear_a8_g128_m16_split", arch, "*i8", 16, 128, partial=True),
        _forward("linear_a8_g64_m1024_zeros_sequence", arch, "*i8", 1024, 64, zeros="*fp16", sequence=True),
        _forward("linear_a8_g16_m16", arch, "*i8", 16, 16),
        _backward("backward_bf16_g128_m16_split", arch, "*bf16", 16, 128, partial=True),
        _backward("backward_bf16_g32_m1024_zeros_perm", arch, "*bf16", 1024, 32, zeros="*fp16", perm="*i32"),
        _backward("backward_fp16_g128_m1024_sequence", arch, "*fp16", 1024, 128, sequence=True),
        _backward("backward_fp32_g128_m64", arch, "*fp32", 64, 128),
        _case(
            "sum_splits_bf16",
            sum_splits_kernel,
            partials,
            {"HAS_PERM": False, "BLOCK": SUM_BLOCK, "perm": None},
            (),
            {},
        ),
        _case("dequantise_bf16_g128", dequantise_kernel, dense, {"GROUP": 128, "BLOCK_N": 64, "BLOCK_K": 128}, (), {}),
    ]
