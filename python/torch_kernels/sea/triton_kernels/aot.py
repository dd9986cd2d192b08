# SPDX-License-Identifier: Apache-2.0
"""The instances of this family's kernels that the tests compile ahead of time."""

from ..heuristics import attention_tile
from .attention import attention_kernel, head_blocks

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FLOAT32 = ("lse", "row_gain", "mix")
INTEGERS = ("cells", "widths")


def _case(name, kernel, kind, constants, absent=(), tile=None):
    signature = dict.fromkeys(kernel.arg_names, "i32") | {"scale": "fp32"} | dict.fromkeys(FLOAT32, "*fp32")
    signature |= dict.fromkeys(INTEGERS, "*i32")
    signature |= dict.fromkeys(("out", "q", "k", "v", "pooled"), f"*{kind}")
    options = {}
    if tile:
        constants = constants | {"M": tile.rows, "N": tile.columns}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    signature = {argument: signature[argument] for argument in kernel.arg_names}
    return name, kernel, signature, constants | dict.fromkeys(absent), options


def _attention(arch, kind, size, value_size, rows=4096, clip=False, gates=True):
    tile = attention_tile(rows, max(size, value_size), BYTES[kind], arch)
    constants = {"CELLS": 256, "WORDS": 96, "CLIP": clip} | head_blocks(size, value_size, BYTES[kind])
    name = f"attention_{kind}_{size}x{value_size}{'_few' * (rows < 64)}{'_clip' * clip}"
    return _case(name, attention_kernel, kind, constants, () if gates else ("row_gain", "mix", "pooled"), tile)


def aot_cases(arch: str):
    return [
        _attention(arch, "bf16", 64, 64),
        _attention(arch, "fp16", 128, 128, clip=True),
        _attention(arch, "bf16", 192, 256, gates=False),
        _attention(arch, "bf16", 128, 128, rows=16),
        _attention(arch, "fp32", 64, 64),
        _attention(arch, "fp32", 256, 256),
    ]
