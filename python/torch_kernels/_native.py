# SPDX-License-Identifier: Apache-2.0
"""The compiled modules, each loaded on first use; a missing one says why instead of breaking the import."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch  # first: it brings the OpenMP runtime whose thread pool the kernels share

cpu = importlib.import_module("torch_kernels._cpu")

__all__ = ["cpu", "cuda", "cuda_missing", "emulator"]

if _isa := os.environ.get("TORCH_KERNELS_CPU_ISA"):
    cpu.select_instruction_set(_isa)


@functools.cache
def _load(name: str) -> ModuleType | str:
    try:
        return importlib.import_module(f"torch_kernels.{name}")
    except ImportError as error:
        return str(error)


@functools.cache
def cuda_missing() -> str | None:
    """Why the CUDA kernels cannot run on this machine's current GPU, or None if they can."""
    module = _load("_cuda")
    if isinstance(module, str):
        return f"this build of torch-kernels has no CUDA module ({module})"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def cuda() -> ModuleType | None:
    """The CUDA module, or None where this build has none."""
    module = _load("_cuda")
    return None if isinstance(module, str) else module


def emulator() -> ModuleType | None:
    """The CUDA sources compiled for the CPU emulator: in builds made for tests only."""
    module = _load("_emulator")
    return None if isinstance(module, str) else module
