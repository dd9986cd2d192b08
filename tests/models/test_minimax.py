# SPDX-License-Identifier: Apache-2.0
"""replace_lightning_ against transformers' own MiniMax."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_kernels
from torch import Tensor, nn
from torch_kernels.nn import LightningAttention, replace_lightning_

from ..tolerance import assert_accurate
from .tiny import DEVICE, assert_near, greedy, model_of, tokens_of, with_cache

TOKENS = tokens_of(2, 21)
LEFT, RIGHT = torch.ones_like(TOKENS), torch.ones_like(TOKENS)
LEFT[0, :5], RIGHT[0, -5:] = 0, 0


def pair(**options: Any) -> tuple[Any, Any]:
    theirs = model_of("minimax", **options)
    ours = replace_lightning_(copy.deepcopy(theirs))
    assert sum(isinstance(module, LightningAttention) for module in ours.modules()) == 2
    return theirs, ours


@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["whole", "left", "right"])
def test_logits(mask: Tensor | None) -> None:
    """Against the truth in float64, with the error of transformers' layers for comparison."""
    theirs, ours = pair()
    real = torch.ones_like(TOKENS).bool() if mask is None else mask.bool()
    with torch.no_grad():
        actual, plain = (model(TOKENS, attention_mask=mask).logits[real] for model in (ours, theirs))
        theirs.set_experts_implementation("eager")  # the others know no float64
        truth = theirs.double()(TOKENS, attention_mask=mask).logits[real]
    # Its norms and angles are float32 there too, and either order of their sums is as good.
    assert_accurate("logits", actual, truth, plain, floor=8 * 2**-24 * float(truth.abs().max()))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generates_the_same_tokens(options: dict[str, Any]) -> None:
    theirs, ours = pair()
    for mask in (None, LEFT):
        assert (
            greedy(ours, TOKENS, 10, mask, **options).tolist() == greedy(theirs, TOKENS, 10, mask, **options).tolist()
        )


def test_a_cache_takes_any_number_of_tokens() -> None:
    """As with transformers' layers, in the same calls: its mask lets several tokens behind a cache see too little
    where the first layer is no full attention, so a whole sequence would be another truth."""
    theirs, ours = pair()
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    logits = {}
    for model in (theirs, ours):
        cache, done, pieces = minimax.MiniMaxCache(), 0, []
        for piece in TOKENS.split([8, 1, 1, 6, 5], dim=1):
            positions = torch.arange(done, done := done + piece.shape[1], device=DEVICE)[None]
            with torch.no_grad():
                output = model(piece, attention_mask=torch.ones(2, done, dtype=torch.int64, device=DEVICE),
                               position_ids=positions, **with_cache(model, cache))  # fmt: skip
            pieces.append(output.logits)
        logits[model] = torch.cat(pieces, dim=1)
        with torch.no_grad():
            assert_near(logits[model][:, :10], theirs(TOKENS[:, :10]).logits, units=100)
    assert_near(logits[ours], logits[theirs], units=100)
    assert cache.get_linear_cache(0).dtype == torch.float32


def test_gradients() -> None:
    theirs, ours = pair()
    for model in (theirs, ours):
        model(TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in theirs.named_parameters():
        assert_near(ours.get_parameter(name).grad, parameter.grad, units=2000)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised(bits: int) -> None:
    theirs, ours = pair(initializer_range=0.05)
    options = {"group_size": 16} if bits == 4 else {}
    skip = ["lm_head", "*.experts.*"]
    for model in (theirs, ours):
        torch_kernels.quantize_(model, bits=bits, skip=skip, **options)
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        assert (ours(TOKENS).logits - expected).norm() < 0.02 * expected.norm()
    assert greedy(ours, TOKENS, 4).shape == (2, 4)


def test_bfloat16_keeps_its_state_in_float32() -> None:
    theirs, ours = pair()
    with torch.no_grad():
        truth = theirs(TOKENS).logits
        plain = theirs.bfloat16()(TOKENS).logits
        actual = ours.bfloat16()(TOKENS).logits
    assert actual.dtype == torch.bfloat16
    assert (actual - truth).norm() < 1.5 * (plain - truth).norm()


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="replace_lightning_: model must be one with MiniMaxLightningAttention"):
        replace_lightning_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="replace_lightning_: the activation must be 0 at 0"):
        replace_lightning_(model_of("minimax", hidden_act="sigmoid"))
