# SPDX-License-Identifier: Apache-2.0
"""The Graph-KV attention benchmark: its count of useful work, its truth and its peers are right."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import graph_attention as bench
from harness.case import error

SMALL = {
    "bipartite": bench.bipartite(4, 5, 2),
    "full": bench.full(3, 4),
    "star": bench.star(3, 4, 6, egos=2),
    "rope": bench.bipartite(4, 5, 2, rope=True),
    "decode": bench.bipartite(3, 9, 0, decode=True),
    "decode-rope": bench.bipartite(3, 9, 0, decode=True, rope=True),
}


def small(name: str) -> bench.Workload:
    return dataclasses.replace(SMALL[name], heads=4, kv_heads=2, head_size=16, dtype=torch.float32)


def by_definition(workload: bench.Workload, inputs: dict) -> torch.Tensor:
    """One softmax under the mask; positions by complex numbers."""
    q, k, v = (inputs[name].double() for name in "qkv")
    if workload.rope:
        frequencies = (500000.0 ** -(torch.arange(0, 16, 2).float() / 16)).double()
        place = torch.arange(len(k)) if not workload.decode else torch.tensor([len(k)])
        start = torch.tensor([sum(workload.lengths[:s]) for s, n in enumerate(workload.lengths) for _ in range(n)])
        turn = [torch.polar(torch.ones(()).double(), p[:, None, None] * frequencies) for p in (place, start)]
        q, k = (torch.complex(*x.chunk(2, -1)) * t for x, t in zip((q, k), turn))
        q, k = (torch.cat([x.real, x.imag], -1) for x in (q, k))
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / 4
    weights = scores.masked_fill(~workload.mask("cpu"), -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v)


@pytest.mark.parametrize("name", SMALL)
def test_truth_ours_and_peers_follow_the_definition(name: str) -> None:
    workload = small(name)
    inputs = workload.make_inputs(3, "cpu")
    expected = by_definition(workload, inputs)
    assert error(bench.truth(workload, inputs), expected) < 1e-10
    assert error(bench.ours(workload, inputs)(), expected) < 1e-5
    case = bench.case(name, workload)
    assert case.peers
    for peer in case.peers.keys() - case.slow_peers:
        assert error(case.peers[peer](inputs)(), expected) < 1e-5, peer


def packed_sequences(q, k, v, *, cu_seq_q, cu_seq_k, max_q, max_k, window_size, enable_gqa):
    """What varlen_attn computes, which has no CPU kernel: causal parts are aligned at their ends."""
    out = []
    for i in range(len(cu_seq_q) - 1):
        rows, keys = slice(*cu_seq_q[i : i + 2]), slice(*cu_seq_k[i : i + 2])
        queries, count = q[rows], keys.stop - keys.start
        assert len(queries) <= max_q and count <= max_k
        mask = torch.ones(len(queries), count, dtype=torch.bool)
        mask = mask.tril(count - len(queries)) if window_size == (-1, 0) else mask
        parts = (x.transpose(0, 1)[None] for x in (queries, k[keys], v[keys]))
        attended = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=enable_gqa)
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)


def of_torch_2_11(q, k, v, *, cu_seq_q, cu_seq_k, max_q, max_k, window_size):
    lengths = {"cu_seq_q": cu_seq_q, "cu_seq_k": cu_seq_k, "max_q": max_q, "max_k": max_k}
    return packed_sequences(q, k, v, **lengths, window_size=window_size, enable_gqa=True)


@pytest.mark.parametrize("varlen_attn", [packed_sequences, of_torch_2_11])
@pytest.mark.parametrize("name", SMALL)
def test_varlen_gets_the_right_sequences(name: str, varlen_attn, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn")
    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    workload = small(name)
    inputs = workload.make_inputs(3, "cpu")
    for regather in (False, True):
        assert error(bench.varlen(regather, workload, inputs)(), by_definition(workload, inputs)) < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_useful_work_is_what_the_mask_shows(name: str) -> None:
    workload = small(name)
    mask = workload.mask("cpu")
    assert workload.flops() == 4 * 16 * 4 * int(mask.sum())
    keys, tokens = int(mask.any(0).sum()), len(mask)
    assert workload.bytes() == keys * 2 * 2 * 16 * 4 + tokens * 4 * (2 * 16 * 4 + 4)


def test_cases_have_distinct_names() -> None:
    names = [case.name for case in bench.cases()]
    assert len(set(names)) == len(names)
