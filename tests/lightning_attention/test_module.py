# SPDX-License-Identifier: Apache-2.0
"""nn.LightningAttention: its formula, prefill and steps, packed sequences, and the precision of its slopes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch_kernels
from torch import Tensor
from torch_kernels.nn import LightningAttention, LightningState

from ..backends import Backend, need
from ..tolerance import assert_bitwise

TRANSNORMER = {"activate_values": False, "lrpe": True, "norm": "srms", "gate": "identity"}
VARIANTS = pytest.mark.parametrize("options", [{}, TRANSNORMER], ids=["minimax", "transnormer"])
WIDTH = 24


def layer_on(backend: Backend, **options: object) -> LightningAttention:
    need(backend, "lightning_attention")
    torch.manual_seed(0)
    layer = LightningAttention(WIDTH, 2, 8, **options)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(0.1 * torch.randn_like(weight))  # the gain and the frequencies too
    return layer.to(backend.device)


def random_tokens(backend: Backend, batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1)).to(backend.device)


def assert_near(actual: Tensor, expected: Tensor, error: float = 2e-5) -> None:
    torch.testing.assert_close(
        actual, expected.to(actual.dtype), rtol=0, atol=error * float(expected.detach().abs().max())
    )


def formula(layer: LightningAttention, x: Tensor) -> Tensor:
    """What the layer means, attention as a matrix. x [B, T, E]"""
    q, k, v = layer.qkv_proj(x).unflatten(-1, (layer.num_heads, 3, layer.head_dim)).unbind(-2)
    q, k, v = F.silu(q), F.silu(k), F.silu(v) if layer.activate_values else v
    places = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
    distance = places[:, None] - places
    decay = torch.exp(-layer.slopes[:, None, None] * distance.clamp(min=0)) * (distance >= 0)
    turned = torch.ones_like(distance)[None, None]
    if layer.theta is not None:  # cos(a) cos(b) + sin(a) sin(b) = cos(a - b): only the distance counts
        turned = torch.cos(layer.theta[:, :, None, None] * distance)
    scores = torch.einsum("bihd,bjhd,hdij->bhij", q, k, turned.expand(layer.num_heads, layer.head_dim, -1, -1))
    out = torch.einsum("bhij,bjhd->bihd", scores * decay, v).flatten(-2)
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + 1e-6)
    gate = layer.output_gate(x)
    if layer.norm.weight is not None:  # MiniMax
        out, gate = out * layer.norm.weight, gate.sigmoid()
    return layer.out_proj(gate * out)


@VARIANTS
def test_formula_and_gradients(backend: Backend, options: dict[str, object]) -> None:
    layer, x = layer_on(backend, **options), random_tokens(backend, 2, 37)
    truth = copy.deepcopy(layer).double()
    with backend.forced():
        y = layer(x)
        y.square().sum().backward()
    expected = formula(truth, x.double())
    expected.square().sum().backward()
    assert_near(y, expected)
    for name, weight in layer.named_parameters():
        assert_near(weight.grad, truth.get_parameter(name).grad, 2e-4)


@VARIANTS
@torch.no_grad()
def test_prefill_steps_and_packed_sequences_agree(backend: Backend, options: dict[str, object]) -> None:
    layer, x = layer_on(backend, **options), random_tokens(backend, 2, 21)
    with backend.forced():
        whole = layer(x)
        empty = layer.init_state(2)
        first, after_first = layer(x[:, :13], empty)
        kept = LightningState(*(part.clone() for part in after_first))
        second, after_second = layer(x[:, 13:17], after_first)
        steps, state = [], after_second
        for t in range(17, 21):
            y, state = layer.step(x[:, t : t + 1], state)
            steps.append(y)
        assert_near(torch.cat([first, second, *steps], dim=1), whole)
        assert not empty.kv.any() and not empty.position.any() and state.position.tolist() == [21, 21]
        assert_bitwise("a state given to forward", after_first.kv, kept.kv)

        packed = torch.cat([x[:1, :13], x[1:, :7]], dim=1)
        cu_seqlens = torch.tensor([0, 13, 13, 20], device=x.device)
        y, states = layer(packed, layer.init_state(3), cu_seqlens=cu_seqlens)
        assert_near(y, torch.cat([whole[:1, :13], whole[1:, :7]], dim=1))
        assert states.position.tolist() == [13, 0, 7]
        assert_near(layer(packed, cu_seqlens=cu_seqlens), y)
        # each goes on from its own state, at its own position
        following = torch.cat([x[:1, 13:15], x[1:, 7:12]], dim=1)
        y, states = layer(following, states.select([0, 2]), cu_seqlens=torch.tensor([0, 2, 7], device=x.device))
        assert_near(y, torch.cat([whole[:1, 13:15], whole[1:, 7:12]], dim=1))
        assert states.position.tolist() == [15, 12]


@torch.no_grad()
def test_positions_in_the_millions(backend: Backend) -> None:
    layer, x = layer_on(backend, **TRANSNORMER), random_tokens(backend, 1, 6)
    truth = copy.deepcopy(layer).double().cpu()
    with backend.forced():
        _, state = layer(x, layer.init_state(1)._replace(position=torch.tensor([5_000_000], device=x.device)))
        y, _ = layer.step(x[:, :1], state)
    with torch_kernels.use_backend("reference"):
        _, state = truth(x.cpu().double(), truth.init_state(1)._replace(position=torch.tensor([5_000_000])))
        expected, _ = truth.step(x[:, :1].cpu().double(), state)
    assert_near(y, expected.to(y.device))


def test_slopes_stay_float32(any_backend: Backend) -> None:
    slopes = torch_kernels.lightning_slopes(2, 3, 4, kind="minimax")
    layer = LightningAttention(WIDTH, 2, 8, slopes=slopes)
    for changed in (layer.to(torch.bfloat16), layer.half(), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert changed.qkv_proj.weight.dtype == torch.float16 or changed is layer
        assert_bitwise("slopes", changed.slopes, slopes)
    assert layer.init_state(3).kv.dtype == torch.float32 and layer.double().init_state(3).kv.dtype == torch.float64
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    with torch.device("meta"):
        other = LightningAttention(WIDTH, 2, 8, dtype=torch.float64)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert_bitwise("slopes", other.slopes, slopes)


def test_half_precision(backend: Backend) -> None:
    layer, x = layer_on(backend), random_tokens(backend, 1, 40)
    for dtype in (torch.float16, torch.bfloat16):
        if dtype in backend.dtypes:
            rounded = copy.deepcopy(layer).to(dtype)
            with backend.forced(), torch.no_grad():
                y = rounded(x.to(dtype))
                _, state = rounded(x.to(dtype), rounded.init_state(1))
            assert y.dtype == dtype and state.kv.dtype == torch.float32
            assert_near(y, formula(copy.deepcopy(layer).double(), x.double()).detach(), 16 * torch.finfo(dtype).eps)


def test_compiles_without_graph_breaks(backend: Backend) -> None:
    layer, x = layer_on(backend, **TRANSNORMER), random_tokens(backend, 1, 12)
    with backend.forced(), torch.no_grad():
        compiled = torch.compile(lambda x, state: layer(x, state)[0], fullgraph=True, backend="eager")
        assert_near(compiled(x, layer.init_state(1)), layer(x))


@pytest.mark.parametrize(
    "words, options",
    [
        ("num_heads must be at least 1", {"num_heads": 0}),
        ("embed_dim must be a multiple of num_heads=5", {"num_heads": 5, "head_dim": None}),
        ("head_dim must be a multiple of 8 up to 256", {"head_dim": 12}),
        ("head_dim must be a multiple of 8 up to 128", {"head_dim": 136, "lrpe": True}),
        ("norm must be rms, srms or None", {"norm": "layer"}),
        ("activation must be .* or a function, got 'swish'", {"activation": "swish"}),
        ("gate must be .* or a function", {"gate": "none"}),
        (r"slopes must be \[H=2\]", {"slopes": torch.ones(3)}),
    ],
)
def test_bad_arguments(words: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"LightningAttention: {words}"):
        LightningAttention(**{"embed_dim": WIDTH, "num_heads": 2, "head_dim": 8} | options)


def test_bad_tokens() -> None:
    layer = LightningAttention(WIDTH, 2, 8)
    with pytest.raises(ValueError, match=r"LightningAttention: x must be \[B=1, T=3, E=24\]"):
        layer(torch.zeros(1, 3, 25))
    with pytest.raises(ValueError, match=r"LightningAttention.step: x_t must be \[B=1, 1, E=24\]"):
        layer.step(torch.zeros(1, 2, 24), layer.init_state(1))
