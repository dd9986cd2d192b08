# SPDX-License-Identifier: Apache-2.0
"""Steps, verification of draft trees, commits, and the two halves of sequence parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_kernels
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend, for_all, need
from ..strategies import TREES, grow, lay_out, seeds
from ..tolerance import assert_accurate, assert_bitwise
from . import oracle
from .cases import Case, cases, make, wide

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
CHUNKS = (16, 64)


def detached(args: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cpu() if isinstance(x, Tensor) else x for name, x in args.items()}


def sizes(backend: Backend) -> tuple[int, ...]:
    return (8, 16, 40) if backend.slow else (8, 16, 40, 64, 96, 128, 192, 256)


def pool_of(states: Tensor, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """A pool with the states at shuffled places among NaN, and where each is. The last row is padding."""
    order = torch.randperm(rows + 2, generator=torch.Generator().manual_seed(seed))[:rows]
    pool = torch.full((rows + 2, *states.shape[1:]), float("nan"), dtype=states.dtype, device=states.device)
    pool[order.to(states.device)] = states
    indices = torch.cat([order, torch.tensor([-1])]).to(torch.int32)
    return pool, indices.to(states.device)


def padded(x: Tensor) -> Tensor:
    return torch.cat([x, torch.full_like(x[:1], float("nan"))])


@for_all(data=st.data())
def test_steps_are_the_recurrence(backend: Backend, data: st.DataObject) -> None:
    """T steps, from a pool by indices or without, give what the whole sequence gives."""
    case = data.draw(cases(backend, packed=False, initial=True, layout="contiguous"))
    tokens = data.draw(st.sampled_from([1, 2, 5] if backend.slow else [1, 3, 20]))
    size, value_size = (data.draw(st.sampled_from(sizes(backend))) for _ in "kv")
    decay = data.draw(st.sampled_from(["slopes", "slow", "infinite", "none"]))
    case = case.replace(lengths=(tokens,) * 2, decay=decay, key_size=size, value_size=value_size)
    indexed, layout = data.draw(st.booleans()), data.draw(st.sampled_from(["contiguous", "sliced", "transposed"]))
    args = make(case, backend.device)
    pool, indices = pool_of(args["initial_state"], 2, case.seed)
    state, outs = (pool if indexed else args["initial_state"].clone()), []
    state = lay_out(state, layout)
    options = {"state_indices": indices if indexed else None, "scale": case.scale}
    for t in range(tokens):
        token = [args[name][:, t] for name in "qkv"]
        out = backend(
            "lightning_attention_step_", *map(padded, token) if indexed else token, state, args["slopes"], **options
        )
        if indexed:
            assert (out[2] == 0).all()
        outs.append(out[:2])
    if indexed:
        unused = torch.ones(len(pool), dtype=torch.bool)
        unused[indices[:2].cpu().long()] = False
        assert state[unused].isnan().all(), "a state that no row has was written"
        state = state[indices[:2].long()]
    true_out, true_state = oracle.attention(**detached(args))
    plain = [oracle.plain_formula(chunk, **detached(args)) for chunk in CHUNKS]
    assert_accurate("out", torch.stack(outs, 1), true_out, *(x for x, _ in plain))
    wide_args = {n: x.to(wide(case.dtype)) if n in "qkv" else x for n, x in detached(args).items()}
    assert_accurate("state", state, true_state, oracle.plain_formula(16, **wide_args)[1], *(x for _, x in plain))


def test_prefill_then_steps(backend: Backend) -> None:
    need(backend, "lightning_attention")
    for dtype in backend.dtypes:
        case = Case(lengths=(90, 90), dtype=dtype, key_size=16, value_size=24, group=2)
        args = make(case, backend.device)
        prefix = {name: args[name][:, :83] for name in "qkv"}
        out, state = backend(
            "lightning_attention", *prefix.values(), args["slopes"], initial_state=args["initial_state"],
            output_final_state=True,
        )  # fmt: skip
        outs = [out]
        for t in range(83, 90):
            token = [args[name][:, t] for name in "qkv"]
            outs.append(backend("lightning_attention_step_", *token, state, args["slopes"])[:, None])
        true_out, true_state = oracle.attention(**detached(args))
        plain = [oracle.plain_formula(chunk, **detached(args)) for chunk in CHUNKS]
        assert_accurate("out", torch.cat(outs, 1), true_out, *(x for x, _ in plain))
        assert_accurate("state", state, true_state, *(x for _, x in plain))


def test_many_steps_do_not_drift(backend: Backend) -> None:
    if backend.slow or backend.name == "reference":
        pytest.skip("minutes when interpreted")
    generator = torch.Generator().manual_seed(0)
    tokens, size = 100_000 if backend.device == "cpu" else 20_000, 8
    slopes = torch.tensor([0.5, 2.0**-8, 2.0**-8 * 1e-2, 2.0**-8 * 1e-5], device=backend.device)
    q, k, v = (torch.randn(tokens, 1, 4, size, generator=generator).to(backend.device) for _ in range(3))
    state = torch.zeros(1, 4, size, size, device=backend.device)
    with backend.forced():
        for t in range(tokens):
            torch.ops.kernels.lightning_attention_step_(q[t], k[t], v[t], state, slopes)
    weights = torch.exp(-slopes.double()[:, None] * torch.arange(tokens - 1, -1, -1, device=backend.device))
    truth = torch.einsum("ht,tbhk,tbhv->bhkv", weights, k.double(), v.double())
    error = (state - truth).abs().amax((2, 3)) / truth.abs().amax((2, 3))
    assert float(error.max()) <= 1e-4, error


def ancestors(parents: list[int], node: int) -> list[int]:
    """From the root to the node; empty for padding."""
    path = []
    while node >= 0:
        path.insert(0, node)
        node = parents[node]
    return path if node == -1 else []


def tree_args(case: Case, nodes: int, device: str) -> dict[str, Any]:
    return make(case.replace(lengths=(nodes,) * 2, packed=False, initial=True, layout="contiguous"), device)


tree_shapes = {
    "tree": st.sampled_from([*TREES, "none"]),
    "group": st.sampled_from([1, 3]),
    "decay": st.sampled_from(["slopes", "slow", "infinite", "none"]),
    "indexed": st.booleans(),
    "seed": seeds,
}


@for_all(**tree_shapes, data=st.data())
def test_verify_is_the_recurrence_along_each_path(
    backend: Backend, tree: str, group: int, decay: str, indexed: bool, seed: int, data: st.DataObject
) -> None:
    nodes = data.draw(st.sampled_from([1, 5, 9] if backend.slow else [1, 6, 17, 40]))
    dtype = data.draw(st.sampled_from(backend.dtypes))
    size, value_size = (data.draw(st.sampled_from(sizes(backend))) for _ in "kv")
    case = Case(
        heads=2, group=group, key_size=size, value_size=value_size, decay=decay, dtype=dtype, seed=seed, scale=0.5
    )
    args = tree_args(case, nodes, backend.device)
    rows = [list(range(-1, nodes - 1)) if tree == "none" else grow(tree, nodes, seed + b) for b in range(2)]
    parents = None if tree == "none" else torch.tensor(rows, dtype=torch.int32, device=backend.device)
    pool, indices = pool_of(args["initial_state"], 2, seed)
    inputs = [args[name] for name in "qkv"]
    if indexed:
        inputs = [padded(x) for x in inputs]
        parents = None if parents is None else torch.cat([parents, parents[:1]])
    state = pool if indexed else args["initial_state"]
    before = state.clone()
    out = backend(
        "lightning_attention_verify", *inputs, state, args["slopes"], parents=parents,
        state_indices=indices if indexed else None, scale=0.5,
    )  # fmt: skip
    assert_bitwise("state", state, before)
    if indexed:
        assert (out[2] == 0).all()
    args = detached(args)
    for b in range(2):
        found, truth, plain = [], [], []
        for i in range(nodes):
            path = ancestors(rows[b], i)
            if not path:
                assert (out[b, i] == 0).all()
                continue
            one = {name: args[name][b : b + 1, path] for name in "qkv"}
            one |= {"slopes": args["slopes"], "initial_state": args["initial_state"][b : b + 1], "scale": 0.5}
            found.append(out[b, i])
            truth.append(oracle.attention(**one)[0][0, -1])
            plain.append(oracle.plain_formula(64, **one)[0][0, -1])
        if found:
            assert_accurate("out", torch.stack(found), torch.stack(truth), torch.stack(plain))


def test_verify_many_nodes(backend: Backend) -> None:
    nodes = 40 if backend.slow else 1024
    case = Case(heads=1, key_size=8, value_size=8)
    args = tree_args(case, nodes, backend.device)
    out = backend("lightning_attention_verify", *(args[name] for name in "qkv"), args["initial_state"], args["slopes"])
    true_out, _ = oracle.attention(**detached(args))
    assert_accurate("out", out, true_out, *(oracle.plain_formula(chunk, **detached(args))[0] for chunk in CHUNKS))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_verify_sees_ancestors_alone(backend: Backend, value: float) -> None:
    case = Case(heads=2, group=2, key_size=16, value_size=16)
    args = tree_args(case, 7, backend.device)
    parents = torch.tensor([[-1, 0, 0, 1, -2, 2, -1]] * 2, dtype=torch.int32, device=backend.device)
    for name in "qkv":
        args[name][:, [1, 4]] = value
    out = backend(
        "lightning_attention_verify", *(args[name] for name in "qkv"), args["initial_state"], args["slopes"],
        parents=parents,
    )  # fmt: skip
    assert out[:, [0, 2, 5, 6]].isfinite().all() and not out[:, [1, 3]].isfinite().any() and (out[:, 4] == 0).all()
    args = tree_args(case, 7, backend.device)
    args["slopes"] = torch.full_like(args["slopes"], float("inf"))
    out = backend(
        "lightning_attention_verify", *(args[name] for name in "qkv"), torch.full_like(args["initial_state"], value),
        args["slopes"], parents=parents,
    )  # fmt: skip
    assert out.isfinite().all()


@for_all(**tree_shapes, data=st.data())
def test_commit_applies_the_path(
    backend: Backend, tree: str, group: int, decay: str, indexed: bool, seed: int, data: st.DataObject
) -> None:
    nodes = data.draw(st.sampled_from([1, 5, 9]))
    dtype = data.draw(st.sampled_from(backend.dtypes))
    size, value_size = (data.draw(st.sampled_from(sizes(backend))) for _ in "kv")
    case = Case(heads=2, key_size=size, value_size=value_size, decay=decay, dtype=dtype, seed=seed)
    args = tree_args(case, nodes, backend.device)
    chain = list(range(-1, nodes - 1))
    paths = [
        ancestors(chain if tree == "none" else grow(tree, nodes, seed + b), data.draw(st.integers(0, nodes - 1)))
        for b in range(2)
    ]
    path = torch.tensor([p + [-1] * (nodes - len(p)) for p in paths], dtype=torch.int32)
    accepted = torch.tensor([max(0, len(p) - 1) for p in paths], dtype=torch.int32)
    k, v, state = args["k"], args["v"], args["initial_state"].clone()
    indices = None
    if indexed:
        k, v, path, accepted = padded(k), padded(v), torch.cat([path, path[:1]]), torch.cat([accepted, accepted[:1]])
        state, indices = pool_of(state, 2, seed)
    before = state.clone()
    backend(
        "lightning_attention_commit_", k, v, state, args["slopes"], path.to(backend.device),
        accepted.to(backend.device), state_indices=indices,
    )  # fmt: skip
    for p in range(len(state)):
        row = p if indices is None else indices[:2].tolist().index(p) if p in indices[:2].tolist() else None
        if row is None or not paths[row]:
            assert_bitwise("state", state[p], before[p])
            continue
        one = {name: args[name][row : row + 1, paths[row]].cpu() for name in "qkv"}
        one |= {"slopes": args["slopes"].cpu(), "initial_state": args["initial_state"][row : row + 1].cpu()}
        truth = oracle.attention(**one)[1][0]
        exact = {n: x.to(wide(dtype)) if n in "qkv" else x for n, x in one.items()}
        assert_accurate("state", state[p], truth, oracle.plain_formula(16, **exact)[1][0])


def test_commit_stops_where_the_path_does(backend: Backend) -> None:
    args = tree_args(Case(heads=1, key_size=8, value_size=8), 4, backend.device)
    k, v, slopes = args["k"], args["v"], args["slopes"]
    long, short = (
        backend_commit(backend, k, v, args["initial_state"].clone(), slopes, path, accepted)
        for path, accepted in (([[0, 2, -1, -1]] * 2, [3, 3]), ([[0, 2, 3, -1]] * 2, [1, 1]))
    )
    assert_bitwise("state", long, short)
    skipped = backend_commit(backend, k, v, args["initial_state"].clone(), slopes, [[-1] * 4] * 2, [0, 3])
    assert_bitwise("state", skipped, args["initial_state"])


def backend_commit(
    backend: Backend, k: Tensor, v: Tensor, state: Tensor, slopes: Tensor, path: list[list[int]], accepted: list[int]
) -> Tensor:
    as_indices = [torch.tensor(x, device=backend.device) for x in (path, accepted)]
    backend("lightning_attention_commit_", k, v, state, slopes, *as_indices)
    return state


def test_no_rows(backend: Backend) -> None:
    args = make(Case(heads=1, key_size=8, value_size=8), backend.device)
    q, k, v, slopes = args["q"][:0, 0], args["k"][:0, 0], args["v"][:0, 0], args["slopes"]
    assert backend("lightning_attention_step_", q, k, v, args["initial_state"][:0], slopes).shape == (0, 1, 8)
    tree = [x[:0] for x in (args["q"], args["k"], args["v"])]
    assert backend("lightning_attention_verify", *tree, args["initial_state"][:0], slopes).shape == (0, 70, 1, 8)
    empty = [x[:, :0] for x in (args["q"], args["k"], args["v"])]
    assert backend("lightning_attention_verify", *empty, args["initial_state"], slopes).shape == (2, 0, 1, 8)
    state = args["initial_state"].clone()
    index = [
        torch.zeros(2, 0, dtype=torch.int32, device=backend.device),
        torch.zeros(2, dtype=torch.int32, device=backend.device),
    ]
    backend("lightning_attention_commit_", *empty[1:], state, slopes, *index)
    assert_bitwise("state", state, args["initial_state"])


@for_all(data=st.data())
def test_steps_of_a_row_do_not_depend_on_the_others(backend: Backend, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(backend.dtypes))
    size = data.draw(st.sampled_from(sizes(backend)))
    args = make(
        Case(lengths=(3,) * 5, dtype=dtype, key_size=size, value_size=size, seed=data.draw(seeds)), backend.device
    )
    token = [args[name][:, 0] for name in "qkv"]
    together, alone = args["initial_state"].clone(), args["initial_state"][3:4].clone()
    out = backend("lightning_attention_step_", *token, together, args["slopes"])
    one = backend("lightning_attention_step_", *(x[3:4] for x in token), alone, args["slopes"])
    assert_bitwise("out", out[3:4], one)
    assert_bitwise("state", together[3:4], alone)


# ---- sequence parallelism ----


@for_all(data=st.data())
def test_chunk_state_is_the_final_state(backend: Backend, data: st.DataObject) -> None:
    need(backend, "lightning_chunk_state")
    case = data.draw(cases(backend, initial=False, decay=data.draw(st.sampled_from(["slopes", "slow", "infinite"]))))
    args = make(case, backend.device)
    state = backend("lightning_chunk_state", args["k"], args["v"], args["slopes"], cu_seqlens=args.get("cu_seqlens"))
    truth = oracle.attention(**detached(args))[1]
    assert_accurate("state", state, truth, *(oracle.plain_formula(chunk, **detached(args))[1] for chunk in CHUNKS))


@for_all(data=st.data())
def test_apply_state_is_what_the_initial_state_adds(backend: Backend, data: st.DataObject) -> None:
    need(backend, "lightning_apply_state")
    case = data.draw(cases(backend, initial=True, decay=data.draw(st.sampled_from(["slopes", "slow", "infinite"]))))
    args = make(case, backend.device)
    out = backend(
        "lightning_apply_state", args["q"], args["initial_state"], args["slopes"], cu_seqlens=args.get("cu_seqlens"),
        scale=case.scale,
    )  # fmt: skip
    alone = detached(args) | {"k": torch.zeros_like(args["k"]).cpu(), "v": torch.zeros_like(args["v"]).cpu()}
    plain = [oracle.plain_formula(chunk, **alone)[0] for chunk in CHUNKS]
    assert_accurate("out", out, oracle.attention(**alone)[0], *plain)


def test_parts_of_a_sequence_joined_by_states(backend: Backend) -> None:
    """As on several machines: each part attends by itself, then adds what comes from before it."""
    need(backend, "lightning_attention", "lightning_chunk_state", "lightning_apply_state")
    args = make(Case(lengths=(100,), initial=False, key_size=16, value_size=16), backend.device)
    with backend.forced():
        before, outs = torch.zeros(1, 2, 16, 16, device=backend.device), []
        for begin, end in ((0, 30), (30, 30), (30, 95), (95, 100)):
            q, k, v = (args[name][:, begin:end] for name in "qkv")
            inside, _ = torch_kernels.lightning_attention(q, k, v, args["slopes"])
            outs.append(inside + torch_kernels.lightning_apply_state(q, before, args["slopes"]))
            kept = torch.exp(-args["slopes"] * (end - begin))[:, None, None] * before
            before = kept + torch_kernels.lightning_chunk_state(k, v, args["slopes"])
    true_out, true_state = oracle.attention(**detached(args))
    assert_accurate("out", torch.cat(outs, 1), true_out, oracle.plain_formula(16, **detached(args))[0])
    assert_accurate("state", before, true_state, oracle.plain_formula(16, **detached(args))[1])
