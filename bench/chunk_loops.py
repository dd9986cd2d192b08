# SPDX-License-Identifier: Apache-2.0
"""Lightning attention in torch operators, as a careful user would write it: what its kernels are held against."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from harness import Call, Inputs, Prepare
from harness.timing import cpu_sampler, cuda_sampler

CHUNKS = (32, 64, 128, 256)
TUNED_TOKENS = 2048  # on which chunk sizes are compared


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """[B, T, H, D] as contiguous [B H, T, D]."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def tokens_first(x: torch.Tensor, batch: int) -> torch.Tensor:
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


@dataclasses.dataclass(frozen=True)
class Decays:
    """Of a chunk of C tokens and every batch and head: [B H, C, C], [B H, C, 1] twice, and of the state [B H, 1, 1]."""

    pairs: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    state: torch.Tensor


Rates = tuple[float, ...]  # the slope of each head


@functools.lru_cache(maxsize=64)
def decays(slopes: Rates, rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Decays:
    rate = -torch.tensor(slopes, dtype=torch.float64, device=device).repeat(rows // len(slopes))[:, None, None]
    i = torch.arange(tokens, device=device)
    distance = i[:, None] - i
    pairs = torch.where(distance >= 0, (rate * distance.clamp(min=0)).exp(), 0.0)
    queries, keys = ((rate * x[:, None]).exp() for x in (i + 1, tokens - 1 - i))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Decays(pairs.to(dtype), queries.to(dtype), keys.to(dtype), (rate * tokens).exp().to(wide))


def chunk_loop(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: Rates, chunk: int, state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk after the other, for all [B H] at once, the state in float32. Differentiable."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    outputs = []
    for start in range(0, q.shape[1], chunk):
        qc, kc, vc = (x[:, start : start + chunk] for x in (q, k, v))
        decay = decays(slopes, len(q), qc.shape[1], q.dtype, q.device)
        out = torch.bmm(torch.bmm(qc, kc.mT) * decay.pairs, vc)
        added = torch.bmm((kc * decay.keys).mT, vc).to(wide)
        if state is None:
            state = added
        else:
            out = torch.baddbmm(out, qc * decay.queries, state.to(q.dtype))
            state = torch.addcmul(added, state, decay.state)
        outputs.append(out)
    return torch.cat(outputs, 1), state


def chunks_at_once(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: Rates, chunk: int) -> torch.Tensor:
    """All chunks in one product, but for a loop that adds up their states; needs whole chunks."""
    chunks = q.shape[1] // chunk
    decay = decays(slopes, len(q), chunk, q.dtype, q.device)
    qc, kc, vc = (x.unflatten(1, (chunks, chunk)) for x in (q, k, v))
    pairs = torch.matmul(qc, kc.mT).mul_(decay.pairs[:, None])
    out = torch.matmul(pairs, vc)
    states = torch.matmul((kc * decay.keys[:, None]).mT, vc)
    before = torch.zeros_like(states)
    state = states.new_zeros(states[:, 0].shape, dtype=torch.float32)
    for i in range(1, chunks):
        state = torch.addcmul(states[:, i - 1].float(), state, decay.state)
        before[:, i] = state
    queries = (qc * decay.queries[:, None]).flatten(0, 1)
    return out.flatten(0, 1).baddbmm_(queries, before.flatten(0, 1)).view(len(q), q.shape[1], -1)


picked: dict[tuple, int] = {}


def fastest_chunk(key: tuple, inputs: Inputs, build: Callable[[int, Inputs], Call]) -> int:
    """The chunk size whose call is fastest on the first tokens."""
    if key not in picked:
        part = inputs | {name: inputs[name][:, :TUNED_TOKENS] for name in "qkv"}
        times = {}
        for chunk in CHUNKS:
            if part["q"].shape[1] % chunk == 0:
                calls = [build(chunk, part)]
                sampler = cpu_sampler(calls) if part["q"].device.type == "cpu" else cuda_sampler(calls)[0]
                times[chunk] = min(sampler() for _ in range(3))
        picked[key] = min(times, key=times.__getitem__)
    return picked[key]


def signature(name: str, inputs: Inputs) -> tuple:
    q = inputs["q"]
    return name, q.device, q.dtype, q.shape[0], min(q.shape[1], TUNED_TOKENS), *q.shape[2:]


def rates(inputs: Inputs) -> Rates:
    return tuple(inputs["slopes"].tolist())


def torch_loop(inputs: Inputs) -> Call:
    def build(chunk: int, inputs: Inputs) -> Call:
        (q, k, v), slopes, batch = (heads_first(inputs[name]) for name in "qkv"), rates(inputs), len(inputs["q"])
        return lambda: tokens_first(chunk_loop(q, k, v, slopes, chunk)[0], batch)

    return build(fastest_chunk(signature("loop", inputs), inputs, build), inputs)


def torch_at_once(inputs: Inputs) -> Call:
    def build(chunk: int, inputs: Inputs) -> Call:
        (q, k, v), slopes, batch = (heads_first(inputs[name]) for name in "qkv"), rates(inputs), len(inputs["q"])
        return lambda: tokens_first(chunks_at_once(q, k, v, slopes, chunk), batch)

    return build(fastest_chunk(signature("at once", inputs), inputs, build), inputs)


def gradients(forward: Prepare, inputs: Inputs) -> Call:
    """The gradients of q, k and v of a call, forward pass included."""
    generator = torch.Generator(inputs["q"].device).manual_seed(1)
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in "qkv"}
    grad = torch.randn(
        inputs["v"].shape, generator=generator, device=inputs["v"].device, dtype=torch.float32
    ).to(inputs["v"].dtype)  # fmt: skip
    call = forward(inputs | leaves)
    return lambda: torch.autograd.grad(call(), tuple(leaves.values()), grad)  # type: ignore[return-value]


def loop_gradients(inputs: Inputs) -> Call:
    """Autograd of the chunk loop; the layout it likes is part of the graph, as it would be in a model."""

    def build(chunk: int, inputs: Inputs) -> Call:
        def forward(inputs: Inputs) -> Call:
            q, k, v = (inputs[name] for name in "qkv")
            slopes = rates(inputs)
            return lambda: tokens_first(chunk_loop(*map(heads_first, (q, k, v)), slopes, chunk)[0], len(q))

        return gradients(forward, inputs)

    return build(fastest_chunk(signature("gradients", inputs), inputs, build), inputs)
