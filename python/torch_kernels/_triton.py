# SPDX-License-Identifier: Apache-2.0
"""What the Triton launchers of all ops share. It is imported where Triton is missing, too."""

import contextlib
import functools

import torch


def on_device(tensor: torch.Tensor):
    """Triton launches on the current device; this makes it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def architecture(device: torch.device) -> str:
    """sm_80, sm_90, .. or gfx942 for all AMD GPUs; the interpreter follows sm_90."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The interpreter has so few that small tests take all paths."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def power_of_two(size: int, least: int = 16) -> int:
    """The next, and at least so much: what a product takes."""
    return max(1 << max(size - 1, 0).bit_length(), least)


def head_chunk(size: int, element_size: int) -> int:
    """How much of the head size one product takes: all of it on tensor cores. Elsewhere registers bound it."""
    return min(power_of_two(size), 32) if element_size == 4 else power_of_two(size)


def contiguous(*tensors: torch.Tensor | None):
    return (None if x is None else x.contiguous() for x in tensors)


def last_stride_one(*tensors: torch.Tensor | None):
    return (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors)


def aot_case(name: str, kernel, types: dict, constants: dict, absent=(), options: dict | None = None):
    """A kernel's instance to compile ahead of time. Arguments that `types` lacks are integers, those `absent` None."""
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    return name, kernel, signature, constants | dict.fromkeys(absent), options or {}
