# SPDX-License-Identifier: Apache-2.0
"""The lightning attention benchmark: its truth, its peers and its count of useful work are right."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import chunk_loops
import lightning_attention as bench
from harness.case import error
from harness.memory import measured

SEQUENCE = bench.Workload(700, 2, 16, batch=2, dtype=torch.float32)


def recurrence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """[B, T, H, D], token by token; shares no code with the benchmark. Differentiable."""
    decay, state, out = torch.exp(-slopes)[:, None, None], 0.0, []
    for t in range(q.shape[1]):
        state = decay * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(out, 1)


def exact(inputs: dict) -> list[torch.Tensor]:
    return [inputs[name].double() for name in ("q", "k", "v", "slopes")]


@pytest.fixture
def few_tokens(monkeypatch):
    monkeypatch.setattr(bench, "CHECKED_TOKENS", 300)
    monkeypatch.setattr(chunk_loops, "TUNED_TOKENS", 128)
    monkeypatch.setattr(chunk_loops, "CHUNKS", (64,))


def test_forward_truth_and_peers_follow_the_recurrence(few_tokens):
    workload = dataclasses.replace(SEQUENCE, tokens=704)
    inputs = workload.make_inputs(3, "cpu")
    expected = recurrence(*exact(inputs))
    assert error(bench.truth(inputs), expected[:, -300:]) < 1e-9
    case = bench.forward_case(workload, "cpu")
    for name in case.peers.keys() - {"sdpa", "transformers"}:
        assert error(case.peers[name](inputs)(), expected) < 1e-5, name
    ragged = SEQUENCE.make_inputs(3, "cpu")
    assert error(bench.torch_loop(ragged)(), recurrence(*exact(ragged))) < 1e-5


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
def test_transformers_computes_the_same(few_tokens):
    inputs = SEQUENCE.make_inputs(3, "cpu")
    assert error(bench.transformers_loop(inputs)(), recurrence(*exact(inputs))) < 1e-5


def test_gradients(few_tokens):
    workload = dataclasses.replace(SEQUENCE, tokens=150)
    inputs = workload.make_inputs(3, "cpu")
    grad = torch.randn(inputs["v"].shape, generator=torch.Generator().manual_seed(1))
    *leaves, slopes = exact(inputs)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    expected = bench.joined(inputs, torch.autograd.grad(recurrence(*leaves, slopes), leaves, grad.double()))
    case = bench.training_case(workload, "cpu")
    assert error(case.select(inputs, case.truth(inputs)), expected) < 1e-9
    assert error(case.select(inputs, case.peers["torch"](inputs)()), expected) < 1e-5


@pytest.mark.parametrize("nodes", [1, 26])
def test_decoding_truth_and_peers_follow_the_recurrence(nodes):
    pool = bench.Pool(3, 2, 16, nodes, torch.float32)
    inputs = pool.make_inputs(3, "cpu")
    q, k, v, slopes = exact(inputs)
    states, expected = {-1: inputs["state"].double()}, []
    for node, parent in enumerate(pool.parents):
        grown = k[:, node, :, :, None] * v[:, node, :, None, :]
        states[node] = torch.exp(-slopes)[:, None, None] * states[parent] + grown
        expected.append(torch.einsum("nhk,nhkv->nhv", q[:, node], states[node]))
    verify = bench.verify_case(pool, "cpu")
    for call in (verify.truth, lambda inputs: verify.peers["torch"](inputs)()):
        assert error(call(inputs), torch.stack(expected, 1)) < 1e-5
    last = max(pool.paths(), key=len)[-1]
    commit = bench.commit_case(pool, "cpu")
    for call in (commit.truth, lambda inputs: commit.peers["torch"](inputs)()):
        assert error(call(inputs), states[last]) < 1e-5
    step = bench.step_case(pool, "cpu")
    for call in (step.truth, lambda inputs: step.peers["torch"](inputs)()):
        assert error(call(inputs), expected[0]) < 1e-5


def test_useful_work():
    sequence = bench.forward_case(bench.Workload(10, 3, 8, batch=2), "cpu")
    assert sequence.bytes == 2 * 10 * 3 * (4 * 8 * 2) + 3 * 4
    assert sequence.flops == 2 * 10 * 3 * (2 * 8 * 8 + 2 * 8 * 8)
    pool = bench.Pool(2, 3, 8, 26)
    ancestors = sum(map(len, pool.paths()))
    verify = bench.verify_case(pool, "cpu")
    assert verify.bytes == 2 * 3 * (8 * 8 * 4 + 26 * 4 * 8 * 2)
    assert verify.flops == 2 * 3 * (26 * 2 * 8 * 8 + ancestors * (2 * 8 + 2 * 8))
    step = bench.step_case(bench.Pool(2, 3, 8), "cpu")
    assert step.bytes == 2 * 3 * (2 * 8 * 8 * 4 + 4 * 8 * 2)


def test_extra_memory_is_seen():
    def call():
        return (torch.ones(40_000_000) + torch.ones(40_000_000))[:1]

    output, extra = measured(call, "cpu")
    assert len(output) == 1
    assert extra is None or 300e6 < extra < 600e6


def test_case_names_are_distinct_and_fit_for_keys():
    names = [case.name for case in bench.cases()]
    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").isalnum() for name in names)
