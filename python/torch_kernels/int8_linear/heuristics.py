# SPDX-License-Identifier: Apache-2.0
"""Tile sizes and splits of the Triton kernels, from the sizes of a product and a few facts about the GPU.

An int8 product is exact, so any tile and any split gives the same bits, and the best may be picked for every M. It is
picked by a model of the time: a program's products and its loads overlap, programs queue for processors, and all of
them share the memory. The model ranks; it does not predict. Choosing the least of many smooth costs, rather than tiles
by buckets of M, keeps one more row from costing much more; where it would still start a new wave of programs, the last
rows become a launch of their own with smaller tiles.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple


class Device(NamedTuple):
    arch: str  # sm_80, sm_90, .., gfx942
    processors: int


class Facts(NamedTuple):
    """Of one processor, per clock; bytes of shared memory."""

    products: int  # int8 multiply-adds of the tensor cores
    load: float  # bytes from the L2 cache
    memory: float  # bytes of device memory
    shared: int


class Tile(NamedTuple):
    """Rows, columns and depth of what a program multiplies at a time, and launch options."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


class Plan(NamedTuple):
    """One launch: which rows, in which tiles, and how K is split."""

    first: int
    rows: int
    tile: Tile
    splits: int  # none is empty
    depth: int  # numbers of K in a split, a multiple of tile.k


_FACTS = {
    "sm_80": Facts(2048, 40, 13, 163 * 1024),
    "sm_89": Facts(1024, 20, 3, 99 * 1024),
    "sm_90": Facts(4096, 32, 18, 227 * 1024),
    "sm_100": Facts(8192, 40, 28, 227 * 1024),
    "sm_120": Facts(1024, 20, 4.5, 99 * 1024),
    "gfx942": Facts(2048, 40, 8, 64 * 1024),
}

# Clocks: from a load to its use; to start and end a program; to launch one more kernel.
_LATENCY, _PROGRAM, _LAUNCH = 800, 1500, 3000
# The least of K that a split is worth, and numbers of splits.
_MIN_DEPTH, _SPLITS = 512, (1, 2, 3, 4, 6, 8, 12, 16)
# The last rows may become a launch of their own after a multiple of one of these.
_CUTS = (64, 128, 256, 512, 1024)
# Below, the memory limits either kernel. An estimate.
_TRITON_ROWS = 256


def facts(arch: str) -> Facts:
    """Those of the newest listed architecture that is not newer; sm_86 and sm_87 share the small memory of sm_89."""
    if arch in _FACTS:
        return _FACTS[arch]
    if not arch.startswith("sm_"):
        return _FACTS["gfx942"]
    number = int(arch.removeprefix("sm_"))
    if number < 90:
        return _FACTS["sm_89"]
    return _FACTS["sm_120" if number >= 120 else "sm_100" if number >= 100 else "sm_90"]


@functools.cache
def tiles(arch: str, *, aligned: bool = True, outliers: int = 0) -> tuple[Tile, ...]:
    """The tiles of one architecture.

    Unaligned rows are loaded byte by byte, which takes registers. Outlier columns, numbers of ``outliers`` bytes, are
    added up in floating point: always by instructions of 64 rows, so that the order of the sum is the same for every
    M, and in float32 by ordinary cores, whose operands take registers too. Blackwell's tensor cores keep the sums in a
    memory of their own, but the compiler brings them into registers all at once: no more than 128 x 128.
    """
    shapes = [(16, 32, 256, 4), (16, 64, 256, 4), (32, 32, 256, 4), (32, 64, 128, 4), (64, 32, 128, 4)]
    shapes += [(64, 64, 128, 4), (64, 128, 128, 4), (128, 128, 128, 8)]
    shared = facts(arch).shared
    if facts(arch) == _FACTS["sm_90"]:
        shapes += [(128, 256, 128, 8)]
    if not aligned or outliers == 4:
        shapes = [shape for shape in shapes if shape[0] * shape[1] <= 64 * 64]
    if outliers:
        shapes = [shape for shape in shapes if shape[0] >= 64 and shape[1] >= 64]
    found = []
    for m, n, k, num_warps in shapes:
        if shared < 128 * 1024 and m + n >= 256:
            k = 64
        # AMD's compiler counts the tile in registers as a stage.
        num_stages = 2 if arch.startswith("gfx") else min(shared * 15 // 16 // ((m + n) * k), 5)
        found.append(Tile(m, n, k, num_warps, num_stages))
    return tuple(found)


def clocks(plan: Plan, n: int, k: int, device: Device) -> float:
    """Modelled time of one launch, for n columns and a depth of k."""
    products, cache, memory, shared = facts(device.arch)
    m, tile = plan.rows, plan.tile
    programs = math.ceil(m / tile.m) * math.ceil(n / tile.n) * plan.splits
    steps = plan.depth / tile.k
    # Tensor cores reach about 4/5 of their peak with 64 rows; with fewer rows they idle.
    multiply = steps * tile.m * tile.n * tile.k / (products * min(tile.m / 80, 0.8))
    tile_bytes = (tile.m + tile.n) * tile.k
    together = max(min(shared // (tile.num_stages * tile_bytes), 4), 1)
    busy = min(max(programs / device.processors, 1), together)
    load = steps * tile_bytes / min(cache, busy * (tile.num_stages - 1) * tile_bytes / _LATENCY)
    # Of several programs that share a processor the last has it alone, so that waves need not be whole.
    waves = max(programs / device.processors, 1)
    waves += (math.ceil(waves) - waves) / together
    time = waves * (max(multiply, load) + _PROGRAM / together)
    bandwidth = device.processors * memory
    time = max(time, (n * k + m * k + 2 * m * n) / bandwidth) + _LAUNCH
    if plan.splits > 1:
        time += _LAUNCH + 2 * 4 * plan.splits * m * n / bandwidth
    return time


@functools.lru_cache(maxsize=16384)
def _best_launch(m: int, n: int, k: int, device: Device, choices: tuple[Tile, ...]) -> tuple[float, Plan]:
    """The cheapest way to multiply m rows in one launch, and its cost."""
    best: tuple[float, Plan] | None = None
    for tile in choices:
        programs = math.ceil(m / tile.m) * math.ceil(n / tile.n)
        for wanted in _SPLITS:
            if wanted > 1 and (programs * wanted > 4 * device.processors or k < wanted * _MIN_DEPTH):
                break
            depth = math.ceil(max(k, 1) / tile.k / wanted) * tile.k
            plan = Plan(0, m, tile, math.ceil(max(k, 1) / depth), depth)
            cost = clocks(plan, n, k, device)
            if best is None or cost < best[0]:
                best = cost, plan
    assert best is not None
    return best


@functools.lru_cache(maxsize=16384)
def product_plans(
    m: int, n: int, k: int, device: Device, *, aligned: bool = True, outliers: int = 0
) -> tuple[Plan, ...]:
    """One or two launches that make an int8 product [m, k] x [k, n]."""
    choices = tiles(device.arch, aligned=aligned, outliers=outliers)
    cost, plan = _best_launch(m, n, k, device, choices)
    plans: tuple[Plan, ...] = (plan,)
    for cut in {m - m % size for size in _CUTS} - {0, m}:
        first_cost, first = _best_launch(cut, n, k, device, choices)
        last_cost, last = _best_launch(m - cut, n, k, device, choices)
        if first_cost + last_cost < cost:
            cost, plans = first_cost + last_cost, (first, last._replace(first=cut))
    return plans


def prefers_triton(rows: int, arch: str) -> bool:
    """Whether a product that the compiled CUDA kernel could serve is faster in Triton, which knows the tensor core
    instructions that Hopper and the first Blackwells have for large tiles."""
    return rows >= _TRITON_ROWS and arch.startswith(("sm_9", "sm_10"))


def outlier_row_splits(rows: int, column_tiles: int, block: int, device: Device) -> int:
    """Into how many parts the search for outlier columns divides the rows, to fill the device about twice."""
    return max(min(2 * device.processors // max(column_tiles, 1), math.ceil(rows / (4 * block))), 1)
