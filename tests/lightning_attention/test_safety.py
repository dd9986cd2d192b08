# SPDX-License-Identifier: Apache-2.0
"""Nothing is read or written outside the tensors, whatever indices say, and every element of an output is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend, for_all, need, unchecked
from ..calls import EVERY, as_tuple, sample
from ..guards import Guards
from ..strategies import seeds
from ..tolerance import assert_bitwise
from .cases import Case, cases, make, run

EXTREMES = torch.tensor([-(2**31), -(2**30), -1000, -3, -2, -1, 0, 1, 2, 3, 5, 100, 1000, 2**20, 2**30, 2**31 - 1])


def indices(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Small numbers and extremes, mixed."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(-3, 8, shape, generator=generator)
    wild = EXTREMES[torch.randint(0, len(EXTREMES), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.4, wild, small).to(dtype)


def guarded(guards: Guards, arguments: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: guards.copy(x.to(device)) if isinstance(x, Tensor) else x for name, x in arguments.items()}


@pytest.mark.parametrize(("op", "i"), [x for x in EVERY if x.values[0].startswith(("lightning", "simple_gla"))])
def test_outputs_are_written_and_nothing_else(backend: Backend, op: str, i: int) -> None:
    need(backend, op)
    guards = Guards()
    positional, keywords = (guarded(guards, x, backend.device) for x in sample(backend, op, i))
    with guards.allocations():
        outputs = backend(op, *positional.values(), **keywords)
    guards.check()
    for x in (*as_tuple(outputs), *(positional[name] for name in positional if name == "state")):
        assert x.isfinite().all()


@for_all(data=st.data())
def test_sequences_stay_inside(backend: Backend, data: st.DataObject) -> None:
    need(backend, "simple_gla")
    case = data.draw(cases(backend, layout="contiguous"))
    guards = Guards()
    args = guarded(guards, make(case, backend.device), backend.device)
    grad = guards.copy(torch.ones(*args["q"].shape[:3], case.value_size, dtype=case.dtype, device=backend.device))
    positional = [args[name] for name in ("q", "k", "v", "g" if "g" in args else "slopes")]
    keywords = {name: args.get(name) for name in ("initial_state", "cu_seqlens", "scale")}
    with guards.allocations():
        results = [*run(backend, case, args), *backend(f"{case.op}_backward", grad, *positional, **keywords)]
    guards.check()
    assert all(x.isfinite().all() for x in results)


@for_all(seed=seeds, dtype=st.sampled_from([torch.int32, torch.int64]))
def test_garbage_offsets(backend: Backend, seed: int, dtype: torch.dtype) -> None:
    need(backend, "simple_gla")
    if backend.name == "reference":
        pytest.skip("PyTorch checks its own indices")
    for decay in ("slopes", "gates"):
        case = Case(lengths=(3, 4, 5), packed=True, decay=decay, key_size=8, value_size=16)
        guards = Guards()
        args = make(case, backend.device)
        args["cu_seqlens"] = indices(seed, 4, dtype=dtype)
        args = guarded(guards, args, backend.device)
        grad = guards.copy(torch.ones(1, 12, 2, 16, device=backend.device))
        positional = [args[name] for name in ("q", "k", "v", "g" if "g" in args else "slopes")]
        keywords = {name: args.get(name) for name in ("initial_state", "cu_seqlens", "scale")}
        with unchecked(case.op), unchecked(f"{case.op}_backward"), guards.allocations():
            run(backend, case, args)
            backend(f"{case.op}_backward", grad, *positional, **keywords)
        if decay == "slopes":
            offsets = args["cu_seqlens"]
            with unchecked("lightning_chunk_state"), unchecked("lightning_apply_state"), guards.allocations():
                backend("lightning_chunk_state", args["k"], args["v"], args["slopes"], cu_seqlens=offsets)
                state = args["initial_state"]
                backend("lightning_apply_state", args["q"], state, args["slopes"], cu_seqlens=offsets)
        guards.check()


@for_all(seed=seeds, dtype=st.sampled_from([torch.int32, torch.int64]))
def test_garbage_indices_of_states(backend: Backend, seed: int, dtype: torch.dtype) -> None:
    for op in ("lightning_attention_step_", "lightning_attention_verify", "lightning_attention_commit_"):
        guards = Guards()
        positional, keywords = sample(backend, op, -1)
        changed = {
            name: indices(seed + i, *x.shape, dtype=dtype)
            for i, (name, x) in enumerate((positional | keywords).items())
            if isinstance(x, Tensor) and not x.is_floating_point()
        }
        positional, keywords = (
            guarded(guards, {name: changed.get(name, x) for name, x in arguments.items()}, backend.device)
            for arguments in (positional, keywords)
        )
        before = {name: x.clone() for name, x in positional.items() if name != "state"}
        with unchecked(op), guards.allocations():
            out = backend(op, *positional.values(), **keywords)
        guards.check()
        for name, x in before.items():
            assert_bitwise(name, positional[name], x)
        assert all(x.isfinite().all() for x in (*as_tuple(out), positional["state"])), "read from outside"
