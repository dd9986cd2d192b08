# SPDX-License-Identifier: Apache-2.0
"""Calls of every op, changed at random: valid ones agree with the reference, others are refused before anything is
written, and none touches what lies around its arguments.

A case is a sample of the op and a list of changes to it, both printed where a test fails. Whether it is valid says the
op's own `check`; what sizes belong together says it too, in the names of dimensions that it compares. The suite of each
family asks how accurate an op is; here a result is only told from a wrong one.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_kernels import _checks, _registry

from .backends import Backend, need, unchecked
from .calls import own, sample, samples
from .guards import Guards
from .strategies import LAYOUTS, bits, lay_out, seeds

CASES = 10_000  # of all ops together, on one backend, in the nightly profile

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPES = (
    *FLOATING, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 24, 33, 64)
SMALL_SIZES = (0, 1, 2, 3, 5, 8, 16, 17)
# Values of scalars. None asks for so much memory that it is not there.
SCALARS: dict[type, tuple[Any, ...]] = {
    bool: (False, True),
    int: (-(2**63), -(2**31) - 1, -2, -1, 0, 1, 2, 3, 5, 8, 16, 64),
    float: (math.nan, math.inf, -math.inf, -1.0, -0.0, 0.0, 5e-324, 0.5, 1.0, 3.0),
    str: ("", "fast", "relu", "exact\0", "nonsense"),
}
PAYLOADS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40)
WRONG = (None, "text", 3, 0.5, [1], object)
EXTREMES = (-(2**31), -(2**30), -1000, 100, 1000, 2**20, 2**30, 2**31 - 1)
# What a result may differ from the reference's, relative to its largest number: by the coarsest dtype of the call.
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}

Values = dict[str, Any]
Change = tuple[Any, ...]


def in_schema_order(declared: _registry.Op, values: Values) -> tuple[Any, ...]:
    defaults = dict(zip(reversed(declared._names), reversed(declared._positional + (*declared._defaults.values(),))))
    return tuple(values.get(name, defaults[name]) for name in declared._names)


def arguments_of(op: str, i: int, backend: Backend) -> Values:
    positional, keywords = sample(backend, op, i)
    return positional | keywords


@functools.cache
def dimensions(op: str, i: int, backend: Backend) -> dict[str, list[str]]:
    """The names of the dimensions of each argument, as the op's check compares them."""
    found: dict[str, list[str]] = {}
    original = _checks.shape

    def shape(op: str, dims: dict[str, int], **arguments: tuple[Tensor | None, str]) -> None:
        found.update({name: pattern.split() for name, (x, pattern) in arguments.items() if x is not None})
        original(op, dims, **arguments)

    declared = _registry.OPS[op]
    with mock.patch.object(_checks, "shape", shape):
        declared.check(*in_schema_order(declared, arguments_of(op, i, backend)))
    return found


# ---- changes ----


@st.composite
def cases(draw: st.DrawFn, op: str, backend: Backend) -> tuple[int, list[Change]]:
    i = draw(st.integers(0, len(samples(backend.device, backend.name)[op]) - 1))
    declared, values = _registry.OPS[op], arguments_of(op, i, backend)
    tensors = [name for name, x in values.items() if isinstance(x, Tensor)]
    scalars = {n: type(x) for n, x in zip(declared._names, in_schema_order(declared, values)) if type(x) in SCALARS}
    scalars |= {name: float for name in ("scale",) if name in declared._names}
    indices = [name for name in tensors if values[name].dtype in (torch.int32, torch.int64)]
    named = sorted({name for names in dimensions(op, i, backend).values() for name in names if not name.isdigit()})
    sizes, name = st.sampled_from(SMALL_SIZES if backend.slow else SIZES), st.sampled_from(tensors)
    axes = st.integers(0, 3)
    kinds = [
        st.tuples(st.just("dtypes"), st.sampled_from(FLOATING)),
        st.tuples(st.just("size"), name, axes, sizes),
        st.tuples(st.just("dtype"), name, st.sampled_from(DTYPES)),
        st.tuples(st.just("rank"), name, st.sampled_from(["drop", "add", "many"])),
        st.tuples(st.just("payload"), name, st.sampled_from(PAYLOADS), seeds),
        st.tuples(st.just("layout"), name, st.sampled_from(LAYOUTS)),
        st.tuples(st.just("replace"), st.sampled_from(declared._names), st.sampled_from(WRONG)),
        st.tuples(st.just("meta"), name),
        st.tuples(st.just("gradient"), name),
    ]
    if named:
        kinds += [st.tuples(st.just("sizes"), st.sampled_from(named), sizes)] * 3
    if indices:
        kinds += [st.tuples(st.just("garbage"), st.sampled_from(indices), seeds)] * 2
    if scalars:
        scalar = st.sampled_from(sorted(scalars)).flatmap(
            lambda n: st.tuples(st.just("scalar"), st.just(n), st.sampled_from(SCALARS[scalars[n]]))
        )
        kinds += [scalar]
    layouts = st.lists(st.tuples(st.just("layout"), name, st.sampled_from(LAYOUTS)), max_size=2)
    return i, draw(st.lists(st.one_of(kinds), max_size=3)) + draw(layouts)


def resized(x: Tensor, axis: int, size: int) -> Tensor:
    """Repeated or cut; what is made of nothing is 0."""
    old = x.shape[axis]
    if old == 0:
        return torch.zeros((*x.shape[:axis], size, *x.shape[axis + 1 :]), dtype=x.dtype, device=x.device)
    return bits(x).index_select(axis, torch.arange(size, device=x.device) % old).view(x.dtype)


def consistent(declared: _registry.Op, values: Values, dtype: torch.dtype) -> None:
    """Gives all floating-point tensors the dtype, except where the op says that it wants another."""
    wanted = {name: dtype for name, x in values.items() if isinstance(x, Tensor) and x.dtype in FLOATING}
    for _ in range(len(wanted) + 1):
        trial = values | {name: values[name].to(to) for name, to in wanted.items()}
        try:
            declared.check(*in_schema_order(declared, trial))
        except TypeError as error:
            said = re.match(rf"{declared.name}: (\w+) must be (\w+)", str(error))
            if said and said[1] in wanted:
                wanted[said[1]] = getattr(torch, said[2])
                continue
        except Exception:  # of another change
            pass
        values.update(trial)
        return


def change(op: str, i: int, backend: Backend, values: Values, kind: str, *what: Any) -> None:
    declared = _registry.OPS[op]
    name = what[0]
    x = values.get(name) if isinstance(name, str) else None
    if kind == "dtypes":
        consistent(declared, values, name)
    elif kind == "sizes":
        for argument, names in dimensions(op, i, backend).items():
            y = values.get(argument)
            if isinstance(y, Tensor) and y.dim() == len(names):
                for axis, dimension in enumerate(names):
                    if dimension == name:
                        y = resized(y, axis, what[1])
                values[argument] = y
    elif kind == "scalar":
        values[name] = what[1]
    elif kind == "replace":
        values[name] = what[1]
    elif not isinstance(x, Tensor):
        return  # an earlier change took it away
    elif kind == "size" and x.dim():
        values[name] = resized(x, what[1] % x.dim(), what[2])
    elif kind == "dtype":
        values[name] = x.to(what[1]) if x.dtype != torch.bool or what[1].itemsize > 1 else x.to(torch.uint8)
    elif kind == "rank":
        values[name] = (
            x[None] if what[1] == "add" else x[(None,) * (6 - min(x.dim(), 6))] if what[1] == "many" else x.flatten()
        )
    elif kind == "payload" and x.dtype in FLOATING and x.numel():
        generator = torch.Generator().manual_seed(what[2])
        places = torch.rand(x.shape, generator=generator) < min(0.5, 2 / x.numel())
        values[name] = x.masked_fill(places.to(x.device), what[1])
    elif kind == "garbage" and x.dtype in (torch.int32, torch.int64):
        generator = torch.Generator().manual_seed(what[1])
        wild = torch.tensor(EXTREMES)[torch.randint(len(EXTREMES), x.shape, generator=generator)]
        small = torch.randint(-3, 10, x.shape, generator=generator)
        # As many columns as a width says: a result of that size is what was asked for.
        use_wild = (torch.rand(x.shape, generator=generator) < 0.3) & (op != "sea_csr" or name != "widths")
        values[name] = torch.where(use_wild, wild, small).to(x.dtype).to(x.device)
    elif kind == "layout" and x.dtype in (*FLOATING, torch.int8, torch.uint8, torch.int32, torch.int64):
        values[name] = lay_out(x, what[1])
    elif kind == "meta":
        values[name] = x.to("meta")
    elif kind == "gradient" and x.dtype in FLOATING:
        values[name] = x.detach().clone().requires_grad_()


def changed(op: str, i: int, backend: Backend, changes: list[Change]) -> Values:
    values = arguments_of(op, i, backend)
    last = ("layout", "gradient", "meta")  # what other changes would undo
    for kind, *what in sorted(changes, key=lambda c: last.index(c[0]) if c[0] in last else -1):
        change(op, i, backend, values, kind, *what)
    return values


# ---- what must hold ----


class Memory:
    """The bytes of a tensor's storage, inside and around the tensor."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.detach()
        self.before = self._bytes(x).clone()

    @staticmethod
    def _bytes(x: Tensor) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())

    def _inside(self, storage: Tensor) -> Tensor:
        x = torch.empty(0, dtype=self.x.dtype, device=storage.device)
        return bits(x.set_(storage.untyped_storage(), self.x.storage_offset(), self.x.shape, self.x.stride()))

    def check(self, name: str, written: bool) -> None:
        now = self._bytes(self.x)
        if written:  # may have changed, what lies around it may not
            now = now.clone()
            self._inside(now).copy_(self._inside(self.before))
        assert torch.equal(now, self.before), f"{name}, or what lies around it, was written"


def call(backend: Backend, op: str, i: int, values: Values) -> tuple[Tensor, ...]:
    positional, _ = samples(backend.device, backend.name)[op][i]
    names = _registry.OPS[op]._names
    keywords = {name: x for name, x in values.items() if name not in positional}
    last = max((names.index(name) for name in values if name in positional), default=-1)
    defaults = in_schema_order(_registry.OPS[op], values)
    assert all(name in positional for name in names[: last + 1])
    outputs = backend(op, *defaults[: last + 1], **keywords)
    return () if outputs is None else outputs if isinstance(outputs, tuple) else (outputs,)


def refusal(declared: _registry.Op, values: Values) -> Exception | None:
    """What the op's declaration says against the arguments."""
    arguments = in_schema_order(declared, values)
    try:
        declared.refuse(*arguments)
    except Exception as error:
        return error
    return None


def assert_close(name: str, actual: Tensor, expected: Tensor, inputs: set[torch.dtype]) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, f"{name}: {actual.dtype} {actual.shape}"
    if expected.dtype not in FLOATING:
        assert torch.equal(bits(actual), bits(expected)), f"{name}: {actual}, expected {expected}"
        return
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{name}: finite at other places: {actual}, expected {expected}"
    x, y = (z.where(finite, 0).double() for z in (actual, expected))
    if y.numel():
        close = max(CLOSE[dtype] for dtype in inputs | {expected.dtype} if dtype in CLOSE)
        bound = close * max(float(y.abs().max()), 1e-3)  # arguments are about 1: less may be what cancels
        assert float((x - y).abs().max()) <= bound, f"{name}: {actual}, expected {expected}"


def comparable(op: str, values: Values, changes: list[Change]) -> bool:
    """Whether backends must agree on the result."""
    other = {what[0] for kind, *what in changes if kind == "garbage" or what[1:] == ["expanded"]}
    places = [x[x >= 0] for n, x in values.items() if n in ("block_table", "state_indices") and isinstance(x, Tensor)]
    if any(len(x.unique()) < x.numel() for x in places):  # two sequences write to one place
        return not any(_registry.OPS[op]._written)
    if "perm" in other:  # two columns of the weight are one of the input
        return op != "int4_linear_backward"
    # `out` and `lse` are the other arguments' own: whether a kernel reads them or computes them again is its choice.
    if op == "sea_attention_backward" and any(kind != "layout" for kind, *_ in changes):
        return False
    # Nobody asks what comes of factors that are not finite.
    factors = [x for name, x in values.items() if name == "slopes" or isinstance(x, float)]
    if not all(torch.as_tensor(x).isfinite().all() for x in factors):
        return False
    # Gradients of what is not finite are not, but zeros times infinity may be left out.
    return not op.endswith("_backward") or all(
        x.isfinite().all() for x in values.values() if isinstance(x, Tensor) and x.dtype in FLOATING
    )


def placed(values: Values, guards: Guards, op: str, guarded: bool) -> Values:
    """Contiguous tensors in memory of their own: guarded, or tight, so that a sanitizer sees its ends. Not those that
    were put somewhere on purpose."""

    def place(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.is_meta or x.requires_grad or not x.is_contiguous() or x.storage_offset():
            return x
        return (
            guards.copy(x)
            if guarded and x.dtype.itemsize and x.dtype not in (torch.complex64, torch.float8_e5m2)
            else own(x)
        )

    return {name: place(x) for name, x in values.items()}


def run_case(backend: Backend, op: str, i: int, changes: list[Change], guarded: bool) -> None:
    declared, guards = _registry.OPS[op], Guards()
    values = placed(changed(op, i, backend, changes), guards, op, guarded)
    tensors = {name: x for name, x in values.items() if isinstance(x, Tensor)}
    on_device = {name: x for name, x in tensors.items() if not x.is_meta}
    wild = backend.name not in ("cpu", "reference") and any(kind == "garbage" for kind, *_ in changes)
    written = dict(zip(declared._names, declared._written))
    memory = {name: Memory(x) for name, x in on_device.items()}
    copies = {name: own(x) if name in on_device and written[name] else x for name, x in values.items()}

    error, outputs = None, ()
    with unchecked(op) if wild else contextlib.nullcontext():
        try:
            outputs = call(backend, op, i, values)
        except Exception as raised:
            error = raised
    for name in on_device:
        memory[name].check(name, written[name] and error is None)
    guards.check()

    # torch compares arguments with the schema, and looks for a tensor whose device says whom to call.
    if isinstance(error, RuntimeError) and re.search(
        rf"kernels::{op}(\(\) Expected|\.  This usually means| \(.*trying to run this operator with meta)", str(error)
    ):
        return
    refused = refusal(declared, values)
    if error is not None:
        assert isinstance(error, (ValueError, TypeError)), f"{type(error).__name__}: {error}"
        assert op in str(error), f"does not name the op: {error}"
        if refused is not None:
            assert str(error) == str(refused)
        else:
            expected = _registry.CannotServe if wild else ValueError
            assert isinstance(error, expected), f"{type(error).__name__}: {error}"
        return
    assert refused is None, f"was not refused: {refused}"
    if not declared.sized_by_data:
        allocated = declared.allocate(*in_schema_order(declared, values))
        assert [(x.shape, x.dtype, x.device) for x in outputs] == [(x.shape, x.dtype, x.device) for x in allocated]
    if wild or len(on_device) < len(tensors) or backend.name == "reference" or not comparable(op, values, changes):
        return
    reference = Backend("reference", backend.device, backend.dtypes)
    expected = call(reference, op, i, copies)
    inputs = {x.dtype for x in tensors.values()}
    for j, (x, y) in enumerate(zip(outputs, expected, strict=True)):
        assert_close(f"output {j}", x, y, inputs)
    for name in on_device:
        if written[name]:
            assert_close(name, values[name], copies[name], inputs)


def examples(backend: Backend) -> int:
    """Of one op. The interpreter is slow: it gets a tenth."""
    share = 10 if backend.name == "triton" and backend.slow else 1
    return max(2, math.ceil(CASES / len(_registry.OPS) / share * settings.default.max_examples / 1000))


@pytest.mark.parametrize("op", sorted(_registry.OPS))
def test_fuzz(backend: Backend, op: str) -> None:
    need(backend, op)

    @settings(max_examples=examples(backend))
    @given(case=cases(op, backend), guarded=st.booleans())
    def property(case: tuple[int, list[Change]], guarded: bool) -> None:
        run_case(backend, op, *case, guarded)

    property()
