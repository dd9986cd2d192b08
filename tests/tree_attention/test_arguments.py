# SPDX-License-Identifier: Apache-2.0
"""Bad arguments raise ValueError or TypeError that name op and argument, before anything is written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..backends import Backend
from ..calls import Wrong, assert_refused, call, cast, fewer, flat, name_of, narrower, put, repeated, sample, shorter
from ..tolerance import assert_bitwise

F32, F16, F64, I32 = torch.float32, torch.float16, torch.float64, torch.int32
WRONG: list[Wrong] = [
    *[("tree_attention", 2, name, flat, name) for name in
      ("q", "k_cache", "v_cache", "parents", "k_tree", "v_tree", "block_table")],
    *[("tree_attention", 0, name, cast(I32), name) for name in ("q", "k_cache", "v_cache", "k_tree", "v_tree")],
    *[("tree_attention", 0, name, cast(F16), "q|k_cache|v_cache|k_tree|v_tree") for name in
      ("q", "k_cache", "v_cache", "k_tree", "v_tree")],
    *[("tree_attention", 2, name, cast(F32), name) for name in ("prefix_lens", "parents", "block_table")],
    *[("tree_attention", 0, name, fewer, "q|" + name) for name in
      ("k_cache", "v_cache", "prefix_lens", "parents", "k_tree", "v_tree")],
    ("tree_attention", 2, "block_table", fewer, "block_table"),
    ("tree_attention", 0, "parents", shorter, "parents|q"),
    ("tree_attention", 0, "k_tree", narrower(1), "k_tree"),
    ("tree_attention", 0, "v_tree", narrower(2), "v_tree"),
    ("tree_attention", 0, "k_cache", narrower(3), "k_cache"),
    ("tree_attention", 0, "v_cache", narrower(1), "v_cache"),
    ("tree_attention", 0, "v_cache", narrower(2), "v_cache"),
    ("tree_attention", 0, "q", narrower(2), "q|Hq"),
    ("tree_attention", 0, "k_tree", None, "k_tree"),
    ("tree_attention", 0, "v_tree", None, "v_tree"),
    ("tree_attention", 2, "sinks", shorter, "sinks"),
    ("tree_attention", 2, "sinks", cast(F64), "sinks"),
    *[("tree_attention", 2, "softcap", value, "softcap") for value in (-1.0, 5e-324, float("inf"), float("nan"))],
    ("tree_attention", 2, "window", -1, "window"),
    ("tree_attention", 3, "k_scale", None, "k_scale"),
    ("tree_attention", 3, "v_scale", None, "v_scale"),
    ("tree_attention", 3, "k_scale", cast(F16), "k_scale"),
    ("tree_attention", 3, "v_scale", repeated(2), "v_scale"),
    ("tree_attention", 3, "k_cache", cast(F32), "k_cache|v_cache"),
    ("tree_mask", 0, "parents", flat, "parents"),
    ("tree_mask", 0, "parents", cast(F32), "parents"),
    ("tree_positions", 0, "parents", flat, "parents"),
    ("tree_positions", 0, "prefix_lens", fewer, "prefix_lens"),
    ("tree_positions", 0, "prefix_lens", cast(F32), "prefix_lens"),
    *[("tree_verify_greedy", 0, name, change, name) for name in ("draft_tokens", "target_tokens", "parents")
      for change in (flat, cast(F32))],
    *[("tree_verify_greedy", 0, name, fewer, "draft_tokens|" + name) for name in ("target_tokens", "parents")],
    *[("tree_verify_typical", 1, name, flat, name) for name in
      ("draft_tokens", "target_logits", "parents", "uniforms")],
    ("tree_verify_typical", 1, "target_logits", cast(I32), "target_logits"),
    ("tree_verify_typical", 1, "target_logits", lambda x: x[:, :, :0], "target_logits"),
    ("tree_verify_typical", 1, "uniforms", shorter, "uniforms"),
    ("tree_verify_typical", 1, "uniforms", cast(I32), "uniforms"),
    ("tree_verify_typical", 0, "temperature", 0.0, "temperature"),
    ("tree_verify_typical", 0, "temperature", -1.0, "temperature"),
    ("tree_verify_typical", 0, "epsilon", -0.1, "epsilon"),
    ("tree_verify_typical", 0, "delta", -0.1, "delta"),
    *[("tree_verify_sampling", 1, name, flat, name) for name in
      ("draft_tokens", "target_probs", "parents", "uniforms", "draft_probs")],
    ("tree_verify_sampling", 1, "draft_probs", shorter, "draft_probs"),
    ("tree_verify_sampling", 1, "target_probs", cast(I32), "target_probs"),
    ("tree_verify_sampling", 1, "uniforms", shorter, "uniforms"),
    *[("tree_commit_kv_", 0, name, flat, name) for name in
      ("k_cache", "v_cache", "k_tree", "v_tree", "path")],
    *[("tree_commit_kv_", 0, name, fewer, "k_cache|k_tree|v_tree|" + name) for name in
      ("v_tree", "prefix_lens", "path", "num_accepted")],
    *[("tree_commit_kv_", 0, name, cast(F32), name) for name in ("prefix_lens", "path", "num_accepted")],
    ("tree_commit_kv_", 0, "k_tree", cast(F16), "k_tree|k_cache|v_tree"),
    ("tree_commit_kv_", 2, "k_scale", None, "k_scale"),
    ("tree_commit_kv_", 1, "block_table", flat, "block_table"),
    *[("tree_compact_kv_", 0, name, flat, name) for name in ("k_cache", "v_cache", "path")],
    *[("tree_compact_kv_", 0, name, cast(F32), name) for name in ("prefix_lens", "path", "num_accepted")],
    ("tree_compact_kv_", 0, "v_cache", cast(F16), "v_cache"),
    *[("merge_attention_states", 0, name, flat, name) for name in ("lse_a", "out_b", "lse_b")],
    *[("merge_attention_states", 0, name, shorter, "out_a|" + name) for name in ("lse_a", "out_b", "lse_b")],
    ("merge_attention_states", 0, "lse_a", cast(F64), "lse_a"),
    ("merge_attention_states", 0, "out_b", cast(F16), "out_b"),
    ("merge_attention_states", 0, "out_a", cast(I32), "out_a"),
]  # fmt: skip

IMPOSSIBLE: list[Wrong] = [
    *[(op, 0, "parents", put(value, 0, 3), "parents") for value in (3, 4, 99, -3, -99) for op in
      ("tree_attention", "tree_mask", "tree_positions", "tree_verify_greedy", "tree_verify_typical",
       "tree_verify_sampling")],
    ("tree_attention", 0, "parents", put(-2, 0, 2), "parents"),  # node 3 hangs on it
    ("tree_attention", 0, "parents", put(0, 0, 0), "parents"),
    ("tree_attention", 0, "prefix_lens", put(-1, 0), "prefix_lens"),
    ("tree_attention", 0, "prefix_lens", put(13, 0), "prefix_lens"),
    ("tree_attention", 1, "prefix_lens", put(9, 1), "prefix_lens"),  # the tree needs five slots more
    ("tree_attention", 2, "prefix_lens", put(13, 1), "prefix_lens"),
    ("tree_attention", 2, "block_table", put(-1, 0, 0), "block_table"),
    ("tree_attention", 2, "block_table", put(6, 1, 1), "block_table"),
    *[(op, 0, name, change, name) for op in ("tree_commit_kv_", "tree_compact_kv_") for name, change in (
        ("prefix_lens", put(-1, 0)), ("prefix_lens", put(12, 1)), ("prefix_lens", put(2**30, 0)),
        ("path", put(99, 0, 1)), ("path", put(-1, 0, 1)), ("path", put(-7, 1, 1)),
        ("num_accepted", put(-1, 0)), ("num_accepted", put(5, 1)), ("num_accepted", put(2**30, 1)))],
    *[(op, 1, "block_table", put(value, 1, 1), "block_table") for op in ("tree_commit_kv_", "tree_compact_kv_")
      for value in (-1, 6)],
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG + IMPOSSIBLE, ids=name_of)
def test_wrong_argument(any_backend: Backend, wrong: Wrong) -> None:
    assert_refused(any_backend, wrong)


@pytest.mark.parametrize("size", [4, 12, 264])
def test_head_sizes_out_of_range(any_backend: Backend, size: int) -> None:
    positional, _ = sample(any_backend, "tree_attention", 0)
    wrong = {name: positional[name].new_zeros(*positional[name].shape[:3], size) for name in ("q", "k_cache")}
    with pytest.raises(ValueError, match="tree_attention.*D"):
        call(any_backend, "tree_attention", 1, **wrong)
    with pytest.raises(ValueError, match="tree_attention.*Dv"):
        call(any_backend, "tree_attention", 1, v_cache=positional["v_cache"].new_zeros(2, 12, 2, size))


def test_more_than_1024_nodes(any_backend: Backend) -> None:
    def long(x: Tensor) -> Tensor:
        return x[:, :1].expand(-1, 1025, *x.shape[2:])

    with pytest.raises(ValueError, match="tree_attention.*1024"):
        call(any_backend, "tree_attention", 0, q=long, parents=long, k_tree=long, v_tree=long)


def test_unused_table_entries_are_ignored(any_backend: Backend) -> None:
    for op in ("tree_commit_kv_", "tree_compact_kv_"):
        call(any_backend, op, 1, block_table=put(-1, 0, 2))
    call(any_backend, "tree_attention", 2, block_table=put(999, 0, 1))


def test_rows_without_a_root_are_skipped(any_backend: Backend) -> None:
    for op in ("tree_commit_kv_", "tree_compact_kv_"):
        positional, _ = sample(any_backend, op, 0)
        k_cache = positional["k_cache"].clone()
        before = k_cache.clone()
        path = torch.full_like(positional["path"], -1)
        # Not even a senseless length matters then.
        call(any_backend, op, 0, k_cache=k_cache, path=path, num_accepted=torch.zeros_like(positional["num_accepted"]))
        assert_bitwise("k_cache", k_cache, before)
