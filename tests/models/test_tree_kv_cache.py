# SPDX-License-Identifier: Apache-2.0
"""TreeKVCache against greedy decoding of transformers with its own eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_kernels
from torch import Tensor
from torch_kernels.nn import TreeKVCache, tree_kv_cache  # noqa: E402  (without transformers the tests are skipped before)
from torch_kernels.trees import PADDING, ROOT

from .tiny import DEVICE, VOCABULARY, assert_near, greedy, model_of, tokens_of, transformers

LENGTHS = (5, 9, 2)
PROMPTS = tokens_of(len(LENGTHS), max(LENGTHS))
COUNT = 20


def random_trees(batch: int, nodes: int, generator: torch.Generator) -> Tensor:
    parents = [[ROOT, *(int(torch.randint(i, (), generator=generator)) for i in range(1, nodes))] for _ in range(batch)]
    parents[-1][nodes - 1] = PADDING
    return torch.tensor(parents, dtype=torch.int32)


def drafts_of(token: Tensor, parents: Tensor, truth: list[list[int]], generator: torch.Generator) -> Tensor:
    """Random tokens, most of them those that come, so that paths of all lengths are accepted."""
    drafts = torch.randint(VOCABULARY, parents.shape, generator=generator)
    depths = torch_kernels.tree_positions(parents, torch.zeros(len(parents), dtype=torch.int32))
    for row, coming in enumerate(truth):
        for node, depth in enumerate(depths[row].tolist()):
            if depth <= len(coming) and torch.rand((), generator=generator) < 0.7:
                drafts[row, node] = coming[depth - 1] if depth else int(token[row])
    drafts[:, 0] = token[:, 0].cpu()
    return drafts.to(DEVICE)


def decode(cache: TreeKVCache, expected: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The tokens that random trees lead to, and how many drafts were accepted in each step of each row."""
    generator = torch.Generator().manual_seed(1)
    token = cache.prefill(PROMPTS, LENGTHS).argmax(-1, keepdim=True)
    written, accepted = [[int(t)] for t in token], []
    while min(map(len, written)) < COUNT:
        parents = random_trees(len(written), 8, generator)
        truth = [row[len(done) :] for row, done in zip(expected, written)]
        drafts, parents = drafts_of(token, parents, truth, generator), parents.to(DEVICE)
        target = cache.verify(drafts, parents).logits.argmax(-1)
        path, num_accepted, tokens = torch_kernels.tree_verify_greedy(drafts, target, parents)
        cache.commit(path, num_accepted)
        token = tokens.gather(1, num_accepted[:, None].long())
        accepted += num_accepted.tolist()
        for row, new in zip(written, tokens.tolist()):
            row += [t for t in new if t >= 0]
    return written, accepted


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral", "gemma2", "gpt_oss"])
def test_writes_what_greedy_decoding_does(kind: str) -> None:
    """Token for token: full and sliding windows, softcap, sinks, experts; rows of different lengths."""
    model = model_of(kind, attn_implementation="eager")
    expected = [greedy(model, PROMPTS[i : i + 1, :n], 2 * COUNT)[0].tolist() for i, n in enumerate(LENGTHS)]
    cache = TreeKVCache(model, max_length=128, batch=len(LENGTHS))
    written, accepted = decode(cache, expected)
    for row, want in zip(written, expected):
        assert row[: len(want)] == want[: len(row)]
    assert len(set(accepted)) >= 3, "trees accept paths of several lengths"
    assert cache.prefix_lens.tolist() == [n + len(row) - 1 for n, row in zip(LENGTHS, written)]
    address = [x.data_ptr() for pair in cache._layers.values() for x in pair]
    cache.reset()
    assert decode(cache, expected)[0] == written
    assert [x.data_ptr() for pair in cache._layers.values() for x in pair] == address


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_logits_of_all_nodes(kind: str) -> None:
    model = model_of(kind)
    cache = TreeKVCache(model, max_length=32)
    prompt = PROMPTS[1:2]
    cache.prefill(prompt)
    parents = torch.tensor([[-1, 0, 0, 2, 1, 2, 4]], dtype=torch.int32, device=DEVICE)
    drafts = tokens_of(1, 7, seed=3)
    output = cache.verify(drafts, parents, output_hidden_states=True)
    assert output.hidden_states[-1].shape == (1, 7, 64)
    model.set_attn_implementation("eager")
    visible = torch_kernels.tree_mask(parents)[0]
    for node in range(7):
        whole = torch.cat([prompt, drafts[:, visible[node]]], dim=1)
        with torch.no_grad():
            assert_near(output.logits[0, node], model(whole).logits[0, -1], units=100)


def test_long_prompts_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    whole, pieces = (TreeKVCache(model, max_length=32, batch=3) for _ in range(2))
    expected = whole.prefill(PROMPTS, LENGTHS)
    monkeypatch.setattr(tree_kv_cache, "MAX_NODES", 4)
    assert_near(pieces.prefill(PROMPTS, LENGTHS), expected, units=100)
    assert pieces.prefix_lens.tolist() == list(LENGTHS)
    again = PROMPTS[:, :3]
    assert_near(pieces.prefill(again), whole.prefill(again), units=100)
    assert pieces.prefix_lens.tolist() == [n + 3 for n in LENGTHS]


def test_other_calls_are_sdpa() -> None:
    model = model_of("llama", attn_implementation="sdpa")
    mask = torch.ones_like(PROMPTS)
    mask[0, :4] = 0
    with torch.no_grad():
        expected = model(PROMPTS, attention_mask=mask).logits
        model.set_attn_implementation("torch_kernels_tree")
        assert torch.equal(model(PROMPTS, attention_mask=mask).logits, expected)
    assert transformers.AttentionInterface()["torch_kernels_tree"] is not transformers.AttentionInterface()["sdpa"]


def test_a_full_cache_stays_as_it_was() -> None:
    model = model_of("llama")
    cache = TreeKVCache(model, max_length=10)
    cache.prefill(PROMPTS[1:2, :8])
    parents = torch.tensor([[-1, 0, 1]], device=DEVICE)
    path = torch.tensor([[0, 1, 2]], dtype=torch.int32, device=DEVICE)
    accepted = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    logits = cache.verify(PROMPTS[1:2, :3], parents).logits
    with pytest.raises(ValueError, match="TreeKVCache.commit: num_accepted must be within max_length=10, got 11 tok"):
        cache.commit(path, accepted)
    assert cache.prefix_lens.tolist() == [8]
    cache.commit(path.where(path < 2, -1), accepted - 1)
    assert cache.prefix_lens.tolist() == [10]
    assert logits.shape == (1, 3, VOCABULARY)
    assert cache.num_bytes == 2 * 2 * 10 * 2 * 16 * 4


def test_rows_without_a_root_add_nothing() -> None:
    cache = TreeKVCache(model_of("llama"), max_length=16, batch=2)
    cache.prefill(PROMPTS[:2, :4])
    cache.verify(PROMPTS[:2, :2], torch.tensor([[-1, 0], [-2, -2]], device=DEVICE))
    cache.commit(torch.tensor([[0, 1], [-1, -1]], device=DEVICE), torch.tensor([1, 0], device=DEVICE))
    assert cache.prefix_lens.tolist() == [6, 4]


def test_wrong_arguments() -> None:
    model = model_of("llama")
    cache = TreeKVCache(model, max_length=16, batch=2)
    tokens, chain = PROMPTS[:2, :2], torch.tensor([[-1, 0]] * 2, device=DEVICE)
    calls: list[tuple[Any, type[Exception], str]] = [
        (lambda: TreeKVCache(model, 0), ValueError, "TreeKVCache: max_length must be at least 1, got 0"),
        (lambda: TreeKVCache(model_of("minimax"), 8), ValueError, "TreeKVCache: model must be one whose layers are"),
        (lambda: cache.prefill(tokens[:1]), ValueError, r"TreeKVCache.prefill: tokens must be \[B=2, T=\?\]"),
        (lambda: cache.prefill(tokens, [2, 3]), ValueError, "lengths must be 2 numbers from 1 to P=2, got"),
        (lambda: cache.verify(tokens.float(), chain), TypeError, "TreeKVCache.verify: tokens must be int32 or int64"),
        (lambda: cache.verify(tokens, chain[:, :1]), ValueError, r"TreeKVCache.verify: parents must be \[B=2, T=2\]"),
        (lambda: cache.commit(chain, chain[:, 0]), ValueError, "TreeKVCache.commit: path must be of a pass of verify"),
    ]
    for call, error, message in calls:
        with pytest.raises(error, match=message):
            call()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(ValueError, match="TreeKVCache: model must be in evaluation mode"):
        TreeKVCache(model.train(), max_length=8).prefill(PROMPTS[:1])


def test_layers_that_do_not_attend_are_noticed() -> None:
    model = model_of("llama")
    cache = TreeKVCache(model, max_length=16)
    model.config.num_hidden_layers = 1  # of which transformers' loop takes so many
    with pytest.raises(ValueError, match="whose layers all call 'torch_kernels_tree', got one of whose 2 layers 1 do"):
        cache.prefill(PROMPTS[:1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_pass_is_one_graph(backend: str) -> None:
    model = model_of("llama")
    cache = TreeKVCache(model, max_length=32)
    cache.prefill(PROMPTS[1:2])
    parents = torch.tensor([[-1, 0, 0, 1]], dtype=torch.int32, device=DEVICE)
    expected = cache.verify(PROMPTS[:1, :4], parents).logits

    def step(tokens: Tensor, parents: Tensor) -> Tensor:
        return cache.verify(tokens, parents).logits

    torch._dynamo.reset()
    actual = torch.compile(step, fullgraph=True, backend=backend)(PROMPTS[:1, :4], parents)
    assert_near(actual, expected, units=20)
    cache.commit(parents.new_tensor([[0, 1, 3, -1]]), parents.new_tensor([2]))
    assert cache.prefix_lens.tolist() == [12]
