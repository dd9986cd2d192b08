# SPDX-License-Identifier: Apache-2.0
"""Int4Weight: what it accepts, how it quantises, and how it travels."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_kernels
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch_kernels import Int4Weight
from torch_kernels.int4_linear import packing

from ..strategies import seeds
from ..tolerance import assert_bitwise
from . import oracle
from .cases import ACT_ORDERS, BF16, F16, F32, GROUP_SIZES, Case, make

F64 = torch.float64


def assert_same(a: Int4Weight, b: Int4Weight) -> None:
    assert (a.shape, a.group_size) == (b.shape, b.group_size)
    for name in ("qweight", "scales", "zeros", "g_idx"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert_bitwise(name, x, y)


# ---- quantize ----


def check_quantised(dense: Tensor, group_size: int, symmetric: bool) -> None:
    w = Int4Weight.quantize(dense, group_size, symmetric)
    assert (w.zeros is None) == symmetric and w.shape == dense.shape
    value = w.dequantize(F64)
    for group in range(len(w.scales)):
        width = dense.shape[1] if group_size == -1 else group_size
        part = slice(group * width, (group + 1) * width)
        original, step = dense[:, part].double(), w.scales[group].double()[:, None]
        assert ((value[:, part] - original).abs() <= step / 2).all(), "more than half a step"
        high, low = original.amax(1).clamp(min=0), original.amin(1).clamp(max=0)
        largest = torch.maximum(high, -low) / 7 if symmetric else (high - low) / 15
        slack = 1 if symmetric else 1 + 2 * torch.finfo(w.scales.dtype).eps
        used = largest > 0
        assert (step[used, 0] <= largest[used] * slack).all(), "a step larger than the range asks for"
        assert (value[:, part][~used] == 0).all(), "a group of zeros"


@given(
    seed=seeds,
    shape=st.sampled_from([(1, 1), (5, 16), (3, 100), (7, 33), (2, 300)]),
    group_size=st.sampled_from(GROUP_SIZES),
    symmetric=st.booleans(),
    dtype=st.sampled_from([F32, F16, BF16, F64]),
    magnitude=st.sampled_from([1.0, 1e-3, 1e-6, 3e4]),
)
def test_quantize(
    seed: int, shape: tuple[int, int], group_size: int, symmetric: bool, dtype: torch.dtype, magnitude: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=g) * magnitude
    dense[torch.rand(shape[0], generator=g) < 0.2] = 0
    check_quantised(dense.to(dtype).clamp(-6e4, 6e4), group_size, symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
def test_quantize_edges(symmetric: bool) -> None:
    rows = [[0.0] * 16, [5.0] * 16, [-5.0] * 16, [1.0, -1.0] * 8, [65504.0, -65504.0] * 8, [2.0**-24] * 16]
    rows += [[1e-3] * 15 + [-1.0], [float(i) for i in range(16)], [float(i - 8) for i in range(16)]]
    for dtype in (F32, F16, BF16):
        check_quantised(torch.tensor(rows).to(dtype), 16, symmetric)


@pytest.mark.parametrize("magnitude", [1e38, 1e-42])
def test_quantize_at_the_ends_of_float32(magnitude: float) -> None:
    dense = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) * magnitude
    w = Int4Weight.quantize(dense, 16)
    steps = w.scales.double().T.repeat_interleave(16, 1)
    assert ((w.dequantize(F64) - dense.double()).abs() <= steps / 2).all()


def test_quantize_exact_grid() -> None:
    """Weights that lie on the grid come back exactly."""
    q = torch.arange(32).reshape(2, 16) % 16
    dense = (q - 8).float() * 0.5
    dense[:, 0] = -3.75  # 7.5 steps: the largest magnitude
    w = Int4Weight.quantize(dense, 16)
    assert_bitwise("grid", w.dequantize()[:, 1:][dense[:, 1:] > -4], dense[:, 1:][dense[:, 1:] > -4])


def test_quantize_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = torch.randn(37, 50)
    whole = Int4Weight.quantize(dense, 16, symmetric=False)
    monkeypatch.setattr(importlib.import_module("torch_kernels.int4_linear.weight"), "CHUNK", 120)
    assert_same(Int4Weight.quantize(dense, 16, symmetric=False), whole)


@pytest.mark.parametrize(
    ("dense", "options", "message"),
    [
        (torch.zeros(3, 4, 5), {}, r"dense must be \[N, K\]"),
        (torch.zeros(3, 4, dtype=torch.int8), {}, "dense"),
        ([[1.0]], {}, "dense must be a tensor, got list"),
        (torch.tensor([[1.0, float("nan")]]), {}, "dense must be finite"),
        (torch.tensor([[1.0, float("inf")]]), {}, "dense must be finite"),
        (torch.tensor([[1e300]], dtype=F64), {}, "dense"),
        (torch.zeros(3, 4), {"group_size": 48}, "group_size must be one of -1, 16, 32, 64, 128, 256, got 48"),
        (torch.zeros(3, 4), {"group_size": 0}, "group_size"),
    ],
)
def test_what_cannot_be_quantised(dense: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as error:
        Int4Weight.quantize(dense, **options)
    assert "Int4Weight.quantize" in str(error.value)


# ---- construction ----


def good(**changes: Any) -> dict[str, Any]:
    arguments = {
        "qweight": torch.zeros(6, 25, dtype=torch.uint8),
        "scales": torch.ones(4, 6),
        "zeros": torch.full((4, 6), 8, dtype=torch.uint8),
        "g_idx": None,
        "in_features": 49,
        "group_size": 16,
    }
    return arguments | changes


U8 = torch.uint8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qweight": torch.zeros(6, 25)}, "qweight must be uint8, got torch.float32"),
        ({"qweight": torch.zeros(6, 24, dtype=U8)}, r"qweight must be \[N=6, ceil\(K/2\)=25\], got shape \[6, 24\]"),
        ({"qweight": torch.zeros(150, dtype=U8)}, "qweight"),
        ({"qweight": None}, "qweight must be a tensor, got NoneType"),
        ({"scales": torch.ones(4, 5)}, r"scales must be \[G=4, N=6\], got shape \[4, 5\]"),
        ({"scales": torch.ones(3, 6)}, r"scales must be \[G=4, N=6\]"),
        ({"scales": torch.ones(4, 6, dtype=F64)}, "scales must be float32 or float16 or bfloat16, got torch.float64"),
        ({"zeros": torch.ones(4, 6, dtype=F16)}, "zeros must be uint8 or float32, got torch.float16"),
        ({"zeros": torch.ones(4, 5)}, "zeros"),
        ({"zeros": torch.full((4, 6), 16, dtype=U8)}, r"zeros must be in 0\.\.15, got 16"),
        ({"zeros": 8}, "zeros must be a tensor, got int"),
        ({"g_idx": torch.zeros(48, dtype=torch.int32)}, r"g_idx must be \[K=49\]"),
        ({"g_idx": torch.zeros(49)}, "g_idx must be int32 or int64, got torch.float32"),
        ({"g_idx": torch.full((49,), 4)}, r"g_idx must be in 0\.\.3, got 4"),
        ({"g_idx": torch.full((49,), -1)}, r"g_idx must be in 0\.\.3, got -1"),
        ({"in_features": -1}, "in_features must be at least 0, got -1"),
        ({"in_features": 49.0}, "in_features must be an int, got float"),
        ({"in_features": 48}, "qweight"),
        ({"group_size": 24}, "group_size must be one of -1, 16, 32, 64, 128, 256, got 24"),
        ({"group_size": -1}, r"scales must be \[G=1, N=6\]"),
        ({"group_size": True}, "group_size must be an int, got bool"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    Int4Weight(**good())
    with pytest.raises((ValueError, TypeError), match=message) as error:
        Int4Weight(**good(**changes))
    assert str(error.value).startswith("Int4Weight: ")


def test_what_a_weight_says_of_itself() -> None:
    w = Int4Weight(**good())
    assert repr(w) == (
        "Int4Weight(out_features=6, in_features=49, group_size=16, scales=float32, zeros=uint8, act_order=False, "
        "device='cpu')"
    )
    assert w.nbytes == 6 * 25 + 4 * 6 * 4 + 4 * 6
    assert w.shape == (6, 49) and w.device == torch.device("cpu")


@pytest.mark.parametrize("act_order", ACT_ORDERS)
@pytest.mark.parametrize("zeros", [None, "int", "float"])
def test_dequantize(act_order: str | None, zeros: str | None) -> None:
    call = make(Case(in_features=101, act_order=act_order, zeros=zeros, scale_dtype=BF16))
    truth = torch.from_numpy(call.dense)
    assert_bitwise("float64", call.weight.dequantize(F64), truth)
    for dtype in (F32, F16, BF16):
        value = call.weight.dequantize(dtype)
        assert value.dtype == dtype
        torch.testing.assert_close(value, truth.to(dtype))


# ---- packing ----


@pytest.mark.parametrize("layout", ["cpu", "gpu"])
@pytest.mark.parametrize("act_order", ACT_ORDERS)
def test_packed_arguments_describe_the_weight(layout: str, act_order: str | None) -> None:
    for zeros in (None, "int", "float"):
        case = Case(out_features=19, in_features=77, group_size=16, zeros=zeros, act_order=act_order)
        call = make(case)
        packed = call.weight.pack(layout)
        columns = 77 if packed.perm is None else len(packed.perm)
        q = packing.LAYOUTS[layout].unpack(packed.weight, 19, columns)
        groups = oracle.groups_of(columns, packed.group_size)
        offsets = torch.zeros_like(packed.scales) if packed.zeros is None else packed.zeros
        dense = torch.from_numpy(oracle.dense(q, packed.scales, offsets.float() + 8, groups))
        perm = torch.arange(77) if packed.perm is None else packed.perm.long()
        assert (packed.perm is None) == (act_order is None)
        assert sorted(perm[perm >= 0].tolist()) == list(range(77))
        ours = torch.zeros(19, 77, dtype=F64)
        ours[:, perm[perm >= 0]] = dense[:, perm >= 0]
        torch.testing.assert_close(ours, torch.from_numpy(call.dense), rtol=1e-6, atol=1e-6)
        if packed.perm is not None:
            assert columns % packed.group_size == 0
        again = Int4Weight._of_packed(
            (layout, 1), packed, call.weight.scales, call.weight.zeros, call.weight.g_idx, group_size=16
        )
        assert_same(again, call.weight)


def test_equal_groups_waste_no_column() -> None:
    """GPTQ's usual act-order: every group has group_size columns, only elsewhere."""
    for group_size in (32, 64, 128):
        w = make(Case(in_features=512, group_size=group_size, act_order="shuffled")).weight
        packed = w.pack("cpu")
        assert len(packed.perm) == 512 and packed.group_size == group_size


def test_zero_points_of_eight_are_left_out() -> None:
    w = Int4Weight(**good())
    assert w.pack("cpu").zeros is None
    assert w.zeros is not None
    w = Int4Weight(**good(zeros=torch.full((4, 6), 9, dtype=U8)))
    assert w.pack("cpu").zeros.dtype == F16 and (w.pack("cpu").zeros == 1).all()


def test_packing_happens_once_per_layout() -> None:
    w = Int4Weight(**good())
    assert w.pack("cpu") is w.pack("cpu") and w.pack("gpu") is w.pack("gpu")
    assert w.pack("cpu").weight.dtype == U8 and w.pack("gpu").weight.dtype == torch.int32
    assert w.pack() is w.pack("cpu")
    with torch_kernels.use_backend("triton"):
        assert w.pack() is w.pack("gpu")
    with pytest.raises(ValueError, match="Int4Weight.pack: layout must be 'cpu' or 'gpu', got 'tpu'"):
        w.pack("tpu")


# ---- travel ----


def various() -> list[Int4Weight]:
    cases = [Case(zeros=zeros, act_order=act_order) for zeros in (None, "int", "float") for act_order in ACT_ORDERS]
    return [make(case).weight for case in cases]


@pytest.mark.parametrize("w", various(), ids=repr)
def test_copies(w: Int4Weight) -> None:
    w.pack("cpu")
    buffer = io.BytesIO()
    torch.save(w.state_dict(), buffer)
    buffer.seek(0)
    copies = {
        "state_dict": Int4Weight.from_state_dict(w.state_dict()),
        "torch.save": Int4Weight.from_state_dict(torch.load(buffer, weights_only=True)),
        "pickle": pickle.loads(pickle.dumps(w)),
        "deepcopy": copy.deepcopy(w),
    }
    for other in copies.values():
        assert_same(other, w)
        assert not other._packed, "packed tensors depend on the machine"
    assert copies["deepcopy"].qweight.data_ptr() != w.qweight.data_ptr()
    assert set(w.state_dict()) <= {"qweight", "scales", "zeros", "g_idx", "in_features", "group_size"}


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    transposed = good(scales=torch.rand(6, 4).T, zeros=None)
    for w in (*various(), Int4Weight(**transposed)):
        file = tmp_path / "weight.safetensors"
        safetensors.save_file({name: torch.as_tensor(value) for name, value in w.state_dict().items()}, file)
        assert_same(Int4Weight.from_state_dict(safetensors.load_file(file)), w)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": None}, r"missing \['scales'\]"),
        ({"weight": torch.zeros(1)}, r"unexpected \['weight'\]"),
        ({"in_features": torch.tensor([1, 2])}, "in_features"),
        ({"in_features": 50.5}, "in_features"),
    ],
)
def test_wrong_state_dict(changes: dict[str, Any], message: str) -> None:
    state = {name: value for name, value in (good() | changes).items() if value is not None}
    with pytest.raises((ValueError, TypeError), match=message):
        Int4Weight.from_state_dict(state)


def test_none_in_a_state_dict_is_absent() -> None:
    assert_same(Int4Weight.from_state_dict(good(zeros=None)), Int4Weight(**good(zeros=None)))


def test_to() -> None:
    w = Int4Weight(**good())
    assert w.to("cpu") is w and w.to(torch.device("cpu")) is w
    w.pack("cpu")
    meta = w.to("meta")
    assert meta.qweight.is_meta and meta.scales.is_meta and meta.zeros.is_meta and not meta._packed
    for wrong in (torch.float16, F64):
        with pytest.raises(TypeError, match=re.escape("Int4Weight.to: device must be a device")):
            w.to(wrong)
    if torch.cuda.is_available():
        assert_same(w.to("cuda").to("cpu"), w)
        assert w.to("cuda").scales.dtype == w.scales.dtype
