# SPDX-License-Identifier: Apache-2.0
"""The tiles and splits that Triton's int8 products are given, on GPUs that need not be here."""

from __future__ import annotations

import itertools

import pytest
from torch_kernels.int8_linear.heuristics import (
    Device,
    clocks,
    facts,
    outlier_row_splits,
    prefers_triton,
    product_plans,
    tiles,
)

DEVICES = [
    Device("sm_80", 108),
    Device("sm_86", 84),
    Device("sm_89", 128),
    Device("sm_90", 132),
    Device("sm_100", 148),
    Device("sm_120", 170),
    Device("gfx942", 304),
]
LAYERS = [(4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192)]
KINDS = [{}, {"aligned": False}, {"outliers": 2}, {"outliers": 4}, {"aligned": False, "outliers": 2}]

each_device = pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.arch)


def modelled(m: int, n: int, k: int, device: Device) -> float:
    return sum(clocks(plan, n, k, device) for plan in product_plans(m, n, k, device))


@each_device
def test_every_product_is_made_once(device: Device) -> None:
    sizes = (1, 2, 16, 17, 63, 65, 129, 1000, 1025, 70000)
    for m, n, k, kind in itertools.product(sizes, (1, 33, 4096), (0, 1, 100, 4096, 74240), KINDS):
        plans = product_plans(m, n, k, device, **kind)
        covered = 0
        for plan in plans:
            assert plan.first == covered and plan.rows > 0
            covered += plan.rows
            assert plan.depth % plan.tile.k == 0
            assert (plan.splits - 1) * plan.depth < max(k, 1) <= plan.splits * plan.depth
        assert covered == m and len(plans) <= 2


@each_device
def test_tiles_fit_into_shared_memory(device: Device) -> None:
    for kind in KINDS:
        assert tiles(device.arch, **kind)
        for tile in tiles(device.arch, **kind):
            stages = max(tile.num_stages - device.arch.startswith("gfx"), 1)
            assert 2 <= tile.num_stages and stages * (tile.m + tile.n) * tile.k <= facts(device.arch).shared


@each_device
def test_outlier_sums_use_one_instruction_for_every_m(device: Device) -> None:
    """Those of 64 rows: with fewer, tensor cores may add in another order."""
    for m, (n, k) in itertools.product((1, 16, 64, 500), LAYERS):
        for size in (2, 4):
            assert all(plan.tile.m >= 64 for plan in product_plans(m, n, k, device, outliers=size))


@each_device
@pytest.mark.parametrize("n, k", LAYERS)
def test_one_more_row_does_not_cost_much_more(device: Device, n: int, k: int) -> None:
    costs = [modelled(m, n, k, device) for m in range(1, 1100)]
    assert costs[8] <= 1.02 * costs[7], "9 rows after 8"
    assert costs[16] <= 1.25 * costs[15], "17 rows after 16"
    for m, (cost, more) in enumerate(zip(costs, costs[1:]), 1):
        assert more <= cost + 1.01 * costs[0], f"row {m + 1} costs more than it would alone"
        assert more >= 0.9 * cost, f"{m} rows cost more than {m + 1}"


@each_device
@pytest.mark.parametrize("n, k", LAYERS)
def test_a_layer_needs_few_kernels(device: Device, n: int, k: int) -> None:
    """Each tile is a kernel to compile, with splits another one; M itself is none."""
    plans = [plan for m in range(1, 3000, 7) for plan in product_plans(m, n, k, device)]
    assert len({(plan.tile, plan.splits > 1) for plan in plans}) <= 12


@each_device
def test_few_rows_of_large_layers_run_at_memory_speed(device: Device) -> None:
    """As modelled: enough programs, with enough bytes on the way."""
    for (n, k), m in itertools.product(LAYERS, (1, 8, 16)):
        floor = n * k / (device.processors * facts(device.arch).memory)
        assert modelled(m, n, k, device) <= 1.15 * floor + 7000


def test_deep_products_of_few_columns_are_split() -> None:
    (plan,) = product_plans(4, 512, 16384, Device("sm_90", 132))
    assert plan.splits > 1
    (plan,) = product_plans(4096, 4096, 4096, Device("sm_90", 132))
    assert plan.splits == 1 and plan.tile.m * plan.tile.n == 128 * 256


def test_unlisted_architectures() -> None:
    assert facts("sm_87") == facts("sm_89") and facts("sm_103") == facts("sm_100")
    assert facts("sm_121") == facts("sm_120") and facts("gfx950") == facts("gfx942")


def test_triton_serves_many_rows_where_its_instructions_are_faster() -> None:
    assert all(prefers_triton(4096, arch) for arch in ("sm_90", "sm_100", "sm_103"))
    assert not any(prefers_triton(4096, arch) for arch in ("sm_80", "sm_86", "sm_89", "sm_120", "sm_121"))
    assert not any(prefers_triton(64, device.arch) for device in DEVICES)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000, 100_000])
@pytest.mark.parametrize("column_tiles", [1, 32, 1000])
def test_outlier_search_fills_the_device(rows: int, column_tiles: int) -> None:
    splits = outlier_row_splits(rows, column_tiles, 16, Device("sm_90", 132))
    assert 1 <= splits <= max(rows // 16, 1)
    if rows > 50_000:
        assert splits * column_tiles >= 132
