# SPDX-License-Identifier: Apache-2.0
"""Where ops meet torch and backends.

An :class:`Op` is declared once, in its family's ``op.py``: schema, checks, outputs, and the backends that serve it in
order of preference. From that this module registers the op with torch for every device, its fake, and decides which
backend runs a call. Checks run once per call signature (dtypes, devices, sizes, strides, scalars): the native
``Dispatcher`` remembers their outcome.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_kernels import _checks, _native

_library = torch.library.Library("kernels", "FRAGMENT")

OPS: dict[str, Op] = {}


class SlowPathWarning(UserWarning):
    """A call is served by the PyTorch reference because no compiled kernel serves it."""


class CannotServe(ValueError):
    """The backend asked for cannot serve a call."""


class _State:
    forced: str | None = os.environ.get("TORCH_KERNELS_BACKEND") or None
    validate: bool = False


def set_validation(enabled: bool) -> None:
    """Whether values inside index tensors are checked on CUDA too (this synchronises). On the CPU they always are."""
    _State.validate = enabled
    _forget_plans()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context every call runs on the named backend, or raises ValueError if that cannot serve it.

    Backends: ``cpu``, ``cuda``, ``triton``, ``reference``; in builds made for tests also ``emulator``.
    """
    if name not in BACKENDS:
        raise ValueError(f"use_backend: unknown backend {name!r}; there are {', '.join(BACKENDS)}")
    before, _State.forced = _State.forced, name
    _forget_plans()
    try:
        yield
    finally:
        _State.forced = before
        _forget_plans()


def _forget_plans() -> None:
    for op in OPS.values():
        op.dispatcher.clear()


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    ``load()`` returns the function to call with outputs first, then every argument of the schema in order; the
    reference returns fresh outputs instead.
    """

    name: str
    load: Callable[[], Callable[..., Any]]
    dtypes: tuple[torch.dtype, ...]
    accepts: Callable[[int, Tensor], bool] | None = None  # says if argument i needs no copy
    refuses: Callable[..., str | None] | None = None  # why it cannot serve these arguments, beyond their dtype
    note: str = ""  # for the support matrix


def unit_stride(i: int, argument: Tensor) -> bool:
    """For `Backend.accepts`: the last stride is 1."""
    return argument.dim() == 0 or argument.shape[-1] <= 1 or argument.stride(-1) == 1


def rows(i: int, argument: Tensor) -> bool:
    """For `Backend.accepts`: the first tensor consists of rows at one distance, all others are contiguous."""
    if i > 0:
        return argument.is_contiguous()
    leading = [(size, stride) for size, stride in zip(argument.shape[:-1], argument.stride()[:-1]) if size != 1]
    one_distance = all(outer == size * inner for (_, outer), (size, inner) in zip(leading, leading[1:]))
    return unit_stride(i, argument) and one_distance


@functools.cache
def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def may_choose_triton() -> bool:
    """Whether a compiled backend may leave a call to Triton: it is there, and no backend is forced."""
    return _State.forced is None and triton_version() is not None


def interpreting_triton() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _unavailable(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device of this machine, or None if it can."""
    if backend == "cpu":
        return None if device.type == "cpu" else "it serves CPU tensors only"
    if backend == "cuda":
        return "it serves CUDA tensors only" if device.type != "cuda" else _native.cuda_missing(device.index)
    if backend == "triton":
        if device.type == "cpu" and not interpreting_triton():
            return "it serves CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)"
        return None if triton_version() else "triton is not installed"
    if backend == "emulator":
        if device.type != "cpu":
            return "it serves CPU tensors only"
        return None if _native.emulator() else "this build has no emulator module"
    return None


BACKENDS = ("cpu", "cuda", "triton", "reference", "emulator")


def native(backend: str, op: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        module = {"cpu": lambda: _native.cpu, "cuda": _native.cuda, "emulator": _native.emulator}[backend]()
        return getattr(module, op)

    return load


@dataclass(eq=False)
class Op:
    """An op of the library.

    ``check(*args)`` raises ValueError or TypeError; ``allocate(*args)`` makes the outputs (a tuple);
    ``validate(*args)`` raises if values inside index tensors are impossible. All three get every argument of the
    schema in order; ``validate`` is called for CPU tensors always, for CUDA under :func:`set_validation`, with index
    tensors on the CPU. ``indices`` names these where not every integer tensor is one; a call without any is not
    validated. With ``sized_by_data`` the outputs' sizes depend on values: ``allocate`` is the fake alone, and every
    backend's function returns fresh outputs, as the reference does.
    """

    schema: str
    check: Callable[..., None]
    allocate: Callable[..., tuple[Tensor, ...]]
    backends: Sequence[Backend]
    validate: Callable[..., None] | None = None
    indices: Sequence[str] | None = None
    sized_by_data: bool = False
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.schema.partition("(")[0]
        _library.define(self.schema)
        arguments = torch._C.parse_schema(f"kernels::{self.schema}").arguments
        self._names = [a.name for a in arguments]
        self._required = [i for i, a in enumerate(arguments) if isinstance(a.type, torch._C.TensorType)]
        self._written = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
        self._defaults = {a.name: a.default_value for a in arguments if a.kwarg_only}
        # torch leaves out the last positional arguments that equal their default, and any by keyword.
        self._positional = tuple(a.default_value for a in arguments if not a.kwarg_only)
        self.dispatcher = _native.cpu.Dispatcher(self._defaults, self._prepare, self._positional)
        for key in ("CPU", "CUDA"):
            _library.impl(self.name, self.dispatcher.call, key)
        # Nothing happens at the autograd level: inputs that want gradients are refused.
        _library.impl(self.name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"kernels::{self.name}", self._fake, lib=_library)
        self._overload = getattr(torch.ops.kernels, self.name).default
        OPS[self.name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._overload(*args, **kwargs)

    def _fake(self, *args: Any, **kwargs: Any) -> Any:
        args = (*args, *self._positional[len(args) :], *(self._defaults | kwargs).values())
        self.refuse(*args)
        outputs = self.allocate(*args)
        return outputs[0] if len(outputs) == 1 else outputs or None

    def refuse(self, *args: Any) -> None:
        """Raises if this is no valid call, whatever the values inside index tensors."""
        for i in self._required:  # torch passes None on
            if not isinstance(args[i], Tensor):
                _checks.fail(self.name, self._names[i], "a tensor", type(args[i]).__name__, TypeError)
        for name, x, written in zip(self._names, args, self._written, strict=True):
            if written and x is not None and any(s == 0 and n > 1 for n, s in zip(x.shape, x.stride(), strict=True)):
                _checks.fail(self.name, name, "without elements that share memory", f"strides {list(x.stride())}")
        self._refuse_gradients(args)
        self.check(*args)

    def _refuse_gradients(self, args: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        for name, value in zip(self._names, args):
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(f"{self.name}: {name} requires grad, but this op has no gradient; use torch.no_grad()")

    def _prepare(self, args: tuple[Any, ...]) -> tuple[Callable[..., Any], Callable[..., None] | None, Any]:
        """A plan for calls with the signature of this one: kernel, validation, and the layouts of the outputs."""
        self.refuse(*args)
        backend = self.backend_for(*args)
        validate = self._validation(args)
        if backend.name == "reference" or self.sized_by_data:
            return backend.load(), validate, None
        kernel, outputs = backend.load(), self.allocate(*args)
        if accepts := backend.accepts:
            strided = [i for i, a in enumerate(args) if isinstance(a, Tensor) and not accepts(i, a)]
            if strided:
                kernel = self._with_copies(kernel, len(outputs), strided)
        return kernel, validate, [(tuple(o.shape), o.stride(), o.dtype) for o in outputs]

    def _validation(self, args: tuple[Any, ...]) -> Callable[..., None] | None:
        """What looks at the values of index tensors in calls like this one."""
        validate = self.validate
        names = self._names if self.indices is None else self.indices
        positions = [i for i, name in enumerate(self._names) if name in names and _is_index(args[i])]
        if validate is None or not positions:
            return None
        if args[0].device.type == "cpu":
            return validate
        if not _State.validate:
            return None
        return lambda *args: validate(*(a.cpu() if i in positions else a for i, a in enumerate(args)))

    def _with_copies(self, kernel: Callable[..., Any], outputs: int, strided: list[int]) -> Callable[..., Any]:
        def run(*args: Any) -> None:
            copies = list(args)
            for i in strided:
                copies[outputs + i] = args[outputs + i].contiguous()
            kernel(*copies)
            for i in strided:
                if self._written[i]:
                    args[outputs + i].copy_(copies[outputs + i])

        return run

    def backend_for(self, *args: Any) -> Backend:
        """The backend that serves a call with these arguments."""
        reasons: dict[str, str] = {}
        for backend in self.backends:
            if backend.name == "emulator" and _State.forced != "emulator":
                continue
            reason = _unavailable(backend.name, args[0].device) or self._unsupported(backend, args)
            if _State.forced is not None and backend.name != _State.forced:
                continue
            if reason is None:
                if backend.name == "reference" and _State.forced is None:
                    why = "; ".join(f"{name}: {why}" for name, why in reasons.items())
                    message = f"{self.name} runs on the slow PyTorch reference ({why})"
                    warnings.warn(message, SlowPathWarning, stacklevel=_callers_level())
                return backend
            reasons[backend.name] = reason
        why = "; ".join(f"{name}: {why}" for name, why in reasons.items()) or "it does not implement the op"
        if _State.forced not in BACKENDS:  # from the environment
            why = f"there are {', '.join(BACKENDS)}"
        raise CannotServe(f"{self.name}: backend {_State.forced!r} cannot serve this call ({why})")

    def serving(self, device: torch.device) -> list[str]:
        """The backends that can run on a device of this machine, the preferred first."""
        return [b.name for b in self.backends if b.name != "emulator" and _unavailable(b.name, device) is None]

    def service(self, device: torch.device) -> tuple[str, dict[str, str]]:
        """The backend that a call on the device runs on, and why the others cannot serve it."""
        names = [b.name for b in self.backends if b.name != "emulator"]
        reasons = {name: why for name in names if (why := _unavailable(name, device))}
        return self.serving(device)[0], reasons

    def _unsupported(self, backend: Backend, args: tuple[Any, ...]) -> str | None:
        floating = next((a.dtype for a in args if isinstance(a, Tensor) and a.dtype.is_floating_point), None)
        if floating is not None and floating not in backend.dtypes:
            return f"no kernel for {str(floating).removeprefix('torch.')}"
        if backend.name == "triton" and interpreting_triton() and floating is torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
        return backend.refuses(*args) if backend.refuses else None


def _callers_level() -> int:
    """The `stacklevel` that makes a warning of the asking function point outside torch and this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "torch_kernels"):
        level, frame = level + 1, frame.f_back
    return level


def _is_index(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.dtype in (torch.int32, torch.int64)
