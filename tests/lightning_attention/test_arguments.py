# SPDX-License-Identifier: Apache-2.0
"""Bad arguments raise ValueError or TypeError that name op and argument, before anything is written."""

from __future__ import annotations

import pytest
import torch
import torch_kernels

from ..backends import Backend
from ..calls import Wrong, assert_refused, cast, deeper, fewer, flat, name_of, narrower, put, repeated, sample, shorter

F32, F16, F64, I32 = torch.float32, torch.float16, torch.float64, torch.int32


FORWARD = [("lightning_attention", "slopes"), ("simple_gla", "g")]
BACKWARD = [(f"{op}_backward", decay) for op, decay in FORWARD]
POOL = ["lightning_attention_step_", "lightning_attention_verify", "lightning_attention_commit_"]
STATES = ["initial_state", "grad_final_state"]

WRONG: list[Wrong] = [
    *[(op, 0, name, flat, name) for op, _ in FORWARD + BACKWARD for name in ("q", "k", "v")],
    *[(op, 0, name, cast(I32), name) for op, decay in FORWARD + BACKWARD for name in ("q", decay)],
    *[(op, 0, name, cast(F16), "q|k|v") for op, _ in FORWARD + BACKWARD for name in ("q", "k", "v")],
    *[(op, 0, decay, cast(F64), decay) for op, decay in FORWARD + BACKWARD],
    *[(op, 0, decay, cast(F16), decay) for op, decay in FORWARD + BACKWARD],
    *[(op, 0, decay, shorter, decay) for op, decay in FORWARD + BACKWARD],
    *[(op, 0, name, fewer, "q|" + name) for op, _ in FORWARD + BACKWARD for name in ("k", "v")],
    *[(op, 0, "k", narrower(1), "k") for op, _ in FORWARD],
    *[(op, 0, "v", narrower(2), "v") for op, _ in FORWARD],
    *[(op, 0, "k", narrower(3), "k") for op, _ in FORWARD],
    *[(op, 0, "q", narrower(2), "Hq") for op, _ in FORWARD],
    ("lightning_attention_step_", 0, "q", lambda x: x[:, :0], "Hq"),
    *[(op, 0, "v", shorter, "V") for op, _ in FORWARD],
    *[(op, 1, name, change, name) for op, _ in FORWARD for name in STATES[:1]
      for change in (flat, fewer, shorter, cast(F16), cast(F64))],
    *[(op, 1, name, change, name) for op, _ in BACKWARD for name in STATES
      for change in (flat, fewer, shorter, cast(F16), cast(F64))],
    *[(op, 1, "cu_seqlens", change, "cu_seqlens") for op, _ in FORWARD + BACKWARD
      for change in (cast(F32), deeper, lambda x: x[:0])],
    *[(op, 1, "q", repeated(2, 1, 1, 1), "q|k|B") for op, _ in FORWARD],
    *[(op, 0, "grad_out", change, "grad_out") for op, _ in BACKWARD for change in (flat, shorter, cast(F16))],
    *[("lightning_chunk_state", 0, name, flat, name) for name in ("k", "v")],
    ("lightning_chunk_state", 0, "v", cast(F16), "v"),
    ("lightning_chunk_state", 0, "slopes", shorter, "slopes"),
    ("lightning_chunk_state", 1, "cu_seqlens", cast(F32), "cu_seqlens"),
    *[("lightning_apply_state", 0, name, flat, name) for name in ("q", "state")],
    ("lightning_apply_state", 0, "state", cast(F16), "state"),
    ("lightning_apply_state", 0, "state", fewer, "state"),
    ("lightning_apply_state", 1, "cu_seqlens", cast(F32), "cu_seqlens"),
    *[(op, 1, name, flat, name) for op in POOL for name in ("k", "v", "state")],
    *[(op, 1, "state", change, "state") for op in POOL for change in (cast(F16), cast(F64), shorter)],
    *[(op, 0, "state", fewer, "state") for op in POOL],
    *[(op, 1, "slopes", cast(F16), "slopes") for op in POOL],
    *[(op, 1, "state_indices", change, "state_indices") for op in POOL for change in (cast(F32), fewer)],
    *[(op, 0, "q", narrower(q_dim), "Hq") for op, q_dim in zip(POOL[:2], (1, 2))],
    *[("lightning_attention_verify", 1, "parents", change, "parents") for change in (flat, shorter, cast(F32))],
    *[("lightning_attention_commit_", 1, name, change, name) for name in ("path", "num_accepted")
      for change in (fewer, cast(F32))],
    ("lightning_attention_commit_", 1, "path", shorter, "path"),
]  # fmt: skip

IMPOSSIBLE: list[Wrong] = [
    *[(op, 1, "cu_seqlens", put(value, i), "cu_seqlens") for op, _ in FORWARD + BACKWARD
      for value, i in ((1, 0), (-1, 0), (4, 3), (6, 3), (-1, 1), (6, 1), (1, 2))],
    *[(op, 1, "cu_seqlens", put(6, 3), "cu_seqlens") for op in ("lightning_chunk_state", "lightning_apply_state")],
    *[(op, 1, "state_indices", put(value, 0), "state_indices") for op in POOL for value in (-2, 3, 2**31 - 1)],
    *[(op, 1, "state_indices", put(2, 1), "state_indices") for op in POOL],
    *[("lightning_attention_verify", 1, "parents", put(value, 0, 2), "parents") for value in (-3, 2, 4)],
    ("lightning_attention_commit_", 1, "path", put(5, 0, 1), "path"),
    ("lightning_attention_commit_", 1, "path", put(0, 0, 1), "path"),
    ("lightning_attention_commit_", 1, "path", put(-2, 0, 1), "path"),
    ("lightning_attention_commit_", 1, "num_accepted", put(5, 0), "num_accepted"),
    ("lightning_attention_commit_", 1, "num_accepted", put(-1, 1), "num_accepted"),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG + IMPOSSIBLE, ids=name_of)
def test_wrong_argument(any_backend: Backend, wrong: Wrong) -> None:
    assert_refused(any_backend, wrong)


@pytest.mark.parametrize("op", [*(op for op, _ in FORWARD), *POOL[:2]])
def test_head_sizes(any_backend: Backend, op: str) -> None:
    for sizes in ((12, 8), (8, 12), (264, 8), (8, 264), (0, 8)):
        positional, _ = sample(any_backend, op, 0)
        for name, size in zip(("k", "v"), sizes):
            x = positional[name]
            positional[name] = x.new_zeros((*x.shape[:-1], size))
        q = positional["q"]
        positional["q"] = q.new_zeros((*q.shape[:-1], sizes[0]))
        if "state" in positional:
            positional["state"] = q.new_zeros((*positional["state"].shape[:2], *sizes))
        with any_backend.forced(), pytest.raises(ValueError, match=f"{op}: head size [KV]"):
            getattr(torch_kernels, op)(*positional.values())


def test_too_many_nodes(any_backend: Backend) -> None:
    q = torch.zeros(1, 1025, 1, 8, device=any_backend.device)
    state, slopes = q.new_zeros(1, 1, 8, 8), q.new_zeros(1)
    with any_backend.forced(), pytest.raises(ValueError, match="lightning_attention_verify: T"):
        torch_kernels.lightning_attention_verify(q, q, q, state, slopes)
