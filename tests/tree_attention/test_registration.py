# SPDX-License-Identifier: Apache-2.0
"""The ops as torch sees them: schemas, fakes, compilation, and the public functions."""

from __future__ import annotations

import pytest
import torch
import torch_kernels
from torch_kernels.tree_attention.heuristics import prefers_triton

from ..backends import Backend


def test_compiled_function_keeps_working_for_other_sizes(any_backend: Backend) -> None:
    torch.compiler.reset()
    function = torch.compile(
        lambda parents, lengths: torch_kernels.tree_positions(parents, lengths) + 1,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    with torch_kernels.use_backend(any_backend.name):
        for nodes in (3, 5, 9):
            parents = torch.arange(-1, nodes - 1, dtype=torch.int32, device=any_backend.device)[None]
            lengths = torch.tensor([4], dtype=torch.int32, device=any_backend.device)
            assert function(parents, lengths)[0].tolist() == list(range(5, nodes + 5))


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="nonsense"), torch_kernels.use_backend("nonsense"):
        pass


def test_triton_serves_many_rows_where_it_was_measured_faster() -> None:
    assert prefers_triton(64, torch.bfloat16, "sm_90") and prefers_triton(17, torch.float16, "sm_90")
    assert not prefers_triton(16, torch.bfloat16, "sm_90")
    assert not any(prefers_triton(1024, torch.bfloat16, arch) for arch in ("sm_80", "sm_89", "sm_100", "sm_120"))
    assert not prefers_triton(1024, torch.float32, "sm_90")
