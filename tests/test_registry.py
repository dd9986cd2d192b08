# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a call, what is remembered between calls; instruction sets."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch_kernels
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch_kernels import _native, _registry, _selftest

from .backends import ON_CPU, unchecked
from .calls import samples
from .tolerance import assert_bitwise
from .tree_attention.cases import FP8, Case
from .tree_attention.test_attention import check

CPU = torch.device("cpu")
PARENTS = torch.tensor([[-1, 0, 1, 1]], dtype=torch.int32)
CASES = list(_selftest.cases())
CASE_IDS = [f"{case.op} {case.description}".strip() for case in CASES]


def mask() -> Tensor:
    return torch.ops.kernels.tree_mask(PARENTS)


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Iterator[_registry.Op]:
    """tree_mask, with nothing remembered: for tests that change the declaration."""
    declared = _registry.OPS["tree_mask"]
    declared.dispatcher.clear()
    yield declared
    monkeypatch.undo()
    declared.dispatcher.clear()


@pytest.fixture
def calls(op: _registry.Op, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends that ran, one entry per call."""
    ran: list[str] = []

    def recorded(backend: _registry.Backend) -> _registry.Backend:
        def load() -> Callable[..., Any]:
            kernel = backend.load()
            return lambda *args: (ran.append(backend.name), kernel(*args))[1]

        return replace(backend, load=load)

    monkeypatch.setattr(op, "backends", tuple(map(recorded, op.backends)))
    return ran


@pytest.fixture
def checks(op: _registry.Op, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every call that was checked."""
    seen: list[tuple[Any, ...]] = []
    check = op.check
    monkeypatch.setattr(op, "check", lambda *args: (seen.append(args), check(*args))[1])
    return seen


# ---- which backend runs ----


def test_the_first_backend_that_serves_runs(calls: list[str]) -> None:
    mask()
    assert calls == ["cpu"]


def test_forced_backends_nest(calls: list[str]) -> None:
    with torch_kernels.use_backend("reference"):
        mask()
        with torch_kernels.use_backend("cpu"):
            mask()
        mask()
    mask()
    assert calls == ["reference", "cpu", "reference", "cpu"]


def test_an_exception_restores_the_backend(calls: list[str]) -> None:
    with pytest.raises(KeyError), torch_kernels.use_backend("reference"):
        raise KeyError
    mask()
    assert calls == ["cpu"]


def test_unknown_backend_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'gpu'; there are cpu, cuda, triton, reference, emulator"):
        torch_kernels.use_backend("gpu").__enter__()
    assert _registry._State.forced == os.environ.get("TORCH_KERNELS_BACKEND")


def test_a_backend_that_cannot_serve_says_why() -> None:
    why = r"tree_mask: backend 'cuda' cannot serve this call \(cuda: it serves CUDA tensors only\)"
    with pytest.raises(ValueError, match=why), torch_kernels.use_backend("cuda"):
        mask()
    arguments = [torch.zeros(1, 2, 2, 8, dtype=torch.float64), torch.zeros(1, 2, 2, dtype=torch.float32)] * 2
    with pytest.raises(ValueError, match=r"merge_attention_states: .*triton"), torch_kernels.use_backend("triton"):
        torch.ops.kernels.merge_attention_states(*arguments)
    mask()  # and nothing stays behind


def test_slow_path_warns_once_per_signature(op: _registry.Op, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = mask()
    monkeypatch.setattr(op, "backends", [b for b in op.backends if b.name in ("cuda", "reference")])
    op.dispatcher.clear()
    message = r"tree_mask runs on the slow PyTorch reference \(cuda: it serves CUDA tensors only\)"
    with pytest.warns(torch_kernels.SlowPathWarning, match=message) as caught:
        assert_bitwise("mask", mask(), expected)
        mask()
    assert len(caught) == 1
    with pytest.warns(torch_kernels.SlowPathWarning) as raw:
        torch.ops.kernels.tree_mask(PARENTS[:, :2])
    assert {warning.filename for warning in (*caught, *raw)} == {__file__}


def test_slow_path_names_the_dtype_nobody_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = _registry.OPS["merge_attention_states"]
    backends = [b if b.name == "reference" else replace(b, dtypes=(torch.float16,)) for b in declared.backends]
    monkeypatch.setattr(declared, "backends", backends)
    state = (torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2))
    with pytest.warns(torch_kernels.SlowPathWarning, match="cpu: no kernel for float32"):
        declared.backend_for(*state, *state)


def test_a_forced_reference_does_not_warn(op: _registry.Op) -> None:
    with torch_kernels.use_backend("reference"):  # a SlowPathWarning is an error in this suite
        mask()


# ---- what is checked, and what is remembered ----


@pytest.mark.parametrize("name", sorted(_registry.OPS))
def test_a_required_tensor_is_not_left_out(name: str) -> None:
    """torch passes None on, which native code takes for an optional tensor that was not given."""
    positional, keywords = samples("cpu")[name][0]
    schema = getattr(torch.ops.kernels, name).default._schema
    for required in [x.name for x in schema.arguments if str(x.type) == "Tensor"]:
        arguments = [None if argument == required else x for argument, x in positional.items()]
        if any(isinstance(x, Tensor) for x in arguments):  # else torch does not know whom to call
            with pytest.raises(TypeError, match=f"{name}: {required} must be a tensor"):
                ON_CPU[0](name, *arguments, **keywords)


@pytest.mark.parametrize("name", sorted(name for name, op in _registry.OPS.items() if any(op._written)))
def test_what_is_written_shares_no_memory(name: str) -> None:
    positional, keywords = samples("cpu")[name][0]
    for written in (x for x, is_written in zip(_registry.OPS[name]._names, _registry.OPS[name]._written) if is_written):
        shared = positional[written][:1].expand(2, *positional[written].shape[1:])
        arguments = [shared if argument == written else x for argument, x in positional.items()]
        with pytest.raises(ValueError, match=f"{name}: {written} must be without elements that share memory"):
            ON_CPU[0](name, *arguments, **keywords)


@pytest.mark.parametrize("enabled", [False, True])
def test_index_values_are_always_checked_on_the_cpu(op: _registry.Op, enabled: bool) -> None:
    torch_kernels.set_validation(enabled)
    try:
        with pytest.raises(ValueError, match="tree_mask: parents"):
            torch.ops.kernels.tree_mask(torch.tensor([[-1, 7]], dtype=torch.int32))
        mask()
    finally:
        torch_kernels.set_validation(False)


def test_index_values_are_checked_in_every_call(op: _registry.Op) -> None:
    parents = PARENTS.clone()
    torch.ops.kernels.tree_mask(parents)
    parents[0, 1] = 3  # the same signature, another value
    with pytest.raises(ValueError, match="tree_mask: parents"):
        torch.ops.kernels.tree_mask(parents)
    with unchecked("tree_mask"):
        torch.ops.kernels.tree_mask(parents)


def test_a_repeated_signature_is_checked_once(checks: list[Any]) -> None:
    mask()
    torch.ops.kernels.tree_mask(PARENTS.clone())
    assert len(checks) == 1


@pytest.mark.parametrize(
    "other",
    [PARENTS[:, :3], PARENTS.long(), PARENTS.expand(2, 4), PARENTS.repeat(1, 2)[:, ::2]],
    ids=["size", "dtype", "batch", "stride"],
)
def test_another_signature_is_checked_again(checks: list[Any], other: Tensor) -> None:
    mask()
    # Every second parent of a doubled row is no tree: found only after the arguments were checked.
    with contextlib.suppress(ValueError):
        torch.ops.kernels.tree_mask(other)
    assert len(checks) == 2


def test_another_backend_is_checked_again(checks: list[Any]) -> None:
    mask()
    with torch_kernels.use_backend("reference"):
        mask()
    assert len(checks) == 2


def test_another_scalar_is_checked_again() -> None:
    case = next(case for case in CASES if case.op == "tree_attention")
    arguments = case.run.args[1]
    torch.ops.kernels.tree_attention(**arguments, window=3, softcap=1.0)
    for wrong in ({"window": -1}, {"softcap": -1.0}, {"softcap": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            torch.ops.kernels.tree_attention(**{**arguments, "window": 3, "softcap": 1.0, **wrong})


def test_a_failed_check_is_not_remembered(checks: list[Any]) -> None:
    for attempt in range(3):
        with pytest.raises((TypeError, ValueError), match="parents"):
            torch.ops.kernels.tree_mask(PARENTS.float())
        assert len(checks) == attempt + 1


def test_memory_for_signatures_is_bounded(op: _registry.Op) -> None:
    roots = torch.full((5000,), -1, dtype=torch.int32)
    most = 0
    for stride in range(1, 4500):
        torch.ops.kernels.tree_mask(roots.as_strided((2, 1), (stride, 1)))
        most = max(most, len(op.dispatcher))
    assert 4000 < most <= 4096
    assert 0 < len(op.dispatcher) < 4500 - 4096


@st.composite
def described(draw: st.DrawFn) -> tuple[list[Any], list[Any]]:
    """Arguments of a call, and all of them that a signature has to tell apart."""
    arguments: list[Any] = []
    description: list[Any] = []
    for kind in draw(st.lists(st.sampled_from(["none", "int", "float", "text", "tensor"]), max_size=3)):
        if kind == "none":
            argument, meaning = None, None
        elif kind == "int":
            argument = meaning = draw(st.sampled_from([0, 1, 2, -1, 2**31, 2**62, -(2**63)]))
        elif kind == "float":
            argument = draw(st.sampled_from([0.0, 1.0, 2.0, 1e-320, float("inf"), float("nan")]))
            meaning = struct.pack("d", argument)
        elif kind == "text":
            argument = meaning = draw(st.sampled_from(["", "fast", "fast\0", "\0"]))
        else:
            dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int8, FP8]))
            shape = draw(st.lists(st.sampled_from([1, 2, 3]), max_size=3))
            argument = torch.zeros(shape, dtype=torch.uint8).to(dtype)
            if draw(st.booleans()):
                argument = argument.movedim(0, -1) if argument.dim() else argument[None]
            meaning = (dtype, tuple(argument.shape), argument.stride())
        arguments.append(argument)
        description.append((kind, meaning))
    return arguments, description


@given(described(), described())
def test_signatures_are_equal_exactly_when_calls_look_alike(a: tuple[list, list], b: tuple[list, list]) -> None:
    dispatcher = _native.cpu.Dispatcher({}, lambda args: (lambda *_: None, None, None))
    dispatcher.call(*a[0])
    dispatcher.call(*b[0])
    assert len(dispatcher) == (1 if a[1] == b[1] else 2)


def test_arguments_left_out_get_their_defaults() -> None:
    """torch leaves out the last positional arguments where they equal their default, and any by keyword."""
    seen: list[tuple[Any, ...]] = []
    plan = (lambda *args: seen.append(args), None, None)
    dispatcher = _native.cpu.Dispatcher({"mode": "exact", "scale": None}, lambda args: plan, (None, None, 7))
    dispatcher.call(1, 2)
    dispatcher.call(1, 2, 3, scale=0.5)
    assert seen == [(1, 2, 7, "exact", None), (1, 2, 3, "exact", 0.5)]


class TestLayouts:
    """What a kernel takes as it is, and what it gets a copy of."""

    def test_rows(self) -> None:
        x = torch.zeros(4, 6, 8)
        for taken in (x, x[:, :, :5], x[:, 2:3], x[1], x[:, 0], x[0, 0], x[:0], x[:1].expand(4, 6, 8)[:, 0]):
            assert _registry.rows(0, taken)
        for copied in (x[:, :3], x[..., ::2], x.transpose(0, 1), x[:1].expand(4, 6, 8)):
            assert not _registry.rows(0, copied)
        assert _registry.rows(1, x) and not _registry.rows(1, x[:, :, :5])

    def test_unit_stride(self) -> None:
        x = torch.zeros(4, 6, 8)
        assert _registry.unit_stride(0, x.transpose(0, 1)) and _registry.unit_stride(0, x.mT[..., :1])
        assert not _registry.unit_stride(0, x.mT)

    def test_kernels_get_copies(self, op: _registry.Op, monkeypatch: pytest.MonkeyPatch) -> None:
        got: list[Tensor] = []

        def load() -> Callable[..., Any]:
            return lambda out, parents: got.append(parents)

        backend = next(b for b in op.backends if b.name == "cpu")
        monkeypatch.setattr(op, "backends", [replace(backend, load=load, accepts=_registry.rows)])
        parents = PARENTS.repeat(2, 1)
        for laid_out in (parents, parents[:, ::2][:, :1], parents.T.contiguous().T):
            torch.ops.kernels.tree_mask(laid_out)
            assert _registry.rows(0, got[-1]) and torch.equal(got[-1], laid_out)


def test_a_backend_may_refuse_arguments(op: _registry.Op, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(parents: Tensor) -> str | None:
        return "it takes four nodes" if parents.shape[1] != 4 else None

    backends = [replace(b, refuses=refuses) if b.name == "cpu" else b for b in op.backends]
    monkeypatch.setattr(op, "backends", backends)
    assert op.backend_for(PARENTS).name == "cpu"
    with torch_kernels.use_backend("cpu"), pytest.raises(ValueError, match="cpu: it takes four nodes"):
        op.backend_for(PARENTS[:, :3])


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_gradients_are_refused(case: _selftest.Case) -> None:
    arguments = case.run.args[1]
    floating = [name for name, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()]
    registered = getattr(torch.ops.kernels, case.op)
    for name in floating:
        leaf = arguments[name].clone().requires_grad_()
        with pytest.raises(ValueError, match=rf"{case.op}: {name} requires grad, .* use torch\.no_grad\(\)"):
            registered(**{**arguments, name: leaf})
        with torch.no_grad():
            registered(
                **{key: x.clone() if isinstance(x, Tensor) else x for key, x in {**arguments, name: leaf}.items()}
            )


# ---- commands ----


def python(*words: str, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs Python as a user does: without what this suite sets."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "OMP_NUM_THREADS")}
    return subprocess.run(
        [sys.executable, *words], env=environment | variables, capture_output=True, text=True, timeout=timeout
    )


def test_info() -> None:
    result = python("-m", "torch_kernels", "info")
    assert result.returncode == 0, result.stderr
    for expected in (*_registry.OPS, *_native.cpu.instruction_sets(), torch.__version__, torch_kernels.__version__):
        assert expected in result.stdout
    assert f"CPU kernels: {_native.cpu.instruction_sets()[-1]} " in result.stdout, "not the best instruction set"


CHOICES = """
import torch
from torch_kernels import _native, _registry
print(_native.cpu.instruction_set(), _registry.OPS["tree_mask"].backend_for(torch.tensor([[-1]])).name)
"""


def test_choices_from_the_environment() -> None:
    least = _native.cpu.instruction_sets()[0]
    result = python("-c", CHOICES, TORCH_KERNELS_BACKEND="reference", TORCH_KERNELS_CPU_ISA=least)
    assert result.stdout.split() == [least, "reference"], result.stderr
    result = python("-c", CHOICES, TORCH_KERNELS_BACKEND="gpu")
    assert result.returncode == 1 and "tree_mask: backend 'gpu' cannot serve this call (there are cpu" in result.stderr
    result = python("-c", CHOICES, TORCH_KERNELS_CPU_ISA="mmx")
    assert result.returncode == 1 and "unknown instruction set mmx" in result.stderr


def test_selftest() -> None:
    result = python("-m", "torch_kernels", "selftest")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAIL" not in result.stdout and all(f" {name} " in result.stdout for name in _registry.OPS)


def test_selftest_covers_every_op_and_notices_errors(
    op: _registry.Op, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {case.op for case in CASES} == set(_registry.OPS)
    monkeypatch.setattr(_selftest, "cases", lambda: iter([case for case in CASES if case.op == "tree_mask"]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_registry, "interpreting_triton", lambda: False)
    assert _selftest.main() == 0
    wrong = [replace(b, load=lambda: lambda out, parents: out.fill_(True)) for b in op.backends if b.name == "cpu"]
    monkeypatch.setattr(op, "backends", wrong)
    assert _selftest.main() == 1
    assert "FAIL cpu" in capsys.readouterr().out


# ---- instruction sets ----


@pytest.fixture(params=_native.cpu.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.cpu.instruction_set()
    _native.cpu.select_instruction_set(request.param)
    try:
        yield request.param
    finally:
        _native.cpu.select_instruction_set(before)


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="unknown instruction set mmx"):
        _native.cpu.select_instruction_set("mmx")


def test_instruction_sets_agree_with_the_truth(instruction_set: str) -> None:
    assert _native.cpu.instruction_set() == instruction_set
    with torch_kernels.use_backend("cpu"):
        for case, name in zip(CASES, CASE_IDS, strict=True):
            error = _selftest.error_of(*case.run(CPU))
            assert error <= case.tolerance, f"{name} on {instruction_set}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("cache_dtype", [None, torch.int8, FP8], ids=["plain", "int8", "fp8"])
def test_instruction_sets_in_every_dtype(
    instruction_set: str, dtype: torch.dtype, cache_dtype: torch.dtype | None
) -> None:
    backend = next(backend for backend in ON_CPU if backend.name == "cpu")
    for head_size, nodes, group in ((8, 1, 1), (80, 17, 4), (128, 33, 7)):
        case = Case(prefixes=(70, 0, 16), nodes=nodes, group=group, head_size=head_size, value_size=24, page=16,
                    dtype=dtype, cache_dtype=cache_dtype, tree="padded", seed=head_size)  # fmt: skip
        check(backend, case)
