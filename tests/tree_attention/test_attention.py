# SPDX-License-Identifier: Apache-2.0
"""tree_attention against the float64 truth, and identities that need no tolerance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend, for_all
from ..strategies import PUBLISHED, published, seeds
from ..tolerance import assert_accurate, assert_bitwise, ulp
from . import oracle
from .cases import FP8, GROUPS, HEAD_SIZES, Case, cases, make, run

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def check(backend: Backend, case: Case) -> None:
    args = make(case, backend.device)
    out, lse = run(backend, args)
    assert out.dtype == case.dtype and lse.dtype == F32 and out.device == args["q"].device
    check_values(out, lse, *oracle.attention(**args), args)


def check_values(out: Tensor, lse: Tensor, true_out: Tensor, true_lse: Tensor, args: dict[str, Any]) -> None:
    # Scores reach about 16 and are rounded in the accumulation type, as is lse, whatever the dtype of q.
    accumulate = F64 if out.dtype == F64 else F32
    floor = 2 * ulp(16.0, accumulate)
    plain = [oracle.plain_formula(out.dtype, backwards, **args)[0] for backwards in (False, True)]
    assert_accurate("out", out, true_out, *plain, floor=floor)
    plain = [oracle.plain_formula(accumulate, backwards, **args)[1] for backwards in (False, True)]
    assert_accurate("lse", lse, true_lse, *plain, floor=floor)


@for_all(data=st.data(), examples=60)
def test_matches_truth(backend: Backend, data: st.DataObject) -> None:
    check(backend, data.draw(cases(backend)))


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_head_sizes(backend: Backend, head_size: int) -> None:
    for value_size in {head_size, 24}:
        for dtype in backend.dtypes:
            case = Case(head_size=head_size, value_size=value_size, dtype=dtype, seed=head_size)
            check(backend, case.replace(prefixes=(5,), nodes=5) if backend.slow else case)


@pytest.mark.parametrize("head_size", [16, 24, 56, 72, 104, 136, 200, 248])
def test_other_multiples_of_eight(backend: Backend, head_size: int) -> None:
    check(backend, Case(prefixes=(11,), nodes=5, head_size=head_size, value_size=264 - head_size, seed=head_size))


@pytest.mark.parametrize("group", GROUPS)
def test_groups(backend: Backend, group: int) -> None:
    for kv_heads in (1, 2):
        check(backend, Case(group=group, kv_heads=kv_heads, dtype=F16, head_size=40, value_size=40, seed=group))


@pytest.mark.parametrize("cache_dtype", [torch.int8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("own_keys", [True, False])
def test_quantised_cache(backend: Backend, cache_dtype: torch.dtype, own_keys: bool) -> None:
    # Scales apply to what comes from the cache and to nothing else; the oracle leaves tree keys alone.
    for dtype in backend.dtypes:
        for scale_per_head in (False, True):
            case = Case(prefixes=(19, 0), dtype=dtype, cache_dtype=cache_dtype, own_keys=own_keys, seed=3)
            check(backend, case.replace(scale_per_head=scale_per_head, page=0 if scale_per_head else 3))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_trees(backend: Backend, name: str) -> None:
    args = make(
        Case(prefixes=(37,), nodes=len(published(name)), kv_heads=1, head_size=16, value_size=16), backend.device
    )
    args["parents"] = torch.tensor([published(name)], dtype=torch.int32, device=backend.device)
    check_values(*run(backend, args), *oracle.attention(**args), args)


@pytest.mark.parametrize("nodes", [100, 128, 257, 1023, 1024])
@pytest.mark.parametrize("tree", ["recent", "padded"])
def test_many_nodes(backend: Backend, nodes: int, tree: str) -> None:
    if backend.slow and (nodes > 128 or tree == "padded"):
        pytest.skip("minutes when interpreted")
    check(
        backend, Case(prefixes=(3,), nodes=nodes, kv_heads=1, group=1, head_size=8, value_size=8, tree=tree, seed=nodes)
    )


def test_long_prefix(backend: Backend) -> None:
    # Long enough to be split over blocks or threads by every backend.
    prefixes = (400, 3) if backend.slow else (5001, 3, 2048)
    for page in (0, 64):
        check(backend, Case(prefixes=prefixes, nodes=4, kv_heads=1, head_size=16, value_size=16, page=page, sinks=True))


@pytest.mark.parametrize("own_keys", [True, False])
@pytest.mark.parametrize("page", [0, 16])
def test_empty(backend: Backend, own_keys: bool, page: int) -> None:
    for prefixes, nodes in [((), 5), ((0,), 5), ((4, 0), 0), ((), 0), ((0,), 0), ((0,), 1)]:
        case = Case(prefixes=prefixes, nodes=nodes, own_keys=own_keys, page=page, head_size=16, value_size=8)
        out, lse = run(backend, make(case, backend.device))
        assert out.shape == (len(prefixes), nodes, 4, 8) and lse.shape == (len(prefixes), 4, nodes)
        check(backend, case)


def test_padding_rows_are_zero(backend: Backend) -> None:
    args = make(Case(prefixes=(9, 4), nodes=5, sinks=True), backend.device)
    args["parents"] = torch.tensor([[-2, -1, -2, 1, 3], [-2] * 5], dtype=torch.int32, device=backend.device)
    out, lse = run(backend, args)
    padding = args["parents"] == -2
    assert (out[padding] == 0).all() and (lse.transpose(1, 2)[padding] == -math.inf).all()
    assert out[~padding].isfinite().all() and lse.transpose(1, 2)[~padding].isfinite().all()


@for_all(data=st.data())
def test_chain_is_causal_attention(backend: Backend, data: st.DataObject) -> None:
    case = data.draw(cases(backend, tree="chain", window=0, softcap=0.0, sinks=False, cache_dtype=None, page=0))
    case = case.replace(prefixes=case.prefixes[:1], layout="contiguous", own_keys=True)
    args = make(case)
    prefix = case.prefixes[0]
    keys = torch.cat([args["k_cache"][:, :prefix], args["k_tree"]], 1).double().transpose(1, 2)
    values = torch.cat([args["v_cache"][:, :prefix], args["v_tree"]], 1).double().transpose(1, 2)
    causal = torch.ones(case.nodes, prefix + case.nodes, dtype=torch.bool).tril(prefix)
    truth = torch.nn.functional.scaled_dot_product_attention(
        args["q"].double().transpose(1, 2), keys, values, attn_mask=causal, scale=case.scale, enable_gqa=True
    ).transpose(1, 2)
    _, true_lse = oracle.attention(**args)
    check_values(*run(backend, make(case, backend.device)), truth, true_lse, args)


@for_all(data=st.data())
def test_window_is_decoding_along_the_path(backend: Backend, data: st.DataObject) -> None:
    # Every root-to-leaf path decoded as an ordinary sequence, token by token, with a sliding window over slots.
    case = data.draw(
        cases(backend, window=data.draw(st.sampled_from([1, 2, 5, 64])), own_keys=True, cache_dtype=None, page=0)
    )
    case = case.replace(prefixes=case.prefixes[:1], softcap=0.0, sinks=False)
    args = make(case, backend.device)
    out, lse = run(backend, args)
    parents, prefix = args["parents"][0].tolist(), int(args["prefix_lens"][0])
    truth, true_lse = torch.zeros(out.shape, dtype=F64), torch.full(lse.shape, -math.inf, dtype=F64)
    for node in range(case.nodes):
        way = oracle.way_up(parents, node)[::-1]
        if way:
            chain = {name: args[name][:, way] for name in ("k_tree", "v_tree")}
            keys, values = (
                torch.cat([args[cache][0, :prefix], chain[tree][0]])[-case.window :]
                .cpu()
                .double()
                .repeat_interleave(case.group, 1)
                for cache, tree in (("k_cache", "k_tree"), ("v_cache", "v_tree"))
            )
            factor = case.head_size**-0.5 if case.scale is None else case.scale
            score = factor * torch.einsum("hd,nhd->hn", args["q"][0, node].cpu().double(), keys)
            truth[0, node] = torch.einsum("hn,nhd->hd", score.softmax(-1), values)
            true_lse[0, :, node] = score.logsumexp(-1)
    check_values(out, lse, truth, true_lse, args)


def test_window_counts_positions_not_slots(backend: Backend) -> None:
    # A star of 8: the last leaf sits in slot 8 but at position prefix + 1. Window 3 shows it one prefix token.
    args = make(Case(prefixes=(10,), nodes=9, kv_heads=1, group=1, window=3, head_size=8, value_size=8), backend.device)
    args["parents"] = torch.tensor([[-1] + [0] * 8], dtype=torch.int32, device=backend.device)
    args["q"].zero_()
    args["v_cache"][:, :10] = 3.0
    args["v_tree"].zero_()
    out, lse = run(backend, args)
    assert_accurate("out", out[:, 1:], torch.full((1, 8, 1, 8), 1.0, dtype=F64))
    assert_accurate("lse", lse[..., 1:], torch.full((1, 1, 8), math.log(3), dtype=F64))


@for_all(data=st.data())
def test_merge_of_parts_is_the_whole(backend: Backend, data: st.DataObject) -> None:
    case = data.draw(cases(backend, own_keys=True, window=0, sinks=False, page=0, layout="contiguous"))
    args = make(case, backend.device)
    whole, whole_lse = run(backend, args)
    tree_only = run(backend, args | {"prefix_lens": torch.zeros_like(args["prefix_lens"])})
    # The op cannot leave the tree out, so the prefix's part comes from the formula. Padding rows of it are poisoned.
    real = (args["parents"] != -2)[:, :, None]
    prefix_out, prefix_lse = (part.to(backend.device) for part in prefix_part(args, case))
    prefix_out = prefix_out.where(real[..., None], float("nan")).to(case.dtype)
    prefix_lse = prefix_lse.where(real.transpose(1, 2), -math.inf).float()
    out, lse = backend("merge_attention_states", *tree_only, prefix_out, prefix_lse)
    # Each part was rounded to the dtype, and its lse to float32, before they were added.
    rounding = ulp(16.0, F32) + ulp(
        float(max(tree_only[0].abs().max(), prefix_out.nan_to_num().abs().max())), case.dtype
    )
    plain = [oracle.plain_formula(case.dtype, backwards, **args)[0] for backwards in (False, True)]
    true_out, true_lse = oracle.attention(**args)
    assert_accurate("merged out", out, true_out, *plain, floor=2 * rounding)
    assert_accurate("merged lse", lse, true_lse, whole_lse.cpu(), floor=2 * ulp(16.0, F32))


def prefix_part(args: dict, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.zeros(*args["q"].shape[:3], case.value_size, dtype=F64)
    lse = torch.full((len(out), case.kv_heads * case.group, case.nodes), -math.inf, dtype=F64)
    factor = case.head_size**-0.5 if case.scale is None else case.scale
    for b, prefix in enumerate(case.prefixes):
        keys, values = (
            torch.from_numpy(oracle.cached(args[name], None, b, list(range(prefix))))
            * (1.0 if args.get(scale) is None else args[scale].cpu().double()[:, None])
            for name, scale in (("k_cache", "k_scale"), ("v_cache", "v_scale"))
        )
        keys, values = keys.repeat_interleave(case.group, 1), values.repeat_interleave(case.group, 1)
        score = factor * torch.einsum("thd,nhd->htn", args["q"][b].cpu().double(), keys)
        if case.softcap:
            score = case.softcap * torch.tanh(score / case.softcap)
        if prefix:
            lse[b] = score.logsumexp(-1)
            out[b] = torch.einsum("htn,nhd->thd", score.softmax(-1), values)
    return out, lse


@pytest.mark.parametrize("own_keys", [True, False])
def test_one_hot_softmax_copies_a_value_row(backend: Backend, own_keys: bool) -> None:
    # Scores are exactly 0 or 2048: the softmax is exactly one-hot and out one row of V, to the bit, in every dtype.
    prefix, nodes, size = 21, 6, 32
    for dtype in backend.dtypes:
        args = make(Case(prefixes=(prefix,), nodes=nodes, kv_heads=1, head_size=size, value_size=size, dtype=dtype,
                         own_keys=own_keys, tree="chain", scale=1.0), backend.device)  # fmt: skip
        for target in (0, prefix - 1, prefix + 2):
            k_cache, q = torch.zeros_like(args["k_cache"]), torch.zeros_like(args["q"])
            q[..., 5] = 32.0
            call = args | {"q": q, "k_cache": k_cache}
            if own_keys:
                call["k_tree"] = torch.zeros_like(args["k_tree"])
            where = call["k_tree"][:, target - prefix] if own_keys and target >= prefix else k_cache[:, target]
            where[..., 5] = 64.0
            out, lse = run(backend, call)
            values = args["v_tree"][0, target - prefix] if own_keys and target >= prefix else args["v_cache"][0, target]
            seeing = slice(max(0, target - prefix), nodes)
            assert_bitwise("out", out[0, seeing], values.expand(out[0, seeing].shape))
            assert (lse[0, :, seeing] == 2048.0).all()


def test_equal_scores_average_exactly(backend: Backend) -> None:
    # q = 0: every visible key has weight 1/n. With n a power of two and small integers in V every step is exact.
    for dtype in backend.dtypes:
        args = make(Case(prefixes=(14,), nodes=4, dtype=dtype, head_size=16, value_size=16), backend.device)
        args["parents"] = torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32, device=backend.device)
        args["q"].zero_()
        for name in ("v_cache", "v_tree"):
            args[name] = torch.randint(-8, 8, args[name].shape, generator=torch.Generator().manual_seed(1)).to(
                args[name]
            )
        out, lse = run(backend, args)
        for leaf in (1, 2, 3):
            rows = torch.cat([args["v_cache"][0, :14], args["v_tree"][0, [0, leaf]]]).double().mean(0)
            assert_bitwise("out", out[0, leaf], rows.to(dtype).repeat_interleave(2, 0))
        assert_accurate("lse", lse[0, :, 1:].cpu(), torch.full((4, 3), math.log(16), dtype=F64))


def test_softcap_bounds_scores(backend: Backend) -> None:
    args = make(Case(prefixes=(40,), nodes=3, softcap=2.0, scale=1000.0), backend.device)
    out, lse = run(backend, args)
    assert out.isfinite().all() and (lse <= 2.0 + math.log(43) + 1e-5).all()


def test_large_scores_do_not_overflow(backend: Backend) -> None:
    # Scores near +-60000: exp overflows in every dtype unless the maximum is taken off first.
    for dtype in backend.dtypes:
        args = make(Case(prefixes=(40,), nodes=5, dtype=dtype, scale=3000.0), backend.device)
        out, lse = run(backend, args)
        truth, true_lse = oracle.attention(**args)
        assert out.isfinite().all()
        assert_accurate("lse", lse, true_lse, *[oracle.plain_formula(F32, way, **args)[1] for way in (False, True)])


@for_all(seed=seeds)
def test_sink_is_a_key_without_value(backend: Backend, seed: int) -> None:
    case = Case(prefixes=(6,), nodes=4, kv_heads=1, seed=seed)
    args = make(case, backend.device)
    out, lse = run(backend, args)
    sinks = torch.tensor([0.5, -math.inf], device=backend.device)
    with_sink, with_sink_lse = run(backend, args | {"sinks": sinks})
    assert_bitwise("head without sink", with_sink[:, :, 1], out[:, :, 1])
    shrink = torch.sigmoid(lse[:, 0].double() - 0.5).cpu()[:, :, None]
    assert_accurate("out", with_sink[:, :, 0], out[:, :, 0].cpu().double() * shrink, floor=2 * ulp(16.0, F32))
    assert_accurate(
        "lse",
        with_sink_lse[:, 0],
        torch.logaddexp(lse[:, 0].double().cpu(), torch.tensor(0.5).double()),
        floor=2 * ulp(16.0, F32),
    )
