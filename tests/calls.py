# SPDX-License-Identifier: Apache-2.0
"""Valid calls of every op, and what turns them into wrong ones."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_kernels
from torch import Tensor

from .backends import Backend, serves
from .strategies import bits
from .tolerance import assert_bitwise

FAMILIES = sorted(path.parent.name for path in Path(__file__).parent.glob("*/samples.py"))


@functools.cache
def samples(device: str, backend: str = "cpu") -> dict[str, list[Any]]:
    """Op name -> small valid calls, of all families, with weights packed for the backend. Not to be written to."""
    merged: dict[str, list[Any]] = {}
    for family in FAMILIES:
        merged |= importlib.import_module(f".{family}.samples", __package__).samples(device, backend)
    return merged


OPS = list(samples("cpu"))
EVERY = [pytest.param(op, i, id=f"{op}-{i}") for op, calls in samples("cpu").items() for i in range(len(calls))]


def own(x: Any) -> Any:
    """A copy that may be written to."""
    return bits(x).contiguous().clone().view(x.dtype) if isinstance(x, Tensor) else x


def sample(backend: Backend, op: str, i: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One of `samples` with tensors of its own: positional arguments and keywords."""
    positional, keywords = samples(backend.device, backend.name)[op][i]
    return {name: own(x) for name, x in positional.items()}, {name: own(x) for name, x in keywords.items()}


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return () if results is None else (results,) if isinstance(results, Tensor) else tuple(results)


@contextlib.contextmanager
def on(backend: Backend, op: str) -> Iterator[None]:
    """On this backend; where it has no kernel for the op, on the one that has."""
    with backend.forced() if serves(backend, op) else contextlib.nullcontext():
        yield


def call(backend: Backend, op: str, i: int, **changes: Any) -> Any:
    """A sample whose arguments are replaced or, where the change is a function, changed."""
    positional, keywords = sample(backend, op, i)
    arguments = positional | keywords
    for name, change in changes.items():
        arguments[name] = change(arguments.get(name)) if callable(change) else change
    unchanged = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.device.type != "meta"}
    before = {name: bits(x).clone() for name, x in unchanged.items()}
    try:
        with on(backend, op):
            first = [arguments.pop(name) for name in positional]
            return getattr(torch.ops.kernels, op)(*first, **arguments)
    except (ValueError, TypeError):
        for name, x in before.items():
            assert_bitwise(f"{name} after the error", bits(unchanged[name]), x)
        raise


# ---- wrong calls ----

Change = Callable[[Any], Any]
# An op, which sample, an argument, what to do with it or to put there, and what the message must contain.
Wrong = tuple[str, int, str, Any, str]


def name_of(wrong: Wrong) -> str:
    return f"{wrong[0]}-{wrong[1]}-{wrong[2]}"


def assert_refused(backend: Backend, wrong: Wrong) -> None:
    """Nothing is written, and the message names the op and the argument."""
    op, i, argument, change, message = wrong
    torch_kernels.set_validation(True)
    try:
        with pytest.raises((ValueError, TypeError)) as error:
            call(backend, op, i, **{argument: change})
    finally:
        torch_kernels.set_validation(False)
    assert re.search(rf"^{op}: .*(?<!\w)({message})(?!\w)", str(error.value)), str(error.value)


def cast(dtype: torch.dtype) -> Change:
    return lambda x: x.to(dtype)


def put(value: int, *index: int) -> Change:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[index] = value
        return x

    return change


def narrower(dim: int) -> Change:
    """One less of a dimension."""
    return lambda x: x.narrow(dim, 0, x.shape[dim] - 1)


def repeated(*times: int) -> Change:
    return lambda x: x.repeat(times)


shorter = narrower(-1)


def fewer(x: Tensor) -> Tensor:
    return x[:1]


def flat(x: Tensor) -> Tensor:
    return x.flatten()


def deeper(x: Tensor) -> Tensor:
    return x[None]


def scalar(x: Tensor) -> Tensor:
    return x.flatten()[0]
