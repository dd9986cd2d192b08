# SPDX-License-Identifier: Apache-2.0
"""Bad arguments raise, name op and argument, and change nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_kernels
from torch import Tensor

from ..backends import Backend
from ..tolerance import assert_bitwise
from .samples import samples

F32, F16, F64, I32 = torch.float32, torch.float16, torch.float64, torch.int32
ATTENTION, BACKWARD, SHIFT = "graph_attention", "graph_attention_backward", "rope_shift"
INDICES = ("q_offsets", "kv_offsets", "edge_offsets", "edge_sources", "own_segment")
STARTS = ("q_start", "edge_start", "own_start")


def cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype)


def put(value: int, *index: int) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[index] = value
        return x

    return change


def shorter(x: Tensor) -> Tensor:
    return x[..., :-1]


def flat(x: Tensor) -> Tensor:
    return x.flatten()


def doubled(x: Tensor) -> Tensor:
    return x[None]


def one_head(x: Tensor) -> Tensor:
    return x[..., :1, :]


# (op, which sample, argument, what to do with it, names one of which the message must contain)
WRONG: list[tuple[str, int, str, Any, str]] = [
    *[(ATTENTION, 3, name, flat, name) for name in "qkv"],
    *[(ATTENTION, 3, name, doubled, name) for name in (*INDICES, *STARTS, "inv_freq")],
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
    (ATTENTION, 4, "block_table", lambda x: x[:1], "block_table"),
    (ATTENTION, 4, "block_table", cast(F32), "block_table"),
    (ATTENTION, 4, "block_table", None, "k"),
    (ATTENTION, 2, "block_table", torch.zeros(4, 2, dtype=I32), "k"),
    (ATTENTION, 4, "k", lambda x: x[:, :0], "v|k"),
    *[(BACKWARD, 1, name, flat, name) for name in ("grad_out", "q", "k", "v", "out", "lse")],
    *[(BACKWARD, 1, name, shorter, "k|D|" + name) for name in ("grad_out", "out", "lse")],
    (BACKWARD, 1, "grad_out", cast(F16), "grad_out"),
    (BACKWARD, 1, "lse", cast(F64), "lse"),
    *[(SHIFT, 0, name, flat, name) for name in ("k",)],
    *[(SHIFT, 0, name, doubled, name) for name in ("offsets", "delta", "inv_freq")],
    *[(SHIFT, 0, name, shorter, "D/2|N|D|" + name) for name in ("k", "offsets", "delta", "inv_freq")],
    *[(SHIFT, 0, name, cast(F32), name) for name in ("offsets", "delta")],
    (SHIFT, 0, "k", cast(I32), "k"),
    (SHIFT, 0, "inv_freq", cast(F16), "inv_freq"),
]  # fmt: skip
WRONG_INDICES: list[tuple[str, int, str, Any, str]] = [
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


def names(case: tuple[str, int, str, Any, str]) -> str:
    return f"{case[0]}-{case[1]}-{case[2]}"


def attempt(backend: Backend, case: tuple[str, int, str, Any, str]) -> None:
    op, i, name, change, culprits = case
    positional, keywords = samples(backend.device)[op][i]
    where = positional if name in positional else keywords
    value = where.get(name)
    where[name] = change(value) if callable(change) else change.to(backend.device) if change is not None else None
    before = [x.clone() for x in (*positional.values(), *keywords.values()) if isinstance(x, Tensor)]
    with pytest.raises((ValueError, TypeError)) as raised:
        getattr(torch.ops.kernels, op)(*positional.values(), **keywords)
    message = str(raised.value)
    assert message.startswith(f"{op}: ") and re.search(rf"\b({culprits})\b", message), message
    after = [x for x in (*positional.values(), *keywords.values()) if isinstance(x, Tensor)]
    for x, y in zip(after, before, strict=True):
        assert_bitwise("input", x, y)


@pytest.mark.parametrize("case", WRONG, ids=names)
def test_shapes_and_dtypes(any_backend: Backend, case: tuple[str, int, str, Any, str]) -> None:
    attempt(any_backend, case)


@pytest.mark.parametrize("case", WRONG_INDICES, ids=names)
def test_indices(any_backend: Backend, case: tuple[str, int, str, Any, str]) -> None:
    torch_kernels.set_validation(True)
    try:
        attempt(any_backend, case)
    finally:
        torch_kernels.set_validation(False)


@pytest.mark.parametrize("size", [4, 12, 264])
def test_head_sizes(any_backend: Backend, size: int) -> None:
    positional, _ = samples(any_backend.device)[ATTENTION][2]
    for name in "qk":
        positional[name] = positional[name][..., :1].repeat(1, 1, size)
    with pytest.raises(ValueError, match="head size D must be a multiple of 8 up to 256"):
        getattr(torch.ops.kernels, ATTENTION)(*positional.values())


def test_entries_behind_the_used_pages_are_ignored(any_backend: Backend) -> None:
    positional, keywords = samples(any_backend.device)[ATTENTION][4]
    expected = getattr(torch.ops.kernels, ATTENTION)(*positional.values(), **keywords)
    table = keywords["block_table"]
    table[1] = 10**6  # an empty segment
    table[3, 1] = -5  # two keys fill one page
    got = getattr(torch.ops.kernels, ATTENTION)(*positional.values(), **keywords)
    for x, y in zip(got, expected):
        assert_bitwise("output", x, y)
