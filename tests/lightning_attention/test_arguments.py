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

from ..backends import Backend, need
from ..tolerance import assert_bitwise
from .samples import samples

F32, F16, F64, I32 = torch.float32, torch.float16, torch.float64, torch.int32


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


def fewer_rows(x: Tensor) -> Tensor:
    return x[:1]


def flat(x: Tensor) -> Tensor:
    return x.flatten()


def columns(dim: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.narrow(dim, 0, x.shape[dim] - 1)


FORWARD = [("lightning_attention", "slopes"), ("simple_gla", "g")]
BACKWARD = [(f"{op}_backward", decay) for op, decay in FORWARD]
POOL = ["lightning_attention_step_", "lightning_attention_verify", "lightning_attention_commit_"]
STATES = ["initial_state", "grad_final_state"]

# (op, which sample, argument, what to do with it, names one of which the message must contain)
WRONG: list[tuple[str, int, str, Any, str]] = [
    *[(op, 0, name, flat, name) for op, _ in FORWARD + BACKWARD for name in ("q", "k", "v")],
    *[(op, 0, name, cast(I32), name) for op, decay in FORWARD + BACKWARD for name in ("q", decay)],
    *[(op, 0, name, cast(F16), "q|k|v") for op, _ in FORWARD + BACKWARD for name in ("q", "k", "v")],
    *[(op, 0, decay, cast(F64), decay) for op, decay in FORWARD + BACKWARD],
    *[(op, 0, decay, cast(F16), decay) for op, decay in FORWARD + BACKWARD],
    *[(op, 0, decay, shorter, decay) for op, decay in FORWARD + BACKWARD],
    *[(op, 0, name, fewer_rows, "q|" + name) for op, _ in FORWARD + BACKWARD for name in ("k", "v")],
    *[(op, 0, "k", columns(1), "k") for op, _ in FORWARD],
    *[(op, 0, "v", columns(2), "v") for op, _ in FORWARD],
    *[(op, 0, "k", columns(3), "k") for op, _ in FORWARD],
    *[(op, 0, "q", columns(2), "Hq") for op, _ in FORWARD],
    ("lightning_attention_step_", 0, "q", lambda x: x[:, :0], "Hq"),
    *[(op, 0, "v", shorter, "V") for op, _ in FORWARD],
    *[(op, 1, name, change, name) for op, _ in FORWARD for name in STATES[:1]
      for change in (flat, fewer_rows, shorter, cast(F16), cast(F64))],
    *[(op, 1, name, change, name) for op, _ in BACKWARD for name in STATES
      for change in (flat, fewer_rows, shorter, cast(F16), cast(F64))],
    *[(op, 1, "cu_seqlens", change, "cu_seqlens") for op, _ in FORWARD + BACKWARD
      for change in (cast(F32), lambda x: x[None], lambda x: x[:0])],
    *[(op, 1, "q", lambda x: x.repeat(2, 1, 1, 1), "q|k|B") for op, _ in FORWARD],
    *[(op, 0, "grad_out", change, "grad_out") for op, _ in BACKWARD for change in (flat, shorter, cast(F16))],
    *[("lightning_chunk_state", 0, name, flat, name) for name in ("k", "v")],
    ("lightning_chunk_state", 0, "v", cast(F16), "v"),
    ("lightning_chunk_state", 0, "slopes", shorter, "slopes"),
    ("lightning_chunk_state", 1, "cu_seqlens", cast(F32), "cu_seqlens"),
    *[("lightning_apply_state", 0, name, flat, name) for name in ("q", "state")],
    ("lightning_apply_state", 0, "state", cast(F16), "state"),
    ("lightning_apply_state", 0, "state", fewer_rows, "state"),
    ("lightning_apply_state", 1, "cu_seqlens", cast(F32), "cu_seqlens"),
    *[(op, 1, name, flat, name) for op in POOL for name in ("k", "v", "state")],
    *[(op, 1, "state", change, "state") for op in POOL for change in (cast(F16), cast(F64), shorter)],
    *[(op, 0, "state", fewer_rows, "state") for op in POOL],
    *[(op, 1, "slopes", cast(F16), "slopes") for op in POOL],
    *[(op, 1, "state_indices", change, "state_indices") for op in POOL for change in (cast(F32), fewer_rows)],
    *[(op, 0, "q", columns(q_dim), "Hq") for op, q_dim in zip(POOL[:2], (1, 2))],
    *[("lightning_attention_verify", 1, "parents", change, "parents") for change in (flat, shorter, cast(F32))],
    *[("lightning_attention_commit_", 1, name, change, name) for name in ("path", "num_accepted")
      for change in (fewer_rows, cast(F32))],
    ("lightning_attention_commit_", 1, "path", shorter, "path"),
]  # fmt: skip

# The same for values inside index tensors.
IMPOSSIBLE: list[tuple[str, str, Any]] = [
    *[(op, "cu_seqlens", put(value, i)) for op, _ in FORWARD + BACKWARD
      for value, i in ((1, 0), (-1, 0), (4, 3), (6, 3), (-1, 1), (6, 1), (1, 2))],
    *[(op, "cu_seqlens", put(6, 3)) for op in ("lightning_chunk_state", "lightning_apply_state")],
    *[(op, "state_indices", put(value, 0)) for op in POOL for value in (-2, 3, 2**31 - 1)],
    *[(op, "state_indices", put(2, 1)) for op in POOL],
    *[("lightning_attention_verify", "parents", put(value, 0, 2)) for value in (-3, 2, 4)],
    ("lightning_attention_commit_", "path", put(5, 0, 1)),
    ("lightning_attention_commit_", "path", put(0, 0, 1)),
    ("lightning_attention_commit_", "path", put(-2, 0, 1)),
    ("lightning_attention_commit_", "num_accepted", put(5, 0)),
    ("lightning_attention_commit_", "num_accepted", put(-1, 1)),
]  # fmt: skip


def raises(backend: Backend, op: str, i: int, argument: str, change: Any, names: str) -> None:
    positional, keywords = samples(backend.device)[op][i]
    for arguments in (positional, keywords):
        if argument in arguments:
            arguments[argument] = change(arguments[argument])
            break
    else:
        raise AssertionError(f"{op} has no {argument}")
    before = {name: x.clone() for name, x in positional.items()}
    with backend.forced(), pytest.raises((ValueError, TypeError)) as error:
        getattr(torch_kernels, op)(*positional.values(), **keywords)
    assert re.search(rf"^{op}: .*\b({names})\b", str(error.value)), str(error.value)
    for name, x in before.items():
        assert_bitwise(name, positional[name], x)


@pytest.mark.parametrize(("op", "i", "argument", "change", "names"), WRONG)
def test_shapes_and_dtypes(any_backend: Backend, op: str, i: int, argument: str, change: Any, names: str) -> None:
    raises(any_backend, op, i, argument, change, names)


@pytest.mark.parametrize(("op", "argument", "change"), IMPOSSIBLE)
def test_impossible_indices(any_backend: Backend, op: str, argument: str, change: Any) -> None:
    need(any_backend, op)
    torch_kernels.set_validation(True)
    try:
        raises(any_backend, op, 1, argument, change, argument)
    finally:
        torch_kernels.set_validation(False)


@pytest.mark.parametrize("op", [*(op for op, _ in FORWARD), *POOL[:2]])
def test_head_sizes(any_backend: Backend, op: str) -> None:
    for sizes in ((12, 8), (8, 12), (264, 8), (8, 264), (0, 8)):
        positional, _ = samples(any_backend.device)[op][0]
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


@pytest.mark.parametrize("op", POOL)
def test_gradients_are_refused(any_backend: Backend, op: str) -> None:
    positional, _ = samples(any_backend.device)[op][0]
    positional["k"].requires_grad_()
    with any_backend.forced(), pytest.raises(ValueError, match=f"{op}: k requires grad"):
        getattr(torch_kernels, op)(*positional.values())
