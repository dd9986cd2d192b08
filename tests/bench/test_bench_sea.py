# SPDX-License-Identifier: Apache-2.0
"""The SEA benchmark: its truth, its peers and its count of useful work are right."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import torch_kernels
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import sea as bench
import sea_peers
from harness.case import error

SMALL = bench.Workload(67, heads=2, size=8, cells=12, k=5)


@pytest.fixture(autouse=True)
def reference():
    with torch_kernels.use_backend("reference"):
        yield


@pytest.mark.parametrize("rough", [False, True])
def test_attention_truth_and_peers_agree_with_the_reference(rough):
    workload = dataclasses.replace(SMALL, rough=rough)
    inputs = workload.make_inputs(3, "cpu")
    case = bench.attention_case(workload, "cpu", curve=False)
    expected = case.run(inputs)()
    assert error(case.truth(inputs), case.select(inputs, expected)) < 1e-6
    assert error(case.peers["torch-csr"](inputs)(), expected) < 1e-6
    gradients = [bench.gradients(prepare, inputs)() for prepare in (case.run, case.peers["sdpa"])]
    assert gradients[0].shape == gradients[1].shape and error(*gradients) > 1e-2


def test_flex_is_given_the_same_keys(monkeypatch):
    inputs = SMALL.make_inputs(3, "cpu")
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(sea_peers, "compiled_flex", lambda: flex_attention)  # not compiled: the same, slowly
    case = bench.attention_case(SMALL, "cpu", curve=False)
    assert error(case.peers["flex"](inputs)(), case.run(inputs)()) < 1e-6


def test_selection():
    inputs = SMALL.map_of(3, "cpu")
    case = bench.select_case(SMALL, "cpu")
    truth = case.truth(inputs)
    for call in (case.run, case.peers["torch"]):
        assert torch.equal(case.select(inputs, call(inputs)()), truth)


def test_layers_and_steps():
    workload = dataclasses.replace(SMALL, tokens=40)
    inputs = workload.tokens_of(3, "cpu")
    case = bench.layer_case(workload, "cpu")
    assert case.run(inputs)().shape == inputs["x"].shape
    dense, eager = (case.peers[name](inputs)() for name in ("sdpa", "eager"))
    assert error(dense, eager) < 1e-5
    for stage in bench.stage_cases(workload, "cpu"):
        of_stage = stage.make_inputs(3, "cpu")
        out = stage.run(of_stage)()
        assert len(out) == 1
        for peer in stage.peers.values():
            assert error(peer(of_stage)(), out) < 1e-6
    step = bench.step_case(workload, "cpu")
    cached = step.make_inputs(3, "cpu")
    call = step.run(cached)
    assert torch.equal(call(), call())
    assert call().shape == step.peers["sdpa"](cached)().shape == (1, 1, workload.width)


def test_useful_work():
    workload = dataclasses.replace(SMALL, tokens=150)
    inputs = workload.make_inputs(3, "cpu")
    crow, _ = torch_kernels.sea_csr(inputs["cells"], inputs["widths"], num_heads=2, num_cells=12)
    assert abs(int(crow[-1]) / workload.pairs - 1) < 0.03
    layer = bench.layer_for(dataclasses.replace(workload, tokens=0), torch.device("cpu"))
    assert workload.features == layer.performer.projection.shape[0]
    z = torch.randn(1, 150, 2, 3 * 8)
    with FlopCounterMode(display=False) as counted:
        z = layer.encoder(z)
        layer.gates(z)
        layer.decoder(z)
    margin = 2 * 2 * 4 * (4 * 4 * 9 * 2) * (12 // 4)  # rows of both convolutions that lie outside
    widening = 2 * 150 * 2 * 3 * 12
    assert abs(counted.get_total_flops() - widening - bench.stage_flops(workload)["decoder"]) <= margin


def test_case_names_are_distinct_and_fit_for_keys():
    names = [case.name for case in bench.cases()]
    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").isalnum() for name in names)
