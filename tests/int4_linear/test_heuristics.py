# SPDX-License-Identifier: Apache-2.0
"""The choice of kernels and tiles: what must not depend on M does not, and what does has no cliffs."""

from __future__ import annotations

import pytest
from torch_kernels.int4_linear import heuristics

from ..aot import resources

LAYERS = ((4096, 4096), (12288, 4096), (4096, 11008), (1024, 8192), (57344, 8192), (48, 100), (1, 1), (33, 20000))
GROUPS = (-1, 16, 32, 64, 128, 256)
ROWS = (*range(1, 300), 511, 512, 513, 4096, 100_000)
ARCHS = tuple(arch for arch in resources.TRITON_ARCHS)


def forward(rows, features, columns, group_size=128, element_size=2, mode="exact", arch="sm_90", multiprocessors=132):
    return heuristics.forward_plan(rows, features, columns, group_size, element_size, mode, arch, multiprocessors)


def order_of_summation(plan):
    return plan.step, plan.split, plan.splits, plan.tile.block_k


@pytest.mark.parametrize("features, columns", LAYERS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("element_size", [1, 2, 4])
def test_order_of_summation_does_not_depend_on_rows(features, columns, group_size, element_size):
    mode = "a8" if element_size == 1 else "exact"
    orders = {
        order_of_summation(forward(rows, features, columns, group_size, element_size, mode, arch, multiprocessors))
        for rows in ROWS
        for arch, multiprocessors in (("sm_80", 108), ("sm_90", 132), ("gfx942", 304))
    }
    assert len(orders) == 1


@pytest.mark.parametrize("features, columns", LAYERS)
@pytest.mark.parametrize("element_size", [2, 4])
def test_order_of_the_gradient_does_not_depend_on_rows(features, columns, element_size):
    plans = [heuristics.backward_plan(rows, features, columns, element_size, "sm_90", 132) for rows in ROWS]
    assert len({(plan.step, plan.split, plan.splits, plan.tile.block_n) for plan in plans}) == 1


@pytest.mark.parametrize("features, columns", LAYERS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("mode", ["exact", "a8", "fast"])
def test_steps_and_splits_are_whole(features, columns, group_size, mode):
    for element_size in (1,) if mode == "a8" else (2, 4):
        for rows in (1, 40, 5000):
            plan = forward(rows, features, columns, group_size, element_size, mode)
            assert plan.step % plan.tile.block_k == 0
            assert plan.split % plan.step == 0
            assert (plan.splits - 1) * plan.split < columns <= plan.splits * plan.split
            if group_size > 0:
                assert group_size % plan.step == 0 or (plan.step, group_size) == (32, 16)


@pytest.mark.parametrize("arch", ARCHS)
def test_tiles_fit_into_shared_memory(arch):
    for element_size in (1, 2, 4):
        for rows in (1, 17, 33, 1000):
            for group_size in GROUPS:
                plan = forward(rows, 4096, 4096, group_size, element_size, arch=arch)
                tile = plan.tile
                step = plan.step * (tile.block_m * element_size + tile.block_n // 2)
                buffers = tile.num_stages - 1 if arch == "gfx942" else tile.num_stages
                assert step * buffers <= resources.shared_limit(arch)


def test_few_rows_of_a_narrow_layer_still_fill_a_gpu():
    plan = forward(1, 4096, 4096)
    assert plan.splits * (4096 // plan.tile.block_n) >= 132
    assert not plan.sequence
    assert forward(4096, 4096, 4096).sequence


def test_fast_splits_only_while_rows_are_few():
    assert forward(1, 4096, 4096, mode="fast").splits == forward(1, 4096, 4096).splits
    assert forward(4096, 4096, 4096, mode="fast").splits == 1


def test_no_cliff_at_the_edge_of_a_tile():
    """One row more costs one tile more at most, and never makes the others dearer."""

    def cost(rows):
        size = heuristics.row_block(rows)
        return -(-rows // size) * (size + heuristics.UNPACK_ROWS)

    costs = [cost(rows) for rows in range(1, 2000)]
    steps = [later - earlier for earlier, later in zip(costs, costs[1:])]
    assert min(steps) >= 0
    assert max(steps) <= 64 + heuristics.UNPACK_ROWS
    assert max(steps[:32]) <= 16 + heuristics.UNPACK_ROWS


def test_only_mode_fast_chooses_by_rows():
    for mode in ("exact", "a8"):
        assert not any(heuristics.prefers_triton(rows, mode) for rows in ROWS)
    assert not heuristics.prefers_triton(1, "fast")
    assert heuristics.prefers_triton(4096, "fast")
    assert all(heuristics.dense_from(arch) > heuristics.CUDA_ROWS for arch in (*ARCHS, "sm_86", "sm_121"))
