# SPDX-License-Identifier: Apache-2.0
"""The ops over a pool of states: against the sum in float64, to the bit where bits must agree, with garbage indices."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend, for_all, unchecked
from ..guards import Guards
from ..strategies import LAYOUTS, TREES, grow, lay_out, seeds
from ..tolerance import assert_accurate, assert_bitwise

NAN, INF = math.nan, math.inf
STEP, VERIFY, COMMIT = "lightning_attention_step_", "lightning_attention_verify", "lightning_attention_commit_"
EXTREMES = torch.tensor([-(2**31), -1000, -3, -2, -1, 0, 1, 2, 3, 5, 8, 100, 2**20, 2**31 - 1])
SLOPES = (0.0, 1e-6, 0.02, 0.7, 30.0, INF)


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int
    nodes: int
    heads: int
    group: int
    size: int
    value_size: int
    dtype: torch.dtype
    tree: str = "random"
    pooled: bool = True  # with state_indices, one of which is padding
    layout: str = "contiguous"
    seed: int = 0

    def make(self, device: str) -> dict[str, Any]:
        """Arguments of all three ops. Scores and outputs are of the order of 1."""
        generator = torch.Generator().manual_seed(self.seed)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        pool = self.rows + 2 if self.pooled else self.rows
        tokens = (self.rows, self.nodes)
        trees = [grow(self.tree, self.nodes, self.seed + n) for n in range(self.rows)]
        paths = [accepted_path(parents, self.seed) for parents in trees]
        indices = torch.randperm(pool, generator=generator)[: self.rows]
        indices[1:2] = -1
        args = {
            "q": numbers(*tokens, self.heads * self.group, self.size).to(self.dtype),
            "k": (numbers(*tokens, self.heads, self.size) / self.size**0.5).to(self.dtype),
            "v": numbers(*tokens, self.heads, self.value_size).to(self.dtype),
            "state": numbers(pool, self.heads, self.size, self.value_size) / self.size**0.5,
            "slopes": torch.tensor(SLOPES)[torch.randint(len(SLOPES), (self.heads,), generator=generator)],
            "parents": torch.tensor(trees, dtype=torch.int32).view(tokens),
            "path": torch.tensor([path + [-1] * (self.nodes - len(path)) for path in paths], dtype=torch.int64).view(
                tokens
            ),
            "num_accepted": torch.tensor([len(path) - 1 for path in paths], dtype=torch.int64),
            "state_indices": indices if self.pooled else None,
        }
        laid_out = {"q", "k", "v", "slopes"} | ({"state"} if self.layout != "expanded" else set())  # which would share
        for name, x in args.items():
            if isinstance(x, Tensor):
                args[name] = lay_out(x.to(device), self.layout) if name in laid_out else x.to(device)
        return args


def accepted_path(parents: list[int], seed: int) -> list[int]:
    """From a root down to some node; nothing for a tree that is all padding."""
    real = [node for node, parent in enumerate(parents) if parent >= -1]
    node, path = real[seed % len(real)] if real else -1, []
    while node >= 0:
        path.insert(0, node)
        node = parents[node]
    return path


def step_args(args: dict[str, Any]) -> dict[str, Any]:
    first = {name: args[name][:, 0] for name in "qkv"}
    return first | {name: args[name] for name in ("state", "slopes", "state_indices")}


def verify_args(args: dict[str, Any]) -> dict[str, Any]:
    return {name: args[name] for name in ("q", "k", "v", "state", "slopes", "parents", "state_indices")}


def commit_args(args: dict[str, Any]) -> dict[str, Any]:
    return {name: args[name] for name in ("k", "v", "state", "slopes", "path", "num_accepted", "state_indices")}


def exact(args: dict[str, Any]) -> dict[str, Any]:
    """On the CPU, floats in float64."""
    moved = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in args.items()}
    return {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in moved.items()}


def plain(op: str, args: dict[str, Any], **options: Any) -> Any:
    """The recurrence as PyTorch computes it: the op's reference, on copies."""
    reference = Backend("reference", "cpu", ())
    return reference(
        op, **{name: x.cpu().clone() if isinstance(x, Tensor) else x for name, x in args.items()}, **options
    )


def chain_state(args: dict[str, Any], n: int, nodes: list[int], head: int) -> Tensor:
    """The state of row n after these nodes, as a sum; args in float64."""
    index = n if args["state_indices"] is None else int(args["state_indices"][n])
    slope, terms = float(args["slopes"][head]), []
    for distance, node in enumerate(reversed(nodes)):
        if distance == 0 or slope != INF:
            fade = 1.0 if distance == 0 else math.exp(-slope * distance)
            terms.append(fade * torch.outer(args["k"][n, node, head], args["v"][n, node, head]))
    if slope != INF or not nodes:
        terms.append(
            math.exp(-slope * len(nodes)) * args["state"][index, head] if nodes else args["state"][index, head]
        )
    return torch.stack(terms).sum(0)


def true_outputs(args: dict[str, Any], scale: float) -> Tensor:
    """verify's outputs in float64."""
    args = exact(args)
    rows, nodes, query_heads = args["q"].shape[:3]
    heads = args["k"].shape[2]
    out = torch.zeros(rows, nodes, query_heads, args["v"].shape[3], dtype=torch.float64)
    for n in range(rows):
        if args["state_indices"] is not None and int(args["state_indices"][n]) < 0:
            continue
        parents = range(-1, nodes - 1) if args["parents"] is None else args["parents"][n].tolist()
        for node in range(nodes):
            if parents[node] < -1:
                continue
            path = [node]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
            for head in range(heads):
                queries = args["q"][n, node].view(heads, -1, args["q"].shape[3])[head]
                out[n, node].view(heads, -1, out.shape[3])[head] = scale * queries @ chain_state(args, n, path, head)
    return out


def summed(args: dict[str, Any], scale: float) -> Tensor:
    """verify as the sum over ancestors, in the precision of the state: another order than the recurrence's."""
    args = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in args.items()}
    rows, nodes, query_heads = args["q"].shape[:3]
    out = torch.zeros(rows, nodes, query_heads, args["v"].shape[3], dtype=args["state"].dtype)
    q, k, v = (args[name].to(out.dtype).movedim(2, 1) for name in "qkv")
    for n in range(rows):
        index = n if args["state_indices"] is None else int(args["state_indices"][n])
        distance, depth = torch.full((nodes, nodes), INF), torch.full((nodes, 1), INF)
        parents = range(-1, nodes - 1) if args["parents"] is None else args["parents"][n].tolist()
        for node in range(nodes):
            at, steps = node, 0
            while at >= 0:
                distance[node, at], at, steps = steps, parents[at], steps + 1
            depth[node] = INF if at < -1 else steps
        distance[depth.isinf().expand_as(distance)] = INF
        for head in range(query_heads if index >= 0 else 0):
            own = head * k.shape[1] // query_heads
            slope = args["slopes"][own].to(out.dtype)
            fade, fade_state = (
                torch.where(x == 0, 1.0, torch.exp(-slope * x)).where(x < INF, 0.0) for x in (distance, depth)
            )
            old = torch.where(slope == INF, 0.0, args["state"][index, own])
            of_tree = (q[n, head] @ k[n, own].mT * fade) @ v[n, own]
            out[n, :, head] = scale * (of_tree + fade_state * (q[n, head] @ old))
    return out.to(args["q"].dtype)


def true_states(args: dict[str, Any], paths: list[list[int]]) -> Tensor:
    args = exact(args)
    state = args["state"].clone()
    for n, path in enumerate(paths):
        index = n if args["state_indices"] is None else int(args["state_indices"][n])
        if index >= 0:
            for head in range(state.shape[1]):
                state[index, head] = chain_state(args, n, path, head)
    return state


@st.composite
def cases(draw: st.DrawFn, backend: Backend, **fixed: Any) -> Case:
    sizes = st.sampled_from([8, 16, 40, 64, 80, 128] + ([] if backend.slow else [96, 192, 256]))
    few = backend.slow
    drawn = {
        "rows": st.integers(1, 2 if few else 4),
        "nodes": st.integers(1, 9) if few else st.one_of(st.integers(1, 20), st.sampled_from([64, 65, 130])),
        "heads": st.integers(1, 2 if few else 3),
        "group": st.sampled_from([1, 1, 2, 3]),
        "size": sizes,
        "value_size": sizes,
        "dtype": st.sampled_from(backend.dtypes),
        "tree": st.sampled_from(TREES),
        "pooled": st.booleans(),
        "layout": st.sampled_from(LAYOUTS),
        "seed": seeds,
    }
    return Case(**{name: fixed[name] if name in fixed else draw(strategy) for name, strategy in drawn.items()})


def widened(args: dict[str, Any]) -> dict[str, Any]:
    """States and slopes in float64 where the inputs are."""
    if args["q"].dtype != torch.float64:
        return args
    return args | {"state": args["state"].double(), "slopes": args["slopes"].double()}


def assert_states(args: dict[str, Any], got: Tensor, paths: list[list[int]], baseline: Tensor) -> None:
    """States of rows as they should be, all others untouched."""
    rows = range(len(paths)) if args["state_indices"] is None else args["state_indices"].tolist()
    touched = [index for index, path in zip(rows, paths) if index >= 0 and path]
    others = [index for index in range(len(got)) if index not in touched]
    assert_bitwise("other states", got[others], args["state"][others])
    truth = true_states(args, paths)
    assert_accurate("state", got[touched], truth[touched], baseline[touched])


def stepped(args: dict[str, Any], scale: float) -> Tensor:
    """step_ by the recurrence, in the precision of the state."""
    args = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in args.items()}
    state = args["state"]
    if args["state_indices"] is not None:
        state = state[args["state_indices"].clamp(min=0).long()]
    q, k, v = (args[name].to(state.dtype) for name in "qkv")
    added, slopes = k[..., None] * v[..., None, :], args["slopes"][:, None, None].to(state.dtype)
    state = torch.where(slopes == INF, added, state + (torch.expm1(-slopes) * state + added))
    out = scale * (q.unflatten(1, (state.shape[1], -1)) @ state).flatten(1, 2)
    if args["state_indices"] is not None:
        out[args["state_indices"] < 0] = 0
    return out


@for_all(data=st.data())
def test_step(backend: Backend, data: st.DataObject) -> None:
    args = widened(data.draw(cases(backend, nodes=1, tree="random")).make(backend.device))
    args["state_indices"] = None if args["state_indices"] is None else args["state_indices"].int()
    before, changed = step_args(args), args["state"].clone()
    reference = {name: x.cpu().clone() if isinstance(x, Tensor) else x for name, x in before.items()}
    baseline = Backend("reference", "cpu", ())(STEP, **reference, scale=0.7)
    out = backend(STEP, **before | {"state": changed}, scale=0.7)
    truth = true_outputs(args | {"parents": None}, 0.7)[:, 0]
    assert_accurate("out", out, truth, baseline, summed(args | {"parents": None}, 0.7)[:, 0], stepped(before, 0.7))
    assert_states(args, changed, [[0]] * len(out), reference["state"])


@for_all(data=st.data())
def test_verify(backend: Backend, data: st.DataObject) -> None:
    args = widened(data.draw(cases(backend)).make(backend.device))
    before = args["state"].clone()
    for parents in (args["parents"], None):
        tree = verify_args(args | {"parents": parents})
        out = backend(VERIFY, **tree, scale=0.7)
        assert_accurate("out", out, true_outputs(tree, 0.7), plain(VERIFY, tree, scale=0.7), summed(tree, 0.7))
    assert_bitwise("state", args["state"], before)


@for_all(data=st.data())
def test_commit(backend: Backend, data: st.DataObject) -> None:
    args = widened(data.draw(cases(backend)).make(backend.device))
    before, changed = commit_args(args), args["state"].clone()
    reference = {name: x.cpu().clone() if isinstance(x, Tensor) else x for name, x in before.items()}
    Backend("reference", "cpu", ())(COMMIT, **reference)
    backend(COMMIT, **before | {"state": changed})
    lengths = (args["num_accepted"] + 1).tolist()
    assert_states(args, changed, [row[:n] for row, n in zip(args["path"].tolist(), lengths)], reference["state"])


def test_many_nodes(backend: Backend) -> None:
    """More query rows than a block has, and keys in several tiles."""
    for group, nodes in ((1, 150), (3, 30)):
        case = Case(1, nodes, 1, group, 40, 8, torch.float32, tree="recent", pooled=False, seed=3)
        args = case.make(backend.device)
        args["slopes"] = torch.full_like(args["slopes"], 0.01)
        for tree in (verify_args(args), verify_args(args | {"parents": None})):
            out = backend(VERIFY, **tree)
            assert_accurate("out", out, true_outputs(tree, 1.0), plain(VERIFY, tree), summed(tree, 1.0))


def results(backend: Backend, args: dict[str, Any]) -> tuple[Tensor, ...]:
    """What the three ops give and make of the state."""
    stepped, committed = args["state"].clone(), args["state"].clone()
    out = backend(STEP, **step_args(args) | {"state": stepped})
    backend(COMMIT, **commit_args(args) | {"state": committed})
    return out, stepped, committed, backend(VERIFY, **verify_args(args))


@for_all(data=st.data())
def test_bits(backend: Backend, data: st.DataObject) -> None:
    """Neither another run, nor other rows, nor where the state lies changes a bit."""
    case = data.draw(cases(backend, layout="contiguous"))
    args = widened(case.make(backend.device))
    out, stepped, committed, verified = results(backend, args)
    for name, again, first in zip("abcd", results(backend, args), (out, stepped, committed, verified)):
        assert_bitwise(name, again, first)
    for n in range(case.rows):
        index = n if args["state_indices"] is None else int(args["state_indices"][n])
        if index < 0:
            continue
        alone = {x: args[x][n : n + 1] for x in ("q", "k", "v", "parents", "path", "num_accepted")}
        alone |= {"slopes": args["slopes"], "state": args["state"][index : index + 1], "state_indices": None}
        expected = (out[n : n + 1], stepped[index : index + 1], committed[index : index + 1], verified[n : n + 1])
        for name, got, want in zip(("out", "stepped", "committed", "verified"), results(backend, alone), expected):
            assert_bitwise(name, got, want)


@for_all(data=st.data())
def test_layout_changes_nothing(backend: Backend, data: st.DataObject) -> None:
    case = data.draw(cases(backend, layout="contiguous"))
    contiguous = results(backend, widened(case.make(backend.device)))
    for layout in ("transposed", "sliced", "misaligned"):
        got = results(backend, widened(dataclasses.replace(case, layout=layout).make(backend.device)))
        for name, x, expected in zip(("out", "stepped", "committed", "verified"), got, contiguous):
            assert_bitwise(name, x, expected)


@pytest.mark.parametrize("special", [NAN, INF])
def test_what_a_node_does_not_see(backend: Backend, special: float) -> None:
    """Siblings, padding nodes, other rows and other states may hold anything."""
    for dtype in backend.dtypes:
        args = widened(dataclasses.replace(TREE, dtype=dtype).make(backend.device))
        args["slopes"] = torch.full_like(args["slopes"], 0.3)
        args["parents"] = torch.tensor([[-1, 0, 0, 1, -2, 2]] * 3, dtype=torch.int32, device=backend.device)
        args["state_indices"] = torch.tensor([2, -1, 0], device=backend.device)
        clean = backend(VERIFY, **verify_args(args))
        for name in "qkv":
            for node in (2, 4, 5):
                args[name][0, node] = special
            args[name][1] = special
        args["state"][[1, 3]] = special
        spoilt = backend(VERIFY, **verify_args(args))
        assert_bitwise("row 0", spoilt[0, [0, 1, 3, 4]], clean[0, [0, 1, 3, 4]])
        assert_bitwise("padding and row 2", spoilt[1:], clean[1:])
        assert not spoilt[0, [2, 5]].isfinite().any()


def test_infinite_slope_forgets(backend: Backend) -> None:
    for dtype in backend.dtypes:
        args = widened(dataclasses.replace(TREE, dtype=dtype, pooled=False).make(backend.device))
        args["slopes"] = torch.full_like(args["slopes"], INF)
        clean = [x.clone() for x in results(backend, args)]
        args["state"].fill_(NAN)
        for name, got, expected in zip(("out", "stepped", "committed", "verified"), results(backend, args), clean):
            assert_bitwise(name, got, expected) if name != "committed" else None
        args["k"][:, 0], args["v"][:, 0] = NAN, INF  # what came before a node is forgotten, too
        spoilt = backend(VERIFY, **verify_args(args | {"parents": None}))
        assert spoilt[:, 1:].isfinite().all()


TREE = Case(3, 6, 2, 2, 40, 24, torch.float32)


@for_all(seed=seeds, dtype=st.sampled_from([torch.int32, torch.int64]))
def test_garbage(backend: Backend, seed: int, dtype: torch.dtype) -> None:
    """Indices that nobody checked: calls end, and touch nothing outside their tensors."""
    if backend.name == "cpu":
        return  # where they are always checked
    generator, guards = torch.Generator().manual_seed(seed), Guards()

    def numbers(*shape: int) -> Tensor:
        return guards.copy(torch.randn(*shape, generator=generator).to(backend.device))

    def indices(*shape: int) -> Tensor:
        small = torch.randint(-3, 8, shape, generator=generator)
        wild = EXTREMES[torch.randint(len(EXTREMES), shape, generator=generator)]
        mixed = torch.where(torch.rand(shape, generator=generator) < 0.4, wild, small)
        return guards.copy(mixed.to(dtype).to(backend.device))

    rows, nodes = 3, 6
    q, k, v = numbers(rows, nodes, 4, 16), numbers(rows, nodes, 2, 16), numbers(rows, nodes, 2, 8)
    # Rows must not share a state; those outside the pool are padding.
    places = torch.tensor([-(2**31), -5, 0, 1, 2, 3, 2**31 - 1])[torch.randperm(7, generator=generator)[:rows]]
    pool = {"state": numbers(3, 2, 16, 8), "slopes": numbers(2).abs(), "state_indices": places.to(dtype).to(k.device)}
    with unchecked(STEP), unchecked(VERIFY), unchecked(COMMIT), guards.allocations():
        out = backend(STEP, q[:, 0], k[:, 0], v[:, 0], **pool)
        verified = backend(VERIFY, q, k, v, parents=indices(rows, nodes), **pool)
        backend(COMMIT, k, v, path=indices(rows, nodes), num_accepted=indices(rows), **pool)
    guards.check()
    for x in (out, verified, pool["state"]):
        assert x.isfinite().all()


def test_empty(backend: Backend) -> None:
    for rows, nodes in ((0, 3), (2, 0)):
        args = Case(rows, nodes, 2, 1, 16, 8, torch.float32, tree="chain", pooled=False).make(backend.device)
        before = args["state"].clone()
        assert backend(VERIFY, **verify_args(args)).shape == (rows, nodes, 2, 8)
        backend(COMMIT, **commit_args(args))
        assert_bitwise("state", args["state"], before)


def test_a_long_life(backend: Backend) -> None:
    """100,000 tokens: the state stays near the float64 recurrence, for slow heads too."""
    if backend.slow or backend.name == "reference":
        return
    generator = torch.Generator().manual_seed(0)
    slopes = torch.tensor([0.0, 2**-8 * 1e-5, 2**-8 * 1e-2, 2**-8, 0.5])
    tokens, heads = 100_000, len(slopes)
    k, v = torch.randn(2, tokens, heads, 8, generator=generator).to(backend.device)
    q = torch.zeros(1, heads, 8, device=backend.device)
    state = torch.zeros(1, heads, 8, 8, device=backend.device)
    on_device = slopes.to(backend.device)
    with backend.forced():
        for t in range(tokens):
            torch.ops.kernels.lightning_attention_step_(q, k[t : t + 1], v[t : t + 1], state, on_device)
    fades = torch.exp(-slopes.double()[:, None] * torch.arange(tokens - 1, -1, -1).double())
    truth = torch.einsum("ht,thk,thv->hkv", fades, k.cpu().double(), v.cpu().double())
    error = (state[0].cpu() - truth).abs().amax((1, 2)) / truth.abs().amax((1, 2))
    assert float(error.max()) < 1e-4, error
