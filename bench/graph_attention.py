# SPDX-License-Identifier: Apache-2.0
"""Graph-KV attention at the paper's workloads, with the heads of Llama-3.1-8B.

Peers get dense masks and index lists that a careful user would prepare once. What each call needs is timed: gathered
keys, repeated heads where a kernel has no groups, flex_attention's BlockMask, which changes with every request, and the
rotation to a graph's positions of queries and, once per layer and graph, of keys: before decoding it is done.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import Call, Case, Curve, Inputs, main
from presets import Model


@dataclass(frozen=True)
class Workload:
    """A layer's attention over a graph of segments; ``decode``: one more token, that sees every segment in whole."""

    lengths: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]  # (source, target)
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    decode: bool = False
    rope: bool = False

    @functools.cached_property
    def sources(self) -> list[list[int]]:
        """Of each query segment, its own segment last."""
        if self.decode:
            return [list(range(len(self.lengths)))]
        return [sorted(s for s, t in self.edges if t == target) + [target] for target in range(len(self.lengths))]

    @property
    def q_lengths(self) -> tuple[int, ...]:
        return (1,) if self.decode else self.lengths

    def pairs(self) -> int:
        total = 0
        for length, sources in zip(self.q_lengths, self.sources, strict=True):
            seen = sum(self.lengths[s] for s in sources)
            total += length * seen - (0 if self.decode else length * (length - 1) // 2)
        return total

    def flops(self) -> int:
        return 4 * self.head_size * self.heads * self.pairs()

    def bytes(self) -> int:
        element = self.dtype.itemsize
        keys = 2 * self.kv_heads * self.head_size * sum(self.lengths) * element
        return keys + sum(self.q_lengths) * self.heads * (2 * self.head_size * element + 4)  # q and out, lse

    def make_inputs(self, seed: int, device: str) -> Inputs:
        import torch_kernels

        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=self.dtype)

        graph = torch_kernels.SegmentGraph(self.lengths, self.edges, device)
        inputs: Inputs = dict(
            zip(("q_offsets", "kv_offsets", "edge_offsets", "edge_sources", "own_segment"), graph.arguments)
        )
        if self.decode:
            count = len(self.lengths)
            inputs |= {
                "q_offsets": torch.tensor([0, 1], dtype=torch.int32, device=device),
                "edge_offsets": torch.tensor([0, count], dtype=torch.int32, device=device),
                "edge_sources": torch.arange(count, dtype=torch.int32, device=device),
                "own_segment": torch.tensor([-1], dtype=torch.int32, device=device),
            }
        keys = sum(self.lengths)
        return inputs | {
            "q": normal(sum(self.q_lengths), self.heads, self.head_size),
            "k": normal(keys, self.kv_heads, self.head_size),
            "v": normal(keys, self.kv_heads, self.head_size),
            "shared": {},  # what peers build once and every copy of the inputs may share
        }

    def mask(self, device: str | torch.device) -> torch.Tensor:
        """[Tq, Tk]"""
        keys = sum(self.lengths)
        begin = [sum(self.lengths[:s]) for s in range(len(self.lengths))]
        rows = []
        for length, sources in zip(self.q_lengths, self.sources, strict=True):
            block = torch.zeros(length, keys, dtype=torch.bool)
            for s in sources if self.decode else sources[:-1]:
                block[:, begin[s] : begin[s] + self.lengths[s]] = True
            if not self.decode:
                block[:, begin[sources[-1]] : begin[sources[-1]] + length] = torch.ones(length, length).tril()
            rows.append(block)
        return torch.cat(rows).to(device)


def shared(inputs: Inputs, name: str, build: Callable[[], Any]) -> Any:
    if name not in inputs["shared"]:
        inputs["shared"][name] = build()
    return inputs["shared"][name]


def ours(workload: Workload, inputs: Inputs) -> Call:
    import torch_kernels

    names = ("q", "k", "v", "q_offsets", "kv_offsets", "edge_offsets", "edge_sources", "own_segment")
    arguments, rotation = [inputs[name] for name in names], rope(workload, inputs)
    return lambda: torch_kernels.graph_attention(*arguments, **rotation)[0]


def rope(workload: Workload, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Every segment at its running position."""
    if not workload.rope:
        return {}
    device = inputs["q"].device
    size, offsets = workload.head_size, inputs["kv_offsets"]
    inv_freq = 500000.0 ** -(torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    q_start = offsets[-1:] if workload.decode else offsets[:-1]
    return {
        "inv_freq": inv_freq,
        "q_start": q_start.contiguous(),
        "edge_start": offsets[inputs["edge_sources"].long()].contiguous(),
    }


Positioned = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def positioned(workload: Workload, inputs: Inputs, dtype: torch.dtype) -> Positioned:
    """Gives queries and keys at their positions, for whoever cannot turn queries for each edge."""
    q, k = inputs["q"].to(dtype), inputs["k"].to(dtype)
    if not workload.rope:
        return lambda: (q, k)
    inv_freq, device = rope(workload, inputs)["inv_freq"].double(), q.device
    lengths = torch.tensor(workload.lengths, device=device)
    starts = inputs["kv_offsets"][:-1].long().repeat_interleave(lengths)
    keys = sum(workload.lengths)
    positions = torch.tensor([keys], device=device) if workload.decode else torch.arange(keys, device=device)

    def turn(at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = at.double()[:, None, None] * inv_freq
        return angle.cos().to(dtype), angle.sin().to(dtype)

    turn_q, turn_k = turn(positions), turn(starts)
    if workload.decode:
        turned = rotate(k, *turn_k)
        return lambda: (rotate(q, *turn_q), turned)
    return lambda: (rotate(q, *turn_q), rotate(k, *turn_k))


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1)


TRUTH_ROWS = 512


def truth(workload: Workload, inputs: Inputs) -> torch.Tensor:
    """The formula in float64, some rows of a query segment and a KV head at a time."""
    q, k = positioned(workload, inputs, torch.float64)()
    v, group = inputs["v"].double(), workload.heads // workload.kv_heads
    out = torch.empty_like(q)
    ends = torch.tensor([0, *workload.lengths]).cumsum(0).tolist()
    first = 0
    for length, sources in zip(workload.q_lengths, workload.sources, strict=True):
        rows = torch.cat([torch.arange(ends[s], ends[s + 1]) for s in sources]).to(q.device)
        for begin in range(0, length, TRUTH_ROWS):
            place = torch.arange(begin, min(begin + TRUTH_ROWS, length), device=q.device)
            last = place + len(rows) - length  # the last key that a row sees
            hidden = torch.arange(len(rows), device=q.device) > last[:, None]
            for head in range(workload.kv_heads):
                mine = slice(head * group, (head + 1) * group)
                scores = torch.einsum("tgd,sd->gts", q[first + place, mine], k[rows, head]) / workload.head_size**0.5
                weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
                out[first + place, mine] = torch.einsum("gts,sd->tgd", weights, v[rows, head])
        first += length
    return out


def sdpa(workload: Workload, inputs: Inputs) -> Call:
    """One call for everything, under a dense mask."""
    get, v = positioned(workload, inputs, workload.dtype), inputs["v"]
    mask = None if workload.decode else shared(inputs, "mask", lambda: workload.mask(v.device))

    def call() -> torch.Tensor:
        rows = (x.transpose(0, 1)[None] for x in (*get(), v))
        return F.scaled_dot_product_attention(*rows, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return call


def gather(workload: Workload, inputs: Inputs) -> Call:
    """A call for each query segment, on keys and values that are gathered for it."""
    get, v = positioned(workload, inputs, workload.dtype), inputs["v"]
    ends = torch.tensor([0, *workload.lengths]).cumsum(0).tolist()

    def masks() -> list[torch.Tensor | None]:
        return [
            None
            if workload.decode or len(sources) == 1
            else torch.ones(length, sum(workload.lengths[s] for s in sources), dtype=torch.bool, device=v.device).tril(
                sum(workload.lengths[s] for s in sources) - length
            )
            for length, sources in zip(workload.q_lengths, workload.sources, strict=True)
        ]

    prepared = shared(inputs, "masks", masks)

    def call() -> torch.Tensor:
        (q, k), out, first = get(), [], 0
        for length, sources, mask in zip(workload.q_lengths, workload.sources, prepared, strict=True):
            keys, values = (torch.cat([x[ends[s] : ends[s + 1]] for s in sources]) for x in (k, v))
            rows = (x.transpose(0, 1)[None] for x in (q[first : first + length], keys, values))
            causal = mask is None and not workload.decode
            part = F.scaled_dot_product_attention(*rows, attn_mask=mask, is_causal=causal, enable_gqa=True)
            out.append(part[0].transpose(0, 1))
            first += length
        return torch.cat(out)

    return call


def varlen(regather: bool, workload: Workload, inputs: Inputs) -> Call:
    """FlashAttention over packed sequences, whose keys are gathered for each query segment in each call or before."""
    from torch.nn.attention.varlen import varlen_attn

    get, v = positioned(workload, inputs, workload.dtype), inputs["v"]
    ends = torch.tensor([0, *workload.lengths]).cumsum(0).tolist()
    rows = torch.cat([torch.arange(ends[s], ends[s + 1]) for mine in workload.sources for s in mine]).to(v.device)
    keys = [sum(workload.lengths[s] for s in mine) for mine in workload.sources]
    q_ends, k_ends = (
        torch.tensor([0, *lengths]).cumsum(0).to(v.device, torch.int32) for lengths in (workload.q_lengths, keys)
    )
    window = (-1, -1) if workload.decode else (-1, 0)
    # Up to torch 2.11 groups of heads need no word.
    groups = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    attend = functools.partial(
        varlen_attn, cu_seq_q=q_ends, cu_seq_k=k_ends, max_q=max(workload.q_lengths), max_k=max(keys),
        window_size=window, **groups,
    )  # fmt: skip
    gathered = get()[1][rows], v[rows]

    def call() -> torch.Tensor:
        q, k = get()
        return attend(q, k[rows], v[rows]) if regather else attend(q, *gathered)

    return call


@functools.cache
def compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(workload: Workload, inputs: Inputs) -> Call:
    """flex_attention, compiled, on the packed sequence, its BlockMask made for each call."""
    from torch.nn.attention.flex_attention import create_block_mask

    get, v = positioned(workload, inputs, workload.dtype), inputs["v"]
    device, count, tokens = v.device, len(workload.lengths), sum(workload.lengths)
    segment = torch.arange(count).repeat_interleave(torch.tensor(workload.lengths)).to(device)
    sees = torch.zeros(count, count, dtype=torch.bool)
    for source, target in workload.edges:
        sees[target, source] = True
    sees = sees.to(device)

    def seen(batch, head, row, key):
        own = (segment[row] == segment[key]) & (key <= row)
        return sees[segment[row], segment[key]] | own

    def call() -> torch.Tensor:
        rows = (x.transpose(0, 1)[None] for x in (*get(), v))
        blocks = create_block_mask(seen, None, None, tokens, tokens, device=str(device))
        return compiled_flex()(*rows, block_mask=blocks, enable_gqa=True)[0].transpose(0, 1)

    return call


def flashinfer(workload: Workload, inputs: Inputs) -> Call:
    """Its single-sequence prefill kernel under a packed mask."""
    import flashinfer as package

    get, v = positioned(workload, inputs, workload.dtype), inputs["v"]
    packed = shared(inputs, "packed", lambda: package.packbits(workload.mask(v.device).reshape(-1), bitorder="little"))
    attend = functools.partial(package.single_prefill_with_kv_cache, packed_custom_mask=packed, kv_layout="NHD")
    return lambda: attend(*get(), v)


DENSE_TOKENS = 20_000  # longer sequences get no dense mask


def case(name: str, workload: Workload, devices: tuple[str, ...] = ("cpu", "cuda"), curve: Curve | None = None) -> Case:
    def of(peer: Callable[..., Call], *options: Any) -> Callable[[Inputs], Call]:
        return functools.partial(peer, *options, workload)

    flash = torch.cuda.is_available() and workload.dtype != torch.float32
    if workload.decode:
        peers = {"sdpa": of(sdpa)} | ({"varlen": of(varlen, False)} if flash else {})
    else:
        peers = {"gather-sdpa": of(gather)}
        if flash:
            peers |= {"gather-varlen": of(varlen, True), "varlen": of(varlen, False)}
        if sum(workload.lengths) <= DENSE_TOKENS:
            peers |= {"sdpa": of(sdpa), "flex": of(flex)}
            if importlib.util.find_spec("flashinfer"):
                peers["flashinfer"] = of(flashinfer)
    return Case(
        name=name,
        make_inputs=workload.make_inputs,
        run=functools.partial(ours, workload),
        bytes=workload.bytes(),
        flops=workload.flops(),
        dtype=workload.dtype,
        peers=peers,
        slow_peers=frozenset({"flex"}) & peers.keys(),
        truth=functools.partial(truth, workload),
        devices=devices,
        curve=curve,
        memory=True,
    )


def bipartite(count: int, length: int, m: int, **options: Any) -> Workload:
    edges = tuple((s, t) for t in range(m, count) for s in range(m))
    return Workload((length,) * count, edges, **options)


def full(count: int, length: int) -> Workload:
    return Workload((length,) * count, tuple((s, t) for t in range(count) for s in range(count) if s != t))


def star(count: int, length: int, centre: int, egos: int = 1, **options: Any) -> Workload:
    """Stars of `count` neighbours and a centre, one after the other."""
    edges = tuple((ego * (count + 1) + s, ego * (count + 1) + count) for ego in range(egos) for s in range(count))
    return Workload(((length,) * count + (centre,)) * egos, edges, **options)


def cases() -> list[Case]:
    gpu = ("cuda",)
    return [
        case("rag-top1-10x150-bf16", bipartite(10, 150, 1)),
        case("rag-top3-10x150-bf16-rope", bipartite(10, 150, 3, rope=True)),
        case("rag-top3-10x150-fp32", bipartite(10, 150, 3, dtype=torch.float32)),
        case("rag-full-10x150-bf16", full(10, 150)),
        case("rag-top1-10x512-bf16", bipartite(10, 512, 1)),
        case("rag-full-10x512-bf16", full(10, 512)),
        case("pubmed-star-130x250-bf16", star(130, 250, 250)),
        case("ego-8x1024-bf16", star(7, 1024, 1024)),
        case("ego-8x11k-bf16", star(7, 11_200, 11_200), gpu),
        case("egos-3x8x11k-bf16", star(7, 11_200, 11_200, egos=3), gpu),
        case("decode-10x8192-bf16", bipartite(10, 8192, 0, decode=True)),
        case("decode-10x8192-bf16-rope", bipartite(10, 8192, 0, decode=True, rope=True)),
        case("decode-8x11k-bf16", Workload((11_200,) * 8, (), decode=True)),
        *(
            case(
                f"rag-top3-10x{length}-bf16",
                bipartite(10, length, 3),
                curve=Curve("ten passages, three of them seen by the rest", "tokens of a passage", length, "sdpa"),
            )
            for length in (75, 150, 512)
        ),
        *(
            case(
                f"star-{count}x250-bf16",
                star(count, 250, 300),
                curve=Curve("a star of 250 tokens each and a centre of 300", "neighbours", count, "sdpa"),
            )
            for count in (4, 16, 64)
        ),
    ]


def preset(name: str, model: Model) -> list[Case]:
    """A layer of a model over passages, over a star, and in decoding."""
    heads = {"heads": model.heads, "kv_heads": model.kv_heads, "head_size": model.head_size}
    return [
        case(f"{name}-rag-top1-10x512-bf16", bipartite(10, 512, 1, **heads)),
        case(f"{name}-rag-top3-10x150-bf16-rope", bipartite(10, 150, 3, rope=True, **heads)),
        case(f"{name}-star-16x250-bf16", star(16, 250, 300, **heads)),
        case(f"{name}-decode-10x512-bf16", bipartite(10, 512, 0, decode=True, **heads)),
    ]


if __name__ == "__main__":
    sys.exit(main("graph_attention", cases()))
