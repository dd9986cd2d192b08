# SPDX-License-Identifier: Apache-2.0
"""int8_linear and its gradient: against the oracle, at the edges of number ranges, and what may not change a bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch_kernels
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend, for_all
from ..strategies import seeds
from ..tolerance import assert_accurate, assert_bitwise, ulp
from . import oracle
from .cases import F16, F32, THRESHOLD, Case, cases, dtypes, make

NAN, INF = math.nan, math.inf


def run(backend: Backend, arguments: dict[str, Any]) -> Tensor:
    positional = [arguments.get(name) for name in ("x", "weight", "weight_scale", "bias")]
    return backend(
        "int8_linear", *positional, x_scale=arguments.get("x_scale"), threshold=arguments.get("threshold", 0.0)
    )


def check(backend: Backend, arguments: dict[str, Any]) -> Tensor:
    y = run(backend, arguments)
    truth, largest = oracle.linear(**arguments)
    assert y.dtype == arguments["x"].dtype and y.device == arguments["x"].device
    plain = truth.float().to(y.dtype)
    assert_accurate("y", y, truth, plain, floor=2 * ulp(largest, F32))
    return y


@for_all(data=st.data(), examples=80)
def test_matches_truth(backend: Backend, data: st.DataObject) -> None:
    check(backend, make(data.draw(cases(backend)), backend.device))


@for_all(data=st.data(), static=st.booleans(), examples=40)
def test_integer_part_to_the_last_bit(backend: Backend, data: st.DataObject, static: bool) -> None:
    # Without outliers and bias only the agreed order of two products is left.
    case = data.draw(cases(backend, outliers=None, bias=None, static=static))
    arguments = make(case, backend.device)
    assert_bitwise("y", run(backend, arguments), oracle.scaled_products(**arguments))


@pytest.mark.parametrize("outliers", ["none", "one", "four", "all"])
def test_outlier_columns(backend: Backend, outliers: str) -> None:
    for dtype in dtypes(backend):
        case = Case(rows=7, inputs=70, outputs=21, dtype=dtype, outliers=outliers, bias=dtype, seed=5)
        arguments = make(case, backend.device)
        found = backend("int8_quantize", arguments["x"], threshold=THRESHOLD)[2]
        assert int(found.sum()) == {"none": 0, "one": 1, "four": 4, "all": 70}[outliers]
        y = check(backend, arguments)
        if outliers == "none":
            assert_bitwise("y", y, run(backend, arguments | {"threshold": 0.0}))


def test_outliers_keep_their_precision(backend: Backend) -> None:
    # A column a thousand times the others leaves no bits to them when all are rounded together.
    generator = torch.Generator().manual_seed(0)
    x, dense = torch.randn(6, 128, generator=generator), torch.randn(24, 128, generator=generator)
    x[:, 17] *= 1000
    w = torch_kernels.Int8Weight.quantize(dense)
    truth = x.double() @ w.dequantize(torch.float64).T
    arguments = {"x": x.to(backend.device), "weight": w.weight.to(backend.device)}
    arguments["weight_scale"] = w.scale.to(backend.device)
    together, apart = (run(backend, arguments | {"threshold": threshold}).cpu().double() for threshold in (0.0, 50.0))
    others = truth - x[:, 17:18].double() @ w.dequantize(torch.float64)[:, 17:18].T
    assert float((together - truth).norm() / others.norm()) > 0.5
    assert float((apart - truth).norm() / others.norm()) < 0.01


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 3), (2, 0, 3), (2, 1, 2)])
def test_leading_dimensions(backend: Backend, shape: tuple[int, ...]) -> None:
    arguments = make(Case(rows=math.prod(shape), outliers="one", bias=F32, seed=2), backend.device)
    rows = run(backend, arguments)
    y = run(backend, arguments | {"x": arguments["x"].reshape(*shape, 70)})
    assert_bitwise("y", y, rows.reshape(*shape, 19))
    if len(shape) > 1:
        x = arguments["x"].reshape(*shape, 70).transpose(0, 1)
        assert_bitwise("y", run(backend, arguments | {"x": x}).transpose(0, 1), y)


@pytest.mark.parametrize("sizes", [(0, 0, 0), (3, 0, 5), (0, 8, 5), (3, 8, 0)])
def test_sizes_of_zero(backend: Backend, sizes: tuple[int, int, int]) -> None:
    rows, inputs, outputs = sizes
    for outliers in (None, "none"):
        arguments = make(Case(rows, inputs, outputs, outliers=outliers, bias=F32), backend.device)
        y = run(backend, arguments)
        assert y.shape == (rows, outputs)
        if inputs == 0:  # an empty sum
            assert_bitwise("y", y, arguments["bias"].expand(rows, outputs))
            assert not run(backend, arguments | {"bias": None}).any()


def test_larger_sizes(backend: Backend) -> None:
    if backend.slow:
        pytest.skip("other tests cover every tile edge")
    for rows, inputs, outputs in ((1, 4100, 130), (16, 2048, 517), (70, 1500, 300), (300, 700, 260)):
        for outliers in (None, "four"):
            check(backend, make(Case(rows, inputs, outputs, F32, outliers, F32, seed=rows), backend.device))


# ---- ranges of numbers ----


def test_rows_of_zeros_give_the_bias(backend: Backend) -> None:
    for dtype in dtypes(backend):
        for extra in ({}, {"threshold": THRESHOLD}, {"x_scale": torch.full((1,), 0.1, device=backend.device)}):
            arguments = make(Case(dtype=dtype, bias=dtype), backend.device) | extra
            arguments["x"][3] = 0
            y = run(backend, arguments)
            assert_bitwise("y", y[3], arguments["bias"])
            assert not run(backend, arguments | {"bias": None})[3].any() and y.isfinite().all()


def test_a_weight_row_of_zeros_gives_the_bias(backend: Backend) -> None:
    arguments = make(Case(zeros=True, bias=F32, outliers="four"), backend.device)
    assert_bitwise("y", run(backend, arguments)[:, 0], arguments["bias"][0].expand(5))


def test_sums_beyond_float16(backend: Backend) -> None:
    """Peers compute in float16 and overflow at 65504: here only a result of float16 itself may."""
    device = backend.device
    x = torch.full((3, 64), 100.0, device=device)
    weight = torch.full((5, 64), 127, dtype=torch.int8, device=device)
    scale = torch.full((5,), 1000.0, device=device)
    for dtype in dtypes(backend):
        y = run(backend, {"x": x.to(dtype), "weight": weight, "weight_scale": scale})
        assert y.isinf().all() if dtype == F16 else float(y[0, 0]) == pytest.approx(64 * 100 * 127e3, rel=1e-2)
    # 100 * 64 * 12.7 = 81280 is no float16 number; with the bias it is one again.
    for threshold in (0.0, THRESHOLD):
        y = run(backend, {"x": x.half(), "weight": weight, "weight_scale": scale / 10000,
                          "bias": torch.full((5,), -60000.0, device=device), "threshold": threshold})  # fmt: skip
        assert y.tolist() == [[pytest.approx(21280.0, abs=16.0)] * 5] * 3
    # So do large parts of opposite sign: 406400 of outlier columns, -16000 of the others, and the bias.
    x[:, ::2] = -5.0
    weight[:, ::2] = 100
    bias = torch.full((5,), -390400.0, device=device)
    arguments = {"x": x.half(), "weight": weight, "weight_scale": scale / 1000, "bias": bias, "threshold": THRESHOLD}
    assert run(backend, arguments).abs().max() <= 0.5


@pytest.mark.parametrize("exponent", [-40, -30, -10, 10, 18])
def test_extreme_scales(backend: Backend, exponent: int) -> None:
    for dtype in set(dtypes(backend)) - {F16}:
        arguments = make(Case(dtype=dtype, seed=4), backend.device)
        arguments["x"] = (arguments["x"].double() * 10.0**exponent).to(dtype)
        arguments["weight_scale"] = (arguments["weight_scale"].double() * 10.0**-exponent).float()
        if exponent == -40:
            arguments["weight_scale"] = torch.full_like(arguments["weight_scale"], 1e38)
        assert_bitwise("y", run(backend, arguments), oracle.scaled_products(**arguments))


def test_static_scale_saturates(backend: Backend) -> None:
    for dtype in dtypes(backend):
        arguments = make(Case(rows=1, inputs=4, outputs=1, dtype=dtype), backend.device)
        arguments["x"] = torch.tensor([[1e4, -1e4, 63.75, 0.25]], dtype=dtype, device=backend.device)
        arguments["weight"] = torch.tensor([[1, -1, 2, 4]], dtype=torch.int8, device=backend.device)
        arguments |= {"weight_scale": torch.ones(1, device=backend.device)}
        arguments |= {"x_scale": torch.full((1,), 0.5, device=backend.device)}
        # 127 + 2 * 127 + 3 * rint(127.5), saturated, + 4 * rint(0.5), to even
        assert run(backend, arguments).tolist() == [[(127 + 127 + 254 + 0) * 0.5]]


def test_static_scale_of_zero_gives_the_bias(backend: Backend) -> None:
    arguments = make(Case(bias=F32), backend.device) | {"x_scale": torch.zeros(1, device=backend.device)}
    assert_bitwise("y", run(backend, arguments), arguments["bias"].expand(5, 19))


# ---- NaN and infinities ----


@pytest.mark.parametrize("special", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["dynamic", "static", "threshold"])
def test_a_row_that_is_not_finite_stays_alone(backend: Backend, special: float, kind: str) -> None:
    for dtype in dtypes(backend):
        case = Case(rows=6, dtype=dtype, bias=dtype, outliers="four" if kind == "threshold" else None)
        arguments = make(case.replace(static=kind == "static"), backend.device)
        x = arguments["x"].clone()
        x[2, 33] = special
        # An infinity makes its column an outlier column, for the others too; NaN does not.
        tame = arguments["x"].clone()
        tame[2, 33] = 0.0 if special != special or kind != "threshold" else 2 * THRESHOLD
        y, clean = run(backend, arguments | {"x": x}), run(backend, arguments | {"x": tame})
        assert not y[2].isfinite().any()
        others = [0, 1, 3, 4, 5]
        assert_bitwise("y", y[others], clean[others])
        assert y[others].isfinite().all()


def test_nan_in_an_outlier_column(backend: Backend) -> None:
    arguments = make(Case(rows=4, outliers="one"), backend.device)
    column = int(backend("int8_quantize", arguments["x"], threshold=THRESHOLD)[2].nonzero())
    victim = next(row for row in range(4) if arguments["x"][row, column].abs() < THRESHOLD)
    arguments["x"][victim, column] = NAN
    y = run(backend, arguments)
    assert not y[victim].isfinite().any() and y[[row for row in range(4) if row != victim]].isfinite().all()


# ---- what changes no bit ----


@for_all(data=st.data())
def test_a_row_does_not_depend_on_the_others(backend: Backend, data: st.DataObject) -> None:
    case = data.draw(cases(backend, outliers=None, layout="contiguous"))
    arguments = make(case, backend.device)
    y = run(backend, arguments)
    assert_bitwise("again", run(backend, arguments), y)
    for rows in {1, 2, case.rows // 2, case.rows - 1} if case.rows > 1 else set():
        part = run(backend, arguments | {"x": arguments["x"][-rows:]})
        assert_bitwise(f"the last {rows} rows", part, y[-rows:])


@for_all(data=st.data())
def test_a_row_does_not_depend_on_others_with_the_same_outliers(backend: Backend, data: st.DataObject) -> None:
    if backend.name == "reference":
        pytest.skip("PyTorch's own products do not promise it")
    case = data.draw(cases(backend, outliers="four", layout="contiguous"))
    arguments = make(case, backend.device)
    y = run(backend, arguments)
    assert_bitwise("again", run(backend, arguments), y)
    more = torch.cat([arguments["x"], arguments["x"].flip(0)[: 1 if backend.slow else 7]])
    assert_bitwise("with more rows", run(backend, arguments | {"x": more})[: case.rows], y)


@for_all(data=st.data())
def test_layout_changes_nothing(backend: Backend, data: st.DataObject) -> None:
    case = data.draw(cases(backend, layout="contiguous", weight_layout="contiguous"))
    y = run(backend, make(case, backend.device))
    for layout in ("sliced", "strided"):
        for change in ({"layout": layout}, {"weight_layout": layout}):
            assert_bitwise(str(change), run(backend, make(case.replace(**change), backend.device)), y)


def test_scaling_by_a_power_of_two_is_exact(backend: Backend) -> None:
    arguments = make(Case(rows=6), backend.device)
    y = run(backend, arguments)
    assert_bitwise("y", run(backend, arguments | {"x": arguments["x"] * 1024}), y * 1024)


# ---- gradients ----


@for_all(
    sizes=st.tuples(*[st.sampled_from([0, 1, 2, 5, 17, 32, 65, 130])] * 3),
    which=st.integers(0, 2),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
    seed=seeds,
)
def test_backward_matches_truth(
    backend: Backend, sizes: tuple[int, int, int], which: int, layout: str, seed: int
) -> None:
    rows, inputs, outputs = (min(size, 33) for size in sizes) if backend.slow else sizes
    dtype = dtypes(backend)[which % len(dtypes(backend))]
    arguments = make(Case(outputs=outputs, inputs=inputs, weight_layout="sliced", seed=seed), backend.device)
    grad = make(Case(rows=rows, inputs=outputs, dtype=dtype, layout=layout, seed=seed + 1), backend.device)["x"]
    weight, scale = arguments["weight"], arguments["weight_scale"]
    dx = backend("int8_linear_backward", grad, weight, scale)
    scaled = grad.cpu().double() * scale.cpu().double()
    truth = scaled @ weight.cpu().double()
    plain = ((grad.cpu().float() * scale.cpu()) @ weight.cpu().float()).to(dtype)
    largest = float((scaled.abs() @ weight.cpu().double().abs()).max()) if truth.numel() and outputs else 0.0
    assert dx.dtype == dtype
    assert_accurate("dx", dx, truth, plain, floor=2 * ulp(largest, F32))


@for_all(rows=st.sampled_from([1, 2, 5, 9, 33]), seed=seeds, examples=10)
def test_backward_of_a_row_does_not_depend_on_the_others(backend: Backend, rows: int, seed: int) -> None:
    if backend.name == "reference":
        pytest.skip("PyTorch's own products do not promise it")
    arguments = make(Case(rows=34, inputs=40, seed=seed), backend.device)
    grad = make(Case(rows=34, inputs=19, seed=seed), backend.device)["x"]
    dx = backend("int8_linear_backward", grad, arguments["weight"], arguments["weight_scale"])
    part = backend("int8_linear_backward", grad[:rows], arguments["weight"], arguments["weight_scale"])
    assert_bitwise("dx", part, dx[:rows])


@pytest.mark.parametrize("special", [NAN, INF])
def test_backward_keeps_nan_in_its_row(backend: Backend, special: float) -> None:
    arguments = make(Case(), backend.device)
    grad = torch.ones(4, 19, device=backend.device)
    clean = backend("int8_linear_backward", grad, arguments["weight"], arguments["weight_scale"])
    grad[1, 7] = special
    dx = backend("int8_linear_backward", grad, arguments["weight"], arguments["weight_scale"])
    assert not dx[1].isfinite().all()
    assert_bitwise("dx", dx[[0, 2, 3]], clean[[0, 2, 3]])


def test_gradients_of_the_public_function(backend: Backend) -> None:
    for dtype in dtypes(backend):
        for bias_dtype in (dtype, F32):
            arguments = make(Case(rows=6, dtype=dtype, bias=bias_dtype, outliers="one"), backend.device)
            w = torch_kernels.Int8Weight(arguments["weight"], arguments["weight_scale"])
            x = arguments["x"].reshape(2, 3, 70).clone().requires_grad_()
            bias = arguments["bias"].clone().requires_grad_()
            with torch_kernels.use_backend(backend.name):
                y = torch_kernels.int8_linear(x, w, bias, threshold=THRESHOLD)
                grad = torch.arange(y.numel(), device=backend.device).reshape(y.shape).sin().to(dtype)
                y.backward(grad)
            assert_bitwise("y", y.reshape(6, 19), run(backend, arguments))
            assert (x.grad.dtype, bias.grad.dtype) == (dtype, bias_dtype)
            truth = grad.cpu().double() @ w.dequantize(torch.float64).cpu()
            assert_accurate("dx", x.grad, truth, truth.to(dtype), floor=2 * ulp(float(truth.abs().max()), F32))
            truth = grad.cpu().double().sum((0, 1))
            assert_accurate("dbias", bias.grad, truth, truth.to(bias_dtype), floor=2 * ulp(6.0, F32))


@pytest.mark.parametrize("wanted", ["x", "bias"])
def test_one_gradient_alone(any_backend: Backend, wanted: str) -> None:
    arguments = make(Case(bias=F32), any_backend.device)
    w = torch_kernels.Int8Weight(arguments["weight"], arguments["weight_scale"])
    arguments[wanted].requires_grad_()
    for x in (arguments["x"], arguments["x"][0], arguments["x"][:0]):
        with torch_kernels.use_backend(any_backend.name):
            y = torch_kernels.int8_linear(x, w, arguments["bias"])
            (grad,) = torch.autograd.grad(y.sum(), arguments[wanted], retain_graph=True)
        assert grad.shape == arguments[wanted].shape
        if wanted == "bias":
            assert (grad == x[..., 0].numel()).all()
