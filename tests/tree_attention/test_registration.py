# SPDX-License-Identifier: Apache-2.0
"""The ops as torch sees them: schemas, fakes, compilation, and the public functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_kernels
from torch import Tensor
from torch_kernels.tree_attention.heuristics import prefers_triton

from ..backends import Backend
from ..tolerance import assert_bitwise
from .cases import FP8
from .samples import samples

VERIFIED = "(Tensor path, Tensor num_accepted, Tensor tokens)"
CACHES = "Tensor(a!) k_cache, Tensor(b!) v_cache"
SCHEMAS = {
    "tree_attention": "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor prefix_lens, Tensor parents, *, "
    "Tensor? k_tree=None, Tensor? v_tree=None, Tensor? block_table=None, float? scale=None, float softcap=0., "
    "int window=0, Tensor? sinks=None, Tensor? k_scale=None, Tensor? v_scale=None) -> (Tensor out, Tensor lse)",
    "tree_mask": "(Tensor parents) -> Tensor",
    "tree_positions": "(Tensor parents, Tensor prefix_lens) -> Tensor",
    "tree_verify_greedy": f"(Tensor draft_tokens, Tensor target_tokens, Tensor parents) -> {VERIFIED}",
    "tree_verify_typical": "(Tensor draft_tokens, Tensor target_logits, Tensor parents, *, float temperature, "
    f"float epsilon, float delta, Tensor? uniforms=None) -> {VERIFIED}",
    "tree_verify_sampling": "(Tensor draft_tokens, Tensor target_probs, Tensor parents, Tensor uniforms, *, "
    f"Tensor? draft_probs=None, bool replacement=True) -> {VERIFIED}",
    "tree_commit_kv_": f"({CACHES}, Tensor k_tree, Tensor v_tree, Tensor prefix_lens, Tensor path, "
    "Tensor num_accepted, *, Tensor? block_table=None, Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
    "tree_compact_kv_": f"({CACHES}, Tensor prefix_lens, Tensor path, Tensor num_accepted, *, "
    "Tensor? block_table=None) -> ()",
    "merge_attention_states": "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)",
}


def every_sample() -> list[Any]:
    counts = {op: len(calls) for op, calls in samples("cpu").items()}
    return [pytest.param(op, i, id=f"{op}-{i}") for op, count in counts.items() for i in range(count)]


@pytest.mark.parametrize("op", SCHEMAS)
def test_schema(op: str) -> None:
    assert str(getattr(torch.ops.kernels, op).default._schema) == f"kernels::{op}{SCHEMAS[op]}"


@pytest.mark.parametrize(("op", "i"), every_sample())
def test_opcheck(any_backend: Backend, op: str, i: int) -> None:
    positional, keywords = samples(any_backend.device)[op][i]
    # The schema check compares inputs by arithmetic that torch has no float8 kernels for.
    eight_bit = any(x.dtype == FP8 for x in positional.values())
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    checks = checks if eight_bit else ("test_schema", *checks)
    with torch_kernels.use_backend(any_backend.name):
        torch.library.opcheck(
            getattr(torch.ops.kernels, op).default, tuple(positional.values()), keywords, test_utils=checks
        )


@pytest.mark.parametrize(("op", "i"), every_sample())
def test_compiles_without_a_break(any_backend: Backend, op: str, i: int) -> None:
    function = getattr(torch_kernels, op)

    def around(*args: Any, **kwargs: Any) -> Any:
        args = [
            x + 0 if isinstance(x, Tensor) and x.dtype == torch.float32 and not op.endswith("_") else x for x in args
        ]
        return function(*args, **kwargs)

    torch.compiler.reset()
    with torch_kernels.use_backend(any_backend.name), torch.no_grad():
        eager_args, compiled_args = samples(any_backend.device)[op][i], samples(any_backend.device)[op][i]
        expected = function(*eager_args[0].values(), **eager_args[1])
        compiled = torch.compile(around, fullgraph=True, backend="aot_eager")
        actual = compiled(*compiled_args[0].values(), **compiled_args[1])
    as_tuple = lambda x: () if x is None else x if isinstance(x, (tuple, list)) else (x,)  # noqa: E731
    for x, y in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert_bitwise("output", x, y)
    for name, x in eager_args[0].items():
        assert_bitwise(name, compiled_args[0][name], x)


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


@pytest.mark.parametrize("op", SCHEMAS)
def test_public_function(any_backend: Backend, op: str) -> None:
    """``torch_kernels.<op>`` has the op's arguments, documentation and result."""
    function = getattr(torch_kernels, op)
    assert function.__doc__ and len(function.__doc__) > 100
    positional, keywords = samples(any_backend.device)[op][-1]
    arguments = positional | keywords
    with torch_kernels.use_backend(any_backend.name):
        function(
            **{name: x.clone() if op.endswith("_") and isinstance(x, Tensor) else x for name, x in arguments.items()}
        )


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="nonsense"), torch_kernels.use_backend("nonsense"):
        pass


def test_triton_serves_many_rows_where_it_was_measured_faster() -> None:
    assert prefers_triton(64, torch.bfloat16, "sm_90") and prefers_triton(17, torch.float16, "sm_90")
    assert not prefers_triton(16, torch.bfloat16, "sm_90")
    assert not any(prefers_triton(1024, torch.bfloat16, arch) for arch in ("sm_80", "sm_89", "sm_100", "sm_120"))
    assert not prefers_triton(1024, torch.float32, "sm_90")
