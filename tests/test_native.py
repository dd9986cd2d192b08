# SPDX-License-Identifier: Apache-2.0
"""What cannot run here says why in one sentence: simulated torches, drivers and GPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch_kernels import _native

BUILT = "80-real, 86-real, 90-real, 100-real, 120"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A GPU that can run everything; tests take something away."""
    module = SimpleNamespace(architectures=BUILT, cuda_version="13.0.88")
    monkeypatch.setattr(_native, "_load", lambda name: module)
    monkeypatch.setattr(_native, "_newest_cuda_of_driver", lambda: (13, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    _native.cuda_missing.cache_clear()
    yield monkeypatch
    _native.cuda_missing.cache_clear()


def test_nothing_is_missing(machine: pytest.MonkeyPatch) -> None:
    assert _native.cuda_missing() is None
    assert _native.cuda_missing(0) is None


def test_no_module(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(_native, "_load", lambda name: "No module named 'torch_kernels._cuda'")
    expected = "this build of torch-kernels has no CUDA module (No module named 'torch_kernels._cuda')"
    assert _native.cuda_missing() == expected


def test_torch_without_cuda(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.version, "cuda", None)
    assert _native.cuda_missing() == f"torch {torch.__version__} is built without CUDA"


def test_no_driver(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(_native, "_newest_cuda_of_driver", lambda: None)
    assert _native.cuda_missing() == "no NVIDIA driver is installed: the system has no libcuda"


@pytest.mark.parametrize(
    ("of_torch", "who", "built"), [("12.8", "torch-kernels", "13.0.88"), ("13.0", "torch", "13.0")]
)
def test_old_driver(machine: pytest.MonkeyPatch, of_torch: str, who: str, built: str) -> None:
    machine.setattr(torch.version, "cuda", of_torch)
    machine.setattr(_native, "_newest_cuda_of_driver", lambda: (12, 4))
    expected = f"the NVIDIA driver is too old: it supports CUDA 12.4, but this {who} is built for {built}"
    assert _native.cuda_missing() == expected


def test_no_gpu(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: False)
    assert _native.cuda_missing() == "torch sees no CUDA device"


def test_gpu_without_code(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5) if index == 1 else (9, 0))
    assert _native.cuda_missing(0) is None
    assert _native.cuda_missing(1) == f"this build has no code for compute capability 7.5: it is made for {BUILT}"


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), "80-real", True),
        ((8, 9), "80-real", True),  # code for a GPU runs on later ones of its generation
        ((9, 0), "80-real", False),
        ((8, 0), "86-real", False),
        ((9, 0), "90a-real", True),
        ((10, 3), "100a-real", False),  # and this kind of code on that GPU alone
        ((10, 3), "100f-real", True),
        ((12, 1), "90a-real, 120-virtual", True),
        ((12, 1), "120a", False),
        ((12, 0), "80", True),
        ((7, 5), "80", False),
        ((7, 5), "native", True),
    ],
)
def test_architectures(capability: tuple[int, int], architectures: str, runs: bool) -> None:
    assert _native._has_code_for(capability, architectures) == runs


def test_driver_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(pointer: object) -> int:
        pointer._obj.value = 12080
        return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=version))
    assert _native._newest_cuda_of_driver() == (12, 8)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=lambda pointer: 999))
    assert _native._newest_cuda_of_driver() is None


@pytest.mark.parametrize("version", ["2.5.1", "2.4.0+cu124", "1.13.1"])
def test_old_torch(version: str) -> None:
    with pytest.raises(ImportError, match=f"needs torch 2.6 or later, but torch {version[:5]}"):
        _native._refuse_old_torch(version)


@pytest.mark.parametrize("version", [torch.__version__, "2.6.0", "2.10.0a0+gitabc", "3.0.0"])
def test_new_torch(version: str) -> None:
    _native._refuse_old_torch(version)
