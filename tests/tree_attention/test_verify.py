# SPDX-License-Identifier: Apache-2.0
"""The verify ops against a walk over all paths, and the losslessness of sampling as a statistic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ..backends import Backend, for_all
from ..strategies import rooted, seeds
from . import oracle

I32, I64 = torch.int32, torch.int64
NODES = st.sampled_from([0, 1, 2, 5, 16, 33, 64, 65])


def device(backend: Backend, *tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else x.to(backend.device) for x in tensors]


def trees(batch: int, nodes: int, seed: int) -> list[list[int]]:
    rows = [rooted(nodes, seed + b) for b in range(batch)]
    if batch > 2:
        rows[1] = [-2] * nodes  # a row without a tree
    return rows


def as_lists(result: tuple[Tensor, Tensor, Tensor], b: int) -> tuple[list[int], int, list[int]]:
    path, num_accepted, tokens = result
    return path[b].tolist(), int(num_accepted[b]), tokens[b].tolist()


def check_types(result: tuple[Tensor, Tensor, Tensor], draft: Tensor) -> None:
    path, num_accepted, tokens = result
    assert path.dtype == I32 and num_accepted.dtype == I32 and tokens.dtype == draft.dtype
    assert path.shape == tokens.shape == draft.shape and num_accepted.shape == draft.shape[:1]


@for_all(
    nodes=NODES,
    batch=st.integers(0, 4),
    vocabulary=st.sampled_from([1, 2, 3]),
    dtypes=st.tuples(*[st.sampled_from([I32, I64])] * 3),
    seed=seeds,
)
def test_greedy(
    backend: Backend, nodes: int, batch: int, vocabulary: int, dtypes: tuple[torch.dtype, ...], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    draft = torch.randint(-1, vocabulary, (batch, nodes), generator=generator).to(dtypes[0])
    target = torch.randint(0, vocabulary, (batch, nodes), generator=generator).to(dtypes[1])
    rows = trees(batch, nodes, seed)
    parents = torch.tensor(rows, dtype=dtypes[2]).reshape(batch, nodes)
    result = backend("tree_verify_greedy", *device(backend, draft, target, parents))
    check_types(result, draft)
    for b in range(batch):
        assert as_lists(result, b) == oracle.verify_greedy(draft[b].tolist(), target[b].tolist(), rows[b])


def test_greedy_prefers_the_longest_path_then_the_lowest_node(backend: Backend) -> None:
    # Siblings 1 and 2 both match; only 2 leads on. Then 4 and 5 tie.
    draft = torch.tensor([[9, 5, 5, 8, 6, 6]])
    target = torch.tensor([[5, 7, 6, 0, 1, 2]])
    parents = torch.tensor([[-1, 0, 0, 1, 2, 2]])
    path, num_accepted, tokens = backend("tree_verify_greedy", *device(backend, draft, target, parents))
    assert path.tolist() == [[0, 2, 4, -1, -1, -1]] and num_accepted.tolist() == [2]
    assert tokens.tolist() == [[5, 6, 1, -1, -1, -1]]


@for_all(
    nodes=NODES,
    vocabulary=st.sampled_from([1, 2, 5, 33, 300]),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    thresholds=st.sampled_from([(0.3, 0.09), (0.09, 0.3), (0.9, 1.5), (0.0, 0.5)]),
    sampled=st.booleans(),
    seed=seeds,
)
def test_typical(
    backend: Backend,
    nodes: int,
    vocabulary: int,
    temperature: float,
    thresholds: tuple[float, float],
    sampled: bool,
    seed: int,
) -> None:
    epsilon, delta = thresholds
    batch, nodes = 6, min(nodes, 16) if backend.slow else nodes
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, nodes, vocabulary, generator=generator)
    # Likely tokens, so that some are accepted, and impossible ones, which never are.
    draft = (
        (logits + torch.randn(logits.shape, generator=generator)).argmax(-1)
        if nodes
        else torch.zeros(batch, 0, dtype=I64)
    )
    draft = draft.roll(1, 1).where(torch.rand(batch, nodes, generator=generator) < 0.9, vocabulary + 3)
    uniforms = torch.rand(batch, nodes + 1, generator=generator) if sampled else None
    rows = trees(batch, nodes, seed)
    for i in range(1, nodes):
        for b in range(batch):
            if rows[b][i] >= 0 and draft[b, i] < vocabulary:
                draft[b, i] = int(logits[b, rows[b][i]].argmax()) if i % 3 else int(draft[b, i])
    parents = torch.tensor(rows, dtype=I32).reshape(batch, nodes)
    # fmt: off
    result = backend("tree_verify_typical", *device(backend, draft, logits, parents), temperature=temperature,
                     epsilon=epsilon, delta=delta, uniforms=device(backend, uniforms)[0])
    # fmt: on
    check_types(result, draft)
    for b in range(batch):
        probabilities = [oracle.softmax(logits[b, i].double().numpy() / temperature) for i in range(nodes)]
        close = []

        def accepts(a: int, c: int, b: int = b, probabilities: list = probabilities, close: list = close) -> bool:
            if not 0 <= int(draft[b, c]) < vocabulary:
                return False
            margin = oracle.typical_margin(probabilities[a], int(draft[b, c]), epsilon, delta)
            close.append(abs(margin) < 1e-4)
            return margin > 0

        way = oracle.longest(oracle.paths(rows[b]), accepts)
        if any(close):
            continue
        path, num_accepted, tokens = as_lists(result, b)
        expected = oracle.report(draft[b].tolist(), way, tokens[num_accepted] if way else -1)
        assert (path, num_accepted, tokens) == expected
        if way and sampled:
            assert_drawn(tokens[num_accepted], probabilities[way[-1]], float(uniforms[b, nodes]))
        elif way:
            assert tokens[num_accepted] == int(logits[b, way[-1]].argmax())


@pytest.mark.parametrize("bound", ["epsilon", "delta"])
def test_typical_threshold(backend: Backend, bound: str) -> None:
    # p(1) = 0.3 against a threshold just below and just above it, once set by epsilon and once by delta * exp(-H).
    p = torch.tensor([0.5, 0.3, 0.2])
    entropy = -float((p.double() * (p.double() + 1e-5).log()).sum())
    draft, parents = torch.tensor([[0, 1]]), torch.tensor([[-1, 0]])
    logits = (2 * p.log()).expand(1, 2, 3)  # temperature 2 takes the factor back
    for factor, accepted in ((0.999, 1), (1.001, 0)):
        options = {"epsilon": 0.3 * factor if bound == "epsilon" else 0.9}
        options["delta"] = 0.3 * factor * math.exp(entropy) if bound == "delta" else 9.0
        # fmt: off
        _, num_accepted, _ = backend("tree_verify_typical", *device(backend, draft, logits, parents),
                                     temperature=2.0, **options)
        # fmt: on
        assert num_accepted.tolist() == [accepted]


def test_typical_uses_the_entropy_of_medusa(backend: Backend) -> None:
    # H = -sum p ln(p + 1e-5): over 4096 equal probabilities that is 4 % more in exp(-H) than the exact entropy.
    draft, parents = torch.tensor([[0, 1]]), torch.tensor([[-1, 0]])
    logits = torch.zeros(1, 2, 4096)
    for delta, accepted in ((0.97, 0), (0.95, 1)):
        # fmt: off
        _, num_accepted, _ = backend("tree_verify_typical", *device(backend, draft, logits, parents),
                                     temperature=1.0, epsilon=0.5, delta=delta)
        # fmt: on
        assert num_accepted.tolist() == [accepted]


def test_typical_takes_the_lowest_of_equal_logits_and_ignores_nan(backend: Backend) -> None:
    logits = torch.tensor([[[0.0, 2.0, 2.0, float("nan")]]])
    # fmt: off
    _, _, tokens = backend("tree_verify_typical", *device(backend, torch.tensor([[0]]), logits, torch.tensor([[-1]])),
                           temperature=1.0, epsilon=0.1, delta=0.1)
    # fmt: on
    assert tokens.tolist() == [[1]]


def assert_drawn(token: int, mass: np.ndarray, u: float, tolerance: float = 2e-5) -> None:
    """The token is the inverse CDF of u, up to the rounding of float32 sums."""
    cdf = np.concatenate([[0.0], np.cumsum(mass / mass.sum())])
    assert 0 <= token < len(mass) and mass[token] > 0, f"token {token} of probability zero"
    assert cdf[token] - tolerance <= u < cdf[token + 1] + tolerance, f"u = {u}, token {token}: {cdf[token : token + 2]}"


@for_all(
    nodes=st.sampled_from([5, 16, 0, 1, 2, 33, 64]),
    vocabulary=st.sampled_from([3, 7, 33, 1, 2, 129, 1000]),
    mode=st.sampled_from(["deterministic", "with", "without"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]),
    seed=seeds,
)
def test_sampling_decisions(
    backend: Backend, nodes: int, vocabulary: int, mode: str, dtype: torch.dtype, seed: int
) -> None:
    batch = 12
    dtype = dtype if dtype in backend.dtypes else torch.float32
    generator = torch.Generator().manual_seed(seed)
    target = (2 * torch.randn(batch, nodes, vocabulary, generator=generator)).softmax(-1)
    target = target.where(torch.rand(target.shape, generator=generator) < 0.8, 0.0)
    target[..., 0] += 0.05
    target = target.to(dtype)
    proposals = (2 * torch.randn(batch, nodes, vocabulary, generator=generator)).softmax(-1).to(dtype)
    draft = torch.randint(-1, vocabulary + 1, (batch, nodes), generator=generator)
    uniforms = torch.rand(batch, nodes + 1, generator=generator)
    rows = trees(batch, nodes, seed)
    if mode == "without":  # siblings differ, and leave something to draw
        for row in range(batch):
            for node in range(nodes):
                children = [c for c in range(nodes) if rows[row][c] == node]
                ranks = torch.randperm(vocabulary, generator=generator).tolist()
                for rank, child in enumerate(children):
                    draft[row, child] = ranks[rank] if rank < vocabulary - 1 else -1
    parents = torch.tensor(rows, dtype=I32).reshape(batch, nodes)
    q = None if mode == "deterministic" else proposals
    # fmt: off
    before = [x.clone() for x in (draft, target, parents, uniforms, proposals)]
    result = backend("tree_verify_sampling", *device(backend, draft, target, parents, uniforms),
                     draft_probs=device(backend, q)[0], replacement=mode != "without")
    # fmt: on
    check_types(result, draft)
    for x, y in zip(before, (draft, target, parents, uniforms, proposals), strict=True):
        assert torch.equal(x, y)
    for b in range(batch):
        way, mass, margin = oracle.verify_sampling(
            draft[b].tolist(),
            target[b].tolist(),
            rows[b],
            uniforms[b].tolist(),
            q if q is None else q[b].tolist(),
            mode != "without",
        )
        if margin < 1e-4:
            continue
        path, num_accepted, tokens = as_lists(result, b)
        assert (path, num_accepted, tokens) == oracle.report(
            draft[b].tolist(), way, tokens[num_accepted] if way else -1
        )
        if way:
            assert_drawn(tokens[num_accepted], mass, float(uniforms[b, nodes]))


def test_sampling_at_the_ends_of_the_unit_interval(backend: Backend) -> None:
    # u = 0 must pick no leading token of probability zero and accept nothing impossible, the largest u no trailing one.
    target = torch.tensor([[[0.0, 0.5, 0.0, 0.5, 0.0]] * 2])
    draft, parents = torch.tensor([[0, 2]]), torch.tensor([[-1, 0]])
    for u, token in ((0.0, 1), (1 - 2**-24, 3)):
        uniforms = torch.full((1, 3), u)
        _, num_accepted, tokens = backend("tree_verify_sampling", *device(backend, draft, target, parents, uniforms))
        assert num_accepted.tolist() == [0] and tokens.tolist() == [[token, -1]]


def test_uniforms_may_be_float64(backend: Backend) -> None:
    # Tokens 0 .. 6 are as likely, and the uniforms lie in the middle of their intervals.
    batch = 7
    draft, parents = torch.zeros(batch, 3, dtype=I64), torch.tensor([[-1, 0, 1]]).expand(batch, -1)
    uniforms = ((torch.arange(4 * batch).reshape(batch, 4) % 7 + 0.5) / 7).double()
    typical = {"temperature": 1.0, "epsilon": 0.1, "delta": 1.0}
    draft, parents, probs = device(backend, draft, parents, torch.full((batch, 3, 7), 1 / 7))
    for verify in (
        lambda u: backend("tree_verify_sampling", draft, probs, parents, u),
        lambda u: backend("tree_verify_typical", draft, torch.zeros_like(probs), parents, uniforms=u, **typical),
    ):
        single, double = (verify(*device(backend, u)) for u in (uniforms.float(), uniforms))
        assert len(set(single[2].flatten().tolist())) > 4
        assert all(map(torch.equal, single, double))


def test_a_certain_token_is_always_accepted(backend: Backend) -> None:
    target = torch.tensor([[[0.0, 1.0, 0.0]] * 3])
    draft, parents = torch.tensor([[0, 1, 1]]), torch.tensor([[-1, 0, 1]])
    uniforms = torch.full((1, 4), 1 - 2**-24)
    for proposals in (None, target):
        # fmt: off
        path, num_accepted, tokens = backend("tree_verify_sampling", *device(backend, draft, target, parents, uniforms),
                                             draft_probs=device(backend, proposals)[0])
        # fmt: on
        assert path.tolist() == [[0, 1, 2]] and num_accepted.tolist() == [2] and tokens.tolist() == [[1, 1, 1]]


# Losslessness. Every batch row is one experiment: a root with three children and two grandchildren, a target that
# depends on the last token only. The first token must follow the root's target; the second, where a draft was accepted,
# the target after the first.

VOCABULARY = 5
TARGET = torch.tensor(
    [
        [0.05, 0.3, 0.0, 0.4, 0.25],
        [0.5, 0.1, 0.1, 0.1, 0.2],
        [0.2] * 5,
        [0.1, 0.2, 0.3, 0.4, 0.0],
        [0.7, 0.0, 0.1, 0.1, 0.1],
    ]
)
PROPOSAL = torch.tensor(
    [
        [0.3, 0.3, 0.2, 0.1, 0.1],
        [0.1, 0.5, 0.2, 0.1, 0.1],
        [0.4, 0.3, 0.1, 0.1, 0.1],
        [0.2] * 5,
        [0.1, 0.1, 0.1, 0.1, 0.6],
    ]
)
PARENTS = [-1, 0, 0, 0, 1, 1]
ALARM = 30.0  # chi-square with 4 degrees of freedom exceeds this once in 200,000


def experiment(
    backend: Backend, mode: str, *, drawn_from: Tensor = PROPOSAL, declared: str | None = None
) -> list[float]:
    """Chi-square statistics of the first token and of the second after each accepted first one."""
    batch = 40_000
    generator = torch.Generator().manual_seed(7)
    draft = torch.zeros(batch, len(PARENTS), dtype=I64)  # the root's token is 0
    if mode == "deterministic":
        draft[:, 1:] = torch.tensor([3, 1, 0, 0, 2])
    else:
        for node in (0, 1):
            children = [c for c, parent in enumerate(PARENTS) if parent == node]
            proposal = drawn_from[draft[:, node]]
            drawn = torch.multinomial(proposal, len(children), replacement=mode == "with", generator=generator)
            draft[:, children] = drawn
    uniforms = torch.rand(batch, len(PARENTS) + 1, generator=generator)
    parents = torch.tensor(PARENTS, dtype=I32).expand(batch, -1)
    declared = declared or mode
    # fmt: off
    _, num_accepted, tokens = backend(
        "tree_verify_sampling", *device(backend, draft, TARGET[draft], parents, uniforms),
        draft_probs=None if declared == "deterministic" else PROPOSAL[draft].to(backend.device),
        replacement=declared != "without")
    # fmt: on
    num_accepted, tokens = num_accepted.cpu(), tokens.cpu()
    assert (TARGET[0][tokens[:, 0]] > 0).all(), "a token of probability zero was emitted"
    statistics = [chi_square(tokens[:, 0], TARGET[0])]
    for first in range(VOCABULARY):
        second = tokens[(num_accepted >= 1) & (tokens[:, 0] == first), 1]
        if len(second) > 100:
            statistics.append(chi_square(second, TARGET[first]))
    assert len(statistics) >= 3 and num_accepted.max() == 2
    return statistics


def chi_square(tokens: Tensor, probabilities: Tensor) -> float:
    observed = torch.bincount(tokens, minlength=VOCABULARY).double()
    expected = probabilities.double() * len(tokens)
    assert (observed[expected == 0] == 0).all(), "a token of probability zero was emitted"
    possible = expected > 0
    return float(((observed - expected)[possible] ** 2 / expected[possible]).sum())


@pytest.mark.parametrize("mode", ["deterministic", "with", "without"])
def test_sampling_is_lossless(backend: Backend, mode: str) -> None:
    if backend.slow:
        pytest.skip("40,000 experiments; test_sampling_decisions covers the rule")
    assert max(experiment(backend, mode)) < ALARM


def test_the_statistic_notices_a_wrong_rule(backend: Backend) -> None:
    if backend.slow:
        pytest.skip("40,000 experiments")
    # Drafts that come from somewhere else than declared, and drafts without replacement declared as with.
    assert max(experiment(backend, "with", drawn_from=torch.full((5, 5), 0.2))) > 2 * ALARM
    assert max(experiment(backend, "without", declared="with")) > 2 * ALARM
