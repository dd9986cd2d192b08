# SPDX-License-Identifier: Apache-2.0
"""What every launcher needs: rows of a tensor, the device to launch on, and its facts."""

import contextlib
import functools
import math

import torch

from ..heuristics import Device


def as_rows(x):
    """[.., K] as [M, K], without a copy where the leading dimensions lie at one distance."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def on_device(tensor):
    """Triton launches on the current device; this makes it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def device_of(device: torch.device) -> Device:
    """The interpreter takes the tiles of an H100."""
    if device.type != "cuda":
        return Device("sm_90", 132)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device("gfx942", properties.multi_processor_count)
    return Device(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)
