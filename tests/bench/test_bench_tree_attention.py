# SPDX-License-Identifier: Apache-2.0
"""The tree attention benchmark: its trees, its count of useful work and its peers are right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import tree_attention as bench
from harness.case import error

SMALL = {
    "plain": bench.Workload(4, 2, 16, (bench.EAGLE1,), (40,), torch.float32),
    "ragged": bench.Workload(4, 2, 16, (bench.MEDUSA, bench.CHAIN, bench.EAGLE1), (40, 0, 17), torch.float32),
    "no-groups": bench.Workload(2, 2, 16, (bench.EAGLE2,), (9,), torch.float32),
    "window": bench.Workload(4, 2, 16, (bench.MEDUSA,), (300,), torch.float32, window=11),
    "window-sinks": bench.Workload(4, 1, 16, (bench.MEDUSA,), (30,), torch.float32, window=12, sinks=True),
    "int8": bench.Workload(4, 2, 16, (bench.EAGLE1,), (40,), torch.float32, cache_dtype=torch.int8),
    "fp8": bench.Workload(4, 2, 16, (bench.EAGLE1,), (40,), torch.float32, cache_dtype=torch.float8_e4m3fn),
}


def by_definition(workload: bench.Workload, inputs: dict) -> torch.Tensor:
    """One query at a time, walking parent links; shares no code with the benchmark."""
    q = inputs["q"].double()
    out = torch.zeros_like(q)
    for row, parents in enumerate(inputs["parents"].tolist()):
        prefix = int(inputs["prefix_lens"][row])
        for node in range(len(parents)):
            if parents[node] == -2:
                continue
            path = [node]
            while parents[path[-1]] >= 0:
                path.append(parents[path[-1]])
            position = prefix + len(path) - 1
            slots = [s for s in range(prefix) if not workload.window or position - s < workload.window]
            for head in range(workload.heads):
                kv = head // (workload.heads // workload.kv_heads)

                def stored(name, kv=kv, row=row, slots=slots, path=path):
                    scale = inputs[f"{name}_scale"]
                    rows = inputs[f"{name}_cache"][row, slots, kv].double() * (
                        1 if scale is None else scale[kv].double()
                    )
                    return torch.cat([rows, inputs[f"{name}_tree"][row, path, kv].double()])

                scores = stored("k") @ q[row, node, head] / workload.head_size**0.5
                sink = inputs["sinks"][head : head + 1].double() if workload.sinks else scores[:0]
                weights = torch.cat([scores, sink]).softmax(0)[: len(scores)]
                out[row, node, head] = weights @ stored("v")
    return out


@pytest.mark.parametrize("name", SMALL)
def test_truth_and_peers_follow_the_definition(name):
    workload = SMALL[name]
    inputs = workload.make_inputs(3, "cpu")
    expected = workload.select(inputs, by_definition(workload, inputs))
    assert error(workload.select(inputs, bench.truth(workload, inputs)), expected) < 1e-10
    case = bench.attention_case(name, workload)
    for peer in case.peers.keys() - case.slow_peers:
        assert error(workload.select(inputs, case.peers[peer](inputs)()), expected) < 1e-5, peer


@pytest.mark.parametrize("name", SMALL)
def test_useful_work_is_what_the_mask_shows(name):
    workload = SMALL[name]
    inputs = workload.make_inputs(3, "cpu")
    mask = workload.mask(inputs)
    assert workload.flops() == 4 * workload.head_size * workload.heads * int(mask.sum())
    nodes = int((inputs["parents"] != -2).sum())
    stored = 1 if workload.cache_dtype else 4
    prefix = sum(int(mask[row, :, :length].any(0).sum()) for row, length in enumerate(workload.prefixes))
    cache = 2 * workload.kv_heads * workload.head_size * (prefix * stored + nodes * 4)
    assert workload.bytes() == cache + nodes * workload.heads * (2 * workload.head_size * 4 + 4)


def test_the_trees_are_the_published_ones():
    assert len(bench.tree(bench.MEDUSA)) == 64
    assert len(bench.tree(bench.EAGLE1)) == 26
    assert len(bench.tree(bench.EAGLE2)) == 60
    for name in (bench.MEDUSA, bench.EAGLE1, bench.EAGLE2):
        parents = bench.tree(name)
        assert parents[0] == -1
        assert all(0 <= parent < node for node, parent in enumerate(parents) if node)


def test_in_cache_inputs_leave_out_the_separate_tree():
    inputs = bench.Workload(2, 1, 8, (bench.EAGLE1,), (5,), in_cache=True).make_inputs(0, "cpu")
    assert inputs["k_tree"] is None
    assert inputs["v_tree"] is None


def test_greedy_verification_peer():
    inputs = bench.verify_inputs(8, 5, "cpu")
    draft, target = inputs["draft"].tolist(), inputs["target"].tolist()
    parents = bench.tree(bench.MEDUSA)
    tokens = bench.verify_torch(inputs)().tolist()
    longest = 0
    for row in range(8):
        paths = {0: [0]}
        for node in range(1, len(parents)):
            if parents[node] in paths and draft[row][node] == target[row][parents[node]]:
                paths[node] = [*paths[parents[node]], node]
        best = max(paths.values(), key=lambda path: (len(path), -path[-1]))
        expected = [draft[row][node] for node in best[1:]] + [target[row][best[-1]]]
        assert tokens[row] == expected + [-1] * (len(parents) - len(expected))
        longest = max(longest, len(best))
    assert longest > 2


def test_commit_peer_writes_the_path_and_nothing_else():
    workload = bench.Workload(2, 1, 8, (bench.MEDUSA,), (6, 3), torch.float32)
    inputs = bench.commit_inputs(workload, 0, "cpu")
    path = [node for node in inputs["path"][0].tolist() if node >= 0]
    cache = bench.commit_torch(inputs)()
    for row, prefix in enumerate(workload.prefixes):
        assert torch.equal(cache[row, prefix : prefix + len(path)], inputs["k_tree"][row, path])
        cache[row, prefix : prefix + len(path)] = 0
    assert not cache.any()


def test_case_names_are_distinct_and_fit_for_keys():
    names = [case.name for case in bench.cases()]
    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").isalnum() for name in names)
