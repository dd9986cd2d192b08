# SPDX-License-Identifier: Apache-2.0
"""int8_quantize and int8_mm, to the last bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend, for_all
from ..strategies import lay_out, seeds
from ..tolerance import assert_bitwise
from . import oracle
from .cases import BF16, F16, F32, INT8_LAYOUTS, THRESHOLD, cases, dtypes, make


def check(backend: Backend, x: Tensor, threshold: float = 0.0) -> None:
    q, scale, outliers = backend("int8_quantize", x, threshold=threshold)
    assert (q.dtype, scale.dtype, outliers.dtype) == (torch.int8, F32, torch.bool)
    true_q, true_scale, true_outliers = oracle.quantize(x, threshold)
    assert_bitwise("outliers", outliers, torch.from_numpy(true_outliers))
    assert_bitwise("scale", scale, torch.as_tensor(true_scale))
    assert_bitwise("q", q, torch.from_numpy(true_q).to(torch.int8))


@for_all(data=st.data(), examples=60)
def test_matches_definition(backend: Backend, data: st.DataObject) -> None:
    arguments = make(data.draw(cases(backend)), backend.device)
    check(backend, arguments["x"], arguments.get("threshold", 0.0))


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (2, 0, 7), (2, 2, 2, 7), (3, 0), (0, 0)])
def test_shapes(backend: Backend, shape: tuple[int, ...]) -> None:
    x = torch.linspace(-7, 7, math.prod(shape)).reshape(shape).to(backend.device)
    for threshold in (0.0, THRESHOLD):
        check(backend, x, threshold)
    check(backend, x.transpose(0, -1))


def test_rounds_half_to_even(backend: Backend) -> None:
    for dtype in dtypes(backend):
        for step in (1.0, 0.5, 3.0):  # a step of 3 is where a product by its reciprocal goes wrong
            halves = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5, 62.5, -63.5]
            x = torch.tensor([[127.0, *halves]], device=backend.device) * step
            q, scale, _ = backend("int8_quantize", x.to(dtype))
            assert scale.tolist() == [step] or dtype != F32
            if scale.tolist() == [step]:
                assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 4, 62, -64]]
            check(backend, x.to(dtype))


def test_all_representable_numbers_of_sixteen_bits(backend: Backend) -> None:
    for dtype in dtypes(backend):
        if dtype == F32:
            continue
        x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[x.isfinite()].reshape(-1, 64 if backend.slow else 8)[:: 16 if backend.slow else 1]
        check(backend, x.to(backend.device))


def test_never_minus_128(backend: Backend) -> None:
    x = torch.tensor([[-3.7, 0.1], [3.7, -3.7], [-1e-30, 0.0], [-3e38, 1.0]], device=backend.device)
    q, _, _ = backend("int8_quantize", x)
    assert q.amin(1).tolist() == [-127] * 4


def test_threshold_counts_equality_infinity_but_not_nan(backend: Backend) -> None:
    x = torch.tensor([[6.0, 5.9, -6.0, math.nan, 1.0], [1.0, 2.0, 3.0, 4.0, -math.inf]], device=backend.device)
    q, scale, outliers = backend("int8_quantize", x, threshold=6.0)
    assert outliers.tolist() == [True, False, True, False, True]
    assert scale[0].isnan() and scale[1] == np.float32(4) / np.float32(127)
    assert q[1].tolist() == [0, 64, 0, 127, 0]  # 2 of 4 is 63.5 steps


def test_numbers_below_the_threshold_in_outlier_columns_count_for_the_scale(backend: Backend) -> None:
    x = torch.tensor([[9.0, 1.0], [5.0, 2.0]], device=backend.device)
    q, scale, _ = backend("int8_quantize", x, threshold=6.0)
    assert (scale * 127).tolist() == pytest.approx([1.0, 5.0])
    assert q.tolist() == [[0, 127], [0, 51]]


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_alone(backend: Backend, special: float) -> None:
    for dtype in dtypes(backend):
        x = torch.randn(6, 67, generator=torch.Generator().manual_seed(1)).to(dtype).to(backend.device)
        clean = backend("int8_quantize", x)
        x[2, 66] = special
        q, scale, outliers = backend("int8_quantize", x)
        assert not scale[2].isfinite() and not outliers.any() and not q[2].any()
        others = [0, 1, 3, 4, 5]
        assert_bitwise("q", q[others], clean[0][others])
        assert_bitwise("scale", scale[others], clean[1][others])


def test_scales_at_the_ends_of_float32(backend: Backend) -> None:
    rows = [[3.4e38, 1e37, -3e38], [1e-38, 3e-39, -7e-39], [0.0, -0.0, 0.0], [1e38, 1e-38, 1.0]]
    tiny = 2.0**-149  # 50 of these are too few for a scale, 190 are more than 127 of the smallest scale
    rows += [[100 * tiny, 7 * tiny, -3 * tiny], [50 * tiny, 0, 0], [190 * tiny, 60 * tiny, -189 * tiny]]
    check(backend, torch.tensor(rows, dtype=torch.float64).float().to(backend.device))
    for dtype in set(dtypes(backend)) - {F32}:
        info = torch.finfo(dtype)
        x = torch.tensor([[info.max, 1.0], [info.smallest_normal, 0.0], [-info.max, info.max]]).to(dtype)
        check(backend, x.to(backend.device))


def test_zero_rows(backend: Backend) -> None:
    for dtype in dtypes(backend):
        q, scale, outliers = backend("int8_quantize", torch.zeros(3, 40, dtype=dtype, device=backend.device))
        assert not q.any() and not scale.any() and not outliers.any()


# ---- int8_mm ----


def test_mm_equals_python_integers(backend: Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, inputs, outputs in ((1, 1, 1), (2, 37, 3), (3, 64, 5), (5, 130, 2)):
        a = torch.randint(-128, 128, (rows, inputs), dtype=torch.int8, generator=generator)
        b = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
        got = backend("int8_mm", a.to(backend.device), b.to(backend.device))
        assert got.dtype == torch.int32
        assert got.tolist() == [[sum(x * y for x, y in zip(r, c)) for c in b.tolist()] for r in a.tolist()]


@for_all(
    sizes=st.tuples(*[st.sampled_from([0, 1, 2, 3, 8, 15, 16, 17, 31, 33, 64, 65, 100, 129])] * 3),
    layouts=st.tuples(*[st.sampled_from(INT8_LAYOUTS)] * 2),
    kind=st.sampled_from(["random", "lowest", "highest", "alternating"]),
    seed=seeds,
    examples=60,
)
def test_mm(backend: Backend, sizes: tuple[int, int, int], layouts: tuple[str, str], kind: str, seed: int) -> None:
    rows, inputs, outputs = (min(size, 33) for size in sizes) if backend.slow else sizes
    generator = torch.Generator().manual_seed(seed)

    def matrix(count: int) -> Tensor:
        x = torch.randint(-128, 128, (count, inputs), dtype=torch.int8, generator=generator)
        if kind != "random":
            # Pairs of extreme products are where 16-bit partial sums saturate.
            x.fill_(127 if kind == "highest" else -128)
        if kind == "alternating":
            x[:, ::2] = 127
        return x.to(backend.device)

    a, b = matrix(rows), matrix(outputs)
    truth = torch.from_numpy(oracle.products(oracle.array(a).astype(np.int64), b)).to(torch.int32)
    assert_bitwise("out", backend("int8_mm", lay_out(a, layouts[0]), lay_out(b, layouts[1])), truth)


@pytest.mark.parametrize("distance", [4, 8, 12, 20, 32])
def test_mm_of_rows_that_end_anywhere(backend: Backend, distance: int) -> None:
    """What lies between two rows is in neither, whatever copies their distance allows."""
    generator = torch.Generator().manual_seed(distance)
    a, b = (
        torch.randint(-128, 128, (count, distance), dtype=torch.int8, generator=generator).to(backend.device)
        for count in (5, 9)
    )
    for inputs in range(max(distance - 7, 0), distance):
        truth = a[:, :inputs].cpu().int() @ b[:, :inputs].cpu().int().T
        assert_bitwise(f"{inputs} columns", backend("int8_mm", a[:, :inputs], b[:, :inputs]), truth)


def test_mm_of_a_long_sum(backend: Backend) -> None:
    # The largest K whose sums cannot leave int32: 2^31 - 2^14 is no float32 number.
    inputs = 4099 if backend.slow else 2**17 - 1
    a = torch.full((2, inputs), -128, dtype=torch.int8, device=backend.device)
    a[1, 5] = 1
    got = backend("int8_mm", a, torch.full((3, inputs), -128, dtype=torch.int8, device=backend.device))
    assert got.tolist() == [[inputs * 2**14] * 3, [(inputs - 1) * 2**14 - 128] * 3]


def test_mm_larger(backend: Backend) -> None:
    if backend.slow:
        pytest.skip("other tests cover every tile edge")
    generator = torch.Generator().manual_seed(3)
    for rows, inputs, outputs in ((1, 2048, 300), (70, 1030, 200), (260, 512, 140), (513, 96, 65)):
        a = torch.randint(-128, 128, (rows, inputs), dtype=torch.int8, generator=generator).to(backend.device)
        b = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8, generator=generator).to(backend.device)
        exact = a.cpu().double() @ b.cpu().double().T
        assert_bitwise("out", backend("int8_mm", a, b), exact.to(torch.int32))


def test_bfloat16_and_float16_are_tested_where_they_can_be(backend: Backend) -> None:
    assert F16 in dtypes(backend) and (BF16 in dtypes(backend) or backend.name == "triton")
