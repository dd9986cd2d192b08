# SPDX-License-Identifier: Apache-2.0
"""What Triton's launchers ask for. Kernels do not run here; only the launches are looked at."""

from __future__ import annotations

import collections
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch_kernels import _triton
from torch_kernels._registry import CannotServe, interpreting_triton, triton_version
from torch_kernels._triton import BLOCKS

from .backends import Backend, serves
from .calls import FAMILIES, sample

pytestmark = pytest.mark.skipif(
    not interpreting_triton() or triton_version() is None, reason="launches are recorded in Triton's interpreter"
)
TRITON = Backend("triton", "cpu", (), slow=True)
DEFAULTS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}  # Triton's
LENGTHS = (70, 128, 200, 333, *range(1000, 20000, 950))
INSTANCES = 8  # of a kernel, over all lengths


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    options: dict[str, Any]
    instance: tuple[Any, ...]  # what another compilation is needed for


def specialised(name: str, value: Any, constexpr: bool, kept: bool) -> Any:
    if isinstance(value, Tensor):
        return value.dtype
    if constexpr or value is None:
        return value
    if kept or not isinstance(value, int):
        return type(value)
    return "1" if value == 1 else value % 16 == 0


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches of the calls within. Their results are whatever was in memory."""
    from triton.runtime.interpreter import InterpretedFunction

    launches = []

    def record(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        parameters = inspect.signature(self.fn).parameters
        options = {name: kwargs.pop(name) for name in DEFAULTS.keys() & kwargs.keys()}
        bound = inspect.signature(self.fn).bind(*args, **kwargs).arguments
        kept = self.kwargs.get("do_not_specialize") or ()
        instance = tuple(
            specialised(name, bound[name], "constexpr" in str(parameters[name].annotation), name in kept)
            for name in parameters
        )
        launches.append(Launch(self.fn.__name__, grid, options, (*sorted(options.items()), *instance)))

    run, InterpretedFunction.run = InterpretedFunction.run, record
    try:
        yield launches
    finally:
        InterpretedFunction.run = run


def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def integers(*shape: int) -> Tensor:
    return zeros(*shape, dtype=torch.int32)


def chain(nodes: int) -> Tensor:
    return torch.arange(-1, nodes - 1, dtype=torch.int32)[None]


def sequences(n: int) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Calls over n tokens."""
    x, slopes = zeros(1, n, 2, 64), zeros(2, dtype=torch.float32)
    few = zeros(1, 40, 2, 64)
    segments = torch.tensor([0, n, 2 * n], dtype=torch.int32)
    graph = segments, segments, torch.tensor([0, 0, 1], dtype=torch.int32), integers(1), torch.arange(2)
    places = {"inv_freq": torch.ones(32), "q_start": integers(2), "edge_start": integers(1)}
    packed, lse = zeros(2 * n, 2, 64), zeros(2, 2 * n, dtype=torch.float32)
    kept = {"num_cells": 16, "max_columns_per_cell": 4}
    return {
        "tree_attention": ((few, x, x, integers(1), chain(40)), {"k_tree": few, "v_tree": few}),
        "graph_attention": ((packed, packed, packed, *graph), places),
        "graph_attention_backward": ((packed, packed, packed, packed, packed, lse, *graph), places),
        "rope_shift": ((packed, segments, integers(2), torch.ones(32)), {}),
        "sea_attention": ((few, x, x, integers(1, 40, 1), integers(1, 40)), kept),
        "sea_attention_backward": ((few, few, x, x, few, lse[None, :, :40], integers(1, 40, 1), integers(1, 40)), kept),
        "linear_attention": ((x, x, x), {}),
        "linear_attention_backward": ((x, x, x, x), {}),
        "running_mean": ((x,), {}),
        "favor_features": ((x, zeros(64, 64)), {"kind": "exp", "eps": 0.1}),
        "lightning_attention": ((x, x, x, slopes), {"output_final_state": True}),
        "lightning_attention_backward": ((x, x, x, x, slopes), {}),
        "simple_gla": ((x, x, x, zeros(1, n, 2, dtype=torch.float32)), {}),
        "simple_gla_backward": ((x, x, x, x, zeros(1, n, 2, dtype=torch.float32)), {}),
    }


@pytest.mark.parametrize("op", sequences(64))
def test_no_length_is_compiled_for(op: str) -> None:
    """A server that has seen calls of all kinds compiles nothing any more."""
    instances = collections.defaultdict(set)
    with recorded() as launches:
        for n in LENGTHS:
            positional, keywords = sequences(n)[op]
            TRITON(op, *positional, **keywords)
    assert launches
    for launch in launches:
        instances[launch.kernel].add(launch.instance)
    for kernel, found in instances.items():
        assert len(found) <= INSTANCES, f"{kernel} is compiled {len(found)} times for {len(LENGTHS)} lengths"


def batches(n: int) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Calls for n sequences."""
    x, packed, gate = zeros(n, 1, 2, 8), zeros(n, 2, 8), zeros(n, 2, 1)
    lens, roots = integers(n), torch.full((n, 1), -1, dtype=torch.int32)
    caches, none = (zeros(n, 2, 2, 8), zeros(n, 2, 2, 8)), integers(n, 1)
    states, slopes = zeros(n, 2, 8, 8, dtype=torch.float32), zeros(2, dtype=torch.float32)
    kept = {"num_cells": 16}
    typical = {"temperature": 1.0, "epsilon": 0.1, "delta": 0.1}
    return {
        "tree_mask": ((roots,), {}),
        "tree_positions": ((roots, lens), {}),
        "tree_verify_greedy": ((none, none, roots), {}),
        "tree_verify_typical": ((none, zeros(n, 1, 8), roots), typical),
        "tree_verify_sampling": ((none, zeros(n, 1, 8), roots, zeros(n, 2, dtype=torch.float32)), {}),
        "merge_attention_states": ((x, gate.float(), x, gate.float()), {}),
        "sea_attention": ((x, x, x, none[..., None], none), kept),
        "sea_attention_backward": ((x, x, x, x, x, gate.float(), none[..., None], none), kept),
        "sea_stretch": ((zeros(n, 2, 1, 4), none), {"length": 3}),
        "linear_attention": ((x, x, x), {}),
        "linear_attention_backward": ((x, x, x, x), {}),
        "running_mean": ((x,), {}),
        "favor_features": ((x, zeros(16, 8)), {"kind": "exp", "eps": 0.1}),
        "lightning_attention": ((x, x, x, slopes), {}),
        "lightning_attention_backward": ((x, x, x, x, slopes), {}),
        # The others are served up to some number of sequences.
        "tree_attention": ((x, *caches, lens, roots), {}),
        "tree_commit_kv_": ((*caches, x, x, lens, none, lens), {}),
        "tree_compact_kv_": ((*caches, lens, none, lens), {}),
        "lightning_attention_step_": ((packed, packed, packed, states, slopes), {}),
        "lightning_attention_verify": ((x, x, x, states, slopes), {}),
        "lightning_attention_commit_": ((x, x, states, slopes, none, lens), {}),
    }


BATCHES = (3, 70_000)
REFUSED = list(batches(1))[-6:]


@pytest.mark.parametrize("op", batches(1))
def test_any_batch_fits_grids(op: str) -> None:
    for n in BATCHES:
        positional, keywords = batches(n)[op]
        refused = op in REFUSED and n > BLOCKS
        with recorded() as launches, pytest.raises(CannotServe, match="sequences") if refused else nullcontext():
            TRITON(op, *positional, **keywords)
        assert bool(launches) != refused
        assert all(size <= BLOCKS for launch in launches for size in launch.grid[1:])


def test_a_large_batch_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 3, 2, 16)
    whole = TRITON("linear_attention", x, x, x)
    monkeypatch.setattr(_triton, "BLOCKS", 4)
    for part, expected in zip(TRITON("linear_attention", x, x, x), whole, strict=True):
        assert torch.equal(part, expected)


def test_rows_that_are_far_apart_are_copied() -> None:
    far = torch.empty(2, 2**24, dtype=torch.uint8)[:, :8]  # 128 rows of these would be 2^31 elements apart
    (near,) = _triton.rows_nearby(far)
    assert near.stride(0) == 8 and torch.equal(near, far)
    assert next(_triton.rows_nearby(near)) is near


@pytest.mark.parametrize("family", FAMILIES)
def test_launches_give_the_options_of_what_is_compiled_ahead(family: str) -> None:
    """One that leaves an option out gets Triton's default, and is not what the resource table tells of."""
    kernels = importlib.import_module(f"torch_kernels.{family}.triton_kernels")
    ahead: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for _, kernel, *_, options in kernels.aot_cases("sm_90"):
        ahead[kernel.fn.__name__] |= {name: x for name, x in options.items() if x != DEFAULTS[name]}
    calls = importlib.import_module(f".{family}.samples", __package__).samples("cpu", "triton")
    with recorded() as launches:
        for op in calls:
            if op == "sea_csr" or not serves(TRITON, op):  # the former looks at a kernel's results
                continue
            for i in range(len(calls[op])):
                positional, keywords = sample(TRITON, op, i)
                TRITON(op, *positional.values(), **keywords)
    assert ahead.keys() & {launch.kernel for launch in launches}
    for launch in launches:
        assert ahead[launch.kernel].keys() <= launch.options.keys(), launch.kernel
