# SPDX-License-Identifier: Apache-2.0
"""Answering from retrieved passages with Graph-KV: passages are encoded once, and the best are seen by the rest.

The ten passages of Python's own help topics that suit a question best go through a small Llama of transformers, with
random weights, since only time and memory are shown here: as one long sequence; as a graph of segments in one pass of
flex_attention with a block mask; and as the same graph with GraphKVCache, from text or from passages that were encoded
before. All but the first give the same logits.

    pip install transformers matplotlib
    python examples/graph_kv_rag.py            less than a minute on two cores, most of it flex_attention compiling

Read `graph_at_once` and `from_a_library` to see the library in use; text and byte counts are those of the other
examples.
"""

import argparse
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
import transformers
from speculative_decoding import topic
from torch import Tensor
from torch_kernels import SegmentGraph
from torch_kernels.nn import GraphKVCache

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
from harness.memory import measured  # noqa: E402

QUESTION = "How do I handle an exception that was raised inside a with statement, and where is it caught?"


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def retrieve(question: str, count: int, length: int) -> list[tuple[float, str, list[str]]]:
    """(score, topic, words) of the best passages, best first: the question's words in them, rare ones counting more."""
    passages, seen = [], set()
    for name in sorted(topics):
        paragraphs = topic(name).split("\n\n")  # topics quote each other
        words = words_of("\n\n".join(paragraph for paragraph in paragraphs if paragraph not in seen))
        seen.update(paragraphs)
        passages += [(name, words[i : i + length]) for i in range(0, len(words) - length // 2, length)]
    counts = [Counter(words) for _, words in passages]
    spread = Counter(word for found in counts for word in found)
    asked = {word for word in words_of(question) if word.isalnum()}

    def score(found: Counter) -> float:
        return sum(math.log(len(passages) / spread[word]) * math.log1p(found[word]) for word in asked if word in found)

    ranked = sorted(((score(found), *passage) for found, passage in zip(counts, passages)), reverse=True)
    return ranked[:count]


def small_llama(vocabulary: int, device: str, seed: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1 << 20,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).eval().to(device)


def one_sequence(model: Any, passages: list[Tensor], question: Tensor) -> Tensor:
    """As usual: every passage sees all before it."""
    model.set_attn_implementation("sdpa")
    return model(torch.cat([*passages, question])[None], logits_to_keep=len(question), use_cache=True).logits[0]


def flex_at_once(model: Any, passages: list[Tensor], question: Tensor, graph: SegmentGraph) -> Tensor:
    """The question is one more segment, which sees all others. A new request needs a new mask: making it is counted."""
    from torch.nn.attention.flex_attention import create_block_mask

    device, count = question.device, len(passages)
    whole = SegmentGraph(
        (*graph.lengths, len(question)), (*graph.edges, *((s, count) for s in range(count))), device=device
    )
    starts, _, _ = whole.positions()
    segment = torch.arange(count + 1, device=device).repeat_interleave(torch.tensor(whole.lengths, device=device))
    place = torch.cat([torch.arange(length, device=device) for length in whole.lengths])
    sees = torch.zeros(count + 1, count + 1, dtype=torch.bool, device=device)
    for source, target in whole.edges:
        sees[target, source] = True

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return sees[segment[row], segment[key]] | ((segment[row] == segment[key]) & (key <= row))

    mask = create_block_mask(visible, None, None, len(segment), len(segment), device=str(device))
    model.set_attn_implementation("flex_attention")
    ids, positions = torch.cat([*passages, question])[None], (starts[segment] + place)[None]
    return model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=len(question), use_cache=True).logits[
        0
    ]


def graph_at_once(model: Any, passages: list[Tensor], question: Tensor, graph: SegmentGraph) -> Tensor:
    cache = GraphKVCache(model)
    cache.encode(passages, graph)  # those without sources first, then those that see them
    return cache.append(question)


def from_a_library(library: GraphKVCache, ranked: list[int], question: Tensor, graph: SegmentGraph) -> Tensor:
    """All passages were encoded alone, long ago: only those with sources pass through the model again."""
    cache = library.select(ranked)
    cache.pass_messages(graph)
    return cache.append(question)


class Way(NamedTuple):
    name: str
    tokens: int  # through the model
    pairs: int  # of queries and keys
    last: int  # position
    run: Callable[[], Tensor]


def ways(model: Any, passages: list[Tensor], question: Tensor, graph: SegmentGraph, flex: bool) -> list[Way]:
    tokens, asked = sum(graph.lengths), len(question)

    def causal(length: int) -> int:
        return length * (length + 1) // 2

    targets = {target for _, target in graph.edges}
    seen = sum(graph.lengths[s] * graph.lengths[t] for s, t in graph.edges) + tokens * asked + causal(asked)
    pairs = seen + sum(map(causal, graph.lengths))
    q_start, _, _ = graph.positions()
    last = max(int(start) + length for start, length in zip(q_start, graph.lengths)) + asked - 1
    # The library holds the passages in some other order.
    shelf = sorted(range(len(passages)), key=lambda i: hash(tuple(passages[i].tolist())))
    library = GraphKVCache(model)
    library.encode([passages[i] for i in shelf])
    ranked = [shelf.index(i) for i in range(len(passages))]
    again = sum(graph.lengths[t] for t in targets) + asked
    new_pairs = seen + sum(causal(graph.lengths[t]) for t in targets)

    found = [Way("one sequence", tokens + asked, causal(tokens + asked), tokens + asked - 1,
                 lambda: one_sequence(model, passages, question))]  # fmt: skip
    if flex:
        found.append(Way("graph, flex_attention", tokens + asked, pairs, last,
                         lambda: flex_at_once(model, passages, question, graph)))  # fmt: skip
    found.append(Way("graph, GraphKVCache", tokens + asked, pairs, last,
                     lambda: graph_at_once(model, passages, question, graph)))  # fmt: skip
    found.append(Way("  passages kept", again, new_pairs, last,
                     lambda: from_a_library(library, ranked, question, graph)))  # fmt: skip
    return found


def synchronised(call: Callable[[], Tensor], device: str) -> tuple[Tensor, float]:
    start = time.perf_counter()
    result = call()
    if device != "cpu":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--passages", type=int, default=10)
    parser.add_argument("--length", type=int, default=150, help="words of a passage")
    parser.add_argument("--sources", type=int, default=3, help="so many of the best passages are seen by the rest")
    parser.add_argument("--rounds", type=int, default=5, help="of timing; the best counts")
    parser.add_argument("--answer", type=int, default=20, help="words to write")
    parser.add_argument("--no-flex", action="store_true", help="spares the compilation of flex_attention")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", default="graph_kv_rag.svg", help="where to draw the mask; empty: nowhere")
    args = parser.parse_args()

    found = retrieve(args.question, args.passages, args.length)
    print(f"question: {args.question}\n")
    for rank, (score, name, words) in enumerate(found):
        print(f"{rank:3}  {score:5.1f}  {name:<16} {' '.join(words[:14])} …")
    asked = words_of(args.question)
    vocabulary = sorted({*asked, *(word for *_, words in found for word in words)})
    number = {word: i for i, word in enumerate(vocabulary)}
    question, *passages = (
        torch.tensor([number[word] for word in words], device=args.device)
        for words in (asked, *(words for *_, words in found))
    )
    graph = SegmentGraph.bipartite([len(words) for words in passages], args.sources)
    print(f"\nwho sees whom, besides the question, which sees all:\n{graph.draw()}\n")
    if args.plot and find_spec("matplotlib"):
        import matplotlib

        matplotlib.use("Agg")
        graph.plot().figure.savefig(args.plot, bbox_inches="tight")
        print(f"plot: {args.plot}")

    model = small_llama(len(vocabulary), args.device, args.seed)
    with torch.inference_mode():
        apart = compare(ways(model, passages, question, graph, not args.no_flex), args.device, args.rounds)
        print(f"the graph's logits differ by at most {apart:.1e} of the largest\n")
        cache = GraphKVCache(model)
        cache.encode(passages, graph)
        cache.append(question)
        size = cache.num_bytes / 1e6
        answer, seconds = synchronised(lambda: cache.generate(question[-1:], args.answer), args.device)
    print(f"written with random weights, {1e3 * seconds / args.answer:.1f} ms a word, from {size:.1f} MB of cache:")
    print(" ".join(vocabulary[i] for i in answer.tolist()))


def compare(found: list[Way], device: str, rounds: int) -> float:
    """Prints a line for each way; returns how far the logits of a graph's ways are apart."""
    first = [synchronised(way.run, device) for way in found]
    memory = [measured(way.run, device)[1] for way in found]
    then = [min(times) for times in zip(*([synchronised(way.run, device)[1] for way in found] for _ in range(rounds)))]
    print(f"{'':24}{'tokens':>8}{'pairs':>12}{'last place':>12}{'first':>10}{'then':>11}{'memory':>10}")
    for way, (_, begun), seconds, taken in zip(found, first, then, memory):
        shown = "" if taken is None else f"{taken / 1e6:.0f} MB"
        counts = f"{way.tokens:8,}{way.pairs:12,}{way.last:12,}"
        print(f"{way.name:24}{counts}{begun:8.2f} s{1e3 * seconds:8.1f} ms{shown:>10}")
    (truth, _), *others = first[1:]
    return max(float((logits - truth).abs().max() / truth.abs().max()) for logits, _ in others)


if __name__ == "__main__":
    main()
