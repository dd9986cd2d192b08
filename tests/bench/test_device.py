# SPDX-License-Identifier: Apache-2.0
"""Facts of the machine: read where possible, else one clear sentence. A pretended driver stands in for a GPU."""

from __future__ import annotations

import enum
import sys
import types

import pytest
from torch_kernels import _device


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NO_DEVICE = 100


class Names:
    """Any CU_... name as itself."""

    def __getattr__(self, name):
        return name


ATTRIBUTES = {
    "COMPUTE_CAPABILITY_MAJOR": 9,
    "COMPUTE_CAPABILITY_MINOR": 0,
    "MULTIPROCESSOR_COUNT": 132,
    "L2_CACHE_SIZE": 60 << 20,
    "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 227 << 10,
    "CLOCK_RATE": 1_980_000,
    "MEMORY_CLOCK_RATE": 3_201_000,
    "GLOBAL_MEMORY_BUS_WIDTH": 6144,
}
KERNEL = {"NUM_REGS": 128, "SHARED_SIZE_BYTES": 1024, "LOCAL_SIZE_BYTES": 0, "CONST_SIZE_BYTES": 8,
          "MAX_THREADS_PER_BLOCK": 512, "BINARY_VERSION": 90}  # fmt: skip


def pretend(monkeypatch, **changes) -> types.SimpleNamespace:
    ok = Result.CUDA_SUCCESS
    driver = types.SimpleNamespace(
        CUresult=Result,
        CUdevice_attribute=Names(),
        CUfunction_attribute=Names(),
        contexts=[],
        cuInit=lambda flags: (ok,),
        cuGetErrorString=lambda status: (ok, b"no CUDA-capable device is detected"),
        cuDeviceGetCount=lambda: (ok, 1),
        cuDeviceGet=lambda index: (ok, index),
        cuDeviceGetName=lambda length, device: (ok, b"NVIDIA H200".ljust(length, b"\0")),
        cuDeviceGetAttribute=lambda name, device: (ok, ATTRIBUTES[name.removeprefix("CU_DEVICE_ATTRIBUTE_")]),
        cuDeviceTotalMem=lambda device: (ok, 140 << 30),
        cuDriverGetVersion=lambda: (ok, 13010),
        cuDevicePrimaryCtxRetain=lambda device: (ok, "context"),
        cuDevicePrimaryCtxRelease=lambda device: (ok,),
        cuCtxPushCurrent=lambda context: (driver.contexts.append(context), (ok,))[1],
        cuCtxPopCurrent=lambda: (ok, driver.contexts.pop()),
        cuLibraryLoadData=lambda image, *_: (ok, image),
        cuLibraryGetKernelCount=lambda library: (ok, 2),
        cuLibraryEnumerateKernels=lambda count, library: (ok, ["first", "second"][:count]),
        cuLibraryUnload=lambda library: (ok,),
        cuKernelGetName=lambda kernel: (ok, kernel.encode()),
        cuKernelGetAttribute=lambda name, kernel, device: (ok, KERNEL[name.removeprefix("CU_FUNC_ATTRIBUTE_")]),
    )
    vars(driver).update(changes)
    bindings = types.ModuleType("cuda.bindings")
    bindings.driver = driver
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    return driver


def test_cpu():
    cpu = _device.cpu()
    assert cpu.name
    assert cpu.cores >= 1
    assert cpu.last_level_cache_bytes >= 1 << 18
    assert cpu.memory_bytes is None or cpu.memory_bytes > 1 << 28


def test_gpu_facts(monkeypatch):
    pretend(monkeypatch)
    (gpu,) = _device.gpus()
    assert gpu.name == "NVIDIA H200"
    assert gpu.compute_capability == (9, 0)
    assert gpu.clock_mhz == 1980
    assert gpu.cuda == "13.1"
    assert gpu.bandwidth_gb_s == pytest.approx(4916.7, abs=0.1)
    assert _device.machine_name("cuda:0") == "nvidia-h200"
    assert "132 multiprocessors" in _device.describe()
    assert "4917 GB/s" in _device.describe()


def test_cubin_attributes(monkeypatch):
    driver = pretend(monkeypatch)
    attributes = _device.cubin_attributes(b"cubin")
    assert list(attributes) == ["first", "second"]
    assert attributes["first"]["registers"] == 128
    assert attributes["second"]["local_bytes"] == 0
    assert driver.contexts == []


def test_the_context_is_given_back_when_a_cubin_does_not_load(monkeypatch):
    driver = pretend(monkeypatch, cuLibraryLoadData=lambda *_: (Result.CUDA_ERROR_NO_DEVICE,))
    with pytest.raises(_device.GpuUnavailable, match="CUDA_ERROR_NO_DEVICE"):
        _device.cubin_attributes(b"not a cubin")
    assert driver.contexts == []


def test_without_cuda_python(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(_device.GpuUnavailable, match=r"cuda-python, which is not installed: pip install"):
        _device.gpus()
    assert "not installed" in _device.describe()


def test_without_a_driver(monkeypatch):
    def missing(flags):
        raise RuntimeError("libcuda.so.1: cannot open shared object file")

    pretend(monkeypatch, cuInit=missing)
    with pytest.raises(_device.GpuUnavailable, match="no NVIDIA driver"):
        _device.gpus()


def test_without_a_gpu(monkeypatch):
    pretend(monkeypatch, cuInit=lambda flags: (Result.CUDA_ERROR_NO_DEVICE,))
    assert "no usable NVIDIA GPU: cuInit says no CUDA-capable device is detected" in _device.describe()


def test_machine_names_are_fit_for_folders():
    name = _device.machine_name("cpu")
    assert name.replace("-", "").isalnum()
    assert name == name.lower()
    assert name.endswith("cores")


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.07  Sat Feb 17", "535.161.07"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build", "580.159.04"),
        ("", "unknown"),
    ],
)
def test_driver_version(monkeypatch, text, version):
    monkeypatch.setattr(_device, "_read", lambda path: text)
    assert _device._driver_version() == version
