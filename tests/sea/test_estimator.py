# SPDX-License-Identifier: Apache-2.0
"""The estimator's kernels: features, normalised linear attention, running means."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch_kernels
from hypothesis import strategies as st
from torch import Tensor

from ..backends import F16, F32, F64, Backend, for_all, need
from ..strategies import LAYOUTS, lay_out, seeds
from ..tolerance import assert_accurate, assert_bitwise, ulp
from . import oracle


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


def floor_of(truth: Tensor, dtype: torch.dtype) -> float:
    """Where the truth itself is rounded."""
    return 16 * ulp(float(truth.abs().nan_to_num(0.0, 0.0).max()), F64) if dtype == F64 and truth.numel() else 0.0


# ---- favor_features ----


def features_case(seed: int, shape: tuple[int, ...], m: int, dtype: torch.dtype, shift: tuple[int, ...] | None) -> Any:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    proj = torch.randn(m, shape[3], generator=generator).to(dtype)
    return x, proj, None if shift is None else torch.randn(shift, generator=generator).to(dtype)


@for_all(data=st.data(), examples=15)
def test_features(backend: Backend, data: st.DataObject) -> None:
    need(backend, "favor_features")
    draw = data.draw
    batch, tokens, heads = draw(st.integers(0, 2)), draw(st.sampled_from([0, 1, 5, 40])), draw(st.integers(1, 3))
    size, m = (
        draw(st.sampled_from([8, 16, 64, 80])),
        draw(st.sampled_from([1, 33, 64, 266][: 2 if backend.slow else 4])),
    )
    kind, dtype = draw(st.sampled_from(["relu", "exp"])), draw(st.sampled_from(backend.dtypes))
    shifts = [None, (1,), (heads, 1), (batch, 1, 1, 1), (batch, tokens, heads, 1)]
    shift = draw(st.sampled_from(shifts)) if kind == "exp" else None
    x, proj, shifted = features_case(draw(seeds), (batch, tokens, heads, size), m, dtype, shift)
    x = lay_out(x, draw(st.sampled_from(LAYOUTS)))
    if draw(st.booleans()) and dtype != F64:
        proj = proj.float()
    on = [None if t is None else t.to(backend.device) for t in (x, proj, shifted)]
    out = backend("favor_features", on[0], on[1], kind=kind, eps=1e-3, shift=on[2])
    assert out.dtype == dtype
    truth = oracle.features(x.double(), proj.double(), kind, 1e-3, None if shifted is None else shifted.double())
    baseline = oracle.features(x, proj.to(dtype), kind, 1e-3, shifted)
    floor = floor_of(truth, dtype)
    if kind == "exp" and truth.numel() and dtype != F64:  # exponents are rounded
        exponent = x.double().norm(dim=-1).max() * proj.double().norm(dim=-1).max() + x.double().square().sum(-1).max()
        floor += 2 * torch.finfo(F32).eps * float(exponent * size**-0.5 * truth.max())
    assert_accurate("features", out, truth, baseline, floor=floor)


def test_features_that_are_not_finite(backend: Backend) -> None:
    need(backend, "favor_features")
    x = torch.zeros(1, 4, 1, 8, device=backend.device)
    x[0, 1, 0, 0], x[0, 2, 0, 0], x[0, 3] = math.nan, math.inf, 0.1
    proj = torch.ones(3, 8, device=backend.device)
    out = backend("favor_features", x, proj, kind="relu", eps=0.5)
    assert (
        bool(out[0, 1].isnan().all()) and bool((out[0, 2] == math.inf).all()) and bool(out[0, [0, 3]].isfinite().all())
    )
    shift = torch.tensor([-200.0, 200.0, 0.0, 0.0], device=backend.device).view(1, 4, 1, 1)
    out = backend("favor_features", torch.zeros_like(x), proj, kind="exp", eps=0.5, shift=shift)
    assert bool((out[0, 0] == math.inf).all())
    assert_accurate("vanished", out[0, 1:2], torch.full((1, 1, 3), 0.5 * 3**-0.5, dtype=F64))


@pytest.mark.parametrize("kind", ["relu", "exp"])
def test_features_gradcheck(kind: str) -> None:
    x, proj, shift = features_case(1, (2, 3, 2, 8), 5, F64, (2, 1, 2, 1) if kind == "exp" else None)
    leaves = [t.requires_grad_() for t in (x, proj, shift) if t is not None]
    call = lambda x, proj, shift=None: torch_kernels.favor_features(x, proj, kind=kind, eps=1e-3, shift=shift)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


# ---- linear_attention ----


def linear_case(
    seed: int, shape: tuple[int, int, int], m: int, values: int, dtype: torch.dtype, initial: bool
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=F64)  # noqa: E731
    batch, tokens, heads = shape
    args = {
        "q": draw(*shape, m).abs().to(dtype),
        "k": draw(*shape, m).abs().to(dtype),
        "v": draw(*shape, values).to(dtype),
    }
    if initial:
        wide = state_dtype(dtype)
        args |= {"state": draw(batch, heads, m, values).to(wide), "norm": draw(batch, heads, m).abs().to(wide)}
    return args


def run_linear(backend: Backend, args: dict[str, Any], **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
    initial = {"initial_state": args.get("state"), "initial_norm": args.get("norm")}
    return backend("linear_attention", args["q"], args["k"], args["v"], **initial, **keywords)


def double(args: dict[str, Any]) -> dict[str, Any]:
    return {n: x.cpu().double() for n, x in args.items()}


@st.composite
def linear_cases(draw: st.DrawFn, backend: Backend) -> tuple[dict[str, Any], dict[str, Any]]:
    tokens = draw(st.sampled_from([0, 1, 20, 33] if backend.slow else [0, 1, 16, 63, 64, 65, 130]))
    shape = (draw(st.integers(1, 2)), tokens, draw(st.integers(1, 2)))
    m, values = (draw(st.sampled_from([8, 33] if backend.slow else [1, 8, 33, 64, 100])) for _ in range(2))
    dtype = draw(st.sampled_from(backend.dtypes))
    args = linear_case(draw(seeds), shape, m, values, dtype, draw(st.booleans()))
    layout = draw(st.sampled_from([x for x in LAYOUTS if x != "expanded"]))
    args = {n: lay_out(x.to(backend.device), layout) for n, x in args.items()}
    return args, {"causal": draw(st.booleans()), "eps": draw(st.sampled_from([0.0, 0.1]))}


@for_all(data=st.data(), examples=20)
def test_linear_attention(backend: Backend, data: st.DataObject) -> None:
    need(backend, "linear_attention")
    args, keywords = data.draw(linear_cases(backend))
    found = run_linear(backend, args, **keywords)
    truth = oracle.linear(**double(args), **keywords)
    baseline = oracle.linear(**{n: x.cpu() for n, x in args.items()}, **keywords)
    dtype = args["q"].dtype
    for name, x, true, base in zip(("out", "state", "norm"), found, truth, baseline, strict=True):
        assert x.dtype == (dtype if name == "out" else state_dtype(dtype))
        # The plain formula of 16 bits rounds its products; ours may, too.
        assert_accurate(name, x, true, base, floor=floor_of(true, dtype))


def linear_gradients(args: dict[str, Any], grads: list[Tensor], **keywords: Any) -> dict[str, Tensor]:
    leaves = {n: x.detach().clone().requires_grad_() for n, x in args.items()}
    outs = oracle.linear(**leaves, **keywords)
    loss = sum((x * g.to(x.dtype)).sum() for x, g in zip(outs, grads)) + sum((x * 0).sum() for x in leaves.values())
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))


def rounding_of_numerators(args: dict[str, Any], grad: Tensor, causal: bool, eps: float) -> dict[str, float]:
    """A gradient of q or k is that of numerators less that of denominators, which may cancel, in one token alone to
    nothing: what is left may be a unit in the last place of the first. That of the state is a product of numbers in q's
    dtype."""
    all_args = double(args)
    q, k, v = (all_args[name] for name in "qkv")
    if not q.numel():
        return {}
    seen = torch.ones(q.shape[1], q.shape[1], dtype=F64)
    seen = seen.tril() if causal else seen
    denominator = (torch.einsum("bthm,bshm->bhts", q, k) * seen).sum(-1) + eps
    if "norm" in all_args:
        denominator = denominator + torch.einsum("bthm,bhm->bht", q, all_args["norm"])
    pairs = torch.einsum("bthv,bshv->bhts", grad.double(), v) * seen / denominator[..., None]
    of_q, of_k = torch.einsum("bhts,bshm->bthm", pairs, k), torch.einsum("bhts,bthm->bshm", pairs, q)
    if "state" in all_args:
        of_q += torch.einsum("bthv,bhmv->bthm", grad.double(), all_args["state"]) / denominator.mT[..., None]
    of_state = torch.einsum("bthm,bthv->bhmv", q, grad.double() / denominator.mT[..., None])
    unit = torch.finfo(args["q"].dtype).eps
    return {name: unit * float(x.abs().max()) for name, x in (("q", of_q), ("k", of_k), ("state", of_state))}


@for_all(data=st.data(), examples=20)
def test_linear_attention_backward(backend: Backend, data: st.DataObject) -> None:
    need(backend, "linear_attention_backward")
    args, keywords = data.draw(linear_cases(backend))
    generator = torch.Generator().manual_seed(7)
    outs = oracle.linear(**{n: x.cpu() for n, x in args.items()}, **keywords)
    grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outs]
    last = data.draw(st.booleans())
    given = {"grad_state": grads[1], "grad_norm": grads[2]} if last else {}
    found = backend(
        "linear_attention_backward", grads[0].to(backend.device), args["q"], args["k"], args["v"],
        initial_state=args.get("state"), initial_norm=args.get("norm"), **keywords,
        **{n: x.to(backend.device) for n, x in given.items()},
    )  # fmt: skip
    used = grads if last else grads[:1]
    truth = linear_gradients(double(args), used, **keywords)
    baseline = linear_gradients({n: x.cpu() for n, x in args.items()}, used, **keywords)
    dtype, rounding = args["q"].dtype, rounding_of_numerators(args, grads[0], **keywords)
    for name, x in zip(("q", "k", "v", "state", "norm"), found, strict=True):
        if name not in args:
            assert x.shape[0] == 0
            continue
        assert x.dtype == args[name].dtype
        size = float(truth[name].abs().max()) if truth[name].numel() else 0.0
        floor = (
            rounding.get(name, 0.0) + floor_of(truth[name], dtype) + 8 * torch.finfo(F32).eps * size * (dtype != F64)
        )
        assert_accurate(f"gradient of {name}", x, truth[name], baseline[name], floor=floor)


@pytest.mark.parametrize("causal", [True, False])
def test_linear_attention_gradcheck(causal: bool) -> None:
    args = linear_case(3, (1, 5, 2), 4, 3, F64, True)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        q, k, v, state, norm = leaves
        return torch_kernels.linear_attention(q, k, v, causal=causal, initial_state=state, initial_norm=norm, eps=0.1)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in args.values()], fast_mode=True)


def test_linear_attention_goes_on(backend: Backend) -> None:
    """From a part's state and norm, as if it had been one call."""
    need(backend, "linear_attention")
    args = linear_case(4, (1, 40, 2), 16, 8, F32, False)
    args = {n: x.to(backend.device) for n, x in args.items()}
    truth = oracle.linear(**double(args), causal=True)
    first = run_linear(backend, {n: x[:, :23] for n, x in args.items()})
    second = run_linear(backend, {n: x[:, 23:] for n, x in args.items()} | {"state": first[1], "norm": first[2]})
    baseline = oracle.linear(**{n: x.cpu() for n, x in args.items()}, causal=True)
    assert_accurate("out", second[0], truth[0][:, 23:], baseline[0][:, 23:])
    assert_accurate("state", second[1], truth[1], baseline[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_later_tokens_have_no_influence(backend: Backend, value: float) -> None:
    need(backend, "linear_attention")
    args = {n: x.to(backend.device) for n, x in linear_case(5, (1, 30, 1), 16, 8, F32, False).items()}
    truth = oracle.linear(**double(args), causal=True)[0]
    baseline = oracle.linear(**{n: x.cpu() for n, x in args.items()}, causal=True)[0]
    for name in ("k", "v"):
        args[name][:, 13, :, 2] = value
    out = run_linear(backend, args)[0]
    assert_accurate("out", out[:, :13], truth[:, :13], baseline[:, :13])
    assert not bool(out[:, 13:].isfinite().all())


def test_a_denominator_of_zero_gives_zero(backend: Backend) -> None:
    need(backend, "linear_attention", "linear_attention_backward")
    args = {n: x.to(backend.device) for n, x in linear_case(6, (1, 9, 1), 8, 8, F32, False).items()}
    args["k"][:, :4], args["q"][:, 6] = 0, 0
    out, _, _ = run_linear(backend, args)
    assert bool((out[:, [0, 1, 2, 3, 6]] == 0).all()) and bool((out[:, [4, 5, 7, 8]] != 0).all())
    grads = backend("linear_attention_backward", torch.ones_like(out), args["q"], args["k"], args["v"])
    assert all(bool(x.isfinite().all()) for x in grads)
    assert bool((grads[0][:, [0, 1, 2, 3, 6]] == 0).all())


# ---- running_mean ----


def test_running_mean_is_right_after_131072_tokens(backend: Backend) -> None:
    """Compensated or wide: a sum in float32 is off in the third digit there."""
    need(backend, "running_mean")
    tokens = 2000 if backend.slow else 131072
    v = torch.rand(1, tokens, 1, 8, generator=torch.Generator().manual_seed(8)) + 1
    mean, total, count = backend("running_mean", v.to(backend.device))
    truth = v.double().cumsum(1) / torch.arange(1, tokens + 1)[:, None, None]
    assert_accurate("mean", mean, truth)
    assert_accurate("sum", total, v.double().sum(1), floor=1e-10 * tokens)
    assert count.tolist() == [tokens]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_running_mean_goes_on(backend: Backend, layout: str) -> None:
    need(backend, "running_mean")
    for dtype in backend.dtypes:
        v = torch.randn(2, 30, 3, 8, generator=torch.Generator().manual_seed(9)).to(dtype).to(backend.device)
        whole = backend("running_mean", lay_out(v, layout))
        truth = v.cpu().double().cumsum(1) / torch.arange(1, 31)[:, None, None]
        assert_accurate("mean", whole[0], truth, floor=floor_of(truth, dtype))
        first = backend("running_mean", v[:, :11])
        second = backend("running_mean", v[:, 11:], sum=first[1], count=first[2])
        if backend.name == "cpu":
            assert_bitwise("sum", second[1], whole[1])
            assert_bitwise("mean", second[0], whole[0][:, 11:])
        assert_accurate("mean", second[0], truth[:, 11:], floor=floor_of(truth, dtype))
        assert_bitwise("count", second[2], whole[2])


def test_running_mean_of_later_tokens(backend: Backend) -> None:
    need(backend, "running_mean")
    v = torch.randn(1, 9, 1, 8, device=backend.device)
    before = backend("running_mean", v)[0]
    v[:, 5] = math.nan
    assert_bitwise("mean", backend("running_mean", v)[0][:, :5], before[:, :5])
    assert backend("running_mean", v[:, :0])[2].tolist() == [0]


def test_running_mean_gradcheck() -> None:
    v = torch.randn(2, 4, 1, 3, dtype=F64, requires_grad=True)
    total, count = torch.randn(2, 1, 3, dtype=F64, requires_grad=True), torch.tensor([3, 0])
    call = lambda v, total: torch_kernels.running_mean(v, sum=total, count=count)[:2]  # noqa: E731
    assert torch.autograd.gradcheck(call, (v, total), fast_mode=True)
    half = torch.randn(1, 3, 1, 8, dtype=F16, requires_grad=True)
    (grad,) = torch.autograd.grad(torch_kernels.running_mean(half)[0].sum(), half)
    assert grad.dtype == F16
