# SPDX-License-Identifier: Apache-2.0
"""The ops as torch sees them: schemas, fakes, compilation, and the public functions."""

from __future__ import annotations

import torch
import torch_kernels
from torch import Tensor

from ..backends import Backend
from ..tolerance import assert_bitwise


def test_training_compiles_without_a_break(any_backend: Backend) -> None:
    """Select, attend and stretch, forward and backward, for several lengths."""
    torch.compiler.reset()

    def loss(q: Tensor, scores: Tensor, widths: Tensor) -> Tensor:
        cells = torch_kernels.sea_select(scores, widths, k=2)
        out, _ = torch_kernels.sea_attention(q, q + 1, q * 2, cells, widths, num_cells=4)
        stretched = torch_kernels.sea_stretch(scores, widths, length=q.shape[1])
        return out.square().sum() + stretched.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with any_backend.forced():
        for tokens in (3, 5, 8):
            q = torch.randn(1, tokens, 2, 8, device=any_backend.device, requires_grad=True)
            scores = torch.randn(1, 2, tokens, 4, device=any_backend.device, requires_grad=True)
            widths = torch.arange(1, tokens + 1, device=any_backend.device)[None]
            grads = [torch.autograd.grad(f(q, scores, widths), (q, scores)) for f in (compiled, loss)]
            for x, y in zip(*grads, strict=True):
                assert_bitwise("gradient", x, y)
