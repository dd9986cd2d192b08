# SPDX-License-Identifier: Apache-2.0
"""What the Triton launchers of all ops share."""

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
