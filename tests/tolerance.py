# SPDX-License-Identifier: Apache-2.0
"""How close is close enough, in one place.

The error against the float64 truth on the same inputs may be twice that of the plain PyTorch formula in the same dtype,
plus two units in the last place at the largest true magnitude. Before sizes are compared, NaN and infinities must sit
at the same places.

In a small case the error of the plain formula is a sample of few roundings, so it is taken over several summation
orders, and a caller may state a ``floor``: what the rounding of intermediate results alone may cost.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ulp(magnitude: float, dtype: torch.dtype) -> float:
    """Distance from ``magnitude`` to the next larger number of ``dtype``."""
    info = torch.finfo(dtype)
    exponent = torch.tensor(magnitude, dtype=torch.float64).clamp(min=info.tiny).log2().floor()
    return float(torch.exp2(exponent) * info.eps)


def assert_accurate(name: str, actual: Tensor, truth: Tensor, *baselines: Tensor, floor: float = 0.0) -> None:
    """``max|actual - truth| <= 2 * max|baseline - truth| + 2 ulp + floor``; the worst of several baselines counts."""
    assert actual.shape == truth.shape, f"{name}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    truth = truth.cpu()
    if truth.numel() == 0:
        return
    got, truth = actual.detach().cpu().to(torch.float64), truth.to(torch.float64)
    assert_same_specials(name, got, truth)

    finite = truth.isfinite()
    difference = (got - truth).abs().where(finite, 0.0)
    plain = [(b.cpu().to(torch.float64) - truth).abs().where(finite, 0.0).nan_to_num(0.0).max() for b in baselines]
    plain = max(map(float, plain), default=0.0)
    largest = float(truth.abs().where(finite, 0.0).max())
    bound = 2 * plain + 2 * ulp(largest, actual.dtype) + floor
    worst = int(difference.flatten().argmax())
    where = [int(i) for i in torch.unravel_index(torch.tensor(worst), difference.shape)]
    assert float(difference.max()) <= bound, (
        f"{name}: error {float(difference.max()):.3e} at {where} exceeds {bound:.3e} "
        f"(2 x plain {actual.dtype} error {plain:.3e} + 2 ulp at {largest:.3g} + floor {floor:.1e}): "
        f"got {float(got.flatten()[worst]):.9g}, truth {float(truth.flatten()[worst]):.9g}; "
        f"{int((difference > bound).sum())} of {difference.numel()} elements are off"
    )


def assert_same_specials(name: str, actual: Tensor, truth: Tensor) -> None:
    for kind, found, expected in (
        ("NaN", actual.isnan(), truth.isnan()),
        ("+inf", actual == float("inf"), truth == float("inf")),
        ("-inf", actual == -float("inf"), truth == -float("inf")),
    ):
        wrong = (found != expected).nonzero()
        assert len(wrong) == 0, (
            f"{name}: {kind} at {int(found.sum())} places, expected at {int(expected.sum())}; "
            f"first difference at {wrong[0].tolist()}: got {actual[tuple(wrong[0])]}, truth {truth[tuple(wrong[0])]}"
        )


def assert_bitwise(name: str, actual: Tensor, expected: Tensor) -> None:
    """The same dtype, shape and bits (any NaN equals any other)."""
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    if actual.dtype == torch.float8_e4m3fn:
        actual, expected = actual.view(torch.uint8), expected.view(torch.uint8)
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    wrong = actual != expected
    if actual.dtype.is_floating_point:
        wrong &= ~(actual.isnan() & expected.isnan())
    places = wrong.nonzero()
    assert len(places) == 0, (
        f"{name}: {len(places)} of {wrong.numel()} elements differ, first at {places[0].tolist()}: "
        f"got {actual[tuple(places[0])]}, expected {expected[tuple(places[0])]}"
    )
