# SPDX-License-Identifier: Apache-2.0
"""The instances of this family's kernels that the tests compile ahead of time, as the launchers would make them."""

from torch_kernels._triton import aot_case, head_chunk, power_of_two

from ..heuristics import MIN_SPLIT, attention_config
from .attention import COMBINE_ROWS, combine_kernel, tree_attention_kernel
from .cache import merge_attention_states_kernel, tree_commit_kv_kernel, tree_compact_kv_kernel
from .tree import tree_mask_kernel, tree_positions_kernel
from .verify import (
    tree_verify_greedy_kernel,
    tree_verify_sampling_kernel,
    tree_verify_typical_kernel,
    typical_matches_kernel,
)

INTEGERS = (
    "prefix_lens", "parents", "block_table", "path", "num_accepted", "matches",
)  # fmt: skip
FLOAT32 = (
    "lse", "lse_a", "lse_b", "partial_out", "partial_lse", "sinks", "k_scale", "v_scale", "target_probs", "draft_probs",
    "uniforms",
)  # fmt: skip
TYPES = dict.fromkeys(INTEGERS, "*i32") | dict.fromkeys(FLOAT32, "*fp32")
TYPES |= dict.fromkeys(("tokens", "draft_tokens", "target_tokens"), "*i64")
TYPES |= dict.fromkeys(("mass", "r"), "*fp64") | {"mask": "*u8", "positions": "*i32"}


def _attention(
    name, arch, *, dtype, size, group, cache=None, nodes=64, page=0, window=False, softcap=False, split=False, tree=True
):
    """``cache`` is the type of a quantised one."""
    element_size = 4 if dtype == "*fp32" else 2
    config = attention_config(nodes * group, size, size, element_size, cache is not None, softcap, arch)
    constants = {
        "GROUP": group, "D": size, "DV": size, "PAGE": page, "HAS_WINDOW": window, "HAS_SOFTCAP": softcap,
        "SPLIT": split, "PRECISION": "ieee", "MIN_KEYS": MIN_SPLIT, "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "BLOCK_D": power_of_two(size), "BLOCK_DV": power_of_two(size),
        "CHUNK": head_chunk(size, element_size),
    }  # fmt: skip
    types = TYPES | dict.fromkeys(("out", "q", "k_tree", "v_tree"), dtype) | {"scale": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(("k_cache", "v_cache"), cache or dtype)
    given = {"partial_out": split, "partial_lse": split, "k_tree": tree, "v_tree": tree, "block_table": page > 0}
    given |= {"sinks": window, "k_scale": cache, "v_scale": cache}
    absent = [argument for argument, present in given.items() if not present]
    return aot_case(name, tree_attention_kernel, types, constants, absent, config.options())


def _commit(name, cache, tree, limit, absent=()):
    constants = {"SIZE": 128, "LIMIT": limit, "PAGE": 0 if absent else 16, "BLOCK_J": 8, "BLOCK_D": 128}
    types = TYPES | {"cache": cache, "tree": tree, "scale": "*fp32"}
    return aot_case(name, tree_commit_kv_kernel, types, constants, absent)


def _verify(name, kernel, absent=(), **constants):
    """Their scalars are the bits of float64 numbers."""
    types = TYPES | dict.fromkeys(("temperature", "epsilon", "delta"), "i64") | {"q": "*fp64", "target_logits": "*bf16"}
    return aot_case(name, kernel, types, constants, absent, {"num_warps": 8 if "BLOCK_V" in constants else 4})


def aot_cases(arch: str):
    float8 = "*u8" if arch in ("sm_80", "gfx942") else "*fp8e4nv"
    combine = {"GROUP": 4, "DV": 128, "HAS_WINDOW": False, "MIN_KEYS": MIN_SPLIT}
    combine |= {"BLOCK_M": COMBINE_ROWS, "BLOCK_N": 64, "BLOCK_DV": 128}
    compact = {"SIZE": 128, "PAGE": 16, "BLOCK_J": 16, "BLOCK_D": 64}
    states = TYPES | dict.fromkeys(("out", "out_a", "out_b"), "*bf16")
    blocks = {"BLOCK_T": 64, "BLOCK_V": 1024}
    return [
        aot_case("tree_mask", tree_mask_kernel, TYPES, {"BLOCK_M": 16, "BLOCK_N": 64}),
        aot_case("tree_positions", tree_positions_kernel, TYPES, {"BLOCK": 128}),
        _attention("attention_bf16_d128_paged_split", arch, dtype="*bf16", size=128, group=4, page=16, split=True),
        _attention("attention_fp16_d64_window_sinks", arch, dtype="*fp16", size=64, group=8, window=True, tree=False),
        _attention("attention_bf16_d80_softcap", arch, dtype="*bf16", size=80, group=4, softcap=True),
        _attention("attention_bf16_d256_split", arch, dtype="*bf16", size=256, group=2, split=True),
        _attention(
            "attention_bf16_d128_float8_split", arch, dtype="*bf16", cache=float8, size=128, group=4, split=True
        ),  # fmt: skip
        _attention("attention_bf16_d128_few_rows", arch, dtype="*bf16", size=128, group=4, nodes=4, split=True),
        _attention("attention_fp32_d128_paged", arch, dtype="*fp32", size=128, group=4, page=16),
        aot_case("combine_bf16_d128", combine_kernel, states, combine, options={"num_warps": 4}),
        _verify("verify_greedy", tree_verify_greedy_kernel, BLOCK_T=64),
        _verify("verify_typical_matches", typical_matches_kernel, BLOCK_V=1024),
        _verify("verify_typical_argmax", tree_verify_typical_kernel, ("uniforms", "mass"), **blocks),
        _verify("verify_typical_sampled", tree_verify_typical_kernel, **blocks),
        _verify(
            "verify_sampling_one_hot", tree_verify_sampling_kernel, ("q", "draft_probs"), **blocks, REPLACEMENT=True
        ),  # fmt: skip
        _verify("verify_sampling_without_replacement", tree_verify_sampling_kernel, **blocks, REPLACEMENT=False),
        _commit("commit_float8_paged", "*u8", "*bf16", 448),
        _commit("commit_int8_paged", "*i8", "*bf16", 127),
        _commit("commit_bf16", "*bf16", "*bf16", 0, ("scale", "block_table")),
        aot_case("compact_paged", tree_compact_kv_kernel, TYPES | {"cache": "*i16"}, compact),
        aot_case("merge_bf16", merge_attention_states_kernel, states, {"SIZE": 128, "BLOCK_M": 16, "BLOCK_D": 128}),
    ]
