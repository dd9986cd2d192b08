# SPDX-License-Identifier: Apache-2.0
"""The instances of this family's kernels that the tests compile ahead of time, as the launchers would make them."""

from torch_kernels._triton import aot_case

from ..heuristics import Tile, tiles
from .backward import backward_kernel, tile
from .product import GROUP, JOIN_COLUMNS, JOIN_ROWS, join_kernel, product_kernel
from .quantize import OUTLIER_COLUMNS, OUTLIER_ROWS, outlier_kernel, quantize_kernel, quantize_tile
from .rotate import Pass, passes, rotate_kernel

FLOAT32 = ("scale", "row_scale", "weight_scale", "x_scale", "bias", "smooth", "signs")
TYPES = dict.fromkeys(FLOAT32, "*fp32") | dict.fromkeys(("threshold", "limit", "factor"), "fp32")
TYPES |= dict.fromkeys(("listed", "count", "partial"), "*i32") | dict.fromkeys(("a", "b", "q", "weight"), "*i8")
TYPES |= {"outliers": "*u8"}
NO_OUTLIERS = ("x", "listed", "count")
WITHOUT_OUTLIERS = ("listed", "count", "outliers", "threshold")


def _quantize(name, dtype, columns, absent):
    block_m, block_k = quantize_tile(columns)
    constants = {"WHOLE": columns <= block_k, "BLOCK_M": block_m, "BLOCK_K": block_k}
    return aot_case(name, quantize_kernel, TYPES | {"x": dtype}, constants, absent, {"num_warps": 8})


def _product(name, tile: Tile, out, absent, even=True, aligned=True, x="*bf16"):
    types = TYPES | {"out": out, "x": x, "depth": "i32:16"}
    if aligned:
        types |= {"columns": "i32:16", "size": "i32:16"}
    constants = {"EVEN": even, "GROUP_M": GROUP, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    options = {"enable_fp_fusion": False, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return aot_case(f"{name}_{tile.m}x{tile.n}", product_kernel, types, constants, absent, options)


def _join(name, kind, absent=()):
    types = TYPES | {"out": kind, "x": kind, "columns": "i32:16"}
    constants = {"BLOCK_M": JOIN_ROWS, "BLOCK_N": JOIN_COLUMNS}
    return aot_case(name, join_kernel, types, constants, absent, {"enable_fp_fusion": False})


def _backward(dtype):
    halves = dtype != "*fp32"
    blocks, options = tile(halves)
    types = TYPES | {"out": dtype, "grad": dtype, "columns": "i32:16", "size": "i32:16"}
    return aot_case(f"backward_{dtype[1:]}", backward_kernel, types, {"HALVES": halves} | blocks, (), options)


def _rotate(name, part: Pass, dtype, out, absent):
    constants, options = part.launch()
    types = TYPES | {"out": out, "x": dtype, "inner": "i32:16", "per_row": "i32:16"}
    if part.inner == 1:
        constants |= {"inner": 1, "per_row": 1}
    return aot_case(name, rotate_kernel, types, constants, absent, options)


def aot_cases(arch: str):
    outlier_tile = {"BLOCK_M": OUTLIER_ROWS, "BLOCK_K": OUTLIER_COLUMNS}
    all_tiles, odd = tiles(arch), tiles(arch, aligned=False)[::2]
    sums = ("row_scale", "weight_scale", "bias", *NO_OUTLIERS)
    plain, static = ("scale", "signs", "smooth", "x_scale"), ("signs", "smooth")
    first, second = passes(1 << 20)
    return [
        aot_case("outliers_bf16", outlier_kernel, TYPES | {"x": "*bf16"}, outlier_tile, options={"num_warps": 4}),
        _quantize("quantize_bf16_4096", "*bf16", 4096, (*WITHOUT_OUTLIERS, "smooth", "x_scale")),
        _quantize("quantize_fp32_16384", "*fp32", 16384, (*WITHOUT_OUTLIERS, "smooth", "x_scale")),
        _quantize("quantize_bf16_4096_outliers", "*bf16", 4096, ("smooth", "x_scale")),
        _quantize("quantize_bf16_512_static", "*bf16", 512, (*WITHOUT_OUTLIERS, "smooth")),
        _quantize("quantize_fp32_32768_smooth", "*fp32", 32768, (*WITHOUT_OUTLIERS, "x_scale")),
        *(_product("linear_bf16", tile, "*bf16", NO_OUTLIERS) for tile in all_tiles),
        *(_product("linear_bf16_outliers", tile, "*bf16", ()) for tile in tiles(arch, outliers=2)),
        *(_product("linear_fp32_outliers", tile, "*fp32", (), x="*fp32") for tile in tiles(arch, outliers=4)),
        *(_product("linear_bf16_tail", tile, "*bf16", NO_OUTLIERS, even=False) for tile in all_tiles[::3]),
        *(_product("linear_bf16_odd", tile, "*bf16", NO_OUTLIERS, even=False, aligned=False) for tile in odd),
        *(_product("mm", tile, "*i32", sums) for tile in (all_tiles[0], all_tiles[-1])),
        _join("join_bf16_outliers", "*bf16"),
        _join("join_fp32_outliers", "*fp32"),
        _join("join_bf16", "*bf16", NO_OUTLIERS),
        _backward("*bf16"),
        _backward("*fp16"),
        _backward("*fp32"),
        _rotate("hadamard_bf16_128", passes(128)[0], "*bf16", "*bf16", plain),
        _rotate("hadamard_bf16_4096", passes(4096)[0], "*bf16", "*bf16", plain),
        _rotate("hadamard_fp32_16384", passes(16384)[0], "*fp32", "*fp32", plain),
        _rotate("hadamard_bf16_12_256", passes(12 * 256)[0], "*bf16", "*bf16", plain),
        _rotate("hadamard_bf16_20_256", passes(20 * 256)[0], "*bf16", "*bf16", plain),
        _rotate("hadamard_bf16_1048576_first", first, "*bf16", "*fp32", plain),
        _rotate("hadamard_bf16_1048576_second", second, "*fp32", "*bf16", plain),
        _rotate("rotate_quantize_bf16_4096", passes(4096)[0], "*bf16", "*i8", ("x_scale",)),
        _rotate("rotate_quantize_bf16_20_512", passes(20 * 512)[0], "*bf16", "*i8", ("x_scale",)),
        _rotate("rotate_quantize_fp32_1024_static", passes(1024)[0], "*fp32", "*i8", static),
    ]
