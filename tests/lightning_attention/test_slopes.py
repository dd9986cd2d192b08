# SPDX-License-Identifier: Apache-2.0
"""The decay rates of the families in use, from their own formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch_kernels import lightning_slopes


def test_transnormer() -> None:
    assert lightning_slopes(4).tolist() == [0.0, 2.0, 4.0, 6.0]
    assert torch.allclose(lightning_slopes(4, layer=3, num_layers=12), torch.tensor([0.0, 1.5, 3.0, 4.5]))


def test_alibi() -> None:
    eight = [2.0 ** -(h + 1) for h in range(8)]
    assert torch.allclose(lightning_slopes(8, kind="alibi"), torch.tensor(eight) * (1 + 1e-5), rtol=1e-7)
    # 12 heads: those of 8, then every other of 16.
    twelve = [*eight, *(2.0 ** (-0.5 * (h + 1)) for h in range(0, 8, 2))]
    for layer, factor in ((0, 1 + 1e-5), (3, 0.4 + 1e-5), (5, 1e-5)):
        slopes = lightning_slopes(12, layer=layer, num_layers=6, kind="alibi")
        assert torch.allclose(slopes, torch.tensor(twelve, dtype=torch.float64).mul(factor).float(), rtol=1e-6)


def test_minimax() -> None:
    """As transformers' MiniMaxLightningAttention.get_slope_rate."""
    for heads, layer, layers in ((64, 0, 80), (64, 79, 80), (12, 3, 8), (4, 0, 1)):
        base = 1 / (2 ** (8 / heads))
        rate = base ** (torch.arange(heads) + 1)
        factor = 1 - layer / (layers - 1 + 1e-5) + 1e-5
        slopes = lightning_slopes(heads, layer=layer, num_layers=layers, kind="minimax")
        assert torch.allclose(slopes, rate * factor, rtol=1e-5)


def test_retnet() -> None:
    """The decays of RetNet are 1 - 2^(-5 - h)."""
    slopes = lightning_slopes(8, layer=3, num_layers=4, kind="retnet")
    assert torch.allclose(
        slopes.double().neg().exp(), 1 - 2.0 ** -(5 + torch.arange(8, dtype=torch.float64)), rtol=1e-7
    )


@pytest.mark.parametrize("kind", ["transnormer", "alibi", "minimax", "retnet"])
def test_all_are_finite_rates(kind: str) -> None:
    for heads in (1, 3, 8, 40, 64):
        for layer, layers in ((0, 1), (0, 24), (23, 24)):
            slopes = lightning_slopes(heads, layer=layer, num_layers=layers, kind=kind)
            assert slopes.shape == (heads,) and slopes.dtype == torch.float32 and slopes.device.type == "cpu"
            assert (slopes >= 0).all() and slopes.isfinite().all()
            assert kind == "transnormer" or float(slopes.max()) <= math.ceil(1)


@pytest.mark.parametrize(
    ("change", "name"),
    [({"num_heads": 0}, "num_heads"), ({"layer": -1}, "layer"), ({"layer": 2}, "layer"), ({"kind": "llama"}, "kind")],
)
def test_bad_arguments(change: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"lightning_slopes: {name}"):
        lightning_slopes(**({"num_heads": 4, "layer": 0, "num_layers": 2} | change))
