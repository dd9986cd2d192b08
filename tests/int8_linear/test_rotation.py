# SPDX-License-Identifier: Apache-2.0
"""hadamard_transform and rotate_quantize against explicit matrices in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch_kernels
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend, for_all
from ..strategies import lay_out, seeds
from ..tolerance import assert_accurate, assert_bitwise, ulp
from . import oracle
from .cases import F32, INT8_LAYOUTS, dtypes

SMALL = (1, 2, 4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192)
LARGE = (256, 320, 384, 640, 768, 1024, 1536)


def sizes(backend: Backend) -> tuple[int, ...]:
    return SMALL if backend.slow else SMALL + LARGE


def matrix(n: int) -> Tensor:
    return torch.from_numpy(oracle.hadamard(n)).double()


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_transform(backend: Backend, x: Tensor, scale: float | None = None) -> None:
    n = x.shape[-1]
    factor = 1 / math.sqrt(n) if scale is None else scale
    y = backend("hadamard_transform", x, scale=scale)
    assert y.dtype == x.dtype and y.shape == x.shape
    truth = x.cpu().double() @ matrix(n) * factor
    plain = ((x.cpu().float() @ matrix(n).float()) * factor).to(x.dtype)
    assert_accurate("y", y, truth, plain, floor=2 * ulp(float(truth.abs().max()) if truth.numel() else 0.0, F32))


def test_the_oracles_matrices_are_symmetric_and_orthogonal() -> None:
    for n in (1, 2, 12, 20, 40, 48):
        h = oracle.hadamard(n)
        assert (h == h.T).all() and (h @ h == n * np.eye(n)).all() and (h[0] == 1).all() and (np.abs(h) == 1).all()


def test_every_size(backend: Backend) -> None:
    for n in sizes(backend):
        check_transform(backend, normal(n, 2, n).to(backend.device))


@pytest.mark.parametrize("n", [2048, 2560, 4096, 5120, 12288])
def test_long_rows(backend: Backend, n: int) -> None:
    """Too long for a matrix of float64: the two factors of the Kronecker product, one after the other."""
    if backend.slow:
        pytest.skip("minutes on this backend")
    base = next(b for b in (20, 12, 1) if n % b == 0)
    x = normal(n, 3, n)
    truth = matrix(base) @ x.double().view(3, base, n // base) @ matrix(n // base) / math.sqrt(n)
    plain = matrix(base).float() @ x.view(3, base, n // base) @ matrix(n // base).float() / math.sqrt(n)
    assert_accurate("y", backend("hadamard_transform", x.to(backend.device)), truth.view(3, n), plain.view(3, n))


@pytest.mark.parametrize("power", [13, 14, 15])
def test_columns_of_long_matrices(backend: Backend, power: int) -> None:
    if backend.slow:
        pytest.skip("minutes on this backend")
    # One column of the matrix: a unit vector's transform.
    n = 2**power
    for dtype in dtypes(backend):
        x = torch.zeros(3, n, dtype=dtype, device=backend.device)
        x[1, 5], x[2, n - 2] = 4.0, -4.0
        index = torch.arange(n)
        parity = torch.zeros(2, n, dtype=torch.int64)
        for bit in range(power):
            for row, column in enumerate((5, n - 2)):
                parity[row] += (index >> bit & 1) * (column >> bit & 1)
        y = backend("hadamard_transform", x, scale=1.0).cpu()
        assert not y[0].any()
        assert_bitwise("y", y[1:], (torch.tensor([[4.0], [-4.0]]) * (1 - 2 * (parity % 2))).to(dtype))


@for_all(
    n=st.sampled_from([1, 4, 12, 20, 32, 40, 96, 128]),
    lead=st.sampled_from([(), (0,), (1,), (3,), (2, 5), (2, 1, 2), (67,)]),
    layout=st.sampled_from([*INT8_LAYOUTS, "expanded"]),
    which=st.integers(0, 2),
    scale=st.sampled_from([None, 1.0, -0.3]),
    seed=seeds,
    examples=40,
)
def test_transform(
    backend: Backend, n: int, lead: tuple[int, ...], layout: str, which: int, scale: float | None, seed: int
) -> None:
    dtype = dtypes(backend)[which % len(dtypes(backend))]
    x = normal(seed, *(min(size, 5) for size in lead) if backend.slow else lead, n).to(dtype).to(backend.device)
    check_transform(backend, lay_out(x, layout if lead else "contiguous"), scale)


@pytest.mark.parametrize("n", [16, 48, 80, 160])
def test_small_integers_transform_exactly(backend: Backend, n: int) -> None:
    x = torch.randint(-4, 5, (5, n), generator=torch.Generator().manual_seed(n))
    truth = x @ torch.from_numpy(oracle.hadamard(n))
    for dtype in dtypes(backend):
        y = backend("hadamard_transform", x.to(dtype).to(backend.device), scale=1.0)
        assert_bitwise("y", y, truth.to(dtype))


@pytest.mark.parametrize("n", [16, 24, 40])
def test_orthonormal(backend: Backend, n: int) -> None:
    eye = torch.eye(n, device=backend.device)
    h = backend("hadamard_transform", eye)
    torch.testing.assert_close(h, h.T, rtol=0, atol=0)
    torch.testing.assert_close(h @ h, eye, rtol=0, atol=1e-6)
    x = normal(0, 3, n).to(backend.device)
    twice = backend("hadamard_transform", backend("hadamard_transform", x))
    torch.testing.assert_close(twice, x, rtol=0, atol=2e-6)


def test_rows_do_not_depend_on_each_other(backend: Backend) -> None:
    for n in (12, 32) if backend.slow else (12, 32, 160, 1536):
        x = normal(n, 9, n).to(backend.device)
        y, (q, scale) = backend("hadamard_transform", x), backend("rotate_quantize", x)
        clean = y, q, scale
        for rows in (1, 2, 8):
            assert_bitwise("y", backend("hadamard_transform", x[:rows]), y[:rows])
            part = backend("rotate_quantize", x[:rows])
            assert_bitwise("q", part[0], q[:rows])
            assert_bitwise("scale", part[1], scale[:rows])
        x[4, 3] = math.nan
        others = [0, 1, 2, 3, 5, 6, 7, 8]
        y, (q, scale) = backend("hadamard_transform", x), backend("rotate_quantize", x)
        assert y[4].isnan().all() and scale[4].isnan()
        for now, before in zip((y, q, scale), clean):
            assert_bitwise("other rows", now[others], before[others])


def test_gradient_is_the_transform(backend: Backend) -> None:
    for dtype in dtypes(backend):
        x = normal(0, 2, 3, 24).to(dtype).to(backend.device).requires_grad_()
        grad = normal(1, 2, 3, 24).to(dtype).to(backend.device)
        with torch_kernels.use_backend(backend.name):
            torch_kernels.hadamard_transform(x, scale=0.25).backward(grad)
        assert_bitwise("dx", x.grad, backend("hadamard_transform", grad, scale=0.25))
    # The identity behind it: <y, H x> = <H y, x>.
    h = matrix(24)
    assert (h == h.T).all()


def test_gradient_of_the_gradient(any_backend: Backend) -> None:
    x = normal(0, 2, 12).to(any_backend.device).requires_grad_()
    with torch_kernels.use_backend(any_backend.name):
        (dx,) = torch.autograd.grad(torch_kernels.hadamard_transform(x).pow(2).sum() / 2, x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.sum(), x)
    torch.testing.assert_close(dx, x, rtol=0, atol=2e-6)
    torch.testing.assert_close(ddx, torch.ones_like(x), rtol=0, atol=2e-6)


# ---- rotate_quantize ----


def rotated(x: Tensor, signs: Tensor | None, smooth: Tensor | None) -> Tensor:
    r = x.cpu().double()
    r = r if signs is None else r * signs.cpu().double()
    r = r @ matrix(x.shape[-1]) / math.sqrt(x.shape[-1])
    return r if smooth is None else r / smooth.cpu().double()


@for_all(
    n=st.sampled_from([1, 2, 12, 20, 32, 40, 64, 96, 160]),
    lead=st.sampled_from([(), (0,), (1,), (5,), (2, 3), (2, 1, 2)]),
    layout=st.sampled_from(INT8_LAYOUTS),
    which=st.integers(0, 2),
    bits=st.integers(2, 8),
    options=st.tuples(*[st.booleans()] * 3),
    seed=seeds,
    examples=60,
)
def test_rotate_quantize(
    backend: Backend,
    n: int,
    lead: tuple[int, ...],
    layout: str,
    which: int,
    bits: int,
    options: tuple[bool, bool, bool],
    seed: int,
) -> None:
    dtype, device = dtypes(backend)[which % len(dtypes(backend))], backend.device
    x = lay_out(normal(seed, *lead, n).to(dtype).to(device), layout if lead else "contiguous")
    signs = (normal(seed + 1, n).sign().to(dtype if seed % 2 else torch.int8).to(device)) if options[0] else None
    smooth = (normal(seed + 2, n).abs() + 0.1).to(device) if options[1] else None
    x_scale = torch.full((1,), 0.05, device=device) if options[2] else None
    q, scale = backend("rotate_quantize", x, signs=signs, smooth=smooth, x_scale=x_scale, bits=bits)
    assert (q.dtype, scale.dtype, q.shape, scale.shape) == (torch.int8, F32, x.shape, x.shape[:-1])

    limit = 2 ** (bits - 1) - 1
    r = rotated(x, signs, smooth)
    q, scale = q.cpu().double(), scale.cpu().double()
    if x_scale is None:
        expected = r.abs().amax(-1) / limit
        assert ((scale - expected).abs() <= 4e-6 * expected).all()
        assert (q.abs().amax(-1) == limit).all(), "the largest value takes the largest integer"
    else:
        assert_bitwise("scale", scale.float(), x_scale.cpu()[0].expand(lead))
    assert (q.abs() <= limit).all()
    # r is float32 on the way, so a value may fall on either side of a half, but no farther.
    slack = 0.5 + 4e-6 * (r.abs() / scale[..., None]).amax() if r.numel() else 0.5
    steps = (r / scale[..., None]).clamp(-limit, limit)
    assert ((q - steps).abs() <= slack).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_exact_rotations_round_exactly(backend: Backend, bits: int) -> None:
    """Integers, n a power of four, factors of two: r is exact whatever the order, so q is known to the last bit."""
    generator = torch.Generator().manual_seed(bits)
    x = torch.randint(-9, 10, (8, 64), generator=generator).float()
    x[3] = 0
    signs = torch.randint(2, (64,), generator=generator).float() * 2 - 1
    smooth = torch.exp2(torch.randint(-2, 3, (64,), generator=generator).float())
    r = rotated(x, signs, smooth).float().numpy()
    limit = 2 ** (bits - 1) - 1
    for x_scale in (None, torch.tensor([0.25])):
        true_scale = np.abs(r).max(-1) / np.float32(limit) if x_scale is None else np.full(8, 0.25, np.float32)
        true_q = torch.from_numpy(oracle.round_to_integers(r, true_scale, limit)).to(torch.int8)
        for dtype in dtypes(backend):
            arguments = {"signs": signs.to(backend.device), "smooth": smooth.to(backend.device)}
            arguments |= {"x_scale": None if x_scale is None else x_scale.to(backend.device), "bits": bits}
            q, scale = backend("rotate_quantize", x.to(dtype).to(backend.device), **arguments)
            assert_bitwise("q", q, true_q)
            assert_bitwise("scale", scale, torch.from_numpy(true_scale))


def test_rotated_values_are_not_rounded_to_sixteen_bits(backend: Backend) -> None:
    # 256 + 1 needs nine bits, one more than bfloat16 has, and 2048 + 1 twelve, one more than float16.
    for dtype, large in ((torch.bfloat16, 256.0), (torch.float16, 2048.0)):
        if dtype in dtypes(backend):
            x = torch.tensor([[large, 1.0, 0.0, 0.0]], dtype=dtype, device=backend.device)
            _, scale = backend("rotate_quantize", x)
            assert scale.item() == np.float32((large + 1) / 2) / np.float32(127)


def test_static_scale_saturates(backend: Backend) -> None:
    x = torch.zeros(2, 16, device=backend.device)
    x[:, 0] = torch.tensor([400.0, -1e30])
    for bits in (2, 4, 8):
        q, _ = backend("rotate_quantize", x, x_scale=torch.full((1,), 0.5, device=backend.device), bits=bits)
        limit = 2 ** (bits - 1) - 1
        assert (q[0] == limit).all() and (q[1] == -limit).all()


@pytest.mark.parametrize("special", [math.nan, math.inf])
@pytest.mark.parametrize("static", [False, True])
def test_a_row_that_is_not_finite_has_no_finite_scale(backend: Backend, special: float, static: bool) -> None:
    x = normal(0, 3, 16).to(backend.device)
    x[1, 7] = special
    x_scale = torch.full((1,), 0.5, device=backend.device) if static else None
    q, scale = backend("rotate_quantize", x, x_scale=x_scale)
    assert not scale[1].isfinite() and scale[[0, 2]].isfinite().all() and not q[1].any()


def test_a_rotated_product_is_the_product(backend: Backend) -> None:
    """(x S H)(W S H)^T = x W^T: quantised at 8 bits it is close, with smoothing folded into the weight too."""
    n, device = 96, backend.device
    x, dense = normal(0, 7, n), normal(1, 13, n)
    x[:, 11] *= 100  # what rotation is for
    signs, smooth = normal(2, n).sign(), normal(3, n).abs() + 0.5
    w = torch_kernels.Int8Weight.quantize((rotated(dense, signs, None) * smooth.double()).float())
    q, scale = backend("rotate_quantize", x.to(device), signs=signs.to(device), smooth=smooth.to(device))
    y = backend("int8_mm", q, w.weight.to(device)).cpu() * scale.cpu()[:, None] * w.scale
    truth = x.double() @ dense.double().T
    assert float((y - truth).norm() / truth.norm()) < 0.02
