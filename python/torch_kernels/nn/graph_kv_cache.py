# SPDX-License-Identifier: Apache-2.0
"""Graph-KV with a model of transformers, which this module imports; it gives transformers the attention
``"torch_kernels_graph"``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_kernels import _checks
from torch_kernels.graph_attention import SegmentGraph, graph_attention, rope_shift
from torch_kernels.nn import _attention_interface

NAME = "torch_kernels_graph"
CHANGING_FREQUENCIES = ("dynamic", "longrope")  # kinds of rotary embedding whose frequencies depend on the length

_attention_interface.register(NAME, "graph_kv", "GraphKVCache")


@dataclass
class _Segment:
    slot: int  # which of the key segments of the layers' tensors it is
    tokens: Tensor  # [L]
    start: int  # the position of its first token for whoever reads it
    spare: int | None = None  # a slot of the same length that is free
    length: int = 0

    def __post_init__(self) -> None:
        self.length = len(self.tokens)

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass
class _Pass:
    """What every layer needs of one pass of the model."""

    cache: GraphKVCache
    rows: Tensor  # [T]: where new keys and values go
    places: Tensor  # [T]: the places of the new tokens in their segments
    one_each: Tensor  # [T + 1]: 0, 1, .. T
    graph: tuple[Tensor, ...]
    q_start: Tensor
    edge_start: Tensor
    inv_freq: Tensor

    def advance(self) -> None:
        """From a pass of one token to that of the next."""
        for x in (self.rows, self.places, self.q_start, self.graph[1][-1:]):
            x += 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Stores a layer's new keys, which come unrotated as queries do, and attends to all that there are."""
        q, k, v = q[0], k[0], v[0]
        keys, values = self.cache._room(layer, k, v)
        keys.index_copy_(0, self.rows, rope_shift(k, self.one_each, self.places, self.inv_freq))
        values.index_copy_(0, self.rows, v)
        return graph_attention(
            q, keys, values, *self.graph, scale=scale, inv_freq=self.inv_freq, q_start=self.q_start,
            edge_start=self.edge_start,
        )[0][None]  # fmt: skip


def _sources(graph: SegmentGraph) -> dict[int, list[int]]:
    sources: dict[int, list[int]] = {}
    for source, target in graph.edges:
        sources.setdefault(target, []).append(source)
    return sources


class GraphKVCache:
    """Graph-KV with a language model of transformers: segments are encoded once, see each other as graphs say, and are
    then read by a query.

    >>> cache = GraphKVCache(model)                                      # doctest: +SKIP
    >>> cache.encode(passages)                                           # each alone
    >>> cache.pass_messages(SegmentGraph.bipartite(cache.lengths, m=3))  # the first three are seen by the rest
    >>> answer = cache.generate(question, max_new_tokens=20)             # sees all passages, and itself causally

    Each layer's keys are kept as rotated by their place in their segment, and every reader gives them the position that
    it wants: nothing is copied or rotated again when positions change.

    Args:
        model: a causal language model of the Llama kind, in evaluation mode: rotary embedding of whole heads, attention
            to everything before in all layers. Its attention implementation becomes ``"torch_kernels_graph"``, which in
            calls that do not come from a cache is ``"sdpa"``.
        prefix: tokens before all others, encoded alone and seen by the query only (a system prompt).
        shared: segments that are encoded alone all begin at position 0 (behind the prefix), as in the paper; otherwise
            each begins where the one before ends.
        tokens_per_pass: the model encodes segments together, up to so many tokens at once.

    Importing this class registers ``"torch_kernels_graph"``, so that ``attn_implementation`` may name it.

    Attributes:
        lengths: the tokens of each segment, prefix and query not among them.
    """

    def __init__(
        self,
        model: Any,
        *,
        prefix: Tensor | Sequence[int] | None = None,
        shared: bool = True,
        tokens_per_pass: int = 16_384,
    ) -> None:
        rotary: Any = getattr(getattr(model, "base_model", None), "rotary_emb", None)
        if not isinstance(getattr(rotary, "inv_freq", None), Tensor):
            _checks.fail("GraphKVCache", "model", "a language model with rotary embedding", type(model).__name__)
        config = model.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if 2 * len(rotary.inv_freq) != size:
            _checks.fail("GraphKVCache", "model", f"one that rotates all {size} channels", 2 * len(rotary.inv_freq))
        if getattr(rotary, "rope_type", "default") in CHANGING_FREQUENCIES:
            _checks.fail("GraphKVCache", "model", "one whose rotary frequencies are fixed", rotary.rope_type)
        if tokens_per_pass < 1:
            _checks.fail("GraphKVCache", "tokens_per_pass", "at least 1", tokens_per_pass)
        model.set_attn_implementation(NAME)
        self.model, self.shared, self.tokens_per_pass = model, shared, tokens_per_pass
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # [rows, Hk, D] twice
        self._offsets = [0]  # where slots begin and end; the query's is the last
        self._segments: list[_Segment] = []
        self._older: list[_Segment] = []  # what segments were before, where the query sees that too
        self._query: _Segment | None = None
        self._step: _Pass | None = None  # the last pass, if it was one token of the query
        self._prefix: _Segment | None = None
        if prefix is not None:
            self._prefix = _Segment(self._slot(len(prefix)), self._tokens("prefix", prefix), 0)
            self._run([(self._prefix, [])])

    @property
    def lengths(self) -> list[int]:
        return [segment.length for segment in self._segments]

    @property
    def num_bytes(self) -> int:
        """Of the keys and values that are in use."""
        return sum(2 * k[: self._offsets[-1]].nbytes for k, _ in self._layers.values())

    def encode(self, segments: Iterable[Tensor | Sequence[int]], graph: SegmentGraph | None = None) -> None:
        """Adds segments of tokens, each of which sees itself only. Forgets the query.

        A graph, of these and the segments before, has the effect of :meth:`pass_messages` afterwards. But new segments
        with sources are encoded only once.
        """
        tokens = [self._tokens("segments", segment) for segment in segments]
        lengths = [*self.lengths, *map(len, tokens)]
        graph = SegmentGraph(lengths, []) if graph is None else graph
        levels = self._levels("encode", graph, lengths)
        self.forget_query()
        known, first = len(self._segments), self._behind_prefix()
        for new in tokens:
            start = first if self.shared else max((segment.end for segment in self._segments), default=first)
            self._segments.append(_Segment(self._slot(len(new)), new, start))
        self._by_level(graph, levels, known)

    def select(self, segments: Iterable[int]) -> GraphKVCache:
        """A cache of its own of these segments, in this order, as they are now: the passages that a question retrieves
        from all that were ever encoded. What they have seen stays in them."""
        chosen = [self._segments[i] for i in segments]
        other = GraphKVCache(self.model, shared=self.shared, tokens_per_pass=self.tokens_per_pass)
        parts = chosen if self._prefix is None else [self._prefix, *chosen]
        copies = [_Segment(other._slot(part.length), part.tokens, part.start) for part in parts]
        if self._prefix is not None:
            other._prefix, *copies = copies
        for segment in copies:
            if not self.shared:
                segment.start = max((s.end for s in other._segments), default=other._behind_prefix())
            other._segments.append(segment)
        for layer, held in self._layers.items():
            rows = [slice(self._offsets[part.slot], self._offsets[part.slot + 1]) for part in parts]
            keys, values = (torch.cat([x[:0], *(x[place] for place in rows)]) for x in held)
            other._layers[layer] = keys, values
        return other

    def pass_messages(self, graph: SegmentGraph, rounds: int | None = None, keep_sources: bool = False) -> None:
        """Encodes targets again, now seeing their sources. Forgets the query.

        Args:
            graph: of the cache's segments; its lengths are theirs.
            rounds: None is for graphs without cycles: every target is encoded once and sees sources that have seen
                theirs. Otherwise all targets are encoded in each of so many rounds, and see their sources as they were
                before the round.
            keep_sources: the query also sees what a source was before it was encoded again.

        With shared positions, the targets of a level or round begin where the longest of the segments before them ends
        (in a level: the segments of all lower levels; in a round: all but targets that are no source). Otherwise every
        segment stays at its place.
        """
        if rounds is not None and rounds < 0:
            _checks.fail("GraphKVCache.pass_messages", "rounds", "None or at least 0", rounds)
        levels = self._levels("pass_messages", graph, self.lengths, cycles=rounds is not None)
        self.forget_query()
        if rounds is None:
            self._by_level(graph, levels, len(graph), keep_sources)
        for _ in range(rounds or 0):
            self._round(graph, keep_sources)

    def append(self, tokens: Tensor | Sequence[int], logits_to_keep: int = 0) -> Tensor:
        """The next tokens of the query, which see the prefix, all segments, and the query up to themselves.

        Returns:
            The logits of what follows each token ``[T, vocabulary]``, or the last so many of them.
        """
        tokens = self._tokens("tokens", tokens)
        if len(tokens) == 0:
            _checks.fail("GraphKVCache.append", "tokens", "at least one", 0)
        if self._query is None:
            start = max((segment.end for segment in self._read_by_query()), default=0)
            self._query = _Segment(self._slot(0), tokens[:0], start)
        query = self._query
        query.length += len(tokens)
        self._offsets[-1] += len(tokens)
        if len(tokens) == 1 and self._step is not None:
            self._step.advance()
            call = self._step
        else:
            call = self._pass([(query, self._read_by_query(), len(tokens))])
        self._step = call if len(tokens) == 1 else None
        return self._forward(self.model, tokens, call, logits_to_keep=logits_to_keep).logits[0]

    def generate(self, tokens: Tensor | Sequence[int], max_new_tokens: int, eos_token_id: int | None = None) -> Tensor:
        """Continues the query with these tokens and then greedily. Returns the new tokens ``[N]``, the last of which is
        ``eos_token_id`` where that ends them early."""
        logits, written = self.append(tokens, logits_to_keep=1), []
        for i in range(max_new_tokens):
            written.append(logits[-1].argmax()[None])
            if i == max_new_tokens - 1 or (eos_token_id is not None and int(written[-1]) == eos_token_id):
                break
            logits = self.append(written[-1])
        return torch.cat(written) if written else torch.empty(0, dtype=torch.int64, device=self.model.device)

    def forget_query(self) -> None:
        """What comes next is another query over the same segments."""
        if self._query is not None:
            self._offsets.pop()
        self._query = self._step = None

    # ---- passes of the model ----

    def _tokens(self, name: str, tokens: Any) -> Tensor:
        tokens = torch.as_tensor(tokens, device=self.model.device)
        tokens = tokens.to(torch.int64) if tokens.numel() == 0 else tokens
        if tokens.dim() != 1 or tokens.dtype not in _checks.INDEX:
            _checks.fail("GraphKVCache", name, "token numbers [L]", f"{tokens.dtype} {list(tokens.shape)}")
        return tokens

    def _levels(self, method: str, graph: SegmentGraph, lengths: list[int], cycles: bool = False) -> list[int]:
        if list(graph.lengths) != lengths:
            _checks.fail(f"GraphKVCache.{method}", "graph", f"of lengths {lengths}", list(graph.lengths))
        return [] if cycles else graph.levels()

    def _by_level(self, graph: SegmentGraph, levels: list[int], known: int, keep_sources: bool = False) -> None:
        """Encodes all targets, and whatever is not among the first ``known`` segments. One pass is enough: in every
        layer the keys of all its segments are there before any attends to them."""
        sources, seen, todo = _sources(graph), {source for source, _ in graph.edges}, []
        for level in range(max(levels, default=-1) + 1):
            start = max((s.end for s, of in zip(self._segments, levels, strict=True) if of < level), default=0)
            for i in (i for i, of in enumerate(levels) if of == level and (level or i >= known)):
                if level:
                    old = self._segments[i]
                    keep = keep_sources and i in seen
                    slot = self._slot(old.length) if keep else old.slot
                    self._older += [old] if keep else []
                    self._segments[i] = _Segment(slot, old.tokens, start if self.shared else old.start, old.spare)
                todo.append((self._segments[i], [self._segments[s] for s in sources.get(i, ())]))
        self._run(todo)

    def _round(self, graph: SegmentGraph, keep_sources: bool) -> None:
        """Encodes all targets, which see their sources as they are now."""
        sources, seen = _sources(graph), {source for source, _ in graph.edges}
        start = max((s.end for i, s in enumerate(self._segments) if i in seen or i not in sources), default=0)
        again: dict[int, _Segment] = {}
        for i in sources:
            old = self._segments[i]
            # Only who is read in the same round must keep its old keys until the round is over.
            slot = old.slot if i not in seen else self._slot(old.length) if old.spare is None else old.spare
            again[i] = _Segment(slot, old.tokens, start if self.shared else old.start)
        self._run([(again[i], [self._segments[s] for s in mine]) for i, mine in sources.items()])
        for i, new in again.items():
            old, self._segments[i] = self._segments[i], new
            if i not in seen:
                new.spare = old.spare
            elif keep_sources:
                self._older.append(old)
            else:
                new.spare = old.slot

    def _behind_prefix(self) -> int:
        return 0 if self._prefix is None else self._prefix.end

    def _read_by_query(self) -> list[_Segment]:
        prefix = [] if self._prefix is None else [self._prefix]
        return [*prefix, *self._older, *self._segments]

    def _slot(self, length: int) -> int:
        self._offsets.append(self._offsets[-1] + length)
        return len(self._offsets) - 2

    @torch.no_grad()
    def _run(self, targets: list[tuple[_Segment, list[_Segment]]]) -> None:
        """Encodes these segments, each seeing its sources, of which those among them come first."""
        targets = [(segment, mine) for segment, mine in targets if segment.length]
        while targets:
            count, tokens = 1, targets[0][0].length
            while count < len(targets) and tokens + targets[count][0].length <= self.tokens_per_pass:
                tokens += targets[count][0].length
                count += 1
            now, targets = targets[:count], targets[count:]
            call = self._pass([(segment, mine, segment.length) for segment, mine in now])
            self._forward(self.model.base_model, torch.cat([segment.tokens for segment, _ in now]), call)

    def _pass(self, targets: list[tuple[_Segment, list[_Segment], int]]) -> _Pass:
        """That of the last so many tokens of each target, which see its sources and their own segment."""
        device = self.model.device

        def index(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int32, device=device)

        def offsets(lengths: Iterable[int]) -> Tensor:
            return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)

        new = [torch.arange(segment.length - count, segment.length) for segment, _, count in targets]
        rows = [places + self._offsets[segment.slot] for places, (segment, _, _) in zip(new, targets, strict=True)]
        graph = (
            offsets(count for *_, count in targets),
            index(self._offsets),
            offsets(len(sources) for _, sources, _ in targets),
            index(source.slot for _, sources, _ in targets for source in sources),
            index(segment.slot for segment, *_ in targets),
        )
        inv_freq = self.model.base_model.rotary_emb.inv_freq
        return _Pass(
            self,
            rows=torch.cat(rows).to(device),
            places=torch.cat(new).to(device),
            one_each=torch.arange(sum(map(len, new)) + 1, device=device),
            graph=graph,
            q_start=index(segment.end - count for segment, _, count in targets),
            edge_start=index(source.start for _, sources, _ in targets for source in sources),
            inv_freq=inv_freq if inv_freq.dtype == torch.float64 else inv_freq.float(),
        )

    @torch.no_grad()
    def _forward(self, model: Any, tokens: Tensor, call: _Pass, **options: Any) -> Any:
        """Every token at position 0, where the model's rotary embedding changes nothing, and under a mask that nobody
        reads, so that transformers makes none."""
        position_ids, mask = torch.zeros_like(tokens)[None], torch.empty(1, 1, 0, 0, device=tokens.device)
        return model(
            input_ids=tokens[None], position_ids=position_ids, attention_mask=mask, use_cache=False, graph_kv=call,
            **options,
        )  # fmt: skip

    def _room(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's tensors, with rows for all slots."""
        held, rows = self._layers.get(layer), self._offsets[-1]
        if held is None or len(held[0]) < rows:
            grown = tuple(x.new_empty(rows + max(rows // 8, 64), *x.shape[1:]) for x in (k, v))
            for x, old in zip(grown, held or ()):
                x[: len(old)] = old
            self._layers[layer] = held = (grown[0], grown[1])
        return held
