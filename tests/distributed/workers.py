# SPDX-License-Identifier: Apache-2.0
"""What every rank of a group checks. Each check is one function, run by all ranks in the same order."""

from __future__ import annotations

import contextlib
import datetime
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch_kernels
from torch import Tensor
from torch_kernels.distributed import ring_attention, sequence_parallel_lightning, zigzag_shard

WORLD = 4
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def run(rank: int, folder: str) -> None:
    """One rank: its file says which checks passed, and what went wrong in the one that did not."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout, WORLD, rank)
    results = []
    for name, function in CHECKS.items():
        try:
            torch.manual_seed(0)  # the same data on every rank
            function()
            results.append(name)
        except BaseException:
            results.append(f"{name}\n{traceback.format_exc()}")
        Path(folder, f"rank{rank}").write_text("\0".join(results), encoding="utf-8")
        if results[-1] != name:
            os._exit(1)  # ranks no longer agree on what comes next: the others end too
    dist.destroy_process_group()


def groups() -> Iterator[dist.ProcessGroup]:
    """Groups of one to four ranks that this rank belongs to."""
    for ranks in ([0], [1, 2], [0, 2, 3], [0, 1, 2, 3]):
        group = dist.new_group(ranks)
        torch.manual_seed(0)
        if dist.get_rank() in ranks:
            yield group


def assert_near(actual: Tensor, expected: Tensor, error: float) -> None:
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=error * largest)


@contextlib.contextmanager
def calls_of(name: str) -> Iterator[list[Tensor]]:
    """The second argument of each call of a torch.distributed function within the context."""
    function, seen = getattr(dist, name), []

    def record(*args: object, **kwargs: object) -> object:
        seen.append(args[-1])
        return function(*args, **kwargs)

    setattr(dist, name, record)
    try:
        yield seen
    finally:
        setattr(dist, name, function)


# ---- lightning attention ----


def lightning_inputs(batch: int, tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, slopes and the gradient of out: four query heads for two of keys, one of which never forgets."""
    shapes = [(batch, tokens, 4, 8), (batch, tokens, 2, 8), (batch, tokens, 2, 16)]
    slopes = torch.tensor([0.0, 0.3], dtype=torch.float64)
    out = torch.randn(batch, tokens, 4, 16, dtype=dtype)
    return [
        *(torch.randn(shape, dtype=dtype) for shape in shapes),
        slopes.to(torch.promote_types(dtype, torch.float32)),
        out,
    ]


def whole_and_part(
    inputs: list[Tensor], places: Tensor, group: dist.ProcessGroup, zigzag: tuple[int, int] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Out and gradients: of this rank's part, and of the same tokens (at ``places``) in one process."""
    *arguments, grad = (x.detach() for x in inputs)
    whole = [x.clone().requires_grad_() for x in arguments]
    expected, _ = torch_kernels.lightning_attention(*whole, scale=0.5)
    expected.backward(grad)
    part = [x[:, places].requires_grad_() for x in arguments[:3]] + [arguments[3].clone().requires_grad_()]
    out = sequence_parallel_lightning(*part, group, zigzag=zigzag, scale=0.5)
    out.backward(grad[:, places])
    yield out, expected[:, places]
    for own, all_tokens in zip(part[:3], whole):
        yield own.grad, all_tokens.grad[:, places]
    dist.all_reduce(part[3].grad, group=group)
    yield part[3].grad, whole[3].grad


@check
def lightning_with_parts_of_any_length() -> None:
    for group in groups():
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        for lengths in ([9, 0, 5, 3], [0, 7, 1, 0], [0, 0, 0, 0]):
            tokens = torch.arange(sum(lengths[:world])).split(lengths[:world])
            for batch, dtype, error in ((1, torch.float64, 1e-12), (2, torch.float32, 1e-5)):
                inputs = lightning_inputs(batch, sum(map(len, tokens)), dtype)
                for actual, expected in whole_and_part(inputs, tokens[rank], group):
                    assert_near(actual, expected, error)


@check
def lightning_in_zigzag_order() -> None:
    for group in groups():
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        lengths = [4, 1, 0, 6, 3, 3, 2, 5][: 2 * world]
        chunks = torch.arange(sum(lengths)).split(lengths)
        places = torch.cat([chunks[rank], chunks[-1 - rank]])
        for batch in (1, 3):
            inputs = lightning_inputs(batch, sum(lengths))
            zigzag = lengths[rank], lengths[2 * world - 1 - rank]
            for actual, expected in whole_and_part(inputs, places, group, zigzag):
                assert_near(actual, expected, 1e-12)


@check
def lightning_gathers_states_once_per_direction() -> None:
    q, k, v, slopes, _ = lightning_inputs(2, 6, torch.float32)
    with calls_of("all_gather_into_tensor") as seen:
        out = sequence_parallel_lightning(q.requires_grad_(), k, v, slopes)
        assert [tuple(x.shape) for x in seen] == [(1,), (2, 2, 8, 16)], seen
        out.sum().backward()
        assert [tuple(x.shape) for x in seen[2:]] == [(2, 2, 8, 16)], seen


@check
def lightning_forgets_by_selection() -> None:
    """Nothing of another part gets past a head without memory, NaN neither, forward or backward."""
    rank = dist.get_rank()
    q, k, v, _, grad = lightning_inputs(1, 5)
    slopes = torch.tensor([torch.inf, 0.1], dtype=torch.float64)
    seen = []
    for poison in (False, True):
        part = [x.clone() for x in (q, k, v)]
        out_grad = grad.clone()
        if poison and rank == 1:
            part[2][:, :, 0] = torch.nan
        if poison and rank == 2:
            out_grad[:, :, :2] = torch.nan  # of the two query heads of that head
        part = [x.requires_grad_() for x in part]
        out = sequence_parallel_lightning(*part, slopes)
        out.backward(out_grad)
        seen.append((out.detach()[:, :, :2], part[1].grad[:, :, 0], part[2].grad[:, :, 0]))
    out, *grads = zip(*seen)
    if rank != 1:
        assert_near(out[1], out[0], 0.0)
    if rank not in (1, 2):
        for clean, poisoned in grads:
            assert_near(poisoned, clean, 0.0)


@check
def lightning_refuses_bad_arguments() -> None:
    q, k, v, slopes, _ = lightning_inputs(1, 6)
    for words, arguments, keywords in (
        ("zigzag must be two lengths that sum to T=6", (q, k, v, slopes), {"zigzag": (2, 3)}),
        ("zigzag must be two lengths that sum to T=6", (q, k, v, slopes), {"zigzag": (7, -1)}),
        (r"k must be \[B=1, T=6, H=\?, K=8\]", (q, k[:, :5], v, slopes), {}),
        (r"slopes must be \[H=2\]", (q, k, v, slopes[:1]), {}),
    ):
        with raises(words):
            sequence_parallel_lightning(*arguments, **keywords)


@contextlib.contextmanager
def raises(words: str) -> Iterator[None]:
    import pytest

    with pytest.raises(ValueError, match=words):
        yield


# ---- softmax attention ----


@check
def ring_attention_is_attention() -> None:
    for group in groups():
        world = dist.get_world_size(group)
        for dtype, heads, error in ((torch.float32, (4, 2), 2e-6), (torch.bfloat16, (2, 2), 2e-2)):
            q, k, v = (torch.randn(2, 6 * world, h, 16).to(dtype) for h in (heads[0], heads[1], heads[1]))
            grad = torch.randn_like(q)
            whole = [x.double().requires_grad_() for x in (q, k, v)]
            expected = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in whole), is_causal=True, scale=0.3, enable_gqa=True
            ).transpose(1, 2)
            expected.backward(grad.double())
            part = [zigzag_shard(x, group).requires_grad_() for x in (q, k, v)]
            out = ring_attention(*part, group, scale=0.3)
            out.backward(zigzag_shard(grad, group))
            assert out.dtype == dtype
            assert_near(out, zigzag_shard(expected, group), error)
            for own, all_tokens in zip(part, whole):
                assert_near(own.grad, zigzag_shard(all_tokens.grad, group), error)


@check
def ring_attention_sends_what_it_says() -> None:
    """The docstring: 2 B T Hk D (W-1)/W numbers forward; the same again and 2 B T Hk D in float32 backward."""
    tokens, numbers = 6 * WORLD, 2 * 6 * WORLD * 2 * 16  # B = 1
    q, k, v = (torch.randn(1, tokens // WORLD, h, 16).bfloat16().requires_grad_() for h in (4, 2, 2))
    with calls_of("batch_isend_irecv") as seen:
        out = ring_attention(q, k, v)
        forward = [transfers[0].tensor for transfers in seen]
        out.sum().backward()
        backward = [transfers[0].tensor for transfers in seen[len(forward) :]]
    assert sum(x.numel() for x in forward) == numbers * (WORLD - 1) // WORLD
    for dtype, expected in ((torch.bfloat16, numbers * (WORLD - 1) // WORLD), (torch.float32, numbers)):
        assert sum(x.numel() for x in backward if x.dtype == dtype) == expected
    assert all(x.dtype == torch.bfloat16 for x in forward) and len(seen) == 2 * (WORLD - 1) + WORLD


@check
def ring_attention_refuses_bad_arguments() -> None:
    q, k = torch.randn(1, 6, 4, 16), torch.randn(1, 6, 2, 16)
    for words, arguments in (
        ("q must be an even number of tokens, got 5", (q[:, :5], k[:, :5], k[:, :5])),
        ("Hq must be a multiple of Hk=3", (q, k[:, :, :1].expand(-1, -1, 3, -1), k[:, :, :1].expand(-1, -1, 3, -1))),
        (r"v must be \[B=1, T=6, Hk=2, D=16\]", (q, k, k[..., :8])),
    ):
        with raises(words):
            ring_attention(*arguments)
    assert ring_attention(q[:, :0], k[:, :0], k[:, :0]).shape == (1, 0, 4, 16)


# ---- sharded tensors ----


def dtensor_mesh() -> object:
    from torch.distributed.tensor import init_device_mesh

    return init_device_mesh("cpu", (2, 2))


@check
def ops_take_sharded_tensors() -> None:
    """Over a mesh that shards batch and heads, time (which must be gathered) and heads, or nothing."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dtensor_mesh()
    q, k, v, slopes, grad = lightning_inputs(2, 5)
    g = F.logsigmoid(torch.randn(2, 5, 2, dtype=torch.float64))
    state = torch.randn(2, 2, 8, 16, dtype=torch.float64)
    places = {
        "batch and heads": ([Shard(0), Shard(2)], [Replicate(), Shard(0)], [Shard(0), Shard(1)]),
        "time and heads": ([Shard(1), Shard(2)], [Replicate(), Shard(0)], [Replicate(), Shard(1)]),
        "heads and time": ([Shard(2), Shard(1)], [Replicate(), Replicate()], [Shard(1), Replicate()]),
        "none": ([Replicate(), Replicate()], [Replicate(), Replicate()], [Replicate(), Replicate()]),
    }
    functions = {
        "lightning": lambda q, k, v, s, g, st: torch_kernels.lightning_attention(
            q, k, v, s, initial_state=st, output_final_state=True
        ),
        "lightning alone": lambda q, k, v, s, g, st: torch_kernels.lightning_attention(q, k, v, s)[:1],
        "gates": lambda q, k, v, s, g, st: torch_kernels.simple_gla(q, k, v, g, initial_state=st)[:1],
        "parts": lambda q, k, v, s, g, st: (
            torch_kernels.lightning_chunk_state(k, v, s),
            torch_kernels.lightning_apply_state(q, st, s),
        ),
    }
    for tokens, rates, states in places.values():
        placements = [tokens, tokens, tokens, rates, tokens, states]
        for function in functions.values():
            whole = [x.detach().clone().requires_grad_() for x in (q, k, v, slopes, g, state)]
            sharded = [distribute_tensor(x.detach(), mesh, p).requires_grad_() for x, p in zip(whole, placements)]
            expected, actual = function(*whole), function(*sharded)
            for ours, wanted in zip(actual, expected):
                assert_near(ours.full_tensor(), wanted, 1e-12)
            sum(x.square().sum() for x in expected).backward()
            sum(x.square().sum() for x in actual).backward()
            for ours, wanted in zip(sharded, whole):
                assert (ours.grad is None) == (wanted.grad is None)
                if wanted.grad is not None:
                    assert_near(ours.grad.full_tensor(), wanted.grad, 1e-12)


@check
def sharded_batch_and_heads_stay_where_they_are() -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = dtensor_mesh()
    q, k, v, slopes, _ = lightning_inputs(2, 5)
    tokens = [distribute_tensor(x, mesh, [Shard(0), Shard(2)]) for x in (q, k, v)]
    rates = distribute_tensor(slopes, mesh, [Replicate(), Shard(0)])
    with CommDebugMode() as communication:
        out, state = torch_kernels.lightning_attention(*tokens, rates, output_final_state=True)
    assert communication.get_total_counts() == 0
    assert tuple(out.placements) == (Shard(0), Shard(2)) and tuple(state.placements) == (Shard(0), Shard(1))


@check
def sharded_drafts_are_verified() -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dtensor_mesh()
    q, k, v, slopes, _ = lightning_inputs(2, 5)
    state = torch.randn(2, 2, 8, 16, dtype=torch.float64)
    parents = torch.tensor([[-1, 0, 0, 1, -2]] * 2)
    expected = torch_kernels.lightning_attention_verify(q, k, v, state, slopes, parents=parents)
    tokens = [distribute_tensor(x, mesh, [Shard(0), Shard(2)]) for x in (q, k, v)]
    out = torch_kernels.lightning_attention_verify(
        *tokens,
        distribute_tensor(state, mesh, [Shard(0), Shard(1)]),
        distribute_tensor(slopes, mesh, [Replicate(), Shard(0)]),
        parents=distribute_tensor(parents, mesh, [Shard(0), Replicate()]),
    )
    assert_near(out.full_tensor(), expected, 1e-12)
