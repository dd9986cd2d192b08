# SPDX-License-Identifier: Apache-2.0
"""Gradients against autograd of the float64 recurrence, and against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_kernels
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend, for_all, need
from ..tolerance import assert_accurate, assert_bitwise, ulp
from . import oracle
from .cases import DECAYS, Case, cases, make, wide

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
CHUNKS = (8, 16, 32, 64, 128)  # a slope's gradient is one number: its error is a sample, so several are taken


@pytest.fixture(autouse=True)
def serving(backend: Backend) -> None:
    need(backend, "lightning_attention_backward", "simple_gla_backward")


def grads_like(case: Case, args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Gradients of out and of the final state."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    q, k, v = (args[name] for name in "qkv")
    states = len(args["cu_seqlens"]) - 1 if "cu_seqlens" in args else len(q)
    out = torch.randn(*q.shape[:3], v.shape[3], generator=generator).to(case.dtype)
    state = torch.randn(states, *k.shape[2:], v.shape[3], generator=generator).to(wide(case.dtype))
    return out.to(q.device), state.to(q.device)


def run(
    backend: Backend, case: Case, args: dict[str, Any], grad_out: Tensor, grad_state: Tensor | None, **options: bool
) -> tuple[Tensor, ...]:
    positional = [args[name] for name in ("q", "k", "v", "g" if "g" in args else "slopes")]
    keywords = {name: args.get(name) for name in ("initial_state", "cu_seqlens", "scale")}
    return backend(f"{case.op}_backward", grad_out, *positional, grad_final_state=grad_state, **keywords, **options)


def check(backend: Backend, case: Case, final: bool = True) -> None:
    args = make(case, backend.device)
    grad_out, grad_state = grads_like(case, args)
    grad_state = grad_state if final else None
    names = ["q", "k", "v", "g" if "g" in args else "slopes", "initial_state"]
    found = dict(zip(names, run(backend, case, args, grad_out, grad_state), strict=True))
    if not case.initial:
        assert found.pop("initial_state").shape == (0, *args["k"].shape[2:], args["v"].shape[3])
    args = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in args.items()}
    grads = [None if x is None else x.cpu() for x in (grad_out, grad_state)]
    truth = oracle.gradients(oracle.attention, *grads, F64, **args)
    plain = [
        oracle.gradients(lambda chunk=chunk, **a: oracle.plain_formula(chunk, **a), *grads, None, **args)
        for chunk in (*CHUNKS, *((1,) if args["q"].shape[1] <= 64 else ()))  # of 1: the recurrence itself
    ]
    for name, x in found.items():
        assert x.dtype == args[name].dtype
        # The slopes' gradients are sums of large numbers that may cancel.
        floor = rounding_of_sums(grads, args) if name == "slopes" else 0.0
        if x.dtype == F64 and x.numel():  # the truth is rounded, too
            floor += 2 * ulp(float(truth[name].abs().nan_to_num(0.0, 0.0).max()), F64)
        assert_accurate(f"gradient of {name}", x, truth[name], *(p[name] for p in plain), floor=floor)


def rounding_of_sums(grads: list[Tensor | None], args: dict[str, Any]) -> float:
    """Of what the tokens contribute: two units in the last place of float32 each; and where states and weights are
    rounded to 16 bits for products, errors of random sign in these."""
    dtype = args["q"].dtype
    if dtype == F64:
        return 0.0
    gates = {name: x for name, x in args.items() if name != "slopes"}
    gates["g"] = oracle.log_decay(args["k"], args["slopes"], None)
    contributions = oracle.gradients(oracle.attention, *grads, F64, **gates)["g"].flatten(0, 1)
    if not len(contributions):
        return 0.0
    rounded = torch.finfo(dtype).eps * float(contributions.norm(dim=0).max()) if dtype != F32 else 0.0
    return 2 * torch.finfo(F32).eps * float(contributions.abs().sum(0).max()) + rounded


@for_all(data=st.data(), examples=40)
def test_matches_recurrence(backend: Backend, data: st.DataObject) -> None:
    lengths = {"lengths": (33,) * 2} if backend.slow else {}
    check(backend, data.draw(cases(backend, **lengths)), final=data.draw(st.booleans()))


@pytest.mark.parametrize("decay", [*DECAYS, "harsh"])
def test_decays(backend: Backend, decay: str) -> None:
    for dtype in backend.dtypes:
        case = Case(lengths=(150,), decay=decay, dtype=dtype, key_size=16, value_size=24, group=2, seed=3)
        check(backend, case.replace(lengths=(70,), heads=1) if backend.slow else case)


@pytest.mark.parametrize("sizes", [(8, 8), (40, 80), (96, 40), (192, 64), (128, 128), (256, 256)])
def test_head_sizes(backend: Backend, sizes: tuple[int, int]) -> None:
    if backend.slow and max(sizes) > 100:
        sizes = (sizes[0] // 2, sizes[1] // 2)
    for dtype in (F32,) if backend.slow else backend.dtypes:
        for decay in ("slopes", "gates"):
            case = Case(lengths=(20,) if backend.slow else (150,), heads=1, decay=decay, dtype=dtype)
            check(backend, case.replace(key_size=sizes[0], value_size=sizes[1]))


@pytest.mark.parametrize("decay", ["slopes", "slow", "gates"])
def test_long(backend: Backend, decay: str) -> None:
    """States of so many blocks are not all kept. (The reference has no blocks.)"""
    tokens = 200 if backend.slow or backend.name == "reference" else 4200
    check(backend, Case(lengths=(tokens,), heads=1, key_size=8, value_size=8, decay=decay, seed=1))


def test_empty(backend: Backend) -> None:
    for decay in ("slopes", "gates"):
        for lengths, packed in [((), False), ((0, 0), False), ((), True), ((0, 3, 0, 2, 0), True)]:
            for initial in (True,) if backend.slow else (False, True):
                case = Case(lengths=lengths, packed=packed, decay=decay, initial=initial, key_size=8, value_size=16)
                check(backend, case)


@for_all(data=st.data())
def test_packed_sequences_are_separate_calls(backend: Backend, data: st.DataObject) -> None:
    lengths = {"lengths": (0, 20, 33)} if backend.slow else {}
    case = data.draw(cases(backend, packed=True, layout="contiguous", **lengths))
    args = make(case, backend.device)
    grad_out, grad_state = grads_like(case, args)
    found = run(backend, case, args, grad_out, grad_state)
    offsets = args["cu_seqlens"].tolist()
    for n, (begin, end) in enumerate(zip(offsets, offsets[1:])):
        one = {name: x[:, begin:end] if name in ("q", "k", "v", "g") else x for name, x in args.items()}
        one |= {"cu_seqlens": None}
        if case.initial:
            one["initial_state"] = args["initial_state"][n : n + 1]
        alone = run(backend, case, one, grad_out[:, begin:end], grad_state[n : n + 1])
        for i in (0, 1, 2) + ((3,) if "g" in args else ()):
            assert_bitwise(f"gradient {i}", alone[i], found[i][:, begin:end])
        if case.initial:
            assert_bitwise("gradient of the state", alone[4], found[4][n : n + 1])


@for_all(data=st.data())
def test_same_bits_again(backend: Backend, data: st.DataObject) -> None:
    lengths = {"lengths": (33,) * 2} if backend.slow else {}
    case = data.draw(cases(backend, **lengths))
    args = make(case, backend.device)
    grads = grads_like(case, args)
    for x, y in zip(run(backend, case, args, *grads), run(backend, case, args, *grads), strict=True):
        assert_bitwise("rerun", x, y)


@pytest.mark.parametrize("decay", ["slopes", "gates"])
def test_without_the_gradient_of_the_decay(backend: Backend, decay: str) -> None:
    case = Case(lengths=(40,), decay=decay, key_size=8, value_size=16, group=2)
    args = make(case, backend.device)
    grads = grads_like(case, args)
    whole, part = (run(backend, case, args, *grads, decay_gradient=wanted) for wanted in (True, False))
    assert part[3].shape == (0,) and part[3].dtype == whole[3].dtype
    for i in (0, 1, 2, 4):
        assert_bitwise(f"gradient {i}", part[i], whole[i])


def leaves(case: Case, device: str) -> dict[str, Any]:
    args = make(case, device)
    return {
        name: x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in args.items()
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", ["slopes", "infinite", "gates", "resets"])
def test_finite_differences(backend: Backend, decay: str, packed: bool) -> None:
    if F64 not in backend.dtypes:
        pytest.skip("needs float64")
    lengths = (3, 0, 6) if packed else (5, 5)
    case = Case(lengths=lengths, packed=packed, decay=decay, dtype=F64, key_size=8, value_size=16, group=2, scale=0.5)
    args = leaves(case, backend.device)
    names = [name for name, x in args.items() if isinstance(x, Tensor) and x.is_floating_point()]
    if decay in ("infinite", "resets"):  # infinities have no neighbours
        names = [name for name in names if name not in ("slopes", "g")]
        for name in ("slopes", "g"):
            if name in args:
                args[name] = args[name].detach()
    rest = {name: x for name, x in args.items() if name not in names}
    function = getattr(torch_kernels, case.op)

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        return function(**dict(zip(names, values)), **rest, output_final_state=True)

    with backend.forced():
        assert torch.autograd.gradcheck(call, [args[name] for name in names], fast_mode=True)


@pytest.mark.parametrize("packed", [False, True])
def test_finite_differences_of_states(backend: Backend, packed: bool) -> None:
    if F64 not in backend.dtypes:
        pytest.skip("needs float64")
    case = Case(lengths=(3, 0, 6) if packed else (5, 5), packed=packed, dtype=F64, key_size=8, value_size=16, group=2)
    args = leaves(case, backend.device)
    q, k, v, slopes, state, offsets = (args.get(n) for n in ("q", "k", "v", "slopes", "initial_state", "cu_seqlens"))
    with backend.forced():
        chunk = lambda k, v, s: torch_kernels.lightning_chunk_state(k, v, s, cu_seqlens=offsets)  # noqa: E731
        apply = lambda q, x, s: torch_kernels.lightning_apply_state(q, x, s, cu_seqlens=offsets, scale=0.5)  # noqa: E731
        assert torch.autograd.gradcheck(chunk, (k, v, slopes), fast_mode=True)
        assert torch.autograd.gradcheck(apply, (q, state, slopes), fast_mode=True)


@pytest.mark.parametrize("decay", ["slopes", "gates"])
def test_autograd_calls_the_op(backend: Backend, decay: str) -> None:
    """What reaches ``.grad`` are the op's gradients; parts that nobody asks for may be missing."""
    case = Case(lengths=(20,), decay=decay, key_size=8, value_size=8)
    args = leaves(case, backend.device)
    grad_out, grad_state = grads_like(case, args)
    function = getattr(torch_kernels, case.op)
    with backend.forced():
        out, state = function(**args, output_final_state=True)
        ((out * grad_out).sum() + (state * grad_state).sum()).backward()
        expected = run(
            backend,
            case,
            {n: x.detach() if isinstance(x, Tensor) else x for n, x in args.items()},
            grad_out,
            grad_state,
        )
        for name, y in zip(
            ("q", "k", "v", "g" if decay == "gates" else "slopes", "initial_state"), expected, strict=True
        ):
            assert_bitwise(name, args[name].grad, y)
        only = function(
            args["q"].detach(), args["k"], *(args[n].detach() for n in ("v", "g" if decay == "gates" else "slopes"))
        )
        (gradient,) = torch.autograd.grad(only[0].sum(), args["k"])
        assert gradient.isfinite().all() and only[1].shape[0] == 0


@pytest.mark.parametrize("decay", ["slopes", "gates"])
def test_autograd_compiles_without_a_break(any_backend: Backend, decay: str) -> None:
    args = leaves(Case(lengths=(20,), key_size=8, value_size=8, decay=decay), any_backend.device)
    names = [name for name, x in args.items() if isinstance(x, Tensor)]
    values = [args[name] for name in names]
    function = torch_kernels.simple_gla if decay == "gates" else torch_kernels.lightning_attention

    def loss(*values: Tensor) -> Tensor:
        out, state = function(**dict(zip(names, values)), output_final_state=True)
        return out.sum() + state.sum()

    for wanted in (values, values[:3]):  # of all, and without the decay's
        for x in values:
            x.requires_grad_(any(x is y for y in wanted) and x.is_floating_point())
        wanted = [x for x in wanted if x.requires_grad]
        torch.compiler.reset()
        with any_backend.forced():
            expected = torch.autograd.grad(loss(*values), wanted)
            compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
            for x, y in zip(torch.autograd.grad(compiled(*values), wanted), expected, strict=True):
                assert_bitwise("gradient", x, y)
