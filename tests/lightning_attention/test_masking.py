# SPDX-License-Identifier: Apache-2.0
"""What a token does not see has no influence, whatever it holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ..backends import Backend, need
from ..interpreter import fences_watched
from ..tolerance import assert_bitwise
from .cases import Case, make, run

VALUES = [math.nan, math.inf]


def poisoned(args: dict[str, Any], value: float, tokens: slice, *names: str) -> dict[str, Any]:
    changed = {name: args[name].clone() for name in names}
    for x in changed.values():
        x[:, tokens] = value
    return args | changed


def gradients(backend: Backend, case: Case, args: dict[str, Any], grad: Tensor) -> tuple[Tensor, ...]:
    positional = [args[name] for name in ("q", "k", "v", "g" if "g" in args else "slopes")]
    keywords = {name: args.get(name) for name in ("initial_state", "cu_seqlens", "scale")}
    return backend(f"{case.op}_backward", grad, *positional, **keywords)


def ones(args: dict[str, Any]) -> Tensor:
    q, v = args["q"], args["v"]
    return q.new_ones((*q.shape[:3], v.shape[3]))


def assert_near(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Equal but for rounding: products of few rows may be added up in another order than those of many."""
    bound = 8 * torch.finfo(dtype or actual.dtype).eps * float(expected.abs().max())
    assert float((actual.double() - expected.double()).abs().max()) <= bound, f"{name} is influenced"


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("decay", ["slopes", "gates"])
def test_other_sequences(backend: Backend, decay: str, value: float) -> None:
    need(backend, "simple_gla")
    for dtype in backend.dtypes[:1] if backend.slow else backend.dtypes:
        case = Case(lengths=(20, 30, 25), heads=1, packed=True, decay=decay, dtype=dtype, key_size=16, value_size=16)
        args = make(case, backend.device)
        bad = poisoned(args, value, slice(20, 50), "q", "k", "v")
        bad["initial_state"] = args["initial_state"].clone()
        bad["initial_state"][1] = value
        pairs = list(zip(run(backend, case, args), run(backend, case, bad), strict=True))
        for tokens in (slice(0, 20), slice(50, 75)):
            assert_bitwise("out", pairs[0][1][:, tokens], pairs[0][0][:, tokens])
        assert_bitwise("state", pairs[1][1][::2], pairs[1][0][::2])
        clean, dirty = (gradients(backend, case, x, ones(args)) for x in (args, bad))
        for i in range(3):
            for tokens in (slice(0, 20), slice(50, 75)):
                assert_bitwise(f"gradient {i}", dirty[i][:, tokens], clean[i][:, tokens])


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("decay", ["slopes", "gates"])
def test_later_tokens(backend: Backend, decay: str, value: float) -> None:
    """Causality holds for what a product with zero would spread."""
    need(backend, "simple_gla")
    for dtype in backend.dtypes[:1] if backend.slow else backend.dtypes:
        case = Case(lengths=(90,), heads=1, decay=decay, dtype=dtype, key_size=16, value_size=16)
        args = make(case, backend.device)
        out, _ = run(backend, case, args)
        for first in (75, 41):
            bad = poisoned(args, value, slice(first, first + 1), "q", "k", "v")
            dirty, _ = run(backend, case, bad)
            assert_near("out", dirty[:, :first], out[:, :first])
            assert not dirty[:, first].isfinite().any()


@pytest.mark.parametrize("value", VALUES)
def test_before_a_reset(backend: Backend, value: float) -> None:
    """Everything before a gate of -inf may be NaN, the initial state included; so may its gradients."""
    need(backend, "simple_gla")
    tokens, resets = (40, (1, 33)) if backend.slow else (90, (0, 1, 40, 64, 70))
    for dtype in backend.dtypes[:1] if backend.slow else backend.dtypes:
        for reset in resets:
            case = Case(lengths=(tokens,), heads=1, decay="gates", dtype=dtype, key_size=16, value_size=16)
            args = make(case, backend.device)
            args["g"][:, reset] = -math.inf
            bad = poisoned(args, value, slice(0, reset), "q", "k", "v")
            bad["initial_state"] = torch.full_like(args["initial_state"], value)
            (out, state), (dirty, dirty_state) = run(backend, case, args), run(backend, case, bad)
            assert dirty[:, reset:].isfinite().all() and dirty_state.isfinite().all()
            assert_near("out", dirty[:, reset:], out[:, reset:])
            assert_near("state", dirty_state, state, dtype)
            grads = gradients(backend, case, bad, ones(args))[:4]
            for x in grads:
                assert x[:, reset:].isfinite().all()
            assert (grads[3][:, reset] == 0).all()


@pytest.mark.parametrize("value", VALUES)
def test_infinite_slope(backend: Backend, value: float) -> None:
    """No memory: only rows that hold a NaN give one, and the slope's gradient is 0."""
    need(backend, "lightning_attention")
    for dtype in backend.dtypes[:1] if backend.slow else backend.dtypes:
        case = Case(lengths=(90,), heads=1, decay="infinite", dtype=dtype, key_size=16, value_size=16)
        args = make(case, backend.device)
        bad = poisoned(args, value, slice(33, 35), "q", "k", "v")
        bad["initial_state"] = torch.full_like(args["initial_state"], value)
        out, state = run(backend, case, bad)
        rows = torch.arange(90)
        sound = (rows < 33) | (rows >= 35)
        assert out[:, sound].isfinite().all() and state.isfinite().all()
        grads = gradients(backend, case, bad, ones(args))
        for x in grads[:3]:
            assert x[:, sound].isfinite().all()
        assert (grads[3] == 0).all() and (grads[4] == 0).all()


@pytest.mark.parametrize("value", [0.0, *VALUES])
def test_parts_of_a_large_state_add_up(backend: Backend, value: float) -> None:
    """Of float32 queries and keys with many columns, which may be walked in parts."""
    need(backend, "lightning_attention", "lightning_apply_state")
    case = Case(lengths=(20,), heads=1, key_size=128, value_size=16)
    args = make(case, backend.device)
    bad = args | {name: args[name].clone() for name in ("q", "k")}
    bad["q"][:, 9, :, 100], bad["k"][:, 9, :, 100] = value, value
    with fences_watched(backend):
        expected, got = (run(backend, case, x)[0] for x in (args, bad))
        applied = backend("lightning_apply_state", bad["q"], args["initial_state"], args["slopes"])
    assert_near("out", got[:, :9], expected[:, :9])
    assert got[:, 9:].isfinite().all() == math.isfinite(value)
    sound = torch.arange(20) != 9
    assert applied[:, sound].isfinite().all() and applied[:, 9].isfinite().all() == math.isfinite(value)


def test_states_of_infinite_slopes(backend: Backend) -> None:
    need(backend, "lightning_chunk_state", "lightning_apply_state")
    case = Case(lengths=(70,), heads=1, decay="infinite", key_size=16, value_size=16)
    args = poisoned(make(case, backend.device), math.nan, slice(0, 69), "k", "v")
    state = backend("lightning_chunk_state", args["k"], args["v"], args["slopes"])
    assert_bitwise("state", state, args["k"][:, 69, :, :, None] * args["v"][:, 69, :, None])
    nothing = backend("lightning_apply_state", args["q"], torch.full_like(state, math.nan), args["slopes"])
    assert (nothing == 0).all()
