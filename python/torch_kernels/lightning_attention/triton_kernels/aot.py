# SPDX-License-Identifier: Apache-2.0
"""The instances of this family's kernels that the tests compile ahead of time, as the launchers would make them."""

import torch

from torch_kernels._triton import aot_case

from ..heuristics import MARK, SPAN, backward_tile, forward_tile, slope_rows, slope_tile, states_tile
from .attention import attention_kernel
from .backward import backward_kernel, decay_gradient_kernel
from .decode import blocks, commit_kernel, step_kernel, verify_kernel, verify_tiles
from .slope_gradient import slope_gradient_kernel
from .states import apply_state_kernel, rows, segment_states_kernel

TYPES = dict.fromkeys(
    ("final", "states", "initial", "decays", "slopes", "gates", "dots", "partial", "state_marks", "grad_marks",
     "grad_initial", "grad_states", "grad_final", "state"), "*fp32"
) | {"cu_seqlens": "*i64", "scale": "fp32"}  # fmt: skip
TYPES |= dict.fromkeys(("path", "num_accepted", "parents", "state_indices"), "*i32")
TENSORS = ("out", "q", "k", "v", "grad", "dq", "dk", "dv")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def _case(name, kernel, kind, constants, absent=(), types=None, tile=None):
    """Strides and counts are not specialised in a launch, hence plain integers here."""
    options = {}
    if tile:
        constants = constants | {"C": tile.chunk, "BLOCK": tile.block}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    types = TYPES | dict.fromkeys(TENSORS, f"*{kind}") | (types or {})
    return aot_case(name, kernel, types, constants, absent, options)


def _shape(arch, tile, kind, size, columns):
    return tile(BYTES[kind], size, columns, arch), rows(size, BYTES[kind]) | {"V": columns, "SPAN": SPAN}


def _forward(arch, kind, size, columns, segments=False, gates=False, group=1):
    tile, sizes = _shape(arch, forward_tile, kind, size, columns)
    absent = ("slopes",) if gates else ("gates",)
    absent += () if segments else ("cu_seqlens", "states")
    name = f"attention_{kind}_{size}x{columns}{'_gates' * gates}{'_segments' * segments}{'_group' * (group > 1)}"
    return _case(name, attention_kernel, kind, sizes | {"GROUP": group, "SPLIT": segments}, absent, tile=tile)


def _backward(arch, kind, size, columns, segments=False, gates=False, group=1):
    tile, sizes = _shape(arch, backward_tile, kind, size, columns)
    values = rows(columns, BYTES[kind])
    sizes |= {"V0": values["K0"], "V1": values["K1"], "V_PARTS": values["PARTS"], "MARK": MARK}
    absent = ("slopes",) if gates else ("gates", "dots", "state_marks", "grad_marks")
    absent += () if segments else ("cu_seqlens", "states", "grad_states", "grad_initial")
    name = f"backward_{kind}_{size}x{columns}{'_gates' * gates}{'_segments' * segments}{'_group' * (group > 1)}"
    return _case(name, backward_kernel, kind, sizes | {"GROUP": group, "SPLIT": segments}, absent, tile=tile)


def _states(arch, kind, size, columns, gates=False, reverse=False):
    tile, sizes = _shape(arch, states_tile, kind, size, columns)
    absent = ("slopes",) if gates else ("gates", "decays")
    name = f"states_{kind}_{size}x{columns}{'_gates' * gates}{'_reverse' * reverse}"
    constants = sizes | {"MEMBERS": 1, "REVERSE": reverse, "SPLIT": True}
    return _case(name, segment_states_kernel, kind, constants, absent, tile=tile)


def _apply(arch, kind, size, columns):
    tile, sizes = _shape(arch, states_tile, kind, size, columns)
    constants = sizes | {"GROUP": 1, "SPLIT": True}
    return _case(f"apply_{kind}_{size}x{columns}", apply_state_kernel, kind, constants, tile=tile)


def _slopes(kind, size, columns):
    tile = slope_tile(BYTES[kind], columns)
    constants = {"GROUP": 1, "K": size, "V": columns, "ROWS": slope_rows(size)}
    return _case(f"slopes_{kind}_{size}x{columns}", slope_gradient_kernel, kind, constants, tile=tile)


def _verify(arch, name, kind, size, group, absent=()):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kind]
    constants = {"GROUP": group} | blocks(size, size) | verify_tiles(dtype, size, arch)
    return _case(f"verify_{kind}_{name}", verify_kernel, kind, constants, absent)


def aot_cases(arch: str):
    decay = {"GROUP": 1, "SIZE": 128 * 128, "BLOCKS": 2, "MARK": MARK, "BLOCK": 1024}
    return [
        _forward(arch, "bf16", 128, 128),
        _forward(arch, "bf16", 192, 192, segments=True, gates=True, group=2),
        _backward(arch, "bf16", 128, 128, segments=True, gates=True, group=2),
        _backward(arch, "bf16", 128, 128),
        _backward(arch, "fp32", 128, 128),
        _states(arch, "bf16", 128, 128, gates=True, reverse=True),
        _apply(arch, "bf16", 128, 128),
        _case("decay_gates", decay_gradient_kernel, "fp32", decay, (), {"out": "*fp32"}),
        _slopes("bf16", 128, 128),
        _slopes("fp32", 256, 128),
        _case("step_bf16_d128", step_kernel, "bf16", blocks(128, 128) | {"GROUP": 1}),
        _case("step_fp32_d80_group4", step_kernel, "fp32", blocks(80, 80) | {"GROUP": 4}, ("state_indices",)),
        _case("step_bf16_d256", step_kernel, "bf16", blocks(256, 256) | {"GROUP": 1}),
        _case("commit_bf16_d128", commit_kernel, "bf16", blocks(128, 128)),
        _verify(arch, "d128", "bf16", 128, 1),
        _verify(arch, "d96_chain", "fp16", 96, 2, ("parents",)),
        _verify(arch, "d256", "bf16", 256, 1),
        _verify(arch, "d128", "fp32", 128, 1, ("state_indices",)),
    ]
