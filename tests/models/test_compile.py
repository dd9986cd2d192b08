# SPDX-License-Identifier: Apache-2.0
"""Decoding steps of quantised models in torch.compile, and torch.export."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
import torch_kernels
from torch import Tensor

from .tiny import DEVICE, assert_near, greedy, model_of, tokens_of, transformers, with_cache

PROMPT = tokens_of(1, 6)
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
KINDS: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4, "group_size": 16},
    "int4 a8": {"bits": 4, "group_size": 16, "mode": "a8"},
    "int8": {"bits": 8},
    "int8 threshold": {"bits": 8, "threshold": 6.0},
    "int8 rotated": {"bits": 8, "rotate": True},
}


def quantised(kind: str) -> Any:
    return torch_kernels.quantize_(model_of("llama", intermediate_size=64), skip="lm_head", **KINDS[kind])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(
    not NIGHTLY, reason="inductor compiles in the nightly profile"))])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_a_decoding_step_is_one_graph(kind: str, backend: str) -> None:
    """The same tokens as without, one graph, compiled once. (Positions are tensors: no step compiles again.)"""
    if backend == "aot_eager" and kind in ("int4 a8", "int8 threshold") and not NIGHTLY:
        pytest.skip("the same code as its neighbours: nightly")
    model = quantised(kind)
    expected = greedy(model, PROMPT, 6)[0].tolist()
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)

    @torch.no_grad()
    def step(token: Tensor, position: Tensor) -> Tensor:
        return model(token, position_ids=position, **with_cache(model, cache)).logits[:, -1].argmax(-1, keepdim=True)

    position = torch.arange(PROMPT.shape[1], device=DEVICE)[None]
    written = [step(PROMPT, position)]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for i in range(5):
        with torch.compiler.set_stance("default" if i < 2 else "fail_on_recompile"):
            written.append(compiled(written[-1], position[:, -1:] + 1 + i))
    assert torch.cat(written, dim=1)[0].tolist() == expected


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_export(kind: str, tmp_path: Any) -> None:
    """For any number of tokens, and through a file."""
    model = quantised(kind)
    dynamic = {"input_ids": {1: torch.export.Dim("tokens", min=2, max=64)}, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(
            model, (), {"input_ids": PROMPT, "use_cache": False}, dynamic_shapes=dynamic, strict=False
        )
        op = f"kernels.{kind}_linear"
        assert sum(op in str(node.target) for node in program.graph.nodes) == 14
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        for length in (6, 17):
            tokens = tokens_of(1, length, seed=1)
            actual = loaded(input_ids=tokens, use_cache=False)
            assert_near(actual["logits"], model(tokens).logits, units=20)


def test_compiled_minimax_without_a_cache() -> None:
    stock = model_of("minimax", experts_implementation="batched_mm")
    model = torch_kernels.nn.replace_lightning_(copy.deepcopy(stock))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_near(compiled(PROMPT, use_cache=False).logits, stock(PROMPT).logits, units=100)
