# SPDX-License-Identifier: Apache-2.0
"""Random features: a product with the projections, and what makes features of it, in one pass."""

import triton
import triton.language as tl

from torch_kernels._triton import architecture, on_device

from ..heuristics import features_tile


@triton.jit(do_not_specialize=["rows", "tokens"])
def features_kernel(
    out, x, proj, shift, factor, scale, eps, rows, tokens, heads,
    x_stride_b, x_stride_t, x_stride_h, shift_stride_b, shift_stride_t, shift_stride_h, features,
    D: tl.constexpr, EXPONENTIAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, feature tiles) over rows [B, T, H]."""
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    feature = tl.program_id(1) * N + tl.arange(0, N)
    exists, wanted = row < rows, feature < features
    head, token, batch = row % heads, row // heads % tokens, row // heads // tokens
    x += batch * x_stride_b + token * x_stride_t + head * x_stride_h
    projected = tl.zeros((M, N), tl.float32)
    square = tl.zeros((M,), tl.float32)
    for first in range(0, D, CHUNK):
        d = first + tl.arange(0, CHUNK)
        a = tl.load(x[:, None] + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0.0)
        w = tl.load(proj + feature[:, None] * D + d[None, :], mask=wanted[:, None] & (d < D)[None, :], other=0.0)
        projected = tl.dot(a.to(w.dtype), tl.trans(w), projected, input_precision="ieee")
        if EXPONENTIAL:
            square += tl.sum(a.to(tl.float32) * a.to(tl.float32), axis=1)
    projected *= factor
    if EXPONENTIAL:
        exponent = projected - (square * (factor * factor * 0.5))[:, None]
        if shift is not None:
            offset = batch * shift_stride_b + token * shift_stride_t + head * shift_stride_h
            exponent -= tl.load(shift + offset, mask=exists, other=0.0).to(tl.float32)[:, None]
        result = (tl.exp(exponent) + eps) * scale
    else:
        # NaN remains.
        result = tl.where(projected < 0, 0.0, projected) + eps
    target = out + row[:, None] * features + feature[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=exists[:, None] & wanted[None, :])


def favor_features(out, x, proj, kind, eps, shift):
    batch, tokens, heads, size = x.shape
    if out.numel() == 0:
        return
    proj, rows = proj.contiguous(), batch * tokens * heads
    tile = features_tile(proj.element_size(), architecture(x.device))
    shift_strides = (0, 0, 0) if shift is None else shift.expand(batch, tokens, heads, 1).stride()[:3]
    with on_device(x):
        features_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(proj.shape[0], tile.columns))](
            out, x, proj, shift, size**-0.25, proj.shape[0] ** -0.5, float(eps), rows, tokens, heads,
            *x.stride()[:3], *shift_strides, proj.shape[0],
            D=size, EXPONENTIAL=kind == "exp", M=tile.rows, N=tile.columns, CHUNK=32,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
