# SPDX-License-Identifier: Apache-2.0
"""A case: inputs, the call to time, what else a user could call, and the work that nobody can avoid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

Inputs = dict[str, Any]  # tensors and plain values by name
Call = Callable[[], torch.Tensor]
Prepare = Callable[
    [Inputs], Call
]  # everything a user does once happens here; what a user does per call is in the returned Call

# Largest error over the largest magnitude of the truth that a contender may show and still be timed.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Curve:
    """Cases of one series that differ in one number are drawn as lines over it."""

    series: str
    axis: str  # what x counts
    x: float
    baseline: str  # the peer whose time all are compared with
    items: int = 0  # what a call works off: with it, times and items per second are drawn instead of speedups


@dataclass(frozen=True)
class Case:
    name: str  # letters, digits, hyphens and dots: it is a key in results and docs
    make_inputs: Callable[[int, str], Inputs]  # (seed, device)
    run: Prepare  # ours
    bytes: int  # each useful input byte read once, each output byte written once
    flops: int  # useful arithmetic only
    dtype: torch.dtype  # of the arithmetic: picks the measured peak
    peers: Mapping[str, Prepare] = field(default_factory=dict)
    slow_peers: frozenset[str] = frozenset()  # run only when named: they compile for long
    inexact_peers: frozenset[str] = frozenset()  # timed whatever their error: they compute something close by design
    truth: Callable[[Inputs], torch.Tensor] | None = None  # in float64; without it peers are compared with ours
    select: Callable[[Inputs, torch.Tensor], torch.Tensor] = lambda inputs, output: (
        output
    )  # the elements that have a meaning
    tolerance: float | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    curve: Curve | None = None  # else the case is a group of bars
    memory: bool = False  # whether to measure what ours takes beyond inputs and outputs

    def of(self, model: str) -> Case:
        """The same case among those of a model."""
        curve = self.curve and replace(self.curve, series=f"{model}: {self.curve.series}")
        return replace(self, name=f"{model}-{self.name}", curve=curve)

    def allowed_error(self) -> float:
        return TOLERANCE.get(self.dtype, 0.0) if self.tolerance is None else self.tolerance


def error(output: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference over the largest magnitude of the truth. A NaN or infinity out of place counts as infinite."""
    if output.shape != truth.shape:
        raise ValueError(f"output is {tuple(output.shape)}, truth is {tuple(truth.shape)}")
    if not truth.numel():
        return 0.0
    output, truth = output.double(), truth.double()
    finite = truth.isfinite()
    same = torch.where(finite, output.isfinite(), (output == truth) | (output.isnan() & truth.isnan()))
    if not same.all():
        return float("inf")
    difference = torch.where(finite, output - truth, 0.0).abs().max().item()
    return difference / (torch.where(finite, truth, 0.0).abs().max().item() or 1.0)


def copy_inputs(inputs: Inputs) -> Inputs:
    """The same values in other memory."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def input_bytes(inputs: Inputs) -> int:
    return sum(value.nbytes for value in inputs.values() if isinstance(value, torch.Tensor))
