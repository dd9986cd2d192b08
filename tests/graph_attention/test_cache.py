# SPDX-License-Identifier: Apache-2.0
"""GraphKVCache against transformers itself, under a dense mask over all copies of all segments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_kernels import SegmentGraph

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from torch_kernels.nn import GraphKVCache  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 97
LENGTHS = (5, 3, 7, 4)
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    },
}  # fmt: skip


def model_of(heads: int = 4, kv_heads: int = 2, rope: str = "default", **options: Any) -> Any:
    """Three layers of random weights, large enough that tokens influence each other."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=heads * 8, intermediate_size=40, num_hidden_layers=3, head_dim=8,
        num_attention_heads=heads, num_key_value_heads=kv_heads, rope_parameters=ROPE[rope], initializer_range=0.25,
        max_position_embeddings=64, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval().to(DEVICE)


def tokens_of(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (length,), generator=generator).to(DEVICE) for length in lengths]


@dataclass
class Copy:
    """A segment in the state of some round, as a part of one long sequence."""

    tokens: Tensor
    start: int
    sources: tuple[int, ...] = ()  # numbers of other copies


def dense(model: Any, copies: list[Copy], query: Tensor, start: int, read: tuple[int, ...]) -> Tensor:
    """The query's logits when transformers runs all copies and the query as one sequence under a 4D mask."""
    copies = [*copies, Copy(query, start, read)]
    ends = torch.tensor([0, *(len(copy.tokens) for copy in copies)]).cumsum(0).tolist()
    places = [slice(a, b) for a, b in zip(ends, ends[1:])]
    mask = torch.zeros(ends[-1], ends[-1], dtype=torch.bool, device=DEVICE)
    for copy, place in zip(copies, places):
        mask[place, place] = torch.ones(len(copy.tokens), len(copy.tokens)).tril().bool()
        for source in copy.sources:
            mask[place, places[source]] = True
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model(
            input_ids=torch.cat([copy.tokens for copy in copies])[None],
            position_ids=torch.cat([copy.start + torch.arange(len(copy.tokens), device=DEVICE) for copy in copies])[
                None
            ],
            attention_mask=mask[None, None],
            use_cache=False,
        ).logits
    return logits[0, places[-1]]


def check(model: Any, cache: GraphKVCache, copies: list[Copy], start: int, read: tuple[int, ...]) -> None:
    """The logits of a question and those of 6 greedily chosen tokens, and these tokens.

    The tolerance, in float32's units in the last place of the largest logit, is for 3 layers in another order of sums;
    in float64, for the angles and norms of transformers, which are float32 there too.
    """
    (question,) = tokens_of(6)
    logits = cache.append(question)
    written = []
    for _ in range(6):
        written.append(logits[-1].argmax()[None])
        logits = torch.cat([logits, cache.append(written[-1])])
    whole = torch.cat([question, *written])
    truth = dense(model, copies, whole, start, read)
    model.set_attn_implementation("torch_kernels_graph")
    assert logits.dtype == truth.dtype and logits.shape == truth.shape
    units = 25 if truth.dtype == torch.float64 else 100
    difference, allowed = (logits - truth).abs().max(), units * 2**-24 * truth.abs().max()
    assert difference <= allowed, f"logits differ by {difference:.1e}, allowed {allowed:.1e}"
    assert torch.cat(written).tolist() == truth[5:-1].argmax(-1).tolist()
    cache.forget_query()
    assert cache.generate(question, 6).tolist() == torch.cat(written).tolist()


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, *([torch.float64] if DEVICE == "cpu" else [])])
A, B, C, D = tokens_of(*LENGTHS)


@DTYPES
@pytest.mark.parametrize("rope", ROPE)
def test_star(dtype: torch.dtype, rope: str) -> None:
    model = model_of(rope=rope).to(dtype)
    cache = GraphKVCache(model)
    cache.encode([A, B, C, D])
    cache.pass_messages(SegmentGraph.star(LENGTHS))
    check(model, cache, [Copy(A, 0), Copy(B, 0), Copy(C, 0), Copy(D, 7, (0, 1, 2))], 11, (0, 1, 2, 3))


@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (6, 3)])
def test_bipartite_at_shared_and_running_positions(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    model = model_of(heads, kv_heads).to(dtype)
    shared, running = GraphKVCache(model), GraphKVCache(model, shared=False, tokens_per_pass=8)
    for cache, starts, query in ((shared, (0, 0, 5, 5), 12), (running, (0, 5, 8, 15), 19)):
        cache.encode([A, B])
        cache.encode([C, D])
        cache.pass_messages(SegmentGraph.bipartite(LENGTHS, 2))
        a, b, c, d = starts
        check(model, cache, [Copy(A, a), Copy(B, b), Copy(C, c, (0, 1)), Copy(D, d, (0, 1))], query, (0, 1, 2, 3))


@DTYPES
def test_chain_of_several_hops(dtype: torch.dtype) -> None:
    model = model_of().to(dtype)
    graph = SegmentGraph.chain(LENGTHS)
    # Level by level: what A says reaches D in one pass over the graph.
    cache = GraphKVCache(model)
    cache.encode([A, B, C, D])
    cache.pass_messages(graph)
    check(model, cache, [Copy(A, 0), Copy(B, 5, (0,)), Copy(C, 8, (1,)), Copy(D, 15, (2,))], 19, (0, 1, 2, 3))
    # The same in several passes of the model; the query also sees what B and C were alone.
    cache = GraphKVCache(model, tokens_per_pass=8)
    cache.encode([A, B, C, D])
    cache.pass_messages(graph, keep_sources=True)
    copies = [Copy(A, 0), Copy(B, 5, (0,)), Copy(C, 8, (1,)), Copy(D, 15, (2,)), Copy(B, 0), Copy(C, 0)]
    check(model, cache, copies, 19, (0, 1, 2, 3, 4, 5))
    # All at once, twice: A reaches C. Sources are read as they were before the round.
    cache = GraphKVCache(model)
    cache.encode([A, B, C, D])
    cache.pass_messages(graph, rounds=2)
    copies = [Copy(A, 0), Copy(B, 0), Copy(C, 0)]
    copies += [Copy(B, 7, (0,)), Copy(C, 7, (1,)), Copy(D, 7, (2,))]  # 3, 4, 5
    copies += [Copy(B, 14, (0,)), Copy(C, 14, (3,)), Copy(D, 14, (4,))]  # 6, 7, 8
    check(model, cache, copies, 21, (0, 6, 7, 8))


def test_rounds_of_a_graph_with_cycles_and_a_prefix() -> None:
    """Every segment sees every other; the query sees prefix and sources of the last round as well, as in the paper."""
    model, prefix = model_of(), tokens_of(4)[0]
    graph = SegmentGraph(LENGTHS, [(s, t) for s in range(4) for t in range(4) if s != t])
    cache = GraphKVCache(model, prefix=prefix)
    cache.encode([A, B, C, D])
    with pytest.raises(ValueError, match="cycle"):
        cache.pass_messages(graph)
    cache.pass_messages(graph, rounds=1, keep_sources=True)
    alone = [Copy(x, 4) for x in (A, B, C, D)]
    seeing = [Copy(x, 11, tuple(s for s in range(4) if s != i)) for i, x in enumerate((A, B, C, D))]
    check(model, cache, [*alone, *seeing, Copy(prefix, 0)], 18, tuple(range(9)))


def test_two_graphs_one_after_the_other() -> None:
    """The paper's chains of retrieval: the best passage is seen by the next two, and these by the last."""
    model = model_of()
    cache = GraphKVCache(model)
    cache.encode([A, B, C, D])
    for edges in ([(0, 1), (0, 2)], [(1, 3), (2, 3)]):
        cache.pass_messages(SegmentGraph(LENGTHS, edges), rounds=1)
    copies = [Copy(A, 0), Copy(B, 5, (0,)), Copy(C, 5, (0,)), Copy(D, 12, (1, 2))]
    # In the first round D is no target and nobody's source: it counts among the segments before.
    check(model, cache, copies, 16, (0, 1, 2, 3))


def test_encoding_once_with_a_graph_and_selecting() -> None:
    model = model_of()
    cache = GraphKVCache(model, prefix=tokens_of(2)[0])
    cache.encode([A, B])
    cache.encode([C, D], SegmentGraph(LENGTHS, [(0, 1), (1, 2), (0, 3)]))
    copies = [Copy(A, 2), Copy(B, 7, (0,)), Copy(C, 11, (1,)), Copy(D, 7, (0,)), Copy(tokens_of(2)[0], 0)]
    check(model, cache, copies, 18, (0, 1, 2, 3, 4))
    for shared, starts in ((True, (2, 2, 9)), (False, (2, 9, 12))):
        library = GraphKVCache(model, prefix=tokens_of(2)[0], shared=shared)
        library.encode([A, B, C, D])
        chosen = library.select([2, 1, 3])
        assert chosen.lengths == [7, 3, 4] and library.lengths == list(LENGTHS)
        chosen.pass_messages(SegmentGraph([7, 3, 4], [(1, 2)]))
        c, b, d = starts
        copies = [Copy(C, c), Copy(B, b), Copy(D, d, (1,)), Copy(tokens_of(2)[0], 0)]
        check(model, chosen, copies, d + 4, (0, 1, 2, 3))


def test_empty_segments_and_no_segments() -> None:
    model, nothing = model_of(), A[:0]
    cache = GraphKVCache(model)
    cache.encode([nothing, A, nothing, B])
    cache.pass_messages(SegmentGraph.star([0, 5, 0, 3]))
    check(model, cache, [Copy(A, 0), Copy(B, 5, (0,))], 8, (0, 1))
    check(model, GraphKVCache(model), [], 0, ())


def test_a_question_after_another_and_more_segments() -> None:
    model = model_of()
    cache = GraphKVCache(model)
    cache.encode([A, B])
    cache.append(C)
    cache.forget_query()
    check(model, cache, [Copy(A, 0), Copy(B, 0)], 5, (0, 1))
    cache.encode([tokens_of(90)[0]])  # more rows than there were
    check(model, cache, [Copy(A, 0), Copy(B, 0), Copy(tokens_of(90)[0], 0)], 90, (0, 1, 2))
    assert cache.lengths == [5, 3, 90]


def test_generation_ends_with_its_token() -> None:
    cache = GraphKVCache(model_of())
    cache.encode([A])
    written = cache.generate(B, 8)
    assert len(written) == 8
    cache.forget_query()
    end = int(written[2])
    first = written.tolist().index(end) + 1
    assert cache.generate(B, 8, eos_token_id=end).tolist() == written[:first].tolist()
    cache.forget_query()
    assert cache.generate(B, 0).tolist() == []


def test_memory_is_that_of_the_segments() -> None:
    model = model_of()
    cache = GraphKVCache(model)
    cache.encode([A, B, C, D])
    of_a_token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, channels, bytes
    assert cache.num_bytes == 19 * of_a_token
    cache.pass_messages(SegmentGraph.star(LENGTHS))  # the centre's place is used again
    assert cache.num_bytes == 19 * of_a_token
    for _ in range(3):  # two targets are sources too: they have a second place, and one is enough
        cache.pass_messages(SegmentGraph.chain(LENGTHS), rounds=2)
        assert cache.num_bytes == (19 + 3 + 7) * of_a_token


def test_other_calls_of_the_model_are_as_before() -> None:
    model = model_of()
    GraphKVCache(model)
    assert model.config._attn_implementation == "torch_kernels_graph"
    ids = torch.stack(tokens_of(9, 9))
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    results = []
    for implementation in ("torch_kernels_graph", "sdpa"):
        model.set_attn_implementation(implementation)
        results.append(model.generate(ids, attention_mask=padding, max_new_tokens=5, do_sample=False))
        results.append(model(ids, attention_mask=padding).logits)
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    config = transformers.LlamaConfig(vocab_size=8, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    named = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="torch_kernels_graph")
    assert named.config._attn_implementation == "torch_kernels_graph"


def test_what_cannot_be_run_is_refused() -> None:
    model = model_of()
    cache = GraphKVCache(model)
    cache.encode([A, B])
    for wrong in (lambda: cache.pass_messages(SegmentGraph.star([5, 4])), lambda: cache.append(A[:0])):
        with pytest.raises(ValueError, match=r"GraphKVCache.*(graph|tokens)"):
            wrong()
    with pytest.raises((ValueError, TypeError), match="tokens"):
        cache.append(A[None])
    with pytest.raises(ValueError, match="model"):
        GraphKVCache(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="frequencies"):
        GraphKVCache(transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=8, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        )))  # fmt: skip
    windowed = transformers.MistralForCausalLM(transformers.MistralConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1,
        intermediate_size=8, sliding_window=4,
    ))  # fmt: skip
    with pytest.raises(ValueError, match="sliding_window"):
        GraphKVCache(windowed.eval()).append(A)
    dropping = model_of(attention_dropout=0.5).train()
    with pytest.raises(ValueError, match="dropout"):
        GraphKVCache(dropping).append(A)
