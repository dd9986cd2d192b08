# SPDX-License-Identifier: Apache-2.0
"""What must hold to the last bit: paging, packing, layouts, reruns, and what a row cannot see."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend, for_all
from ..strategies import LAYOUTS
from ..tolerance import assert_bitwise
from .cases import Case, cases, make, run


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert_bitwise("out", actual[0], expected[0])
    assert_bitwise("lse", actual[1], expected[1])


@for_all(data=st.data())
def test_paged_equals_packed(backend: Backend, data: st.DataObject) -> None:
    case = data.draw(cases(backend, page=0, layout="contiguous"))
    packed = run(backend, make(case, backend.device))
    for page in (3, 16) if backend.slow else (1, 3, 16, 64, 256):
        assert_same(run(backend, make(case.replace(page=page), backend.device)), packed)


@for_all(data=st.data())
def test_layout_changes_nothing(backend: Backend, data: st.DataObject) -> None:
    case = data.draw(cases(backend, layout="contiguous"))
    contiguous = run(backend, make(case, backend.device))
    for layout in ("transposed", "sliced") if backend.slow else [x for x in LAYOUTS if x not in ("expanded",)]:
        assert_same(run(backend, make(case.replace(layout=layout), backend.device)), contiguous)


def packed_together(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Two requests as one call."""
    both = dict(a)
    keys, segments, edges = len(a["k"]), len(a["kv_offsets"]) - 1, len(a["edge_sources"])
    for name in ("q", "k", "v", "q_start", "edge_start", "own_start"):
        if name in a:
            both[name] = torch.cat([a[name], b[name]])
    own = b["own_segment"]
    both["own_segment"] = torch.cat([a["own_segment"], torch.where(own < 0, own, own + segments)])
    both["edge_sources"] = torch.cat([a["edge_sources"], b["edge_sources"] + segments])
    both["q_offsets"] = torch.cat([a["q_offsets"], b["q_offsets"][1:] + len(a["q"])])
    both["edge_offsets"] = torch.cat([a["edge_offsets"], b["edge_offsets"][1:] + edges])
    both["kv_offsets"] = torch.cat([a["kv_offsets"], b["kv_offsets"][1:] + keys])
    return both


@for_all(data=st.data())
def test_packing_requests_changes_nothing(backend: Backend, data: st.DataObject) -> None:
    case = data.draw(cases(backend, page=0, layout="contiguous"))
    # Offsets of 0 and no rows behind, so that the requests' keys are neighbours.
    case = case.replace(seed=case.seed // 6 * 6)
    other = case.replace(seed=case.seed + 6, q_lengths=(7, 1, 33))
    a, b = make(case, backend.device), make(other, backend.device)
    one, two = run(backend, a), run(backend, b)
    assert_same(run(backend, a), one)
    out, lse = run(backend, packed_together(a, b))
    assert_same((out[: len(one[0])], lse[:, : len(one[0])]), one)
    assert_same((out[len(one[0]) :], lse[:, len(one[0]) :]), two)
    out, lse = run(backend, packed_together(b, a))
    assert_same((out[len(two[0]) :], lse[:, len(two[0]) :]), one)


def test_a_hidden_nan_never_leaks(backend: Backend) -> None:
    """Keys and values of the own segment become NaN from the end: rows that do not see them keep their bits."""
    for dtype in backend.dtypes:
        case = Case(q_lengths=(21,), kv_lengths=(21, 9), own="all", density=1.0, rope="half", dtype=dtype)
        args = make(case, backend.device)
        clean_out, clean_lse = run(backend, args)
        own = int(args["own_segment"][0])
        begin, end = int(args["kv_offsets"][own]), int(args["kv_offsets"][own + 1])
        hidden = 5
        for value in (float("nan"), float("inf")):
            for name in ("k", "v"):
                args[name][end - hidden : end] = value
            out, lse = run(backend, args)
            seen = 21 - hidden if end - begin == 21 else 21 - hidden
            assert_same((out[:seen], lse[:, :seen]), (clean_out[:seen], clean_lse[:, :seen]))
            assert not out[seen:].isfinite().any()
