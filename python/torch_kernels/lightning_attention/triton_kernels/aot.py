# SPDX-License-Identifier: Apache-2.0
"""The instances of this family's kernels that the tests compile ahead of time."""

from ..heuristics import MARK, SPAN, backward_tile, forward_tile, states_tile
from .attention import attention_kernel
from .backward import SUM_BLOCK, backward_kernel, decay_gradient_kernel, sum_kernel
from .states import SCAN_BLOCK, apply_state_kernel, rows, scan_kernel, segment_states_kernel

STATES = dict.fromkeys(
    ("final", "states", "initial", "decays", "slopes", "gates", "dots", "partial", "state_marks", "grad_marks",
     "grad_initial", "grad_states", "state"), "*fp32"
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


def aot_cases(arch: str):
    def heads(kind, size, columns, segments, gates=False):
        shape = (BYTES[kind], size, columns, arch)
        tiles = forward_tile(*shape, gates), states_tile(*shape), backward_tile(*shape, gates)
        return tiles, rows(size, BYTES[kind]) | {"V": columns, "SPLIT": segments > 1, "SPAN": SPAN}

    def forward(kind, size, columns, segments=1, gates=False, group=1):
        tiles, sizes = heads(kind, size, columns, segments, gates)
        absent = ("slopes",) if gates else ("gates",)
        absent += () if segments > 1 else ("cu_seqlens", "states")
        name = f"attention_{kind}_{size}x{columns}{'_gates' * gates}{'_segments' * (segments > 1)}"
        return _case(name, attention_kernel, kind, sizes | {"GROUP": group}, absent, tile=tiles[0])

    def backward(kind, size, columns, segments=1, gates=False, group=1):
        tiles, sizes = heads(kind, size, columns, segments, gates)
        values = rows(columns, BYTES[kind])
        sizes |= {"V0": values["K0"], "V1": values["K1"], "V_PARTS": values["PARTS"]}
        absent = ("slopes",) if gates else ("gates",)
        absent += () if segments > 1 else ("cu_seqlens", "states", "grad_states", "grad_initial")
        name = (
            f"backward_{kind}_{size}x{columns}{'_gates' * gates}{'_segments' * (segments > 1)}{'_group' * (group > 1)}"
        )
        return _case(name, backward_kernel, kind, sizes | {"GROUP": group, "MARK": MARK}, absent, tile=tiles[2])

    def states(kind, size, columns, gates=False, reverse=False):
        tiles, sizes = heads(kind, size, columns, 8)
        absent = ("slopes",) if gates else ("gates", "decays")
        name = f"states_{kind}_{size}x{columns}{'_gates' * gates}{'_reverse' * reverse}"
        constants = sizes | {"MEMBERS": 1, "REVERSE": reverse}
        return _case(name, segment_states_kernel, kind, constants, absent, tile=tiles[1])

    def apply(kind, size, columns):
        tiles, sizes = heads(kind, size, columns, 1 << 20)
        return _case(f"apply_{kind}_{size}x{columns}", apply_state_kernel, kind, sizes | {"GROUP": 1}, tile=tiles[1])

    scan = {"SIZE": 128 * 128, "SPAN": SPAN, "BLOCK": SCAN_BLOCK}
    decay = {"GROUP": 1, "SIZE": 128 * 128, "BLOCKS": 2, "MARK": MARK, "BLOCK": 1024}
    fp32 = {"out": "*fp32"}
    cases = [forward("bf16", size, size) for size in (64, 96, 128, 192, 256)]
    cases += [forward("bf16", 128, 128, 8, gates=True, group=2), forward("fp32", 128, 128), forward("fp32", 192, 192)]
    cases += [backward("bf16", size, size) for size in (64, 96, 128, 192, 256)]
    cases += [backward("bf16", 128, 128, 8, gates=True, group=2), backward("fp32", 128, 128)]
    cases += [states("bf16", 128, 128), states("bf16", 128, 128, True, True), states("fp32", 128, 128)]
    cases += [apply("bf16", 128, 128), apply("fp32", 128, 128)]
    cases += [_case("scan", scan_kernel, "fp32", scan | {"REVERSE": False})]
    cases += [_case("decay_slopes", decay_gradient_kernel, "fp32", decay, ("gates", "cu_seqlens"), fp32)]
    cases += [_case("decay_gates", decay_gradient_kernel, "fp32", decay, ("slopes",), fp32)]
    cases += [_case("sum", sum_kernel, "fp32", {"BLOCK": SUM_BLOCK}, (), fp32)]
    return cases
