# SPDX-License-Identifier: Apache-2.0
"""Reruns, streams and CUDA graphs, for every op. Reruns are tested on every backend, the rest needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_kernels
from torch import Tensor
from torch_kernels import _native, _registry

from . import conftest
from .backends import Backend, need
from .calls import EVERY, own, sample, samples
from .interpreter import fences_watched
from .strategies import bits
from .tolerance import assert_bitwise

ROOT = Path(__file__).resolve().parents[1]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


OFFSETS = ("cu_seqlens", "edge_offsets", "kv_offsets", "offsets", "q_offsets")
# Calls that only enqueue work. Of the others the host must know how large the result is.
ENQUEUED = [case for case in EVERY if not _registry.OPS[case.values[0]].sized_by_data]


class Call:
    """A call of an op with arguments of its own, which may be called again after they changed in place."""

    def __init__(self, op: str, i: int, backend: Backend) -> None:
        need(backend, op)
        self.op = op
        self.arguments, self.keywords = sample(backend, op, i)

    def tensors(self) -> dict[str, Tensor]:
        both = self.arguments | self.keywords
        return {name: x for name, x in both.items() if isinstance(x, Tensor)}

    def set(self, values: dict[str, Tensor]) -> None:
        for name, x in self.tensors().items():
            bits(x).copy_(bits(values[name]))

    def values(self) -> dict[str, Tensor]:
        return {name: own(x) for name, x in self.tensors().items()}

    def changed(self) -> dict[str, Tensor]:
        """Other values that are as valid: every tensor in reverse order along its first dimension, the batch; offsets
        so that their differences are."""
        flipped = {name: bits(x).flip(0).view(x.dtype) for name, x in self.tensors().items()}
        return {name: x[0] - x if name in OFFSETS else x for name, x in flipped.items()}

    def __call__(self, backend: Backend) -> dict[str, Tensor]:
        """The outputs, and the arguments: ops may change them."""
        outputs = backend(self.op, *self.arguments.values(), **self.keywords)
        outputs = () if outputs is None else outputs if isinstance(outputs, tuple) else (outputs,)
        return {f"output {i}": x for i, x in enumerate(outputs)} | self.tensors()


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, x in expected.items():
        assert_bitwise(name, actual[name], x)


def fill_free_memory(device: str) -> None:
    """Leaves NaN in the blocks that torch's allocator hands out next."""
    _ = [torch.full((size,), float("nan"), device=device) for size in (64, 512, 4096, 1 << 18) for _ in range(8)]


def test_every_op_has_samples() -> None:
    assert set(samples("cpu")) == set(_registry.OPS)


@pytest.mark.parametrize(("op", "i"), EVERY)
def test_rerun(backend: Backend, op: str, i: int) -> None:
    call = Call(op, i, backend)
    interpreted = backend.name == "triton" and backend.slow  # one program after the other, in one order
    for start in (call.values(), call.changed())[interpreted:]:
        call.set(start)
        with fences_watched(backend):
            expected = {name: x.clone() for name, x in call(backend).items()}
        for seed in range(1 if interpreted else 3):
            if backend.name == "emulator":
                _native.emulator().set_seed(seed)  # another order of threads and of asynchronous copies
            fill_free_memory(backend.device)
            call.set(start)
            assert_same(call(backend), expected)


@needs_gpu
@pytest.mark.parametrize(("op", "i"), ENQUEUED)
def test_graph_replay_equals_eager(backend: Backend, op: str, i: int) -> None:
    if backend.name == "reference":
        pytest.skip("the reference is written to be read, and looks at values on the host")
    call = Call(op, i, backend)
    inputs = [call.changed(), call.values()]
    eager = []
    for values in inputs:
        call.set(values)
        eager.append({name: x.clone() for name, x in call(backend).items()})
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # modules are loaded and Triton compiles before the capture
        call(backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = call(backend)
    for values, expected in zip(inputs, eager, strict=True):
        for name, x in static.items():
            if name.startswith("output"):
                bits(x).fill_(1)
        call.set(values)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(static, expected)


@needs_gpu
@pytest.mark.parametrize(("op", "i"), ENQUEUED)
def test_runs_on_the_current_stream_without_waiting(backend: Backend, op: str, i: int) -> None:
    if backend.name == "reference":
        pytest.skip("the reference is written to be read, and looks at values on the host")
    call = Call(op, i, backend)
    first, second = call.values(), call.changed()
    call.set(second)
    expected = {name: x.clone() for name, x in call(backend).items()}
    call.set(first)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(backend)
        call.set(first)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second; a kernel on another stream reads the old inputs
        call.set(second)
        actual = call(backend)
        waited = stream.query()
    torch.cuda.synchronize()
    assert not waited, "the call waited for the device"
    assert_same(actual, expected)


@needs_gpu
def test_validation_on_the_device(backend: Backend) -> None:
    wrong = torch.tensor([[-1, 7]], dtype=torch.int32, device=backend.device)
    backend("tree_mask", wrong)  # unchecked: some result, and no fault
    torch_kernels.set_validation(True)
    try:
        with pytest.raises(ValueError, match="tree_mask: parents"):
            backend("tree_mask", wrong)
    finally:
        torch_kernels.set_validation(False)


def test_a_process_that_lost_the_gpu_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(conftest, "_failed", {"the culprit"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    conftest.pytest_runtest_logfinish("another")
    with pytest.raises(pytest.exit.Exception, match="since the culprit: CUDA error"):
        conftest.pytest_runtest_logfinish("the culprit")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")
def test_the_script_reports_what_it_did(tmp_path: Path) -> None:
    def script(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "scripts/gpu.py", "--dry-run", "--output", str(tmp_path), *words]
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=300
        )

    result = script("--only", "info,memcheck")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line.split()[3] for line in result.stdout.splitlines()[-2:]] == ["ok", "skipped"]
    assert "tree_attention" in (tmp_path / "logs" / "info.log").read_text()
    assert [step["result"] for step in json.loads((tmp_path / "logs" / "steps.json").read_text())["steps"]] == [
        "ok",
        "skipped",
    ]
    assert script("--only", "reruns", PYTEST_ADDOPTS="--no-such-option").returncode == 1
    stopped = script("--only", "reruns", "--minutes", "0.1")
    assert stopped.returncode == 1 and "stopped" in stopped.stdout
    assert "no step nonsense" in script("--only", "nonsense").stderr
