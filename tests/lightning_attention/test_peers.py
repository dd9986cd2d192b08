# SPDX-License-Identifier: Apache-2.0
"""Independent oracles: transformers' MiniMax layer, and the naive functions of flash-linear-attention."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch_kernels
from torch import Tensor
from torch_kernels.nn import LightningAttention

from ..backends import Backend, need
from ..tolerance import assert_bitwise


def assert_near(actual: Tensor, expected: Tensor, error: float) -> None:
    expected = expected.to(actual.device, actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=error * float(expected.detach().abs().max()))


@pytest.fixture(scope="module")
def minimax() -> ModuleType:
    pytest.importorskip("transformers", reason="transformers is not installed")
    return pytest.importorskip("transformers.models.minimax.modeling_minimax")


def minimax_layer(minimax: ModuleType, layer: int) -> torch.nn.Module:
    """transformers' lightning layer number ``layer`` of 4, 2 heads of size 16."""
    config = minimax.MiniMaxConfig(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_hidden_layers=4, block_size=16,
        layer_types=["linear_attention"] * 4,
    )  # fmt: skip
    torch.manual_seed(layer)
    module = minimax.MiniMaxLightningAttention(config, layer)
    torch.nn.init.normal_(module.norm.weight)
    return module.eval()


def call(module: torch.nn.Module, x: Tensor, cache: object = None) -> Tensor:
    """The output, whatever this version of transformers calls the cache's argument."""
    name = "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"
    return module(x, position_embeddings=None, attention_mask=None, **{name: cache})[0]


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_minimax(backend: Backend, minimax: ModuleType, layer: int) -> None:
    """Prefill over several of its blocks and a part of one, then decoding from both caches, then gradients."""
    need(backend, "lightning_attention")
    theirs = minimax_layer(minimax, layer)
    ours = LightningAttention.from_minimax(theirs)
    assert_near(ours.slopes, theirs.slope_rate.flatten(), 1e-6)
    ours = ours.to(backend.device)  # parameters are shared: a copy of theirs computes beside it
    x = torch.randn(2, 75, 32, generator=torch.Generator().manual_seed(0))
    truth = minimax_layer(minimax, layer).double()
    with torch.no_grad(), backend.forced():
        cache = minimax.MiniMaxCache()
        state = ours.init_state(2)
        y, state = ours(x[:, :70].to(backend.device), state)
        assert_near(y, call(truth, x[:, :70].double(), cache), 1e-5)
        for t in range(70, 75):
            y, state = ours.step(x[:, t : t + 1].to(backend.device), state)
            assert_near(y, call(truth, x[:, t : t + 1].double(), cache), 1e-5)
        assert_near(state.kv, cache.get_linear_cache(layer), 1e-5)
    with backend.forced():
        y = ours(x.to(backend.device))
        y.square().sum().backward()
    expected = call(truth, x.double())
    expected.square().sum().backward()
    assert_near(y, expected, 1e-5)
    for name, weight in ours.named_parameters():
        assert_near(weight.grad, truth.get_parameter(name).grad, 1e-4)


def test_minimax_in_bfloat16_keeps_its_decays(minimax: ModuleType) -> None:
    theirs = minimax_layer(minimax, 1)
    slopes = theirs.slope_rate.flatten()
    ours = LightningAttention.from_minimax(theirs.to(torch.bfloat16))
    assert_near(ours.slopes, slopes, 1e-6)
    assert ours.out_proj.weight is theirs.out_proj.weight and ours.norm.eps == theirs.norm.variance_epsilon
    other = LightningAttention.from_minimax(minimax_layer(minimax, 1))
    missing, unexpected = other.load_state_dict(theirs.state_dict(), strict=False)  # names of the weights are theirs
    assert missing == ["slopes"] and all("decay" in name or name == "slope_rate" for name in unexpected)
    assert_bitwise("weights", other.qkv_proj.weight, theirs.qkv_proj.weight.float())


# ---- flash-linear-attention: functions in plain PyTorch that its own tests trust ----


@pytest.fixture(scope="module")
def naive() -> ModuleType:
    pytest.importorskip("fla", reason="fla-core is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that Triton has no GPU here
        return pytest.importorskip("fla.ops.simple_gla.naive")


def sequence(backend: Backend, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, log gates and an initial state."""
    need(backend, "lightning_attention")
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, length, 3, size, generator=generator) for size in (16, 16, 24))
    g = torch.nn.functional.logsigmoid(torch.randn(2, length, 3, generator=generator))
    state = torch.randn(2, 3, 16, 24, generator=generator)
    return tuple(x.to(backend.device) for x in (q, k, v, g, state))


@pytest.mark.parametrize("function", ["naive_recurrent_simple_gla", "naive_chunk_simple_gla"])
def test_gates_of_fla(backend: Backend, naive: ModuleType, function: str) -> None:
    q, k, v, g, state = sequence(backend, 100)
    theirs: Callable[..., tuple[Tensor, Tensor]] = getattr(naive, function)
    expected, final = theirs(q, k, v, g, scale=0.5, initial_state=state, output_final_state=True)
    ours = backend("simple_gla", q, k, v, g, scale=0.5, initial_state=state, output_final_state=True)
    assert_near(ours[0], expected, 1e-5)
    assert_near(ours[1], final, 1e-5)


def test_constant_decay_of_fla(backend: Backend, naive: ModuleType) -> None:
    q, k, v, _, state = sequence(backend, 70)
    slopes = torch_kernels.lightning_slopes(3, kind="alibi").to(q.device)
    g = -slopes.expand(*q.shape[:3])
    expected, final = naive.naive_recurrent_simple_gla(q, k, v, g, scale=1.0, initial_state=state)
    ours = backend("lightning_attention", q, k, v, slopes, initial_state=state, output_final_state=True)
    assert_near(ours[0], expected, 1e-5)
    assert_near(ours[1], final, 1e-5)


def test_retention_of_fla(backend: Backend, naive: ModuleType) -> None:
    theirs = pytest.importorskip("fla.ops.retention.naive").naive_retention
    q, k, v, _, _ = sequence(backend, 50)
    expected = theirs(*(x.transpose(1, 2).cpu() for x in (q, k, v))).transpose(1, 2)
    slopes = torch_kernels.lightning_slopes(3, kind="retnet").to(q.device)
    assert_near(backend("lightning_attention", q, k, v, slopes, scale=16**-0.5)[0], expected, 1e-5)
