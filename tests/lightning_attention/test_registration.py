# SPDX-License-Identifier: Apache-2.0
"""The ops as torch sees them: schemas, fakes, compilation, and the public functions."""

from __future__ import annotations

import torch
import torch_kernels

from ..backends import Backend, need
from ..tolerance import assert_bitwise


def test_compiled_function_keeps_working_for_other_sizes(any_backend: Backend) -> None:
    need(any_backend, "lightning_attention")
    torch.compiler.reset()
    function = torch.compile(
        lambda q, slopes: torch_kernels.lightning_attention(q, q, q, slopes)[0] + 1,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    slopes = torch.tensor([0.5, 0.1], device=any_backend.device)
    with any_backend.forced():
        for tokens in (3, 5, 9):
            q = torch.ones(1, tokens, 2, 8, device=any_backend.device)
            expected = torch_kernels.lightning_attention(q, q, q, slopes)[0] + 1
            assert_bitwise("out", function(q, slopes), expected)
