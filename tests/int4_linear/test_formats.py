# SPDX-License-Identifier: Apache-2.0
"""Checkpoint formats, packed by hand from their definitions, become the values they were packed from."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_kernels import Int4Weight

from ..tolerance import assert_accurate, assert_bitwise
from . import oracle

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16


class Data:
    """Values, scales and zero points of one weight."""

    def __init__(self, n: int, k: int, group_size: int, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.groups = oracle.groups_of(k, group_size)
        count = int(self.groups.max()) + 1
        self.q = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
        self.scales = (torch.randn(count, n, generator=g) * 0.01).to(F16)  # both signs
        self.zeros = torch.randint(0, 16, (count, n), generator=g, dtype=torch.uint8)
        self.zeros[0, :4] = torch.tensor([0, 15, 1, 8])
        self.fractions = (torch.rand(count, n, generator=g) * 15).to(F16)

    def check(self, w: Int4Weight, zeros: Tensor | None, groups: np.ndarray | None = None) -> None:
        assert w.shape == self.q.shape and w.scales.dtype == self.scales.dtype
        truth = oracle.dense(self.q, self.scales, zeros, self.groups if groups is None else groups)
        assert_bitwise("weight", w.dequantize(torch.float64), torch.from_numpy(truth))
        assert_bitwise("qweight", w.qweight, oracle.portable(self.q))


@pytest.mark.parametrize(("k", "group_size"), [(128, 32), (128, 128), (72, 16), (72, -1), (64, 64), (144, 128)])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq(k: int, group_size: int, version: int) -> None:
    data = Data(24, k, group_size)
    w = Int4Weight.from_gptq(
        oracle.gptq_weight(data.q), oracle.gptq_zeros(data.zeros, version), data.scales, version=version
    )
    data.check(w, data.zeros)
    assert w.group_size == (-1 if len(data.scales) == 1 else group_size) and w.zeros.dtype == torch.uint8


def test_gptq_zero_point_of_zero_does_not_disturb_its_neighbours() -> None:
    """v1 stores z - 1: 0 becomes 15, and adding one to the whole word would carry."""
    data = Data(8, 16, 16)
    data.zeros[0] = torch.tensor([0, 8, 0, 0, 3, 15, 0, 1])
    qzeros = torch.tensor([[0x0FE2FF7F]], dtype=torch.int32)
    assert int(oracle.gptq_zeros(data.zeros, 1)) == 0x0FE2FF7F
    w = Int4Weight.from_gptq(oracle.gptq_weight(data.q), qzeros, data.scales)
    assert w.zeros.tolist() == [[0, 8, 0, 0, 3, 15, 0, 1]]


def test_gptq_without_zeros_and_with_odd_n() -> None:
    data = Data(13, 64, 32)
    weight = oracle.gptq_weight(data.q)
    data.check(Int4Weight.from_gptq(weight, None, data.scales), None)
    data.check(Int4Weight.from_gptq(weight, oracle.gptq_zeros(data.zeros, 1), data.scales), data.zeros)


@pytest.mark.parametrize("kind", ["shuffled", "unequal", "absent"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gptq_act_order(kind: str, dtype: torch.dtype) -> None:
    data = Data(16, 96, 32)
    g_idx = torch.arange(96)[torch.randperm(96, generator=torch.Generator().manual_seed(1))] // 32
    if kind == "unequal":
        g_idx[:40] = 0
    elif kind == "absent":
        g_idx[g_idx == 1] = 2
    w = Int4Weight.from_gptq(oracle.gptq_weight(data.q), oracle.gptq_zeros(data.zeros, 1), data.scales, g_idx.to(dtype))
    data.check(w, data.zeros, g_idx.numpy())
    assert w.g_idx.dtype == torch.int32 and w.g_idx.tolist() == g_idx.tolist()


def test_gptq_consecutive_g_idx_is_dropped() -> None:
    data = Data(16, 96, 32)
    w = Int4Weight.from_gptq(oracle.gptq_weight(data.q), None, data.scales, torch.arange(96, dtype=torch.int32) // 32)
    assert w.g_idx is None
    data.check(w, None)


@pytest.mark.parametrize(("k", "group_size"), [(128, 32), (50, 16), (50, -1)])
def test_awq(k: int, group_size: int) -> None:
    data = Data(24, k, group_size)
    data.check(Int4Weight.from_awq(oracle.awq(data.q.T), oracle.awq(data.zeros), data.scales), data.zeros)


@pytest.mark.parametrize(("k", "group_size"), [(128, 64), (96, 16), (96, 96)])
@pytest.mark.parametrize("dtype", [F16, F32, BF16])
def test_hqq(k: int, group_size: int, dtype: torch.dtype) -> None:
    data = Data(10, k, group_size)
    scale, zero = (x.to(dtype).T.reshape(-1, 1) for x in (data.scales, data.fractions))
    w = Int4Weight.from_hqq(oracle.hqq(data.q, group_size), scale, zero, (10, k))
    data.scales = data.scales.to(dtype)
    truth = oracle.dense(data.q, data.scales, data.fractions.to(dtype), data.groups)
    assert_bitwise("weight", w.dequantize(torch.float64), torch.from_numpy(truth))
    assert w.zeros.dtype == F32 and w.group_size == (-1 if group_size == k else group_size)


@pytest.mark.parametrize("inner", [2, 4, 8])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_tinygemm(inner: int, dtype: torch.dtype) -> None:
    n, k, group_size = 16, 256, 32
    data = Data(n, k, group_size)
    scales, centers = data.scales.to(dtype), (torch.randn(data.scales.shape) * 0.1).to(dtype)
    scales[2, 3] = 0  # a constant group
    w = Int4Weight.from_tinygemm(oracle.tinygemm(data.q, inner), torch.stack([scales, centers], -1))
    truth = np.zeros((n, k))
    for column, group in enumerate(data.groups):
        s, z = oracle.array(scales[group]), oracle.array(centers[group])
        truth[:, column] = (oracle.array(data.q[:, column]) - 8) * s + z
    assert_accurate("weight", w.dequantize(F32), torch.from_numpy(truth), floor=1e-6)
    assert w.scales.dtype == dtype and w.zeros.dtype == F32
    assert_bitwise("constant group", w.dequantize(F32)[3, 64:96], centers[2, 3].float().expand(32))


def test_ggml_q4_0() -> None:
    data = Data(5, 96, 32)
    data.check(Int4Weight.from_ggml_q4_0(oracle.ggml_q4_0(data.q, data.scales)), None)
    assert (data.scales < 0).any(), "negative scales are part of the format"


@pytest.mark.parametrize("group_size", [-1, 32, 64])
def test_marlin(group_size: int) -> None:
    data = Data(128, 64 if group_size == -1 else 128, group_size)
    w = Int4Weight.from_marlin(oracle.marlin_weight(data.q), oracle.marlin_scales(data.scales))
    data.check(w, None)
    assert w.group_size == group_size


def test_marlin_by_its_published_fragment_order() -> None:
    """The first words of a tile, from the fragment order of mma.m16n8k16 rather than from the closed form."""
    q = torch.arange(64 * 16).reshape(64, 16) % 16
    q[8:] = 0
    q = q.to(torch.uint8)
    packed = oracle.marlin_weight(q)
    # Lane 0 holds of row 0 columns 0, 1, 8, 9, and of row 8 the same: nibbles 0 and 4, 1 and 5 are the pairs' halves.
    assert int(packed[0, 0]) & 0xF == 0 and int(packed[0, 0]) >> 16 & 0xF == 1
    assert int(packed[0, 0]) >> 4 & 0xF == 8 and int(packed[0, 0]) >> 20 & 0xF == 9
    assert_bitwise("weight", Int4Weight.from_marlin(packed, torch.ones(1, 64)).qweight, oracle.portable(q))


# ---- malformed ----


def gptq(**changes: Any) -> dict[str, Any]:
    data = Data(16, 64, 32)
    return {
        "qweight": oracle.gptq_weight(data.q),
        "qzeros": oracle.gptq_zeros(data.zeros, 1),
        "scales": data.scales,
    } | changes


def awq(**changes: Any) -> dict[str, Any]:
    data = Data(16, 64, 32)
    return {"qweight": oracle.awq(data.q.T), "qzeros": oracle.awq(data.zeros), "scales": data.scales} | changes


def hqq(**changes: Any) -> dict[str, Any]:
    data = Data(16, 64, 32)
    column = data.scales.T.reshape(-1, 1)
    return {"W_q": oracle.hqq(data.q, 32), "scale": column, "zero": column, "shape": (16, 64)} | changes


def tinygemm(**changes: Any) -> dict[str, Any]:
    data = Data(16, 64, 32)
    pairs = torch.stack([data.scales, data.scales], -1)
    return {"packed": oracle.tinygemm(data.q, 2), "scales_and_zeros": pairs} | changes


def marlin(**changes: Any) -> dict[str, Any]:
    data = Data(64, 64, 32)
    return {"B": oracle.marlin_weight(data.q), "s": data.scales} | changes


WRONG: list[tuple[str, Callable[..., dict[str, Any]], dict[str, Any], str]] = [
    ("from_gptq", gptq, {"qweight": torch.zeros(8, 16)}, "qweight must be int32, got torch.float32"),
    ("from_gptq", gptq, {"qweight": torch.zeros(8, dtype=torch.int32)}, "qweight"),
    ("from_gptq", gptq, {"qweight": None}, "qweight must be a tensor, got NoneType"),
    ("from_gptq", gptq, {"scales": torch.zeros(2, 15)}, r"scales must be \[G=2, N=16\], got shape \[2, 15\]"),
    ("from_gptq", gptq, {"scales": torch.zeros(3, 16), "qzeros": None}, r"number of groups .* K=64, got 3"),
    ("from_gptq", gptq, {"scales": torch.zeros(2, 16, dtype=torch.float64)}, "scales"),
    ("from_gptq", gptq, {"qzeros": torch.zeros(2, 3, dtype=torch.int32)}, "qzeros"),
    ("from_gptq", gptq, {"qzeros": torch.zeros(3, 2, dtype=torch.int32)}, "qzeros"),
    ("from_gptq", gptq, {"g_idx": torch.zeros(63, dtype=torch.int32)}, "g_idx"),
    ("from_gptq", gptq, {"g_idx": torch.full((64,), 2)}, r"g_idx must be in 0\.\.1, got 2"),
    ("from_gptq", gptq, {"g_idx": torch.full((64,), -1)}, "g_idx"),
    ("from_gptq", gptq, {"g_idx": torch.zeros(64)}, "g_idx"),
    ("from_gptq", gptq, {"version": 3}, "version must be 1 or 2, got 3"),
    ("from_awq", awq, {"qweight": torch.zeros(64, 3, dtype=torch.int32)}, "qzeros|qweight"),
    ("from_awq", awq, {"qzeros": None}, "qzeros"),
    ("from_awq", awq, {"scales": torch.zeros(2, 8)}, "scales"),
    ("from_hqq", hqq, {"shape": (16, 60)}, "W_q"),
    ("from_hqq", hqq, {"shape": (16,)}, "shape"),
    ("from_hqq", hqq, {"W_q": torch.zeros(4, 128, dtype=torch.uint8)}, "W_q"),
    ("from_hqq", hqq, {"scale": torch.zeros(31, 1)}, "scale"),
    ("from_hqq", hqq, {"zero": torch.zeros(32, 1, dtype=torch.uint8)}, "zero"),
    ("from_tinygemm", tinygemm, {"packed": torch.zeros(1, 64, 32, dtype=torch.uint8)}, "packed .* CPU"),
    ("from_tinygemm", tinygemm, {"packed": torch.zeros(2, 4, 32, 3, dtype=torch.int32)}, "packed"),
    ("from_tinygemm", tinygemm, {"packed": torch.zeros(2, 2, 16, 1, dtype=torch.int32)}, "packed"),
    ("from_tinygemm", tinygemm, {"scales_and_zeros": torch.zeros(2, 16, 3)}, "scales_and_zeros"),
    ("from_ggml_q4_0", dict, {"blocks": torch.zeros(3, 37, dtype=torch.uint8)}, "blocks"),
    ("from_ggml_q4_0", dict, {"blocks": torch.zeros(3, 36)}, "blocks"),
    ("from_marlin", marlin, {"B": torch.zeros(4, 96, dtype=torch.int32)}, "B"),
    ("from_marlin", marlin, {"B": torch.zeros(4, 128, dtype=torch.int64)}, "B"),
    ("from_marlin", marlin, {"s": torch.zeros(2, 32)}, "s must be"),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=lambda case: f"{case[0]}-{next(iter(case[2]))}")
def test_malformed_checkpoints_are_named(
    case: tuple[str, Callable[..., dict[str, Any]], dict[str, Any], str],
) -> None:
    name, good, changes, message = case
    with pytest.raises((ValueError, TypeError)) as error:
        getattr(Int4Weight, name)(**good(**changes))
    assert re.search(message, str(error.value)) and "Int4Weight" in str(error.value), error.value
