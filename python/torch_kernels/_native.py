# SPDX-License-Identifier: Apache-2.0
"""The compiled modules, each loaded on first use; a missing one says why instead of breaking the import."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import re
from types import ModuleType

import torch  # first: it brings the OpenMP runtime whose thread pool the kernels share

__all__ = ["cpu", "cuda", "cuda_missing", "emulator"]

OLDEST_TORCH = (2, 6)


def _refuse_old_torch(version: str) -> None:
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(f"torch-kernels needs torch {needed} or later, but torch {version} is installed")


_refuse_old_torch(torch.__version__)
cpu = importlib.import_module("torch_kernels._cpu")

if _isa := os.environ.get("TORCH_KERNELS_CPU_ISA"):
    cpu.select_instruction_set(_isa)


@functools.cache
def _load(name: str) -> ModuleType | str:
    try:
        return importlib.import_module(f"torch_kernels.{name}")
    except ImportError as error:
        return str(error)


def _newest_cuda_of_driver() -> tuple[int, int] | None:
    """The newest CUDA version that the installed driver supports, or None without a driver."""
    version = ctypes.c_int()
    try:
        library = ctypes.CDLL("libcuda.so.1" if os.name == "posix" else "nvcuda.dll")
    except OSError:
        return None
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _has_code_for(capability: tuple[int, int], architectures: str) -> bool:
    """Whether a module compiled for `architectures`, written as in CMake, runs on a GPU of that compute capability."""
    for architecture in architectures.split(", "):
        parts = re.fullmatch(r"(\d+)(\d)([af]?)(?:-(real|virtual))?", architecture)
        if parts is None:  # native, all, ...
            return True
        major, minor, specific, kind = int(parts[1]), int(parts[2]), parts[3], parts[4]
        if capability == (major, minor):
            return True
        if kind != "virtual" and specific != "a" and capability[0] == major and capability[1] > minor:
            return True
        if kind != "real" and not specific and capability > (major, minor):
            return True
    return False


@functools.cache
def cuda_missing(index: int | None = None) -> str | None:
    """Why the CUDA kernels cannot run on a GPU of this machine (None: torch's current one), or None if they can."""
    module = _load("_cuda")
    if isinstance(module, str):
        return f"this build of torch-kernels has no CUDA module ({module})"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    driver = _newest_cuda_of_driver()
    if driver is None:
        return "no NVIDIA driver is installed: the system has no libcuda"
    for name, version in (("torch", torch.version.cuda), ("torch-kernels", module.cuda_version)):
        if int(version.partition(".")[0]) > driver[0]:
            supported = ".".join(map(str, driver))
            return f"the NVIDIA driver is too old: it supports CUDA {supported}, but this {name} is built for {version}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(index)
    if not _has_code_for(capability, module.architectures):
        found = ".".join(map(str, capability))
        return f"this build has no code for compute capability {found}: it is made for {module.architectures}"
    return None


def cuda() -> ModuleType | None:
    """The CUDA module, or None where this build has none."""
    module = _load("_cuda")
    return None if isinstance(module, str) else module


def emulator() -> ModuleType | None:
    """The CUDA sources compiled for the CPU emulator: in builds made for tests only."""
    module = _load("_emulator")
    return None if isinstance(module, str) else module
