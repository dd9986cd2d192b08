# SPDX-License-Identifier: Apache-2.0
"""The backends this machine can test. One suite runs on each of them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_kernels import _native, _registry

_schedules = itertools.cycle(range(8))

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Backend:
    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    slow: bool = False  # interpreted or emulated: tests draw smaller sizes

    def __call__(self, op: str, *args: Any, **kwargs: Any) -> Any:
        """Calls ``torch.ops.kernels.<op>`` on this backend; the emulator changes its schedule from call to call."""
        with self.forced():
            return getattr(torch.ops.kernels, op)(*args, **kwargs)

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        """Within the context every call runs on this backend."""
        if self.name == "emulator" and (emulator := _native.emulator()):
            emulator.set_seed(next(_schedules))
        with torch_kernels.use_backend(self.name):
            yield


ON_CPU = (
    Backend("cpu", "cpu", (F32, F16, BF16, F64)),
    Backend("reference", "cpu", (F32, F16, BF16, F64)),
    Backend("emulator", "cpu", (F32, F16, BF16), slow=True),
    # Triton's interpreter computes bf16 wrongly by design.
    Backend("triton", "cpu", (F32, F16), slow=True),
)
ON_CUDA = (
    Backend("cuda", "cuda", (F32, F16, BF16)),
    Backend("triton", "cuda", (F32, F16, BF16)),
    Backend("reference", "cuda", (F32, F16, BF16)),
)


def testing_backends() -> list[Backend]:
    """The backends that serve this machine's device, or exactly those named in TORCH_KERNELS_TEST_BACKENDS."""
    candidates = {backend.name: backend for backend in (ON_CUDA if torch.cuda.is_available() else ON_CPU)}
    wanted = os.environ.get("TORCH_KERNELS_TEST_BACKENDS")
    if wanted:
        return [candidates[name] for name in wanted.split(",")]
    return [backend for backend in candidates.values() if works(backend)]


def works(backend: Backend) -> bool:
    try:
        backend("tree_mask", torch.tensor([[-1]], dtype=torch.int32, device=backend.device))
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def unchecked(op: str) -> Iterator[None]:
    """Lets garbage in index tensors through to the kernel, as an unvalidated call on a GPU does."""
    declared = _registry.OPS[op]
    validate, declared.validate = declared.validate, None
    declared.dispatcher.clear()
    try:
        yield
    finally:
        declared.validate = validate
        declared.dispatcher.clear()


@functools.cache
def serves(backend: Backend, op: str) -> bool:
    return any(b.name == backend.name for b in _registry.OPS[op].backends)


def need(backend: Backend, *ops: str) -> None:
    """Skips the test where a backend has no kernel for one of the ops."""
    for op in ops:
        if not serves(backend, op):
            pytest.skip(f"{backend.name} does not serve {op}")


CI_EXAMPLES = 20  # of a property by default


def for_all(*, examples: int | None = None, **strategies: st.SearchStrategy) -> Callable[[Callable[..., None]], Any]:
    """``hypothesis.given`` for tests whose first argument is ``backend``; slow backends get a tenth of the examples.

    `examples` are those of the profile "ci"; others have more or fewer in proportion.
    """

    def decorate(test: Callable[..., None]) -> Callable[[Backend], None]:
        count = settings.default.max_examples * (examples or CI_EXAMPLES) // CI_EXAMPLES
        full, few = (settings(max_examples=n)(given(**strategies)(test)) for n in (count, max(2, count // 10)))

        def run(backend: Backend) -> None:
            (few if backend.slow else full)(backend=backend)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate
