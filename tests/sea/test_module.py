# SPDX-License-Identifier: Apache-2.0
"""nn.SEAttention: its formula, prefill and steps, causality, padding; and the loss that it learns from."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import torch_kernels
from torch import Tensor
from torch_kernels.nn import SEAttention, sea_distillation_loss

from ..backends import Backend
from ..tolerance import assert_bitwise

WIDTH, HEADS, CELLS, KEYS = 32, 2, 12, 5
BOTH = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


@pytest.fixture(params=["best", "reference"])
def device(request: pytest.FixtureRequest, any_backend: Backend) -> Iterator[str]:
    """The tests run on the backends that calls run on, and on the reference: on a GPU none serves the whole layer."""
    with torch_kernels.use_backend("reference") if request.param == "reference" else contextlib.nullcontext():
        yield any_backend.device


@pytest.fixture
def any_device(any_backend: Backend) -> str:
    """For what does not depend on the backend."""
    return any_backend.device


def make_layer(device: str, causal: bool = True, **options: object) -> SEAttention:
    """In float64 where all ops have it. What cells are kept hangs on digits that float32 may not have."""
    torch.manual_seed(0)
    layer = SEAttention(WIDTH, HEADS, CELLS, options.pop("k", KEYS), causal, **options)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return layer.to(device, torch.float64 if device == "cpu" else torch.float32)


def tokens_for(layer: SEAttention, batch: int, count: int) -> Tensor:
    x = torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(1))
    return x.to(layer.out_proj.weight)


def assert_near(actual: Tensor, expected: Tensor, error: float | None = None) -> None:
    error = error or (1e-9 if actual.dtype == torch.float64 else 1e-4)
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=error * float(expected.abs().max()))


# ---- the layer as the paper has it: every matrix in full, every step of the decoders as it is told ----


def formula(layer: SEAttention, x: Tensor, kept_by: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y, map). Cells are kept by a map, or all of them."""
    heads, size, tokens = layer.num_heads, layer.head_dim, x.shape[1]
    q, k, v = layer.qkv_proj(x).unflatten(-1, (3, heads, size)).permute(2, 0, 3, 1, 4)  # [B, H, T, D] each
    place = torch.arange(tokens, dtype=x.dtype, device=x.device)
    seen = place[:, None] >= place if layer.causal else torch.ones_like(place[:, None] >= place)
    projected_q, projected_k = (y * size**-0.25 @ layer.performer.projection.mT for y in (q, k))
    if layer.causal:
        weights = (projected_q.relu() + 1e-3) @ (projected_k.relu() + 1e-3).mT * seen
        ratio = torch.log((place + 1) / (place[:, None] + 1))[..., None] * layer.performer.frequencies
        values = torch.cat([ratio.cos(), ratio.sin()], -1)  # [T, T, D]: row, key
    else:
        norm_q, norm_k = (y.square().sum(-1, keepdim=True) / (2 * size**0.5) for y in (q, k))
        phi_q = torch.exp(projected_q - norm_q - projected_q.detach().amax(-1, keepdim=True)) + 1e-4
        phi_k = torch.exp(projected_k - norm_k - projected_k.detach().amax((-2, -1), keepdim=True)) + 1e-4
        weights = phi_q @ phi_k.mT
        identity = torch.eye(size, dtype=x.dtype, device=x.device)[None]
        values = F.interpolate(identity, tokens, mode="linear", align_corners=True)[0].T.expand(tokens, -1, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    z = layer.encoder(torch.cat([torch.einsum("bhij,ijd->bhid", weights, values), weights @ v, v], -1))
    gain, mix = layer.gates(z).sigmoid().unbind(-1)
    scores = (causal_scores if layer.causal else bidirectional_scores)(layer.decoder, z)
    estimate = scores.softmax(-1)

    width = (place + 1 if layer.causal else torch.full_like(place, tokens)).long()
    cell, stretched = columns_of_cells(width, layer.num_cells, tokens), seen.expand(*q.shape[:3], -1)
    if kept_by is not None:
        stretched = kept(kept_by, width, layer.k).gather(-1, cell.expand(*q.shape[:2], -1, -1)) & seen
    attention = torch.where(stretched, q @ k.mT * size**-0.5, -torch.inf).softmax(-1).nan_to_num(0.0)
    average = seen.to(x.dtype) / width[:, None]
    if not layer.causal:
        average = estimate.mean(2, keepdim=True).gather(-1, cell[:1].expand(*q.shape[:2], -1, -1))
        average = average / average.sum(-1, keepdim=True)
    context = mix[..., None] * gain[..., None] * (attention @ v) + (1 - mix[..., None]) * (average @ v)
    return layer.out_proj(context.transpose(1, 2).flatten(-2)), estimate


def columns_of_cells(width: Tensor, cells: int, tokens: int) -> Tensor:
    """The cell that each column belongs to in rows of such widths [T, tokens]; anything where there is none."""
    table = torch.zeros(len(width), tokens, dtype=torch.int64, device=width.device)
    for row, w in enumerate(width.tolist()):
        for m in range(cells):
            table[row, math.floor(m * w / cells + 0.5) : math.floor((m + 1) * w / cells + 0.5)] = m
    return table


def kept(estimate: Tensor, width: Tensor, k: float) -> Tensor:
    """Which cells each row keeps [B, H, T, K]."""
    batch, heads, tokens, cells = estimate.shape
    out = torch.zeros(batch, tokens, heads * cells, dtype=torch.bool, device=estimate.device)
    for row, w in enumerate(width.tolist()):
        count = min(max(round(heads * k * cells / w), 1), heads * cells)
        best = estimate[:, :, row].flatten(1).sort(descending=True, stable=True).indices[:, :count]
        out[:, row].scatter_(1, best, True)
    return out.unflatten(-1, (heads, cells)).transpose(1, 2)


def shifted(x: Tensor, rows: int, columns: int) -> Tensor:
    """x [B, C, T, W] read at (t + rows, w + columns), 0 outside."""
    padded = F.pad(x, (8, 8, 8, 8))
    return padded[:, :, 8 + rows : 8 + rows + x.shape[2], 8 + columns : 8 + columns + x.shape[3]]


def causal_scores(decoder: torch.nn.Module, z: Tensor) -> Tensor:
    x = decoder.linear(z).unflatten(-1, (2, -1)).permute(0, 1, 3, 2, 4).flatten(1, 2)
    x = decoder.norm(x)
    for conv in (decoder.conv1, decoder.conv2):
        taps = (
            torch.einsum("oc,bctw->botw", conv.weight[:, :, i, j], shifted(x, 2 * i - 4, 2 * j - 2))
            for i in range(3)
            for j in range(3)
        )
        x = F.relu(sum(taps) + conv.bias[:, None, None])
    x = F.interpolate(x, scale_factor=(1, 4), mode="nearest")
    weight = decoder.mix.weight[:, :, None, None]
    x = F.conv2d(x, weight, torch.randn_like(weight[:, 0, 0, 0]), padding=(0, 1))  # the norm takes the bias out
    return decoder.out_norm(F.adaptive_avg_pool2d(x, (x.shape[2], CELLS)))


def bidirectional_scores(decoder: torch.nn.Module, z: Tensor) -> Tensor:
    x = decoder.linear(z).unflatten(-1, (4, -1)).permute(0, 1, 3, 2, 4).flatten(1, 2)
    x = F.relu(F.conv2d(x, decoder.conv1.weight, decoder.conv1.bias, stride=(2, 1), padding=1))
    x = F.relu(F.conv2d(x, decoder.conv2.weight, decoder.conv2.bias, padding=1))
    x = F.conv2d(F.interpolate(x, scale_factor=(2, 1)), decoder.conv3.weight, decoder.conv3.bias, padding=1)
    return F.interpolate(x[:, :, : z.shape[2]], size=(z.shape[2], CELLS), mode="bilinear")


@BOTH
@pytest.mark.parametrize("k", [KEYS, 37], ids=["sparse", "dense"])
def test_formula_and_gradients(device: str, causal: bool, k: int) -> None:
    layer = make_layer(device, causal, k=k)
    x = tokens_for(layer, 2, 37)
    y, estimate = layer(x, return_map=True)
    (y.square().sum() + (estimate * estimate.detach().flip(-1)).sum()).backward()
    truth = copy.deepcopy(layer).double()
    truth.zero_grad()
    expected, of_map = formula(truth, x.double(), None if k == 37 else estimate.detach())
    (expected.square().sum() + (of_map * of_map.detach().flip(-1)).sum()).backward()
    assert_near(y, expected.detach())
    assert_near(estimate, of_map.detach())
    for name, weight in layer.named_parameters():
        expected = truth.get_parameter(name).grad
        bound = (1e-9 if device == "cpu" else 1e-3) * max(1.0, float(expected.abs().max()))  # some are 0
        torch.testing.assert_close(weight.grad, expected.to(weight.dtype), rtol=0, atol=bound)


@torch.no_grad()
def test_prefill_pieces_and_steps_agree(device: str) -> None:
    layer = make_layer(device)
    x = tokens_for(layer, 2, 37)
    whole, of_whole = layer(x, return_map=True)
    empty = layer.init_state(2, 40)
    at_once, estimate, after = layer(x, state=empty, return_map=True)
    assert_near(at_once, whole)
    assert_near(estimate, of_whole)
    parts, state = [], empty
    for piece in x[:, :30].split([13, 2, 15], dim=1):
        y, state = layer(piece, state=state)
        parts.append(y)
    for t in range(30, 37):
        y, state = layer.step(x[:, t : t + 1], state)
        parts.append(y)
    assert_near(torch.cat(parts, 1), whole)
    nothing, same = layer(x[:, :0], state=state)
    assert nothing.shape == (2, 0, WIDTH) and same is state
    assert not empty.features.any() and not empty.history[0].any() and empty.filled == 0
    assert state.length.tolist() == [37, 37] and state.filled == 37
    for part, expected in zip(state[:5], after[:5]):
        assert_near(part, expected)
    for part, expected in zip(state.history, after.history):
        assert_near(part, expected)


@torch.no_grad()
def test_padded_prompts_go_on_as_if_alone(device: str) -> None:
    layer = make_layer(device)
    x, lengths = tokens_for(layer, 3, 21), (17, 6, 1)
    padded, mask = torch.full_like(x[:, :17], torch.nan), torch.ones(3, 17, dtype=torch.bool, device=x.device)
    for b, length in enumerate(lengths):
        padded[b, 17 - length :], mask[b, 17 - length :] = x[b, :length], False
    y, state = layer(padded, padding_mask=mask, state=layer.init_state(3, 21))
    following = torch.stack([x[b, length : length + 4] for b, length in enumerate(lengths)])
    piece, state = layer(following[:, :2], state=state)
    third, state = layer.step(following[:, 2:3], state)
    fourth, state = layer.step(following[:, 3:], state)
    for b, length in enumerate(lengths):
        alone = layer(x[b : b + 1, : length + 4])[0]
        assert_near(torch.cat([y[b, 17 - length :], piece[b], third[b], fourth[b]]), alone)
    other = state.select(torch.tensor([2, 0], device=x.device))
    assert other.length.tolist() == [state.length[2], state.length[0]] and len(other.history[1]) == 2


@BOTH
@torch.no_grad()
def test_padding_has_no_influence(device: str, causal: bool) -> None:
    layer = make_layer(device, causal)
    x = tokens_for(layer, 4, 26)
    mask = torch.zeros(4, 26, dtype=torch.bool, device=x.device)
    mask[0, :7] = mask[1, 19:] = mask[2, 3::4] = mask[3] = True
    y, estimate = layer(x.masked_fill(mask[..., None], torch.nan), padding_mask=mask, return_map=True)
    for b in range(3):
        alone, of_alone = layer(x[b : b + 1, ~mask[b]], return_map=True)
        assert_near(y[b, ~mask[b]], alone[0])
        assert_near(estimate[b, :, ~mask[b]], of_alone[0])
    nothing = torch.zeros_like(mask)
    assert_near(layer(x, padding_mask=nothing), layer(x))
    assert not y[mask].any() and not estimate.transpose(1, 2)[mask].any()


@torch.no_grad()
def test_later_tokens_change_no_bit(device: str) -> None:
    layer = make_layer(device).float()
    x = tokens_for(layer, 1, 90)
    y, estimate = layer(x, return_map=True)
    for t, other in ((33, 7.0), (64, torch.nan), (89, -3.0)):
        changed = x.clone()
        changed[:, t:] = other
        again, of_again = layer(changed, return_map=True)
        assert_bitwise("y", again[:, :t], y[:, :t])
        assert_bitwise("map", of_again[:, :, :t], estimate[:, :, :t])
        assert not torch.equal(again[:, t:], y[:, t:])


@BOTH
def test_trains(any_device: str, causal: bool) -> None:
    layer, teacher = make_layer(any_device, causal).float(), torch.Generator().manual_seed(2)
    x = torch.randn(2, 24, WIDTH, generator=teacher).to(any_device)
    attention = torch.randn(2, HEADS, 24, 24, generator=teacher).mul(3).to(any_device)
    if causal:
        attention = attention.masked_fill(~torch.ones(24, 24, dtype=torch.bool, device=any_device).tril(), -torch.inf)
    attention, wanted = attention.softmax(-1), x.roll(1, 1)
    optimizer, losses = torch.optim.Adam(layer.parameters(), 1e-2), []
    for _ in range(12):
        y, estimate = layer(x, return_map=True)
        student = layer.dense_attention(x)
        loss = sea_distillation_loss(estimate, attention, student=student, outputs=[(y, wanted)], causal=causal)
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in layer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@torch.no_grad()
def test_k_may_change(any_device: str) -> None:
    layer = make_layer(any_device)
    x = tokens_for(layer, 1, 60)
    dense, _ = formula(copy.deepcopy(layer).double(), x.double(), None)
    errors = []
    for layer.k in (1, 8, 30, 60):
        errors.append((layer(x).double() - dense).abs().max().item())
    assert errors[0] > errors[1] > errors[2] > 1e-3 and errors[3] < 1e-4 * dense.abs().max()


@BOTH
@torch.no_grad()
def test_state_dict_and_precision(any_device: str, causal: bool) -> None:
    layer = make_layer(any_device, causal, k=40, bias=False).float()
    x = tokens_for(layer, 2, 40)
    y, frequencies = layer(x), layer.performer.frequencies if causal else None
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    with torch.device("meta"):
        other = SEAttention(WIDTH, HEADS, CELLS, 40, causal, bias=False)
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert_bitwise("y", other(x), y)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert not causal or torch.equal(half.performer.frequencies, frequencies)
    rounded, estimate = half(x.bfloat16(), return_map=True)
    assert rounded.dtype == torch.bfloat16 and estimate.dtype == torch.float32
    assert_near(rounded, y, 0.1)
    if causal:
        again, state = half(x.bfloat16(), state=half.init_state(2, 40))
        assert_near(again, rounded, 0.05)
        assert state.k.dtype == torch.bfloat16 and state.features.dtype == torch.float32


def test_projection_is_orthogonal_and_redrawn() -> None:
    performer = SEAttention(64, 2, num_features=70).performer
    rows = F.normalize(performer.projection[32:64], dim=1)
    assert_near(rows @ rows.T, torch.eye(32), 1e-5)
    before = performer.projection.clone()
    performer.redraw(torch.Generator().manual_seed(3))
    again = performer.projection.clone()
    performer.redraw(torch.Generator().manual_seed(3))
    assert not torch.equal(before, again) and torch.equal(again, performer.projection)


@BOTH
def test_compiles_without_graph_breaks(any_device: str, causal: bool) -> None:
    layer = make_layer(any_device, causal)
    x = tokens_for(layer, 1, 12)
    mask = torch.arange(12, device=x.device)[None] < 3
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert_near(compiled(x, padding_mask=mask), layer(x, padding_mask=mask))
        if causal:
            step = torch.compile(layer.step, fullgraph=True, backend="eager")
            assert_near(step(x[:, :1], layer.init_state(1, 4))[0], layer(x[:, :1]))


# ---- the loss ----


@BOTH
def test_loss(any_device: str, causal: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    estimate = torch.randn(2, HEADS, 21, CELLS, generator=generator, dtype=torch.float64).softmax(-1)
    scores, others = torch.randn(2, 2, HEADS, 21, 21, generator=generator, dtype=torch.float64)
    place = torch.arange(21)
    seen = place[:, None] >= place if causal else torch.ones(21, 21, dtype=torch.bool)
    teacher, student = (x.masked_fill(~seen, -torch.inf).softmax(-1) for x in (scores, others))
    cell = columns_of_cells(place + 1 if causal else torch.full((21,), 21), CELLS, 21)
    stretched = estimate.gather(-1, cell.expand(2, HEADS, -1, -1)) * seen
    stretched = stretched / stretched.sum(-1, keepdim=True)
    expected = 0.0
    for x in (stretched, student):
        divergence = torch.where(seen, teacher * (teacher.log() - x.log()), 0.0).sum(-1).mean()
        expected = expected + 0.1 * divergence + (teacher - x)[..., seen].square().mean()
    a, b = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    expected = expected + (a - b).square().mean()
    on_device = [
        x.to(any_device) if any_device == "cpu" else x.float().to(any_device)
        for x in (estimate, teacher, student, a, b)
    ]
    estimate, teacher, student, a, b = on_device
    loss = sea_distillation_loss(estimate, teacher, student=student, outputs=[(a, b)], causal=causal)
    assert_near(loss, expected)
    assert sea_distillation_loss(estimate, torch.zeros_like(teacher), causal=causal) >= 0

    mask = torch.zeros(2, 21, dtype=torch.bool, device=any_device)
    mask[1, 2::3] = True
    real = ~mask[1]
    one = {"teacher": teacher[1:][..., real, :][..., real], "student": student[1:][..., real, :][..., real]}
    alone = sea_distillation_loss(estimate[1:, :, real], **one, causal=causal)
    torn = estimate.masked_fill(mask[:, None, :, None], torch.nan).requires_grad_()
    teacher, student = (
        x.masked_fill((mask[:, None] | mask[:, :, None])[:, None], torch.nan) for x in (teacher, student)
    )
    loss = sea_distillation_loss(
        torn[1:], teacher[1:], student=student[1:], causal=causal, padding_mask=mask[1:]
    )  # fmt: skip
    assert_near(loss, alone)
    loss.backward()
    assert torn.grad.isfinite().all() and not torn.grad.transpose(1, 2)[mask].any()


# ---- arguments ----


@pytest.mark.parametrize(
    "words, options",
    [
        ("num_heads must be at least 1", {"num_heads": 0}),
        ("embed_dim must be num_heads=3 times a head size", {"num_heads": 3}),
        ("embed_dim must be num_heads=2 times a head size", {"embed_dim": 2 * 136}),
        ("num_cells must be a positive multiple of 4, got 6", {"num_cells": 6}),
        ("k must be finite and at least 0", {"k": math.inf}),
        ("num_features must be at least 1", {"num_features": 0}),
    ],
)
def test_bad_arguments(words: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"SEAttention: {words}"):
        SEAttention(**{"embed_dim": WIDTH, "num_heads": HEADS} | options)


def test_bad_calls() -> None:
    layer, x = SEAttention(WIDTH, HEADS, CELLS), torch.zeros(1, 3, WIDTH)
    with pytest.raises(ValueError, match=r"SEAttention: x must be \[B=1, T=3, E=32\]"):
        layer(x[..., :5])
    with pytest.raises(ValueError, match=r"SEAttention: padding_mask must be \[B=1, T=3\]"):
        layer(x, padding_mask=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="SEAttention: padding_mask must be bool"):
        layer(x, padding_mask=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="SEAttention: state must be one with room for T=3 tokens after 0"):
        layer(x, state=layer.init_state(1, 2))
    with pytest.raises(ValueError, match=r"SEAttention: state must be \[B=1\]"):
        layer(x, state=layer.init_state(2, 3))
    with pytest.raises(ValueError, match=r"SEAttention.step: x_t must be \[B=1, 1, E=32\]"):
        layer.step(x, layer.init_state(1, 5))
    both = SEAttention(WIDTH, HEADS, CELLS, causal=False)
    with pytest.raises(ValueError, match="SEAttention.init_state: the layer must be causal"):
        both.init_state(1, 5)
    with pytest.raises(ValueError, match="SEAttention: state must be None in a bidirectional layer"):
        both(x, state=layer.init_state(1, 5))
    with pytest.raises(ValueError, match=r"sea_distillation_loss: teacher must be"):
        sea_distillation_loss(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))


@pytest.mark.parametrize("padded", [False, True])
def test_parts_without_gradients_are_the_whole(device: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CPU_ROWS", "GPU_ROWS"):
        monkeypatch.setattr(f"torch_kernels.nn.sea_attention.{name}", 7)
    layer = make_layer(device)
    x = tokens_for(layer, 2, 24)
    mask = torch.arange(24, device=device).remainder(5).eq(3).expand(2, -1) if padded else None
    whole, whole_map = layer(x, padding_mask=mask, return_map=True)
    with torch.no_grad():
        parts, parts_map = layer(x, padding_mask=mask, return_map=True)
        assert_bitwise("y", layer(x, padding_mask=mask), parts)
    assert whole.requires_grad and not parts.requires_grad
    torch.testing.assert_close(parts, whole.detach())
    torch.testing.assert_close(parts_map, whole_map.detach())
