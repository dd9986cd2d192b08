# SPDX-License-Identifier: Apache-2.0
"""Tensors with more elements than 32 bits can count. Most of their memory is never touched."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .backends import Backend, need
from .strategies import bits
from .test_gpu import EVERY, Call, assert_same

BEYOND = 2**31 + 64
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
nightly = pytest.mark.skipif(not NIGHTLY, reason="gigabytes and seconds: HYPOTHESIS_PROFILE=nightly")


@pytest.fixture(autouse=True)
def compiled_only(backend: Backend) -> Iterator[None]:
    if backend.name == "reference" or (backend.name == "triton" and backend.slow):
        pytest.skip("touches all memory of its arguments")
    if backend.device == "cpu":
        yield
        return
    # A GPU's memory is there or not: up to 17 GB of it, of which a few processes at a time take their turn.
    import fcntl

    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    with Path(tempfile.gettempdir(), f"torch-kernels-{worker % 3}").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


def empty(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    if device != "cpu":
        torch.cuda.empty_cache()  # of what the argument before had
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError as error:
        pytest.skip(f"not enough memory: {error}")


def far_apart(x: Tensor) -> Tensor:
    """The same values, the last entry of the first dimension more than 2^31 elements after the first."""
    stride = -(-BEYOND // (len(x) - 1))
    memory = empty(stride * (len(x) - 1) + x[0].numel(), dtype=bits(x).dtype, device=str(x.device))
    return memory.as_strided(x.shape, (stride, *x[0].contiguous().stride())).copy_(bits(x)).view(x.dtype)


@pytest.mark.parametrize(("op", "i"), EVERY)
def test_strides_beyond_32_bits(backend: Backend, op: str, i: int) -> None:
    call = Call(op, i, backend)
    start = call.values()
    expected = {name: x.clone() for name, x in call(backend).items()}
    for name, x in start.items():
        if x.dim() < 2 or len(x) < 2:
            continue
        call.set(start)
        group = call.arguments if name in call.arguments else call.keywords
        near, group[name] = group[name], far_apart(x)
        actual = call(backend)
        assert_same(actual, expected)
        group[name] = near
        del actual


@nightly
def test_outputs_beyond_32_bits(backend: Backend) -> None:
    if backend.slow:
        pytest.skip("too slow")
    need(backend, "tree_mask", "int8_mm")
    size = 46_344  # its square is larger than 2^31
    parents = torch.arange(-1, size - 1, dtype=torch.int32, device=backend.device)[None]
    mask = backend("tree_mask", parents)[0]
    ones = torch.arange(1, size + 1, device=backend.device)
    assert mask.numel() > 2**31
    for first in range(0, size, 4096):
        assert torch.equal(mask[first : first + 4096].sum(1), ones[first : first + 4096])
    assert mask[-1].all() and not mask[-2, -1]
    del mask

    a = torch.randint(-128, 128, (size, 16), dtype=torch.int8, device=backend.device)
    product = backend("int8_mm", a, a.flip(0))
    last = slice(size - 256, size)
    expected = backend("int8_mm", a[last].clone(), a.flip(0)[last].clone())
    assert torch.equal(product[last, last], expected) and product.numel() > 2**31


@nightly
@pytest.mark.parametrize("paged", [False, True])
def test_an_expanded_cache_beyond_32_bits(backend: Backend, paged: bool) -> None:
    """2^24 keys that are one and the same: every weight is equal, and the output is the value."""
    if backend.slow:
        pytest.skip("too slow")
    slots, size = 2**24 + 16, 128
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(size, generator=generator).to(backend.device) for _ in range(3))
    shape: tuple[int, ...] = (slots // 16, 16, 1, size) if paged else (1, slots, 1, size)
    options: dict[str, Any] = {}
    if paged:
        pages = torch.arange(slots // 16, dtype=torch.int32, device=backend.device)
        options["block_table"] = pages[None]
    own = torch.zeros(1, 1, 1, size, device=backend.device)
    lens, parents = (torch.tensor(x, dtype=torch.int32, device=backend.device) for x in ([slots], [[-1]]))
    out, lse = backend(
        "tree_attention", q.view(1, 1, 1, size), k.expand(shape), v.expand(shape), lens, parents,
        k_tree=own, v_tree=own, **options,
    )  # fmt: skip
    score = float(q.double() @ k.double()) / size**0.5
    assert abs(float(lse) - (score + torch.tensor(slots).double().log().item())) < 1e-4
    torch.testing.assert_close(out.flatten(), v, rtol=1e-3, atol=1e-4)
