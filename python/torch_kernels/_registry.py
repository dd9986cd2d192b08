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
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_kernels import _native

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
    unit_stride: bool = False  # whether tensors must have last stride 1; others are copied
    note: str = ""  # for the support matrix


@functools.cache
def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def interpreting_triton() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _unavailable(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device of this machine, or None if it can."""
    if backend == "cpu":
        return None if device.type == "cpu" else "it serves CPU tensors only"
    if backend == "cuda":
        return "it serves CUDA tensors only" if device.type != "cuda" else _native.cuda_missing()
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
    tensors on the CPU.
    """

    schema: str
    check: Callable[..., None]
    allocate: Callable[..., tuple[Tensor, ...]]
    backends: Sequence[Backend]
    validate: Callable[..., None] | None = None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.schema.partition("(")[0]
        _library.define(self.schema)
        arguments = torch._C.parse_schema(f"kernels::{self.schema}").arguments
        self._names = [a.name for a in arguments]
        self._written = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
        self._defaults = {a.name: a.default_value for a in arguments if a.kwarg_only}
        self.dispatcher = _native.cpu.Dispatcher(self._defaults, self._prepare)
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
        args = (*args, *(self._defaults | kwargs).values())
        self._refuse_gradients(args)
        self.check(*args)
        outputs = self.allocate(*args)
        return outputs[0] if len(outputs) == 1 else outputs or None

    def _refuse_gradients(self, args: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        for name, value in zip(self._names, args):
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(f"{self.name}: {name} requires grad, but this op has no gradient; use torch.no_grad()")

    def _prepare(self, args: tuple[Any, ...]) -> tuple[Callable[..., Any], Callable[..., None] | None, Any]:
        """A plan for calls with the signature of this one: kernel, validation, and the layouts of the outputs."""
        self._refuse_gradients(args)
        self.check(*args)
        backend = self.backend_for(*args)
        validate = self.validate
        if validate and args[0].device.type != "cpu":
            on_cpu = validate
            validate = (lambda *args: on_cpu(*map(_index_to_cpu, args))) if _State.validate else None
        if backend.name == "reference":
            return backend.load(), validate, None
        kernel, outputs = backend.load(), self.allocate(*args)
        if backend.unit_stride and (strided := [i for i, a in enumerate(args) if _is_strided(a)]):
            kernel = self._with_copies(kernel, len(outputs), strided)
        return kernel, validate, [(tuple(o.shape), o.stride(), o.dtype) for o in outputs]

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
                    warnings.warn(
                        f"{self.name} runs on the slow PyTorch reference ({why})", SlowPathWarning, stacklevel=4
                    )
                return backend
            reasons[backend.name] = reason
        why = "; ".join(f"{name}: {why}" for name, why in reasons.items()) or "it does not implement the op"
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
        return None


def _is_strided(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.dim() > 0 and argument.shape[-1] > 1 and argument.stride(-1) != 1


def _index_to_cpu(argument: Any) -> Any:
    is_index = isinstance(argument, Tensor) and argument.dtype in (torch.int32, torch.int64)
    return argument.cpu() if is_index else argument
