# SPDX-License-Identifier: Apache-2.0
"""What the Triton launchers of all ops share. It is imported where Triton is missing, too."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

BLOCKS = 65535  # of a grid at most, along its second and its third axis


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


def rows_nearby(*tensors: torch.Tensor):
    """Tensors, or copies of them, whose rows lie close enough for the offsets within a tile to fit in 32 bits."""
    return (x if x.stride(0) < 2**24 else x.contiguous() for x in tensors)


def beyond_a_grid(sequences: int) -> str | None:
    """For backends whose kernels have the sequences along such an axis: why they cannot serve so many."""
    return f"it serves up to {BLOCKS} sequences" if sequences > BLOCKS else None


def in_batches(heads: int | None = None) -> Callable[..., Any]:
    """For launchers whose tensors all begin with the batch, and whose grids have an axis of B blocks or, with `heads`,
    a dimension of the first tensor, of B * H: as many calls as that takes."""

    def decorate(launch: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(launch)
        def run(first: torch.Tensor, *others: Any) -> None:
            most = BLOCKS if heads is None else max(BLOCKS // max(first.shape[heads], 1), 1)
            if len(first) <= most:
                return launch(first, *others)
            for low in range(0, len(first), most):
                launch(*(x[low : low + most] if isinstance(x, torch.Tensor) else x for x in (first, *others)))

        return run

    return decorate


def aot_case(name: str, kernel, types: dict, constants: dict, absent=(), options: dict | None = None):
    """A kernel's instance to compile ahead of time. Arguments that `types` lacks are integers, those `absent` None."""
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    return name, kernel, signature, constants | dict.fromkeys(absent), options or {}
