# SPDX-License-Identifier: Apache-2.0
"""The instances of this family's kernels that the tests compile ahead of time, as the launchers would make them."""

from torch_kernels._triton import aot_case, power_of_two

from ..heuristics import attention_config, backward_configs
from .attention import combine_kernel, graph_attention_kernel
from .backward import gradients_together
from .key_gradient import key_gradient_kernel
from .query_gradient import query_gradient_kernel

TENSORS = ("out", "q", "k", "v", "turned", "grad_q", "grad_k", "grad_v", "grad_out")
TYPES = dict.fromkeys(("lse", "delta", "partial_out", "partial_lse", "turns", "deltas"), "*fp32")
TYPES |= dict.fromkeys(("items", "records", "lists", "block_table", "key_records", "readers"), "*i32")
TYPES |= {"scale": "fp32", "score_scale": "fp32"}


def _case(name, kernel, config, dtype, size, group, rope, constants, absent=()):
    constants = constants | {
        "GROUP": group, "D": size, "DV": size, "ROPE": rope, "INTERLEAVED": False, "BLOCK_M": config.block_m,
        "BLOCK_D": power_of_two(size), "BLOCK_DV": power_of_two(size), "STAGES": config.num_stages,
    }  # fmt: skip
    absent = [argument for argument in absent if argument in kernel.arg_names]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return aot_case(name, kernel, TYPES | dict.fromkeys(TENSORS, dtype), constants, absent, options)


def _attention(name, arch, *, dtype, size, group=4, page=0, rope=False, split=False):
    config = attention_config(size, size, 4 if dtype == "*fp32" else 2, rope, arch)
    constants = {
        "PAGE": page, "NEGATE": False, "SPLIT": split, "CHUNK": config.chunk, "BLOCK_N": config.block_n,
        "BLOCK_T": config.block_t, "TAIL_STAGES": min(config.num_stages, 2),
    }  # fmt: skip
    given = {"partial_out": split, "partial_lse": split, "turns": rope, "deltas": rope, "block_table": page > 0}
    given["turned"] = rope and config.chunk == 0
    absent = [argument for argument, present in given.items() if not present]
    return _case(name, graph_attention_kernel, config, dtype, size, group, rope, constants, absent)


def _gradients(name, arch, *, dtype, size, rope=False):
    absent = () if rope else ("turns", "deltas", "turned")
    of_queries, of_keys = backward_configs(size, size, 4 if dtype == "*fp32" else 2, rope, arch)
    tiles = {"BLOCK_N": of_queries.block_n, "BLOCK_T": of_queries.block_t}
    yield _case(f"query_gradient_{name}", query_gradient_kernel, of_queries, dtype, size, 4, rope, tiles, absent)
    for both in gradients_together(size, size):
        which = {(True, True): "key", (True, False): "key_only", (False, True): "value"}[both]
        tiles = {"BLOCK_K": of_keys.block_n, "OF_KEYS": both[0], "OF_VALUES": both[1]}
        yield _case(f"{which}_gradient_{name}", key_gradient_kernel, of_keys, dtype, size, 4, rope, tiles, absent)


def aot_cases(arch: str):
    combine = {"GROUP": 4, "DV": 128, "BLOCK_M": 128, "BLOCK_DV": 128}
    return [
        _attention("attention_bf16_d128_split", arch, dtype="*bf16", size=128, split=True),
        _attention("attention_bf16_d128_rope_split", arch, dtype="*bf16", size=128, rope=True, split=True),
        _attention("attention_bf16_d128_rope_paged", arch, dtype="*bf16", size=128, rope=True, page=16, split=True),
        _attention("attention_fp16_d64", arch, dtype="*fp16", size=64, group=1),
        _attention("attention_bf16_d80_rope", arch, dtype="*bf16", size=80, group=1, rope=True),
        _attention("attention_bf16_d256_rope_split", arch, dtype="*bf16", size=256, group=8, rope=True, split=True),
        _attention("attention_fp32_d128_rope", arch, dtype="*fp32", size=128, rope=True, split=True),
        _attention("attention_fp32_d256_paged", arch, dtype="*fp32", size=256, page=16),
        aot_case("combine_bf16_d128", combine_kernel, TYPES | {"out": "*bf16"}, combine, options={"num_warps": 4}),
        *_gradients("bf16_d128", arch, dtype="*bf16", size=128),
        *_gradients("bf16_d128_rope", arch, dtype="*bf16", size=128, rope=True),
        *_gradients("fp16_d64_rope", arch, dtype="*fp16", size=64, rope=True),
        *_gradients("bf16_d256_rope", arch, dtype="*bf16", size=256, rope=True),
        *_gradients("fp32_d128_rope", arch, dtype="*fp32", size=128, rope=True),
    ]
