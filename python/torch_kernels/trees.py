# SPDX-License-Identifier: Apache-2.0
"""Building and looking at token trees.

A tree of T nodes is a ``parents`` tensor: ``parents[i]`` is the index of node i's parent and smaller than i, -1 marks a
root and -2 padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ROOT, PADDING = -1, -2


def from_choices(choices: Sequence[Sequence[int]]) -> Tensor:
    """The static tree of a list of rank paths, the format of Medusa (Cai et al. 2024) and EAGLE-1.

    ``[0, 2, 1]`` is the 2nd-best child of the 3rd-best child of the root's best child. Nodes come breadth-first,
    sorted by (length, ranks), after the root. Returns parents int32 ``[len(choices) + 1]``. A path that occurs twice
    or lacks its prefix is a ValueError.

    >>> from_choices([[0], [0, 0], [1]]).tolist()
    [-1, 0, 0, 1]
    """
    node: dict[tuple[int, ...], int] = {(): 0}
    parents = [ROOT]
    for path in sorted((tuple(choice) for choice in choices), key=lambda path: (len(path), path)):
        if not all(isinstance(rank, int) and rank >= 0 for rank in path):
            raise ValueError(f"from_choices: choices: ranks must be integers >= 0, got {list(path)}")
        if path in node:
            raise ValueError(f"from_choices: choices: {list(path)} occurs twice (the root, [], is implied)")
        if path[:-1] not in node:
            raise ValueError(f"from_choices: choices: {list(path)} lacks its prefix {list(path[:-1])}")
        parents.append(node[path[:-1]])
        node[path] = len(node)
    return torch.tensor(parents, dtype=torch.int32)


def from_scores(scores: Tensor, parent_index: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    """The root and the ``num_nodes - 1`` best candidates of a scored pool: EAGLE-2's dynamic tree (Li et al. 2024).

    ``scores [B, N]`` are cumulative log-probabilities. ``parent_index [B, N]`` is the pool index of each candidate's
    parent, smaller than its own; -1 for a child of the root; -2 for an entry that is no candidate. Returns int32
    ``parents`` and ``selected``, both ``[B, num_nodes]``: node 0 is the root with selected -1, the others follow in
    ascending pool index. Too few candidates leave padding at the end, -2 in both.

    A candidate ranks by ``min(its score, its ancestors' scores)``, equal ranks by pool index, NaN as -inf. Whatever the
    scores, a parent then ranks before its children: no node is chosen without its parent.
    """
    if scores.dim() != 2 or parent_index.shape != scores.shape:
        shapes = f"{list(scores.shape)} and {list(parent_index.shape)}"
        raise ValueError(f"from_scores: scores and parent_index must both be [B, N], got {shapes}")
    if num_nodes < 1:
        raise ValueError(f"from_scores: num_nodes must be at least 1, the root, got {num_nodes}")
    batch, pool = scores.shape
    index = torch.arange(pool, device=scores.device)
    if scores.device.type == "cpu" and bool(((parent_index < PADDING) | (parent_index >= index)).any()):
        raise ValueError("from_scores: parent_index must be a smaller pool index, -1 (root) or -2 (no candidate)")

    # From here on the root is entry 0 and pool index p is entry p + 1; the root is its own parent and ranks first.
    parent = torch.nn.functional.pad(parent_index.long() + 1, (1, 0))
    rank = torch.nn.functional.pad(scores.to(torch.float64), (1, 0), value=math.inf)
    rank = rank.masked_fill(rank.isnan(), -math.inf)
    usable = parent >= 0

    # Minimum over all ancestors in log2(N) steps: after step s, `ancestor` is 2**s generations up.
    ancestor = parent.clamp(min=0)
    for _ in range(pool.bit_length()):
        rank = torch.minimum(rank, rank.gather(1, ancestor))
        usable = usable & usable.gather(1, ancestor)
        ancestor = ancestor.gather(1, ancestor)

    order = rank.sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, usable.gather(1, order).int().sort(dim=1, descending=True, stable=True).indices)
    chosen = order[:, :num_nodes]
    chosen = chosen.where(usable.gather(1, chosen), pool + 1).sort(dim=1).values
    chosen = torch.nn.functional.pad(chosen, (0, num_nodes - chosen.shape[1]), value=pool + 1)

    node = torch.arange(num_nodes, device=scores.device).expand(batch, -1)
    node_of_entry = torch.zeros(batch, pool + 2, dtype=torch.long, device=scores.device).scatter(1, chosen, node)
    chosen_parent = torch.nn.functional.pad(parent.clamp(min=0), (0, 1)).gather(1, chosen)
    parents = node_of_entry.gather(1, chosen_parent).where(chosen <= pool, PADDING)
    parents[:, 0] = ROOT
    selected = (chosen - 1).where(chosen <= pool, PADDING)
    return parents.to(torch.int32), selected.to(torch.int32)


def add_chains(parents: Tensor, lengths: Tensor | Sequence[int]) -> Tensor:
    """Hangs a chain of ``lengths[i]`` new nodes on node i, as PPD does with its prompt tokens (Chen et al. 2024).

    ``parents`` is ``[T]`` or ``[B, T]``, ``lengths`` of the same shape or ``[T]``. The old nodes keep their indices;
    the chains follow in the order of their nodes, each chain consecutive. Batch rows with fewer new nodes end in
    padding.

    >>> add_chains(torch.tensor([-1, 0]), [2, 1]).tolist()
    [-1, 0, 0, 2, 1]
    """
    _check_parents("add_chains", parents)
    lengths = torch.as_tensor(lengths, device=parents.device)
    if lengths.shape not in (parents.shape, parents.shape[-1:]):
        shapes = f"{list(parents.shape)}, got {list(lengths.shape)}"
        raise ValueError(f"add_chains: lengths must have the shape of parents, {shapes}")
    lengths = lengths.expand(parents.shape)
    if bool(((lengths < 0) | ((lengths > 0) & (parents == PADDING))).any()):
        raise ValueError("add_chains: lengths must be >= 0, and 0 on padding nodes")
    if parents.dim() == 2:
        rows = [add_chains(row, count) for row, count in zip(parents, lengths, strict=True)]
        longest = max(map(len, rows), default=0)
        rows = [torch.nn.functional.pad(row, (0, longest - len(row)), value=PADDING) for row in rows]
        return torch.stack(rows) if rows else parents.clone()

    nodes = len(parents)
    owner = torch.arange(nodes, device=parents.device).repeat_interleave(lengths)
    new = torch.arange(nodes, nodes + len(owner), device=parents.device)
    starts_chain = torch.ones_like(owner, dtype=torch.bool)
    starts_chain[1:] = owner[1:] != owner[:-1]
    return torch.cat([parents, torch.where(starts_chain, owner, new - 1).to(parents.dtype)])


def draw(parents: Tensor | Sequence[int], accepted: Tensor | Sequence[int] | None = None) -> str:
    """The tree as text, one node a line. ``accepted``, a path as the verify ops return it (-1 padded), is marked.

    >>> print(draw([-1, 0, 0, 2, -2], accepted=[0, 2, -1]))
    0 ●
    ├─ 1
    └─ 2 ●
       └─ 3
    padding: 4

    A batch ``[B, T]`` gives one tree after the other, separated by empty lines.
    """
    parents = torch.as_tensor(parents)
    _check_parents("draw", parents)
    if parents.dim() == 2:
        paths = [None] * len(parents) if accepted is None else torch.as_tensor(accepted).expand(len(parents), -1)
        return "\n\n".join(draw(row, path) for row, path in zip(parents, paths, strict=True))

    marked = set() if accepted is None else set(torch.as_tensor(accepted).flatten().tolist())
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents.tolist()):
        children.setdefault(parent, []).append(node)

    lines = []
    pending = [(root, "", "") for root in reversed(children.get(ROOT, []))]
    while pending:
        node, before, below = pending.pop()
        lines.append(f"{before}{node}{' ●' if node in marked else ''}")
        offspring = children.get(node, [])
        for child in reversed(offspring):
            corner, rail = ("└─ ", "   ") if child == offspring[-1] else ("├─ ", "│  ")
            pending.append((child, below + corner, below + rail))
    if PADDING in children:
        lines.append("padding: " + " ".join(map(str, children[PADDING])))
    return "\n".join(lines)


def _check_parents(function: str, parents: Tensor) -> None:
    if parents.dim() not in (1, 2):
        raise ValueError(f"{function}: parents must be [T] or [B, T], got {list(parents.shape)}")
    node = torch.arange(parents.shape[-1], device=parents.device)
    if bool(((parents < PADDING) | (parents >= node)).any()):
        raise ValueError(f"{function}: parents must be smaller than the node's own index, -1 (root) or -2 (padding)")
    grandparent = parents.gather(-1, parents.clamp(min=0).long())
    if bool(((parents >= 0) & (grandparent == PADDING)).any()):
        raise ValueError(f"{function}: parents: a padding node cannot be a parent")
