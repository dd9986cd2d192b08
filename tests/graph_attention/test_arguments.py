# SPDX-License-Identifier: Apache-2.0
"""Bad arguments raise ValueError or TypeError that name op and argument, before anything is written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..backends import Backend
from ..calls import Wrong, assert_refused, cast, deeper, fewer, flat, name_of, put, sample, shorter
from ..tolerance import assert_bitwise

F32, F16, F64, I32 = torch.float32, torch.float16, torch.float64, torch.int32
ATTENTION, BACKWARD, SHIFT = "graph_attention", "graph_attention_backward", "rope_shift"
INDICES = ("q_offsets", "kv_offsets", "edge_offsets", "edge_sources", "own_segment")
STARTS = ("q_start", "edge_start", "own_start")


def one_head(x: Tensor) -> Tensor:
    return x[..., :1, :]


WRONG: list[Wrong] = [
    *[(ATTENTION, 3, name, flat, name) for name in "qkv"],
    *[(ATTENTION, 3, name, deeper, name) for name in (*INDICES, *STARTS, "inv_freq")],
    *[(ATTENTION, 3, name, shorter, "Nq|Nk|E|D/2|" + name) for name in
      (*INDICES[:1], *INDICES[2:], *STARTS, "inv_freq")],
    *[(ATTENTION, 3, name, cast(F32), name) for name in (*INDICES, *STARTS)],
    *[(ATTENTION, 3, name, cast(I32), name) for name in ("q", "k", "v", "inv_freq")],
    *[(ATTENTION, 3, name, cast(F16), "q|k|v|inv_freq") for name in ("q", "k", "v", "inv_freq")],
    (ATTENTION, 3, "q", shorter, "k|D"),
    (ATTENTION, 3, "v", shorter, "Dv"),
    (ATTENTION, 3, "v", one_head, "v"),
    (ATTENTION, 3, "q", lambda x: x[:, :3], "Hq"),
    (ATTENTION, 3, "k", lambda x: x[:, :0], "Hk|v"),
    (ATTENTION, 3, "q_start", None, "q_start"),
    (ATTENTION, 3, "edge_start", None, "edge_start"),
    (ATTENTION, 3, "inv_freq", None, "q_start"),
    (ATTENTION, 4, "block_table", flat, "block_table"),
    (ATTENTION, 4, "block_table", fewer, "block_table"),
    (ATTENTION, 4, "block_table", cast(F32), "block_table"),
    (ATTENTION, 4, "block_table", None, "k"),
    (ATTENTION, 2, "block_table", lambda _: torch.zeros(4, 2, dtype=I32), "k"),
    (ATTENTION, 4, "k", lambda x: x[:, :0], "v|k"),
    *[(BACKWARD, 1, name, flat, name) for name in ("grad_out", "q", "k", "v", "out", "lse")],
    *[(BACKWARD, 1, name, shorter, "k|D|" + name) for name in ("grad_out", "out", "lse")],
    (BACKWARD, 1, "grad_out", cast(F16), "grad_out"),
    (BACKWARD, 1, "lse", cast(F64), "lse"),
    *[(SHIFT, 0, name, flat, name) for name in ("k",)],
    *[(SHIFT, 0, name, deeper, name) for name in ("offsets", "delta", "inv_freq")],
    *[(SHIFT, 0, name, shorter, "D/2|N|D|" + name) for name in ("k", "offsets", "delta", "inv_freq")],
    *[(SHIFT, 0, name, cast(F32), name) for name in ("offsets", "delta")],
    (SHIFT, 0, "k", cast(I32), "k"),
    (SHIFT, 0, "inv_freq", cast(F16), "inv_freq"),
]  # fmt: skip
IMPOSSIBLE: list[Wrong] = [
    (op, sample, *rest)
    for op, sample in ((ATTENTION, 2), (BACKWARD, 0))
    for rest in [
        ("q_offsets", put(1, 0), "q_offsets"),
        ("q_offsets", put(-1, 0), "q_offsets"),
        ("q_offsets", put(8, 4), "q_offsets"),
        ("q_offsets", put(10, 4), "q_offsets"),
        ("q_offsets", put(2, 2), "q_offsets"),
        ("kv_offsets", put(-1, 0), "kv_offsets"),
        ("kv_offsets", put(10, 4), "kv_offsets"),
        ("kv_offsets", put(2, 2), "kv_offsets"),
        ("edge_offsets", put(3, 4), "edge_offsets"),
        ("edge_offsets", put(5, 4), "edge_offsets"),
        ("edge_offsets", put(1, 0), "edge_offsets"),
        ("edge_sources", put(-1, 1), "edge_sources"),
        ("edge_sources", put(4, 1), "edge_sources"),
        ("edge_sources", put(0, 3), "edge_sources"),  # twice for one target
        ("edge_sources", put(3, 3), "edge_sources"),  # the own segment
        ("own_segment", put(-2, 0), "own_segment"),
        ("own_segment", put(4, 0), "own_segment"),
    ]
] + [
    (ATTENTION, 4, "block_table", put(6, 0, 0), "block_table"),
    (ATTENTION, 4, "block_table", put(-1, 0, 1), "block_table"),
    (ATTENTION, 4, "kv_offsets", put(20, 4), "kv_offsets"),
    (SHIFT, 0, "offsets", put(-1, 0), "offsets"),
    (SHIFT, 0, "offsets", put(10, 4), "offsets"),
    (SHIFT, 0, "offsets", put(2, 2), "offsets"),
]


@pytest.mark.parametrize("wrong", WRONG + IMPOSSIBLE, ids=name_of)
def test_wrong_argument(any_backend: Backend, wrong: Wrong) -> None:
    assert_refused(any_backend, wrong)


@pytest.mark.parametrize("size", [4, 12, 264])
def test_head_sizes(any_backend: Backend, size: int) -> None:
    positional, _ = sample(any_backend, ATTENTION, 2)
    for name in "qk":
        positional[name] = positional[name][..., :1].repeat(1, 1, size)
    with pytest.raises(ValueError, match="head size D must be a multiple of 8 up to 256"):
        getattr(torch.ops.kernels, ATTENTION)(*positional.values())


def test_entries_behind_the_used_pages_are_ignored(any_backend: Backend) -> None:
    positional, keywords = sample(any_backend, ATTENTION, 4)
    expected = getattr(torch.ops.kernels, ATTENTION)(*positional.values(), **keywords)
    table = keywords["block_table"]
    table[1] = 10**6  # an empty segment
    table[3, 1] = -5  # two keys fill one page
    got = getattr(torch.ops.kernels, ATTENTION)(*positional.values(), **keywords)
    for x, y in zip(got, expected):
        assert_bitwise("output", x, y)
