# SPDX-License-Identifier: Apache-2.0
"""Threads of OpenMP and of Python, forked processes, memory over many calls, and an older torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch_kernels
from torch import Tensor
from torch_kernels import _native, _registry, _selftest

from .backends import ON_CPU
from .test_gpu import EVERY, Call, assert_same
from .test_registry import CASE_IDS, CASES, python
from .tolerance import assert_bitwise

CPU = ON_CPU[0]
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads there are, and lets calls as small as samples use them."""
    count, operations = torch.get_num_threads(), _native.cpu.set_worth_threads(0)
    try:
        yield torch.set_num_threads
    finally:
        torch.set_num_threads(count)
        _native.cpu.set_worth_threads(operations)


@pytest.mark.parametrize(("op", "i"), EVERY)
def test_number_of_threads_changes_no_bit(threads: Callable[[int], None], op: str, i: int) -> None:
    call = Call(op, i, CPU)
    start = call.values()
    threads(1)
    expected = {name: x.clone() for name, x in call(CPU).items()}
    for count in (2, 3):
        threads(count)
        call.set(start)
        assert_same(call(CPU), expected)


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_number_of_threads_changes_no_bit_of_a_longer_call(
    threads: Callable[[int], None], case: _selftest.Case
) -> None:
    with torch_kernels.use_backend("cpu"):
        threads(1)
        expected = case.run(torch.device("cpu"))[0]
        threads(3)
        for x, y in zip(case.run(torch.device("cpu"))[0], expected, strict=True):
            assert_bitwise(case.op, x, y)


@pytest.mark.parametrize("inner", [1, 2])
def test_calls_from_several_python_threads(threads: Callable[[int], None], inner: int) -> None:
    def all_ops() -> list[dict[str, Tensor]]:
        results = []
        for op, i in (parameter.values for parameter in EVERY):
            call = Call(op, i, CPU)
            outputs = getattr(torch.ops.kernels, op)(*call.arguments.values(), **call.keywords)
            outputs = () if outputs is None else outputs if isinstance(outputs, tuple) else (outputs,)
            results.append(dict(enumerate(outputs)) | call.tensors())
        return results

    threads(1)
    with torch_kernels.use_backend("cpu"), ThreadPoolExecutor(4) as pool:
        expected = all_ops()
        threads(inner)
        for declared in _registry.OPS.values():
            declared.dispatcher.clear()  # the first calls race to check and to remember
        for future in [pool.submit(all_ops) for _ in range(8)]:
            for ours, theirs in zip(future.result(), expected, strict=True):
                assert_same(ours, theirs)


FORK = """
import os, signal, sys, torch
from tests.backends import ON_CPU
from tests.test_gpu import Call, assert_same
from torch_kernels import _native
used = sys.argv[1]
torch.set_num_threads(1 if used == "nobody" else 2)
_native.cpu.set_worth_threads(0)
call = Call("tree_attention", 0, ON_CPU[0])  # so small that torch's own operations, which do wait, run on one thread
if used == "torch":
    torch.ones(1 << 22).exp()
expected = None if used == "torch" else {name: x.clone() for name, x in call(ON_CPU[0]).items()}

for threads in (1, 2):
    child = os.fork()
    if child == 0:
        signal.alarm(600)  # a deadlock ends here
        torch.set_num_threads(threads)
        results = call(ON_CPU[0])
        if expected:
            assert_same(results, expected)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"the child with {threads} threads: {status}")
if expected:
    assert_same(call(ON_CPU[0]), expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("used", ["nobody", "torch", "us"])
def test_a_forked_child_may_call(used: str) -> None:
    """Whoever used OpenMP's pool before the fork, which it does not survive."""
    result = python("-c", FORK, used, timeout=1800)
    assert result.returncode == 0, result.stderr


GROWTH = """
import gc, sys, torch, torch_kernels
from pathlib import Path
from tests.calls import samples
from tests.test_gpu import Call
from tests.backends import ON_CPU
calls = int(sys.argv[1])

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4

def objects():
    gc.collect()  # empties Python's lists of free objects too
    return sys.getallocatedblocks()

def repeat(call, times):
    kernel = getattr(torch.ops.kernels, call.op)
    for _ in range(times):
        kernel(*call.arguments.values(), **call.keywords)

torch.set_num_threads(1)
samples("cpu")
gc.freeze()  # collecting is quick
with torch_kernels.use_backend("cpu"):
    for op in samples("cpu"):
        call = Call(op, 0, ON_CPU[0])
        repeat(call, 20)
        for _ in range(3):  # what leaks does so in every round; the interpreter's own tables grow once
            blocks = objects()
            repeat(call, 200)
            more = objects() - blocks
            if more < 50:
                break
        assert more < 50, f"{op}: {more} more Python objects after 200 calls"
    for op in ("tree_mask", "int4_linear", "lightning_attention", "sea_csr"):
        call = Call(op, 0, ON_CPU[0])
        repeat(call, calls // 10)
        before = resident()
        repeat(call, calls)
        print(op, resident() - before, "KiB")
        assert resident() - before <= 512, f"{op}: {resident() - before} KiB after {calls} calls"
    roots = torch.full((calls + 5000,), -1, dtype=torch.int32)
    other = lambda stride: torch.ops.kernels.tree_mask(roots.as_strided((2, 1), (stride, 1)))
    for stride in range(1, 5000):
        other(stride)
    before = resident()
    for stride in range(1, calls):
        other(stride)
    print("signatures", resident() - before, "KiB")
    assert resident() - before <= 2048, f"{resident() - before} KiB after {calls} signatures"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow() -> None:
    """Half a MiB after 100,000 calls: less than six bytes a call."""
    result = python("-c", GROWTH, "100000" if NIGHTLY else "3000", timeout=1800)
    assert result.returncode == 0, result.stdout + result.stderr


OLDER = """
import sys, torch
del torch.Tensor.__dlpack_c_exchange_api__
from torch_kernels import _selftest
sys.exit(_selftest.main())
"""


@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch is an older one")
def test_torch_without_the_exchange_api() -> None:
    """Every op takes its tensors through attributes, as an older torch has nothing else."""
    result = python("-c", OLDER)
    assert result.returncode == 0, result.stdout + result.stderr
