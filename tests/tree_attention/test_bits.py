# SPDX-License-Identifier: Apache-2.0
"""What must hold to the last bit: paging, batching, reruns, and what a row cannot see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend, for_all
from ..guards import Guards
from ..interpreter import fences_watched
from ..strategies import bits
from ..tolerance import assert_bitwise
from .cases import FP8, Case, cases, make, run

NAN = float("nan")


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert_bitwise("out", actual[0], expected[0])
    assert_bitwise("lse", actual[1], expected[1])


@for_all(data=st.data())
def test_paged_equals_contiguous(backend: Backend, data: st.DataObject) -> None:
    case = data.draw(cases(backend, page=0, layout="contiguous"))
    contiguous = run(backend, make(case, backend.device))
    for page in (3, 16) if backend.slow else (1, 3, 16, 64, 256):
        assert_same(run(backend, make(case.replace(page=page), backend.device)), contiguous)


@for_all(data=st.data())
def test_layout_changes_nothing(backend: Backend, data: st.DataObject) -> None:
    case = data.draw(cases(backend, layout="contiguous"))
    contiguous = run(backend, make(case, backend.device))
    for layout in ("transposed", "sliced") if backend.slow else ("transposed", "sliced", "misaligned", "strided"):
        assert_same(run(backend, make(case.replace(layout=layout), backend.device)), contiguous)


@for_all(data=st.data())
def test_a_row_alone_equals_the_row_in_a_batch(backend: Backend, data: st.DataObject) -> None:
    case = data.draw(cases(backend, layout="contiguous"))
    args = make(case.replace(prefixes=(*case.prefixes, *((0,) if backend.slow else (40, 0, 3)))), backend.device)
    out, lse = run(backend, args)
    again = run(backend, args)
    assert_same(again, (out, lse))
    for b in range(len(case.prefixes)):
        assert_same(run(backend, row(args, b)), (out[b : b + 1], lse[b : b + 1]))


def row(args: dict[str, Any], b: int) -> dict[str, Any]:
    names = ["q", "prefix_lens", "parents", "k_tree", "v_tree", "block_table"]
    names += [] if "block_table" in args else ["k_cache", "v_cache"]
    return args | {name: args[name][b : b + 1] for name in names if name in args}


@for_all(data=st.data())
def test_spare_room_changes_nothing(backend: Backend, data: st.DataObject) -> None:
    # Longer caches and tables, more padding nodes behind the tree: the same keys, so the same bits.
    case = data.draw(cases(backend, layout="contiguous", page=0, own_keys=True))
    args = make(case, backend.device)
    out, lse = run(backend, args)
    more = dict(args)
    for name in ("k_cache", "v_cache"):
        spare = bits(args[name])[:, :1].expand(-1, 50, -1, -1) if args[name].shape[1] else bits(args[name])
        more[name] = torch.cat([bits(args[name]), spare], 1).view(args[name].dtype)
    assert_same(run(backend, more), (out, lse))


@for_all(data=st.data())
def test_heads_may_be_permuted(backend: Backend, data: st.DataObject) -> None:
    if backend.name == "reference":
        pytest.skip("PyTorch's own products do not promise it")
    case = data.draw(cases(backend, layout="contiguous", kv_heads=2))
    args = make(case, backend.device)
    out, lse = run(backend, args)
    kv = torch.tensor([1, 0], device=backend.device)
    heads = (kv[:, None] * case.group + torch.arange(case.group, device=backend.device)).flatten()
    swapped = dict(args, q=args["q"][:, :, heads])
    for name in ("k_cache", "v_cache", "k_tree", "v_tree"):
        if name in args:
            swapped[name] = bits(args[name])[:, :, kv].view(args[name].dtype)
    if "sinks" in args:
        swapped["sinks"] = args["sinks"][heads]
    for name in ("k_scale", "v_scale"):
        if name in args and len(args[name]) == 2:
            swapped[name] = args[name][kv]
    swapped_out, swapped_lse = run(backend, swapped)
    assert_same((swapped_out, swapped_lse), (out[:, :, heads], lse[:, heads]))


@for_all(data=st.data())
def test_scaling_values_by_a_power_of_two_is_exact(backend: Backend, data: st.DataObject) -> None:
    case = data.draw(cases(backend, layout="contiguous", dtype=torch.float32, cache_dtype=None))
    args = make(case, backend.device)
    out, lse = run(backend, args)
    scaled = args | {name: args[name] * 4 for name in ("v_cache", "v_tree") if name in args}
    assert_same(run(backend, scaled), (out * 4, lse))


def test_one_node_equals_the_first_node_of_a_tree(backend: Backend) -> None:
    # A root sees the prefix and itself: verifying one node is decoding, whatever hangs below.
    args = make(Case(prefixes=(33, 7), nodes=6, tree="chain"), backend.device)
    out, lse = run(backend, args)
    first = {name: args[name][:, :1] for name in ("q", "parents", "k_tree", "v_tree")}
    one_out, one_lse = run(backend, args | first)
    torch.testing.assert_close(one_out, out[:, :1], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(one_lse, lse[:, :, :1], rtol=2e-6, atol=2e-6)


@for_all(data=st.data())
def test_hidden_nan_never_leaks(backend: Backend, data: st.DataObject) -> None:
    """Every node in turn becomes NaN in K and V: those that do not see it keep their bits, those that do turn NaN."""
    case = data.draw(cases(backend, window=0, softcap=0.0, layout="contiguous", cache_dtype=None))
    case = case.replace(nodes=min(case.nodes, 17))
    args = make(case, backend.device)
    clean_out, clean_lse = run(backend, args)
    sees = backend("tree_mask", args["parents"])
    victim = case.seed % case.nodes
    slots = args["prefix_lens"].long() + victim
    for key, value in (("k_tree", "v_tree"), ("k_cache", "v_cache")):
        if (key in ("k_tree",)) != case.own_keys:
            continue
        for name in (value,) if backend.slow else (key, value):
            poisoned = args[name].clone()
            for b, slot in enumerate(slots.tolist()):
                if case.own_keys:
                    poisoned[b, victim] = NAN
                elif case.page:
                    poisoned[int(args["block_table"][b, slot // case.page]), slot % case.page] = NAN
                else:
                    poisoned[b, slot] = NAN
            out, lse = run(backend, args | {name: poisoned})
            blind = ~sees[:, :, victim]
            assert_bitwise(f"rows blind to NaN in {name}", out[blind], clean_out[blind])
            assert_bitwise("their lse", lse.transpose(1, 2)[blind], clean_lse.transpose(1, 2)[blind])
            assert out[~blind].isnan().all(), f"NaN in {name} must reach the rows that see it"


def test_nan_before_the_window_never_leaks(backend: Backend) -> None:
    for page in (0, 16):
        args = make(Case(prefixes=(70, 20), nodes=5, window=4, tree="chain", page=page), backend.device)
        out, lse = run(backend, args)
        for name in ("k_cache", "v_cache"):
            poisoned = args[name].clone()
            if page:
                used = args["block_table"][:, 0].long()
                poisoned[used] = NAN
            else:
                poisoned[:, :16] = NAN
            assert_same(run(backend, args | {name: poisoned}), (out, lse))
        # Its last key inside the window does: node 0 of row 0 sees slots 67..69.
        if not page:
            args["v_cache"][0, 67] = NAN
            assert run(backend, args)[0][0, 0].isnan().all() and not run(backend, args)[0][0, 1:].isnan().any()


@pytest.mark.parametrize("prefix", [40, 1500], ids=["whole", "split"])
def test_nan_and_infinities_of_several_keys_add_up(backend: Backend, prefix: int) -> None:
    args = make(Case(prefixes=(prefix,), nodes=4, tree="chain", dtype=torch.float16, own_keys=True), backend.device)
    infinity, plus, minus = float("inf"), 0, 1
    args["v_cache"][0, 3, :, plus], args["v_tree"][0, 2, :, plus] = infinity, infinity
    args["v_cache"][0, 3, :, minus], args["v_cache"][0, 7, :, minus] = infinity, -infinity
    args["v_tree"][0, 1, :, 2], args["v_tree"][0, 2, :, 2] = infinity, -infinity
    with fences_watched(backend):
        out, _ = run(backend, args)
    assert (out[..., plus] == infinity).all() and out[..., minus].isnan().all()
    assert out[0, 0, :, 2].isfinite().all() and (out[0, 1, :, 2] == infinity).all() and out[0, 2:, :, 2].isnan().all()
    assert out[..., 3:].isfinite().all()


def test_nan_in_q_stays_in_its_row(backend: Backend) -> None:
    args = make(Case(prefixes=(20, 9), nodes=6), backend.device)
    out, lse = run(backend, args)
    poisoned = args["q"].clone()
    poisoned[0, 2, 1, 3] = NAN
    got, got_lse = run(backend, args | {"q": poisoned})
    assert got[0, 2, 1].isnan().all() and got_lse[0, 1, 2].isnan()
    got[0, 2, 1], got_lse[0, 1, 2] = out[0, 2, 1], lse[0, 1, 2]
    assert_same((got, got_lse), (out, lse))


@pytest.mark.parametrize("cache_dtype", [None, torch.int8, FP8], ids=["plain", "int8", "fp8"])
def test_outputs_are_filled_and_nothing_else_is(backend: Backend, cache_dtype: torch.dtype | None) -> None:
    for nodes, tree in ((1, "chain"), (9, "padded"), (17, "tail")):
        args = make(Case(prefixes=(18, 0, 3), nodes=nodes, tree=tree, cache_dtype=cache_dtype, page=3), backend.device)
        expected = run(backend, args)
        guards = Guards()
        guarded = {name: guards.copy(x) if isinstance(x, Tensor) else x for name, x in args.items()}
        before = {name: x.clone() for name, x in guarded.items() if isinstance(x, Tensor)}
        inputs = guards.allocated
        with guards.allocations():
            actual = run(backend, guarded)
        assert backend.name == "reference" or guards.allocated > inputs, "outputs are allocated in a way no guard sees"
        guards.check()
        assert_same(actual, expected)
        for name, x in before.items():
            assert_bitwise(f"input {name}", guarded[name], x)


def test_number_of_threads_changes_nothing(backend: Backend) -> None:
    if backend.name != "cpu":
        pytest.skip("only the CPU kernels have threads of their own")
    args = make(Case(prefixes=(300, 5, 64), nodes=17, group=4, sinks=True), backend.device)
    expected = run(backend, args)
    torch.set_num_threads(3)
    try:
        assert_same(run(backend, args), expected)
    finally:
        torch.set_num_threads(1)
