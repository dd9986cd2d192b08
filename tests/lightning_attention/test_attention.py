# SPDX-License-Identifier: Apache-2.0
"""lightning_attention and simple_gla against the float64 recurrence, and identities that need no tolerance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend, for_all, need
from ..strategies import LAYOUTS
from ..tolerance import assert_accurate, assert_bitwise
from . import oracle
from .cases import DECAYS, HEAD_SIZES, SEQUENCE_OPS, Case, cases, make, run, wide

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
CHUNKS = (16, 64)


@pytest.fixture(autouse=True)
def serving(backend: Backend) -> None:
    need(backend, *SEQUENCE_OPS)


def check(backend: Backend, case: Case) -> None:
    args = make(case, backend.device)
    out, state = run(backend, case, args)
    assert out.dtype == case.dtype and state.dtype == wide(case.dtype)
    check_values(out, state, args)


def check_values(out: Tensor, state: Tensor, args: dict[str, Any]) -> None:
    args = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in args.items()}
    true_out, true_state = oracle.attention(**args)
    plain = [oracle.plain_formula(chunk, **args) for chunk in CHUNKS]
    assert_accurate("out", out, true_out, *(x for x, _ in plain))
    assert_accurate("final_state", state, true_state, *(x for _, x in plain))


@for_all(data=st.data(), examples=60)
def test_matches_recurrence(backend: Backend, data: st.DataObject) -> None:
    check(backend, data.draw(cases(backend)))


@pytest.mark.parametrize("size", HEAD_SIZES)
def test_head_sizes(backend: Backend, size: int) -> None:
    for value_size in {size, 24}:
        for dtype in backend.dtypes:
            case = Case(lengths=(70,), key_size=size, value_size=value_size, dtype=dtype, heads=1, seed=size)
            if backend.slow and (size > 64 or dtype != F32):
                case = case.replace(lengths=(20,))
            check(backend, case)


@pytest.mark.parametrize("size", [16, 24, 56, 72, 104, 136, 200, 248])
def test_other_multiples_of_eight(backend: Backend, size: int) -> None:
    case = Case(lengths=(20,) if backend.slow else (150,), heads=1, key_size=size, value_size=264 - size, seed=size)
    for dtype in (F32,) if backend.slow else backend.dtypes:
        check(backend, case.replace(dtype=dtype))


@pytest.mark.parametrize("decay", [*DECAYS, "harsh"])
def test_decays(backend: Backend, decay: str) -> None:
    for dtype in backend.dtypes:
        case = Case(lengths=(150,), decay=decay, dtype=dtype, key_size=16, value_size=16, seed=7)
        check(backend, case.replace(heads=1, lengths=(130,)) if backend.slow else case)


@pytest.mark.parametrize("decay", ["slopes", "gates"])
def test_past_the_first_blocks(backend: Backend, decay: str) -> None:
    """Kernels in use elsewhere are right within a block and wrong behind it, or when a state is given."""
    tokens = 300 if backend.slow else 1100
    case = Case(lengths=(tokens,), heads=1, key_size=16, value_size=16, decay=decay, seed=5)
    for initial in (False, True):
        check(backend, case.replace(initial=initial))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, layout: str) -> None:
    for decay in ("slopes", "gates"):
        check(backend, Case(lengths=(21, 21), decay=decay, layout=layout, key_size=16, value_size=16, group=2))


def test_empty(backend: Backend) -> None:
    small = Case(key_size=8, value_size=16)
    for decay in ("slopes", "gates"):
        for lengths, packed in [((), False), ((0, 0), False), ((0,), True), ((), True), ((0, 3, 0, 0, 2, 0), True)]:
            for initial in (False, True):
                case = small.replace(lengths=lengths, packed=packed, decay=decay, initial=initial)
                args = make(case, backend.device)
                out, state = run(backend, case, args)
                assert out.shape == (*args["q"].shape[:3], 16) and state.shape == (len(lengths), 2, 8, 16)
                check_values(out, state, args)


def test_final_state_is_returned_on_request(backend: Backend) -> None:
    for decay in ("slopes", "gates"):
        case = Case(lengths=(20, 20), decay=decay, key_size=8, value_size=16)
        args = make(case, backend.device)
        out, nothing = run(backend, case, args, final=False)
        assert nothing.shape == (0, 2, 8, 16) and nothing.dtype == F32
        assert_bitwise("out", out, run(backend, case, args)[0])


@for_all(data=st.data())
def test_inputs_stay(backend: Backend, data: st.DataObject) -> None:
    case = data.draw(cases(backend, layout="contiguous"))
    args = make(case, backend.device)
    before = {name: x.clone() for name, x in args.items() if isinstance(x, Tensor)}
    run(backend, case, args)
    for name, x in before.items():
        assert_bitwise(name, args[name], x)


@for_all(data=st.data())
def test_packed_sequences_are_separate_calls(backend: Backend, data: st.DataObject) -> None:
    case = data.draw(cases(backend, packed=True))
    args = make(case, backend.device)
    out, state = run(backend, case, args)
    offsets = args["cu_seqlens"].tolist()
    for n, (begin, end) in enumerate(zip(offsets, offsets[1:])):
        one = {name: args[name][:, begin:end] for name in ("q", "k", "v")} | {"scale": case.scale}
        one |= {"g": args["g"][:, begin:end]} if "g" in args else {"slopes": args["slopes"]}
        if case.initial:
            one["initial_state"] = args["initial_state"][n : n + 1]
        alone, alone_state = run(backend, case, one)
        assert_bitwise("out", alone, out[:, begin:end])
        assert_bitwise("state", alone_state, state[n : n + 1])


@for_all(data=st.data())
def test_a_row_does_not_depend_on_the_batch(backend: Backend, data: st.DataObject) -> None:
    case = data.draw(cases(backend, packed=False))
    args = make(case.replace(lengths=case.lengths[:1] * 3), backend.device)
    out, state = run(backend, case, args)
    per_row = ("q", "k", "v", "g", "initial_state")
    one = {name: x[1:2] if name in per_row else x for name, x in args.items()}
    alone, alone_state = run(backend, case, one)
    assert_bitwise("out", alone, out[1:2])
    assert_bitwise("state", alone_state, state[1:2])


@for_all(data=st.data())
def test_same_bits_again(backend: Backend, data: st.DataObject) -> None:
    case = data.draw(cases(backend))
    args = make(case, backend.device)
    for x, y in zip(run(backend, case, args), run(backend, case, args), strict=True):
        assert_bitwise("rerun", x, y)


@for_all(data=st.data())
def test_any_split_agrees(backend: Backend, data: st.DataObject) -> None:
    """A sequence in two parts, the second from the state of the first."""
    case = data.draw(cases(backend, packed=False, layout="contiguous"))
    tokens = case.lengths[0]
    args = make(case, backend.device)
    cut = data.draw(st.integers(0, tokens))
    parts = []
    state = args.get("initial_state")
    for tokens_of in (slice(0, cut), slice(cut, tokens)):
        part = {name: x[:, tokens_of] if name in ("q", "k", "v", "g") else x for name, x in args.items()}
        out, state = run(backend, case, part | {"initial_state": state})
        parts.append(out)
    check_values(torch.cat(parts, 1), state, args)


def test_slopes_are_constant_gates(backend: Backend) -> None:
    for dtype in backend.dtypes:
        case = Case(lengths=(90,), key_size=16, value_size=16, dtype=dtype)
        args = make(case, backend.device)
        gates = {name: x for name, x in args.items() if name != "slopes"}
        gates["g"] = -args["slopes"].expand(1, 90, 2)
        out, state = run(backend, case.replace(decay="gates"), gates)
        check_values(out, state, args)


def test_grouped_heads_share_a_state(backend: Backend) -> None:
    """Query heads of a group are as if each had its own copy of keys and values, to the bit."""
    if backend.name == "reference":
        pytest.skip("PyTorch's own products do not promise it")
    for decay in ("slopes", "gates"):
        for dtype in backend.dtypes:
            case = Case(lengths=(70,), heads=2, group=3, decay=decay, dtype=dtype, key_size=16, value_size=24)
            args = make(case, backend.device)
            out, _ = run(backend, case, args)
            dims = {"k": 2, "v": 2, "g": 2, "slopes": 0, "initial_state": 1}
            single = {name: x.repeat_interleave(3, dims[name]) if name in dims else x for name, x in args.items()}
            assert_bitwise("out", out, run(backend, case, single)[0])


def test_scale(backend: Backend) -> None:
    """A power of two scales the output exactly; none means 1, not the 1/sqrt(K) of softmax attention."""
    case = Case(lengths=(40,), key_size=16, value_size=16)
    args = make(case, backend.device)
    out, state = run(backend, case, args)
    for scale, factor in ((None, 1.0), (0.25, 0.25)):
        scaled, scaled_state = run(backend, case, args | {"scale": scale})
        assert_bitwise("out", scaled, factor * out)
        assert_bitwise("state", scaled_state, state)


def test_large_decays_underflow_cleanly(backend: Backend) -> None:
    """exp(slope * t) overflows where kernels divide by it."""
    for slope in (3.0, 100.0, 1e4, 3e38):
        case = Case(lengths=(100,), heads=1, key_size=16, value_size=16)
        args = make(case, backend.device) | {"slopes": torch.tensor([slope], device=backend.device)}
        check_values(*run(backend, case, args), args)


def test_long_memory_does_not_drift(backend: Backend) -> None:
    """100,000 tokens with decays that float32 cannot tell from 1."""
    if backend.slow or backend.name == "reference":
        pytest.skip("minutes when interpreted")
    generator = torch.Generator().manual_seed(0)
    tokens, size = 100_000, 8
    slopes = torch.tensor([0.5, 2.0**-8, 2.0**-8 * 1e-2, 2.0**-8 * 1e-5], device=backend.device)
    q, k, v = (torch.randn(1, tokens, 4, size, generator=generator).to(backend.device) for _ in range(3))
    _, state = backend("lightning_attention", q, k, v, slopes, output_final_state=True)
    weights = torch.exp(-slopes.double()[:, None] * torch.arange(tokens - 1, -1, -1, device=backend.device))
    truth = torch.einsum("ht,bthk,bthv->bhkv", weights, k.double(), v.double())
    error = (state - truth).abs().amax((2, 3)) / truth.abs().amax((2, 3))
    assert float(error.max()) <= 1e-4, error
