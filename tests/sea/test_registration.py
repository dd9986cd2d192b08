# SPDX-License-Identifier: Apache-2.0
"""The ops as torch sees them: schemas, fakes, compilation, and the public functions."""

from __future__ import annotations

import pytest
import torch
import torch_kernels
from torch import Tensor
from torch_kernels._registry import OPS, CannotServe, interpreting_triton

from ..backends import F16, Backend
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


@pytest.mark.skipif(not interpreting_triton(), reason="needs Triton's interpreter")
def test_triton_refuses_cells_of_columns_beyond_32_bits() -> None:
    """A row of one column among rows of many: counted in its cells, those columns would wrap around."""
    cells, keys = 1 << 15, 1 << 16
    q, k = torch.zeros(1, 16, 1, 8, dtype=F16), torch.zeros(1, 1, 1, 8, dtype=F16).expand(1, keys, 1, 8)
    words, widths = torch.zeros(1, 16, cells // 32, dtype=torch.int32), torch.zeros(1, 16, dtype=torch.int32)
    triton = Backend("triton", "cpu", (F16,), slow=True)
    with pytest.raises(CannotServe, match="up to 65536 keys"):
        triton("sea_attention", q, k, k, words, widths, num_cells=cells)
    with pytest.raises(CannotServe, match="up to 65536 keys"):
        triton("sea_attention_backward", q, q, k, k, q, q.float()[..., 0].mT, words, widths, num_cells=cells)
    fewer = k[:, 1:]
    with triton.forced():
        gates = None, None, None
        assert OPS["sea_attention"].backend_for(q, fewer, fewer, words, widths, cells, None, 0, *gates).name == "triton"
