# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding of a recurrent model: a drafted tree is verified, accepted greedily and committed, and the text
is that of plain decoding, token for token."""

from __future__ import annotations

import dataclasses
import random

import torch
from torch import Tensor

from ..backends import Backend

VOCABULARY, WIDTH, LAYERS, HEADS, QUERY_HEADS, SIZE, VALUE_SIZE = 50, 32, 2, 2, 4, 16, 8
PROMPT, TOKENS, NODES = 5, 24, 12


@dataclasses.dataclass
class Model:
    """Layers of lightning attention between residual connections; a pool of states per layer."""

    backend: Backend
    weights: dict[str, Tensor]
    slopes: Tensor
    states: list[Tensor]

    @classmethod
    def random(cls, backend: Backend, pool: int) -> Model:
        generator = torch.Generator().manual_seed(1)

        def weight(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) / shape[-2] ** 0.5).to(backend.device)

        weights = {"embedding": weight(VOCABULARY, WIDTH) * 7, "head": weight(WIDTH, VOCABULARY)}
        columns = {"q": QUERY_HEADS * SIZE, "k": HEADS * SIZE, "v": HEADS * VALUE_SIZE}
        for layer in range(LAYERS):
            weights |= {f"{name}{layer}": weight(WIDTH, count) for name, count in columns.items()}
            weights[f"out{layer}"] = weight(QUERY_HEADS * VALUE_SIZE, WIDTH) / SIZE**0.5
        states = [torch.zeros(pool, HEADS, SIZE, VALUE_SIZE, device=backend.device) for _ in range(LAYERS)]
        return cls(backend, weights, torch.tensor([0.02, 0.5], device=backend.device), states)

    def project(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (torch.tanh(x @ self.weights[f"{name}{layer}"]) for name in "qkv")
        return q.unflatten(-1, (QUERY_HEADS, SIZE)), k.unflatten(-1, (HEADS, SIZE)), v.unflatten(-1, (HEADS, -1))

    def step(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Logits after one more token per row."""
        x = self.weights["embedding"][tokens]
        for layer, state in enumerate(self.states):
            qkv = self.project(layer, x)
            out = self.backend("lightning_attention_step_", *qkv, state, self.slopes, state_indices=rows)
            x = x + out.flatten(-2) @ self.weights[f"out{layer}"]
        return x @ self.weights["head"]

    def verify(self, tokens: Tensor, parents: Tensor, rows: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The target's token after each node, and the nodes' keys and values."""
        x, kept = self.weights["embedding"][tokens], []
        for layer, state in enumerate(self.states):
            qkv = self.project(layer, x)
            kept.append(qkv[1:])
            options = {"parents": parents, "state_indices": rows}
            out = self.backend("lightning_attention_verify", *qkv, state, self.slopes, **options)
            x = x + out.flatten(-2) @ self.weights[f"out{layer}"]
        return (x @ self.weights["head"]).argmax(-1), kept

    def commit(self, kept: list[tuple[Tensor, Tensor]], path: Tensor, num_accepted: Tensor, rows: Tensor) -> None:
        for (k, v), state in zip(kept, self.states):
            self.backend(
                "lightning_attention_commit_", k, v, state, self.slopes, path, num_accepted, state_indices=rows
            )


def plainly(model: Model, prompts: Tensor, rows: Tensor) -> list[list[int]]:
    """Greedy decoding, a token at a time. Of two tokens none is ever close to being a tie."""
    for column in prompts.T[:-1]:
        model.step(column, rows)
    token, text = prompts[:, -1], []
    for _ in range(TOKENS):
        logits = model.step(token, rows)
        best = logits.topk(2).values
        assert float((best[:, 0] - best[:, 1]).min()) > 1e-4, "choose another seed"
        token = logits.argmax(-1)
        text.append(token)
    return torch.stack(text, 1).tolist()


def draft(root: int, future: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """A tree below the last token: at each level some guesses, the right one often among them, and some padding."""
    tokens, parents, depths = [root], [-1], [0]
    while len(tokens) < NODES:
        if rng.random() < 0.1:
            parent, token, depth = -2, 0, 0
        else:
            parent = rng.choice([i for i, up in enumerate(parents) if up > -2][-3:])
            depth = depths[parent] + 1
            guess = rng.randrange(VOCABULARY)
            token = future[depth - 1] if depth <= len(future) and rng.random() < 0.6 else guess
        tokens.append(token), parents.append(parent), depths.append(depth)
    return tokens, parents


def test_speculation_writes_what_plain_decoding_writes(backend: Backend) -> None:
    rng = random.Random(0)
    rows = torch.tensor([3, 0, 2], device=backend.device)
    prompts = torch.tensor([[rng.randrange(VOCABULARY) for _ in range(PROMPT)] for _ in rows], device=backend.device)
    expected = plainly(Model.random(backend, 4), prompts, rows)

    model = Model.random(backend, 4)
    for column in prompts.T[:-1]:
        model.step(column, rows)
    last, texts, passes = prompts[:, -1].tolist(), [[] for _ in rows], 0
    while min(map(len, texts)) < TOKENS:
        drafts = [draft(token, wanted[len(text) :], rng) for token, wanted, text in zip(last, expected, texts)]
        tokens = torch.tensor([tokens for tokens, _ in drafts], device=backend.device)
        parents = torch.tensor([parents for _, parents in drafts], dtype=torch.int32, device=backend.device)
        targets, kept = model.verify(tokens, parents, rows)
        path, num_accepted, accepted = backend("tree_verify_greedy", tokens, targets, parents)
        model.commit(kept, path, num_accepted, rows)
        for row, count in enumerate(num_accepted.tolist()):
            texts[row] += accepted[row, : count + 1].tolist()
            last[row] = texts[row][-1]
        passes += 1
    assert [text[:TOKENS] for text in texts] == expected
    assert passes < TOKENS, "no draft was ever accepted"
    assert len({token for text in texts for token in text}) > 5, "the model only repeats itself"
