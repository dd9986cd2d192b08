# SPDX-License-Identifier: Apache-2.0
"""Graphs of text segments, as the index tensors that :func:`torch_kernels.graph_attention` takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FULL, CAUSAL, NOTHING = "■", "◣", "·"


class SegmentGraph:
    """Segments of given lengths and who sees whom among them.

    Segment s is query segment s and key segment s, so ``own_segment`` is 0, 1, .. n - 1. Edges are (source, target)
    pairs, deduplicated and sorted by target, then source.

    >>> graph = SegmentGraph([2, 3, 2], [(0, 2), (1, 2)])
    >>> graph.edge_offsets.tolist(), graph.edge_sources.tolist()
    ([0, 0, 0, 2], [0, 1])
    >>> print(graph.draw())
      0 1 2
    0 ◣ · ·
    1 · ◣ ·
    2 ■ ■ ◣

    Attributes:
        lengths: tokens of each segment.
        edges: the (source, target) pairs.
        q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment: int32 arguments of the op of the same names;
            ``arguments`` is all five in order.
    """

    def __init__(
        self, lengths: Iterable[int], edges: Iterable[tuple[int, int]], device: torch.device | str | None = None
    ) -> None:
        self.lengths = tuple(int(length) for length in lengths)
        self.edges = tuple(sorted({(int(s), int(t)) for s, t in edges}, key=lambda edge: (edge[1], edge[0])))
        if any(length < 0 for length in self.lengths):
            raise ValueError(f"SegmentGraph: lengths must not be negative, got {list(self.lengths)}")
        for source, target in self.edges:
            if not (0 <= source < len(self.lengths) and 0 <= target < len(self.lengths)):
                raise ValueError(
                    f"SegmentGraph: edges must join segments in [0, {len(self.lengths)}), got {(source, target)}"
                )
            if source == target:
                raise ValueError(f"SegmentGraph: edges: segment {source} sees itself anyway, got {(source, target)}")

        def offsets(counts: Sequence[int]) -> Tensor:
            ends = torch.tensor([0, *counts], dtype=torch.int64).cumsum(0)
            return ends.to(torch.int32).to(device)

        sources_of = [0] * len(self.lengths)
        for _, target in self.edges:
            sources_of[target] += 1
        self.q_offsets = self.kv_offsets = offsets(self.lengths)
        self.edge_offsets = offsets(sources_of)
        self.edge_sources = torch.tensor([source for source, _ in self.edges], dtype=torch.int32, device=device)
        self.own_segment = torch.arange(len(self.lengths), dtype=torch.int32, device=device)

    @classmethod
    def star(cls, lengths: Iterable[int], **options: Any) -> SegmentGraph:
        """The last segment, the centre, sees all others: a paper and its references."""
        lengths = tuple(lengths)
        return cls(lengths, ((source, len(lengths) - 1) for source in range(len(lengths) - 1)), **options)

    @classmethod
    def bipartite(cls, lengths: Iterable[int], m: int, **options: Any) -> SegmentGraph:
        """The first m segments are sources of all others: the best passages of a retrieval."""
        lengths = tuple(lengths)
        if not 0 <= m <= len(lengths):
            raise ValueError(f"SegmentGraph.bipartite: m must be in [0, {len(lengths)}], got {m}")
        return cls(lengths, ((s, t) for t in range(m, len(lengths)) for s in range(m)), **options)

    @classmethod
    def chain(cls, lengths: Iterable[int], **options: Any) -> SegmentGraph:
        """Each segment sees the one before it."""
        lengths = tuple(lengths)
        return cls(lengths, ((s, s + 1) for s in range(len(lengths) - 1)), **options)

    @classmethod
    def from_networkx(cls, g: Any, lengths: Mapping[Any, int] | Iterable[int], **options: Any) -> SegmentGraph:
        """The edges of a networkx graph, whose nodes become segments in the order in which it lists them.

        ``lengths`` is a mapping from nodes or in that order. An undirected edge goes both ways; loops are left out,
        because every segment sees itself.
        """
        nodes = list(g.nodes)
        lengths = [lengths[node] for node in nodes] if isinstance(lengths, Mapping) else list(lengths)
        if len(lengths) != len(nodes):
            raise ValueError(
                f"SegmentGraph.from_networkx: lengths must be those of {len(nodes)} nodes, got {len(lengths)}"
            )
        number = {node: i for i, node in enumerate(nodes)}
        edges = [(number[s], number[t]) for s, t in g.edges() if s != t]
        if not g.is_directed():
            edges += [(t, s) for s, t in edges]
        return cls(lengths, edges, **options)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.q_offsets, self.kv_offsets, self.edge_offsets, self.edge_sources, self.own_segment

    def to(self, device: torch.device | str) -> SegmentGraph:
        return SegmentGraph(self.lengths, self.edges, device)

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"SegmentGraph({list(self.lengths)}, {list(self.edges)})"

    def levels(self) -> list[int]:
        """Of each segment: 0 without sources, else one more than the highest level of a source."""
        sources: list[list[int]] = [[] for _ in self.lengths]
        for source, target in self.edges:
            sources[target].append(source)
        level = [-1] * len(self.lengths)
        waiting = set(range(len(self.lengths)))
        while waiting:
            ready = [s for s in waiting if all(level[source] >= 0 for source in sources[s])]
            if not ready:
                raise ValueError(f"SegmentGraph: edges make a cycle among segments {sorted(waiting)}: it has no levels")
            found = {s: 1 + max((level[source] for source in sources[s]), default=-1) for s in ready}
            for s, value in found.items():
                level[s] = value
            waiting -= found.keys()
        return level

    def positions(self, shared: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Where segments stand: ``(q_start, edge_start, own_start)``, int32, for the op's arguments of these names.

        Shared positions are the paper's: segments without sources all begin at 0, and every further level of the graph
        right after the longest segments of the levels before it (a cycle has no levels: ValueError). Otherwise the
        segments follow each other.
        """
        if shared:
            level = self.levels()
            longest = [0] * (max(level, default=-1) + 1)
            for s, length in zip(level, self.lengths, strict=True):
                longest[s] = max(longest[s], length)
            starts = [sum(longest[:s]) for s in level]
        else:
            starts = [sum(self.lengths[:s]) for s in range(len(self.lengths))]
        device = self.own_segment.device
        q_start = torch.tensor(starts, dtype=torch.int32, device=device)
        edge_start = torch.tensor([starts[source] for source, _ in self.edges], dtype=torch.int32, device=device)
        return q_start, edge_start, q_start.clone()

    def dense_mask(self) -> Tensor:
        """Who sees whom token by token, bool ``[Tq, Tk]``: the mask that the op makes unnecessary."""
        segment = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths, dtype=torch.int64))
        sees = torch.zeros(len(self.lengths), len(self.lengths), dtype=torch.bool)
        for source, target in self.edges:
            sees[target, source] = True
        token = torch.arange(len(segment))
        own = (segment[:, None] == segment) & (token <= token[:, None])
        return (sees[segment][:, segment] | own).to(self.own_segment.device)

    def draw(self) -> str:
        """The block mask as text: a row for each query segment, a column for each key segment."""
        width = len(str(max(len(self.lengths) - 1, 0)))
        edges = set(self.edges)

        def cell(target: int, source: int) -> str:
            return CAUSAL if source == target else FULL if (source, target) in edges else NOTHING

        count = range(len(self.lengths))
        header = " ".join([" " * width, *(f"{s:>{width}}" for s in count)])
        rows = (" ".join([f"{t:>{width}}", *(f"{cell(t, s):>{width}}" for s in count)]) for t in count)
        return "\n".join([header, *rows])

    def plot(self, axes: Any = None) -> Any:
        """The mask as a picture in which a token is a token (needs matplotlib). Returns the axes."""
        import matplotlib.pyplot as plt
        from matplotlib.patches import Polygon, Rectangle

        axes = plt.subplots(figsize=(4, 4))[1] if axes is None else axes
        begin = [sum(self.lengths[:s]) for s in range(len(self.lengths) + 1)]
        end = begin[-1]
        for source, target in self.edges:
            corner = (begin[source], begin[target])
            axes.add_patch(Rectangle(corner, self.lengths[source], self.lengths[target], color="C0", lw=0))
        for s in range(len(self.lengths)):
            a, b = begin[s], begin[s + 1]
            axes.add_patch(Polygon([(a, a), (b, b), (a, b)], color="C1", lw=0))
            for line in (axes.axhline, axes.axvline):
                line(b, color="0.85", lw=0.5, zorder=2)
        axes.set(xlim=(0, end), ylim=(end, 0), xlabel="keys", ylabel="queries", aspect="equal")
        if len(self) <= 16:
            middles = [(a + b) / 2 for a, b in zip(begin, begin[1:], strict=False)]
            axes.set_xticks(middles, [f"{s}" for s in range(len(self))])
            axes.set_yticks(middles, [f"{s}" for s in range(len(self))])
            axes.set(xlabel="keys of segment", ylabel="queries of segment")
            axes.tick_params(length=0)
        return axes
