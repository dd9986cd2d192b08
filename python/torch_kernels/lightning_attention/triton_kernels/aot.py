# SPDX-License-Identifier: Apache-2.0
"""The instances of this family's kernels that the tests compile ahead of time."""

from ..heuristics import MARK, SPAN, backward_tile, forward_tile, slope_rows, slope_tile, states_tile
from .attention import attention_kernel
from .backward import backward_kernel, decay_gradient_kernel
from .slope_gradient import slope_gradient_kernel
from .states import apply_state_kernel, rows, segment_states_kernel

STATES = dict.fromkeys(
    ("final", "states", "initial", "decays", "slopes", "gates", "dots", "partial", "state_marks", "grad_marks",
     "grad_initial", "grad_states", "grad_final", "state"), "*fp32"
) | {"cu_seqlens": "*i64", "scale": "fp32"}  # fmt: skip
TENSORS = ("out", "q", "k", "v", "grad", "dq", "dk", "dv")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def _case(name, kernel, kind, constants, absent=(), types=None, tile=None):
    """Strides and counts are not specialised in a launch, hence plain integers here."""
    signature = dict.fromkeys(kernel.arg_names, "i32") | STATES | dict.fromkeys(TENSORS, f"*{kind}") | (types or {})
    options = {}
    if tile:
        constants = constants | {"C": tile.chunk, "BLOCK": tile.block}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    signature = {argument: signature[argument] for argument in kernel.arg_names}
    return name, kernel, signature, constants | dict.fromkeys(absent), options


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
    ]
