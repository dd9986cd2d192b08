# SPDX-License-Identifier: Apache-2.0
"""graph_attention against the float64 truth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch_kernels
from hypothesis import strategies as st
from torch import Tensor
from torch_kernels.graph_attention import heuristics

from ..backends import F16, Backend, for_all
from ..interpreter import fences_watched
from ..tolerance import assert_accurate, ulp
from . import oracle
from .cases import GRAPH, GROUPS, HEAD_SIZES, Case, cases, make, run

F64, F32 = torch.float64, torch.float32


def check(backend: Backend, case: Case) -> None:
    args = make(case, backend.device)
    out, lse = run(backend, args)
    assert out.dtype == case.dtype and lse.dtype == F32 and out.device == args["q"].device
    check_values(out, lse, args)


def check_values(out: Tensor, lse: Tensor, args: dict[str, Any]) -> None:
    # Scores reach about 16 and are rounded in the accumulation type, as is lse, whatever the dtype of q.
    accumulate = F64 if out.dtype == F64 else F32
    floor = 2 * ulp(16.0, accumulate)
    args = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in args.items()}
    true_out, true_lse = oracle.attention(**args)
    plain = [oracle.plain_formula(out.dtype, backwards, **args)[0] for backwards in (False, True)]
    assert_accurate("out", out, true_out, *plain, floor=floor)
    plain = [oracle.plain_formula(accumulate, backwards, **args)[1] for backwards in (False, True)]
    assert_accurate("lse", lse, true_lse, *plain, floor=floor)


@for_all(data=st.data(), examples=60)
def test_matches_truth(backend: Backend, data: st.DataObject) -> None:
    check(backend, data.draw(cases(backend)))


@for_all(data=st.data(), examples=30)
def test_decode_matches_truth(backend: Backend, data: st.DataObject) -> None:
    check(backend, data.draw(cases(backend, q_lengths=(1, 1, 1))))


def test_tokens_and_segments_of_one_number_need_not_match(backend: Backend) -> None:
    # As many tokens as segments, and yet no decoding: only the offsets know.
    args = make(Case(q_lengths=(2, 0, 1), rope="half"), backend.device)
    check_values(*run(backend, args), args)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_head_sizes(backend: Backend, head_size: int) -> None:
    small: dict[str, Any] = {"q_lengths": (3,), "kv_lengths": (7, 5), "kv_heads": 1} if backend.slow else {}
    for dtype in backend.dtypes:
        check(backend, Case(head_size=head_size, value_size=head_size, dtype=dtype, rope="half", **small))
    if not backend.slow:
        check(backend, Case(head_size=head_size, value_size=24, rope="interleaved"))


@pytest.mark.parametrize("group", (*GROUPS, 17))
def test_groups(backend: Backend, group: int) -> None:
    if backend.slow and group not in (1, 7, 17):
        pytest.skip("long when interpreted")
    for kv_heads in (2,) if backend.slow else (1, 2):
        check(backend, Case(group=group, kv_heads=kv_heads, head_size=40, value_size=40, seed=group, rope="half"))


@pytest.mark.parametrize("rope", ["half", "interleaved"])
def test_positions(backend: Backend, rope: str) -> None:
    case = Case(q_lengths=(9,), kv_lengths=(5, 12), rope=rope, own="all", density=1.0, own_start=True, kv_heads=1)
    for position in (0, 264_000, 2**30):
        args = make(case.replace(head_size=24, value_size=16), backend.device)
        args["q_start"] = torch.full_like(args["q_start"], position)
        check_values(*run(backend, args), args)


def test_many_tiny_segments_next_to_a_long_one(backend: Backend) -> None:
    tiny, long = (20, 70) if backend.slow else (130, 1500)
    lengths = (3,) * tiny + (long, 17)
    for rope, page in (("", 0), ("half", 0), ("half", 16)):
        case = Case(
            q_lengths=(17,), kv_lengths=lengths, density=1.0, own="all", kv_heads=1, head_size=16, value_size=16
        )
        check(backend, case.replace(rope=rope, page=page, shared_starts=page > 0))


def test_long_sources_of_one_token(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    # Long enough to be split over blocks or threads by every backend.
    lengths = (300, 1, 200) if backend.slow else (5001, 3, 2048, 700)
    if backend.slow and backend.name == "triton":
        monkeypatch.setattr(heuristics, "MIN_SPLIT", 64)
        lengths = (130, 1, 70)
    for page in (0, 64):
        case = Case(
            q_lengths=(1, 1), kv_lengths=lengths, density=1.0, kv_heads=1, head_size=16, value_size=16, page=page
        )
        check(backend, case.replace(rope="half"))


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("rope", ["", "half"])
def test_empty(backend: Backend, page: int, rope: str) -> None:
    for q_lengths, kv_lengths in [((), ()), ((), (3,)), ((1,), ()), ((1, 1), (0, 0)), ((1, 0), (0, 4)), ((0,), (2,))]:
        check(backend, Case(q_lengths=q_lengths, kv_lengths=kv_lengths, page=page, rope=rope, own="all", density=1.0))


def test_rows_that_see_nothing(backend: Backend) -> None:
    # No sources and no own keys; then an own segment shorter than the queries, whose first rows come too early.
    args = make(Case(q_lengths=(1, 1, 1), own="none", density=0.0), backend.device)
    out, lse = run(backend, args)
    assert (out == 0).all() and (lse == -math.inf).all()
    args = make(Case(q_lengths=(9,), kv_lengths=(4,), own="all"), backend.device)
    out, lse = run(backend, args)
    assert (out[:5] == 0).all() and (lse[:, :5] == -math.inf).all() and lse[:, 5:].isfinite().all()
    check_values(out, lse, args)


def test_segment_graph(backend: Backend) -> None:
    """The op on a SegmentGraph is dense attention under its mask, with positions as it gives them."""
    lengths = (5, 9, 2, 7) if backend.slow else (50, 90, 20, 70)
    for graph in (
        torch_kernels.SegmentGraph.star(lengths),
        torch_kernels.SegmentGraph.bipartite(lengths, 2),
        torch_kernels.SegmentGraph.chain(lengths),
    ):
        generator = torch.Generator().manual_seed(1)
        q, k, v = (torch.randn(sum(lengths), heads, 16, generator=generator).to(backend.device) for heads in (2, 1, 1))
        inv_freq = torch.logspace(0, -3, 8).to(backend.device)
        graph = graph.to(backend.device)
        args = dict(zip(GRAPH, graph.arguments)) | {"q": q, "k": k, "v": v, "inv_freq": inv_freq}
        args |= dict(zip(("q_start", "edge_start", "own_start"), graph.positions()))
        out, lse = run(backend, args)
        check_values(out, lse, args)
        mask = graph.dense_mask()
        got = run(backend, dict(zip(GRAPH, graph.arguments)) | {"q": q, "k": k, "v": v})[0]
        dense = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), k.repeat_interleave(2, 1).transpose(0, 1), v.repeat_interleave(2, 1).transpose(0, 1),
            attn_mask=mask,
        )  # fmt: skip
        torch.testing.assert_close(got, dense.transpose(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("others", [1, 2100], ids=["whole", "split"])
def test_nan_and_infinities_of_several_keys_add_up(backend: Backend, others: int) -> None:
    tokens, size = 12, 16
    q, k = torch.zeros(tokens, 2, size, dtype=F16), torch.zeros(others + tokens, 1, size, dtype=F16)
    v = k.clone()
    expected = torch.zeros_like(q)
    for column, (first, second) in enumerate([(math.inf, -math.inf), (math.inf, math.nan)]):
        v[others + 3, 0, column], v[others + 9, 0, column] = first, second
        expected[3:, :, column], expected[9:, :, column] = first, math.nan
    graph = [[0, tokens], [0, others, others + tokens], [0, 1], [0], [1]]
    arguments = [x.to(backend.device) for x in (q, k, v, *map(torch.tensor, graph))]
    with fences_watched(backend):
        out, _ = backend("graph_attention", *arguments)
    assert torch.equal(out.cpu().isnan(), expected.isnan())
    assert torch.equal(out.cpu().nan_to_num(0.0, 1.0, -1.0), expected.nan_to_num(0.0, 1.0, -1.0))
