# SPDX-License-Identifier: Apache-2.0
"""Tree attention, greedy verification and KV commit at published model shapes and trees.

Peers get what a careful user would prepare once: a contiguous [B, H, S, D] cache that already holds the tree, a ready
mask, a sliced window. What depends on the call (folding q, dequantising the cache) is timed.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Call, Case, Inputs, main
from presets import Model

TREES = json.loads((Path(__file__).parent / "data" / "trees.json").read_text())
CHAIN = "chain"  # one node: plain decode
MEDUSA, EAGLE1, EAGLE2 = "medusa_mc_sim_7b_63", "eagle1_26", "eagle2_like_60"


def tree(name: str) -> list[int]:
    parents = [-1]
    for node, count in enumerate([] if name == CHAIN else TREES[name]["counts"]):
        parents += [node] * count
    return parents


def ancestors(parents: list[int]) -> list[set[int]]:
    """The tree nodes each node sees, itself included; none for padding."""
    seen: list[set[int]] = []
    for node, parent in enumerate(parents):
        seen.append(set() if parent == -2 else {node} | (seen[parent] if parent >= 0 else set()))
    return seen


@dataclass(frozen=True)
class Workload:
    """One verification pass of a layer. Several prefixes make a batch; trees take turns, padded to the largest."""

    heads: int
    kv_heads: int
    head_size: int
    trees: tuple[str, ...]
    prefixes: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype | None = None  # quantised with one scale per KV head
    window: int = 0
    sinks: bool = False
    in_cache: bool = False  # the tree's keys and values lie in the cache instead of tensors of their own

    @functools.cached_property
    def parents(self) -> list[list[int]]:
        trees = [tree(self.trees[row % len(self.trees)]) for row in range(len(self.prefixes))]
        width = max(map(len, trees))
        return [parents + [-2] * (width - len(parents)) for parents in trees]

    @functools.cached_property
    def visible(self) -> list[list[set[int]]]:
        return [ancestors(parents) for parents in self.parents]

    def first_key(self, row: int, node: int) -> int:
        """The first prefix slot that the window leaves to a node."""
        depth = len(self.visible[row][node]) - 1
        return max(0, self.prefixes[row] + depth - self.window + 1) if self.window else 0

    def nodes(self):
        return ((row, node) for row, sets in enumerate(self.visible) for node, seen in enumerate(sets) if seen)

    def bytes(self) -> int:
        element, stored = self.dtype.itemsize, (self.cache_dtype or self.dtype).itemsize
        first = {
            row: min(self.first_key(row, node) for r, node in self.nodes() if r == row)
            for row in range(len(self.prefixes))
        }
        prefix = sum(self.prefixes[row] - first[row] for row in first)
        nodes = sum(1 for _ in self.nodes())
        cache = 2 * self.kv_heads * self.head_size * (prefix * stored + nodes * element)
        return cache + nodes * self.heads * (2 * self.head_size * element + 4)  # q and out, lse

    def flops(self) -> int:
        pairs = sum(
            self.prefixes[row] - self.first_key(row, node) + len(self.visible[row][node]) for row, node in self.nodes()
        )
        return 4 * self.head_size * self.heads * pairs

    def make_inputs(self, seed: int, device: str) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=self.dtype)

        batch, nodes = len(self.prefixes), len(self.parents[0])
        shape = (batch, max(self.prefixes) + nodes, self.kv_heads, self.head_size)
        inputs: Inputs = {
            "q": normal(batch, nodes, self.heads, self.head_size),
            "k_cache": normal(*shape),
            "v_cache": normal(*shape),
            "prefix_lens": torch.tensor(self.prefixes, dtype=torch.int32, device=device),
            "parents": torch.tensor(self.parents, dtype=torch.int32, device=device),
            "sinks": torch.randn(self.heads, generator=generator, device=device) if self.sinks else None,
            "shared": {},  # what peers build once and every copy of the inputs may share
        }
        for name in "kv":
            cache = inputs[f"{name}_cache"]
            rows = [cache[row, prefix : prefix + nodes] for row, prefix in enumerate(self.prefixes)]
            inputs[f"{name}_tree"] = None if self.in_cache else torch.stack(rows)
            inputs[f"{name}_scale"] = None
            if self.cache_dtype is not None:
                scale = cache.float().abs().amax((0, 1, 3)) / (127 if self.cache_dtype == torch.int8 else 448)
                stored = cache.float() / scale[:, None]
                inputs[f"{name}_scale"] = scale
                inputs[f"{name}_cache"] = (stored.round() if self.cache_dtype == torch.int8 else stored).to(
                    self.cache_dtype
                )
        return inputs

    def mask(self, inputs: Inputs) -> torch.Tensor:
        """[B, T, S]: which slots a node sees."""
        keys = inputs["k_cache"].shape[1]
        mask = torch.zeros(*inputs["parents"].shape, keys, dtype=torch.bool)
        for row, node in self.nodes():
            prefix = self.prefixes[row]
            mask[row, node, self.first_key(row, node) : prefix] = True
            mask[row, node, [prefix + seen for seen in self.visible[row][node]]] = True
        return mask.to(inputs["q"].device)

    def select(self, inputs: Inputs, out: torch.Tensor) -> torch.Tensor:
        return out[inputs["parents"] != -2]


def shared(inputs: Inputs, name: str, build: Callable[[], Any]) -> Any:
    if name not in inputs["shared"]:
        inputs["shared"][name] = build()
    return inputs["shared"][name]


def ours(workload: Workload, inputs: Inputs) -> Call:
    import torch_kernels

    arguments = [inputs[name] for name in ("q", "k_cache", "v_cache", "prefix_lens", "parents")]
    keywords = {name: inputs[name] for name in ("k_tree", "v_tree", "sinks", "k_scale", "v_scale")}
    return lambda: torch_kernels.tree_attention(*arguments, window=workload.window, **keywords)[0]


def truth(workload: Workload, inputs: Inputs) -> torch.Tensor:
    """The formula in float64, one sequence and KV head at a time."""
    q, mask = inputs["q"], workload.mask(inputs)
    batch, nodes, heads, size = q.shape
    group = heads // workload.kv_heads
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    keys, values = (dense_cache(workload, inputs, name) for name in "kv")
    for row in range(batch):
        for head in range(workload.kv_heads):
            mine = slice(head * group, (head + 1) * group)
            scores = torch.einsum("tgd,sd->gts", q[row, :, mine].double(), keys[row, head].double()) / size**0.5
            scores = scores.masked_fill(~mask[row], -torch.inf)
            if workload.sinks:
                sink = inputs["sinks"][mine].double()[:, None, None].expand(group, nodes, 1)
                scores = torch.cat([scores, sink], -1)
            weights = scores.softmax(-1)[..., : mask.shape[2]]
            out[row, :, mine] = torch.einsum("gts,sd->tgd", weights, values[row, head].double())
    return out


def dense_cache(workload: Workload, inputs: Inputs, name: str) -> torch.Tensor:
    """[B, Hk, S, D] in float64 for a quantised cache, else as stored; the tree lies behind each prefix."""
    cache = inputs[f"{name}_cache"]
    if workload.cache_dtype is not None:
        cache = cache.double() * inputs[f"{name}_scale"][:, None]
        for row, prefix in enumerate(workload.prefixes):
            nodes = inputs[f"{name}_tree"][row]
            cache[row, prefix : prefix + len(nodes)] = nodes
    return cache.transpose(1, 2)


def peer_cache(workload: Workload, inputs: Inputs) -> tuple[Callable[[], tuple[torch.Tensor, torch.Tensor]], int]:
    """A call that gives keys and values [B, Hk, S, D] in q's dtype, and the first slot of the cache they hold."""
    first = min(workload.first_key(row, node) for row, node in workload.nodes())
    if workload.cache_dtype is None:
        kept = tuple(inputs[f"{name}_cache"][:, first:].transpose(1, 2).contiguous() for name in "kv")
        return lambda: kept, first
    (prefix,) = set(workload.prefixes)  # a batch of equal prefixes: the dequantised cache and the tree concatenate
    stored = [
        (inputs[f"{name}_cache"][:, first:prefix].transpose(1, 2).contiguous(), inputs[f"{name}_scale"][:, None, None])
        for name in "kv"
    ]
    trees = [inputs[f"{name}_tree"].transpose(1, 2) for name in "kv"]

    def dequantised() -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (
            torch.cat([cache.to(workload.dtype) * scale.to(workload.dtype), nodes], 2)
            for (cache, scale), nodes in zip(stored, trees, strict=True)
        )
        return k, v

    return dequantised, first


def sdpa(workload: Workload, folded: bool, inputs: Inputs) -> Call:
    """scaled_dot_product_attention under a mask, with enable_gqa or the query heads of a KV head folded into rows."""
    q = inputs["q"]
    batch, nodes, heads, size = q.shape
    group = heads // workload.kv_heads
    cache, first = peer_cache(workload, inputs)
    mask = shared(inputs, "mask", lambda: workload.mask(inputs)[:, None, :, first:])
    if workload.sinks:  # a sink is one more key of score b and value zero

        def sink_mask() -> torch.Tensor:
            bias = torch.zeros(batch, heads, nodes, mask.shape[3], dtype=q.dtype, device=q.device).masked_fill(
                ~mask, -torch.inf
            )
            return torch.cat([bias, inputs["sinks"].to(q.dtype)[:, None, None].expand(batch, heads, nodes, 1)], 3)

        mask = shared(inputs, "sink mask", sink_mask)
        kept = tuple(F.pad(tensor, (0, 0, 0, 1)) for tensor in cache())
        cache = lambda: kept  # noqa: E731
    if not folded:
        attend = functools.partial(F.scaled_dot_product_attention, attn_mask=mask, enable_gqa=group > 1)
        return lambda: attend(q.transpose(1, 2), *cache()).transpose(1, 2)
    if mask.shape[1] == 1:
        mask = shared(inputs, "folded mask", lambda: mask.repeat(1, 1, group, 1))
    else:
        mask = mask.reshape(batch, workload.kv_heads, group * nodes, mask.shape[3])

    def call() -> torch.Tensor:
        rows = q.view(batch, nodes, workload.kv_heads, group, size).permute(0, 2, 3, 1, 4)
        rows = rows.reshape(batch, workload.kv_heads, group * nodes, size)
        out = F.scaled_dot_product_attention(rows, *cache(), attn_mask=mask)
        return out.view(batch, workload.kv_heads, group, nodes, size).permute(0, 3, 1, 2, 4).reshape(q.shape)

    return call


@functools.cache
def compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(workload: Workload, inputs: Inputs) -> Call:
    """flex_attention, compiled, its BlockMask built beforehand. Sinks rescale its output by its log-sum-exp."""
    from torch.nn.attention.flex_attention import create_block_mask

    q = inputs["q"]
    cache, first = peer_cache(workload, inputs)
    mask = shared(inputs, "mask", lambda: workload.mask(inputs)[:, None, :, first:])[:, 0]

    def tree_mask(batch, head, node, key):
        return mask[batch, node, key]

    blocks = shared(
        inputs,
        "blocks",
        lambda: create_block_mask(tree_mask, len(mask), None, mask.shape[1], mask.shape[2], device=str(q.device)),
    )
    attend = functools.partial(compiled_flex(), block_mask=blocks, enable_gqa=workload.heads != workload.kv_heads)

    def call() -> torch.Tensor:
        if workload.sinks:
            out, lse = attend(q.transpose(1, 2), *cache(), return_lse=True)
            out = (out * torch.sigmoid(lse - inputs["sinks"][:, None])[..., None]).to(q.dtype)
        else:
            out = attend(q.transpose(1, 2), *cache())
        return out.transpose(1, 2)

    return call


def flashinfer(workload: Workload, inputs: Inputs) -> Call:
    """Its single-sequence prefill kernel with a packed custom mask, the form it offers for trees."""
    import flashinfer as package

    q = inputs["q"][0]
    cache, first = peer_cache(workload, inputs)
    mask = shared(inputs, "mask", lambda: workload.mask(inputs)[:, None, :, first:])[0, 0]
    packed = package.packbits(mask.reshape(-1), bitorder="little")
    attend = functools.partial(package.single_prefill_with_kv_cache, packed_custom_mask=packed, kv_layout="HND")
    return lambda: attend(q, *(tensor[0] for tensor in cache()))[None]


def attention_case(name: str, workload: Workload, devices: tuple[str, ...] = ("cpu", "cuda")) -> Case:
    peers = {
        "sdpa": functools.partial(sdpa, workload, False),
        "sdpa-folded": functools.partial(sdpa, workload, True),
        "flex": functools.partial(flex, workload),
    }
    if workload.heads == workload.kv_heads:
        del peers["sdpa-folded"]
    if importlib.util.find_spec("flashinfer") and len(workload.prefixes) == 1 and not workload.sinks:
        peers["flashinfer"] = functools.partial(flashinfer, workload)
    return Case(
        name=name,
        make_inputs=workload.make_inputs,
        run=functools.partial(ours, workload),
        bytes=workload.bytes(),
        flops=workload.flops(),
        dtype=workload.dtype,
        peers=peers,
        slow_peers=frozenset({"flex"}),
        truth=functools.partial(truth, workload),
        select=workload.select,
        devices=devices,
    )


def verify_inputs(batch: int, seed: int, device: str) -> Inputs:
    """Half of the nodes carry the token that the target wants after their parent, so that longer paths are accepted."""
    generator = torch.Generator().manual_seed(seed)
    parents = torch.tensor([tree(MEDUSA)] * batch, dtype=torch.int32)
    target = torch.randint(32000, parents.shape, generator=generator)
    draft = torch.where(
        torch.rand(parents.shape, generator=generator) < 0.5,
        target.gather(1, parents.clamp(0).long()),
        torch.zeros_like(target),
    )
    return {name: tensor.to(device) for name, tensor in (("draft", draft), ("target", target), ("parents", parents))}


def verify_ours(inputs: Inputs) -> Call:
    import torch_kernels

    return lambda: torch_kernels.tree_verify_greedy(inputs["draft"], inputs["target"], inputs["parents"])[2]


def verify_torch(inputs: Inputs) -> Call:
    """The same in PyTorch operators: acceptance one level at a time, then the longest path back to the root."""
    draft, target, parents = inputs["draft"], inputs["target"], inputs["parents"].long().clamp(0)
    batch, nodes = draft.shape
    seen = ancestors(tree(MEDUSA))
    depth = torch.tensor([len(each) - 1 for each in seen], device=draft.device)
    levels = int(depth.max())
    order = torch.arange(nodes, device=draft.device)
    rows = torch.arange(batch, device=draft.device)[:, None]

    def call() -> torch.Tensor:
        accepted = (draft == target.gather(1, parents)) | (order == 0)
        for _ in range(levels):
            accepted = accepted & (accepted.gather(1, parents) | (order == 0))
        last = (accepted * (depth * nodes + nodes - order)).argmax(1, keepdim=True)
        length = depth[last]
        tokens = torch.full((batch, nodes + 1), -1, dtype=draft.dtype, device=draft.device)
        tokens.scatter_(1, length, target.gather(1, last))
        node = last
        for level in range(levels, 0, -1):
            on_path = depth[node] == level
            tokens[rows, torch.where(on_path, level - 1, nodes)] = draft.gather(1, node)
            node = torch.where(on_path, parents.gather(1, node), node)
        return tokens[:, :nodes]

    return call


def commit_inputs(workload: Workload, seed: int, device: str) -> Inputs:
    inputs = workload.make_inputs(seed, device)
    nodes = len(workload.parents[0])
    path = sorted(max(workload.visible[0], key=len))
    inputs["path"] = torch.tensor(
        [path + [-1] * (nodes - len(path))] * len(workload.prefixes), dtype=torch.int32, device=device
    )
    inputs["num_accepted"] = torch.full((len(workload.prefixes),), len(path) - 1, dtype=torch.int32, device=device)
    return inputs


def commit_ours(inputs: Inputs) -> Call:
    import torch_kernels

    caches = inputs["k_cache"].zero_(), inputs["v_cache"].zero_()
    arguments = [inputs[name] for name in ("k_tree", "v_tree", "prefix_lens", "path", "num_accepted")]

    def call() -> torch.Tensor:
        torch_kernels.tree_commit_kv_(*caches, *arguments)
        return caches[0]

    return call


def commit_torch(inputs: Inputs) -> Call:
    """What Medusa and EAGLE do: lengths on the host, one indexed copy per sequence."""
    caches = inputs["k_cache"].clone().zero_(), inputs["v_cache"].clone().zero_()
    trees = inputs["k_tree"], inputs["v_tree"]

    def call() -> torch.Tensor:
        counts, starts = inputs["num_accepted"].tolist(), inputs["prefix_lens"].tolist()
        for row, (count, start) in enumerate(zip(counts, starts, strict=True)):
            nodes = inputs["path"][row, : count + 1]
            for cache, tree_rows in zip(caches, trees, strict=True):
                cache[row, start : start + count + 1] = tree_rows[row, nodes]
        return caches[0]

    return call


def cases() -> list[Case]:
    llama = functools.partial(Workload, 32, 8, 128)
    ragged = (777, 4096, 1500, 3333, 64, 2048, 2900, 1023)
    commit = llama((MEDUSA,), (1024,) * 8)
    return [
        attention_case("llama3-8b-t64-p8192-bf16", llama((MEDUSA,), (8192,))),
        attention_case("llama3-8b-t26-p2048-bf16", llama((EAGLE1,), (2048,))),
        attention_case("llama3-8b-t1-p8192-bf16", llama((CHAIN,), (8192,))),
        attention_case("llama3-8b-t64-p1024-fp32", llama((MEDUSA,), (1024,), torch.float32)),
        attention_case("llama3-8b-t60-p4096-bf16", llama((EAGLE2,), (4096,))),
        attention_case("llama3-8b-t64-p8192-bf16-in-cache", llama((MEDUSA,), (8192,), in_cache=True)),
        attention_case("llama3-8b-t64-p8192-int8", llama((MEDUSA,), (8192,), cache_dtype=torch.int8)),
        attention_case("llama3-8b-t64-p8192-fp8", llama((MEDUSA,), (8192,), cache_dtype=torch.float8_e4m3fn)),
        attention_case("llama3-8b-t1-p8192-int8", llama((CHAIN,), (8192,), cache_dtype=torch.int8)),
        attention_case("llama3-8b-b8-ragged-bf16", llama((MEDUSA, EAGLE1, EAGLE2), ragged)),
        attention_case("vicuna-7b-t64-p4096-bf16", Workload(32, 32, 128, (MEDUSA,), (4096,))),
        attention_case("qwen3-30b-a3b-t60-p4096-bf16", Workload(32, 4, 128, (EAGLE2,), (4096,))),
        attention_case("gemma3-12b-t64-p4096-bf16", Workload(16, 8, 256, (MEDUSA,), (4096,))),
        attention_case(
            "gpt-oss-t64-p4096-window-sinks", Workload(64, 8, 64, (MEDUSA,), (4096,), window=128, sinks=True)
        ),
        attention_case("llama3-70b-b8-t64-p8192-bf16", Workload(64, 8, 128, (MEDUSA,), (8192,) * 8), devices=("cuda",)),
        Case(
            name="verify-greedy-b8-t64",
            make_inputs=functools.partial(verify_inputs, 8),
            run=verify_ours,
            bytes=8 * 64 * (8 + 8 + 4 + 4 + 8) + 8 * 4,
            flops=0,
            dtype=torch.bfloat16,
            peers={"torch": verify_torch},
            tolerance=0.0,
        ),
        Case(
            name="commit-b8-t64",
            make_inputs=functools.partial(commit_inputs, commit),
            run=commit_ours,
            bytes=2 * 2 * 8 * max(map(len, commit.visible[0])) * commit.kv_heads * commit.head_size * 2,
            flops=0,
            dtype=torch.bfloat16,
            peers={"torch": commit_torch},
            tolerance=0.0,
        ),
    ]


def preset(name: str, model: Model) -> list[Case]:
    """A layer of a model behind four thousand tokens: plain decoding and trees, an int8 cache, a sliding window."""
    layer = functools.partial(Workload, model.heads, model.kv_heads, model.head_size, sinks=model.sinks)
    trees = {1: CHAIN, 26: EAGLE1, 64: MEDUSA}
    made = [
        attention_case(f"{name}-t{nodes}-p4096-bf16", layer((drafted,), (4096,))) for nodes, drafted in trees.items()
    ]
    made.append(attention_case(f"{name}-t64-p4096-int8", layer((MEDUSA,), (4096,), cache_dtype=torch.int8)))
    if model.window:
        windowed = layer((MEDUSA,), (4096,), window=model.window)
        made.append(attention_case(f"{name}-t64-p4096-window{model.window}", windowed))
    return made


if __name__ == "__main__":
    sys.exit(main("tree_attention", cases()))
