# SPDX-License-Identifier: Apache-2.0
"""torch_kernels.distributed over gloo: four processes are started once and go through the checks in workers.py."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_kernels
from torch import Tensor

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

from torch_kernels.distributed import ring  # noqa: E402

from . import workers  # noqa: E402


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    folder = tmp_path_factory.mktemp("ranks")
    with contextlib.suppress(torch.multiprocessing.ProcessExitedException):  # a check failed, as the files say
        torch.multiprocessing.start_processes(workers.run, (str(folder),), workers.WORLD, start_method="spawn")
    files = [folder / f"rank{rank}" for rank in range(workers.WORLD)]
    return [file.read_text(encoding="utf-8").split("\0") if file.exists() else ["nothing"] for file in files]


@pytest.mark.parametrize("name", workers.CHECKS)
def test_ranks(results: list[list[str]], name: str) -> None:
    for rank, checks in enumerate(results):
        assert name in checks, f"rank {rank}: {checks[-1]}"


def test_importing_the_library_leaves_dtensor_and_transformers_alone() -> None:
    """Whoever does not use them does not pay for them; the attributes are there all the same."""
    code = (
        "import sys, torch_kernels; assert not {'torch.distributed.tensor', 'transformers'} & sys.modules.keys();"
        "torch_kernels.distributed.ring_attention; assert 'torch.distributed.tensor' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
    assert "distributed" in dir(torch_kernels) and "GraphKVCache" in dir(torch_kernels.nn)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"
))])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_block_of_ring_attention(device: str, dtype: torch.dtype) -> None:
    """PyTorch's kernels, called below torch.nn.functional, with the log-sum-exp over more keys than the block's."""
    generator = torch.Generator().manual_seed(0)
    q, grad = torch.randn(2, 2, 40, 4, 16, generator=generator).to(device, dtype)
    kv = torch.randn(2, 2, 64, 2, 16, generator=generator).to(device, dtype)
    exact_q, exact_kv = (x.double().requires_grad_() for x in (q, kv))
    k, v = exact_kv.repeat_interleave(2, 3)
    scores = 0.3 * torch.einsum("bihd,bjhd->bhij", exact_q, k)
    lse = scores.logsumexp(-1)
    out = torch.einsum("bhij,bjhd->bihd", torch.exp(scores - lse[..., None]), v)
    out.backward(grad.double())
    error = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]

    def near(actual: Tensor, expected: Tensor) -> None:
        workers.assert_near(actual.double(), expected.detach(), error)

    first, first_lse = ring.block_attention(q, kv[:, :, :32], causal=False, scale=0.3)
    second, second_lse = ring.block_attention(q, kv[:, :, 32:], causal=False, scale=0.3)
    merged, merged_lse = torch_kernels.merge_attention_states(first.float(), first_lse, second.float(), second_lse)
    near(merged, out)
    near(merged_lse, lse)
    parts = [
        ring.block_attention_backward(
            grad, q, kv[:, :, keys], merged.to(dtype), merged_lse, causal=False, scale=0.3
        )
        for keys in (slice(0, 32), slice(32, 64))
    ]  # fmt: skip
    near(parts[0][0].float() + parts[1][0].float(), exact_q.grad)
    near(torch.cat([part[1] for part in parts], 2), exact_kv.grad)
