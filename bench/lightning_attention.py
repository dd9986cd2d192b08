# SPDX-License-Identifier: Apache-2.0
"""Lightning attention from a thousand to a million tokens, its gradients, and decoding.

Peers get the layout they like best and decays that are ready. Where a peer has a chunk size, the fastest is picked on
the first tokens of the same inputs.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from chunk_loops import (
    chunk_loop,
    gradients,
    heads_first,
    loop_gradients,
    rates,
    tokens_first,
    torch_at_once,
    torch_loop,
)
from harness import Call, Case, Curve, Inputs, Prepare, main
from presets import Model

TREES = json.loads((Path(__file__).parent / "data" / "trees.json").read_text())
TREE_OF = {26: "eagle1_26", 64: "medusa_mc_sim_7b_63"}  # by number of nodes
CHECKED_TOKENS = 4096  # of the end of a sequence, which all of it has a part in
# Longest sequences of peers whose time grows faster, or whose launches are many.
SDPA_TOKENS = {"cpu": 16384, "cuda": 65536}
LOOP_TOKENS = {"cpu": 65536, "cuda": 131072}


@dataclasses.dataclass(frozen=True)
class Workload:
    tokens: int
    heads: int
    size: int = 128
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        batch = f"b{self.batch}-" if self.batch > 1 else ""
        return f"{batch}t{self.tokens}-h{self.heads}-d{self.size}-{short(self.dtype)}"

    @property
    def elements(self) -> int:
        """Of each of q, k, v and the output."""
        return self.batch * self.tokens * self.heads * self.size

    def make_inputs(self, seed: int, device: str) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        shape = (self.batch, self.tokens, self.heads, self.size)
        inputs: Inputs = {
            name: torch.randn(shape, generator=generator, device=device, dtype=self.dtype) for name in "qkv"
        }
        inputs["k"] /= self.size**0.5
        return inputs | {"slopes": slopes(self.heads).to(device)}


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def slopes(heads: int) -> torch.Tensor:
    """MiniMax's of a first layer."""
    return 2 ** (-8 * (torch.arange(heads) + 1.0) / heads) * (1 + 1e-5)


# ---- sequences: ours and the truth ----


def ours(inputs: Inputs) -> Call:
    import torch_kernels

    arguments = [inputs[name] for name in ("q", "k", "v", "slopes")]
    return lambda: torch_kernels.lightning_attention(*arguments)[0]


def last_tokens(inputs: Inputs, out: torch.Tensor) -> torch.Tensor:
    return out[:, -CHECKED_TOKENS:]


def truth(inputs: Inputs) -> torch.Tensor:
    """The last tokens' outputs in float64."""
    tokens = inputs["q"].shape[1]
    first = max(0, tokens - CHECKED_TOKENS)
    state = None
    for start in range(0, first, CHECKED_TOKENS):
        part = {name: inputs[name][:, start : min(start + CHECKED_TOKENS, first)].double() for name in "kv"}
        _, state = chunk_loop(heads_first(part["k"]), *map(heads_first, part.values()), rates(inputs), 128, state)
    q, k, v = (heads_first(inputs[name][:, first:].double()) for name in "qkv")
    return tokens_first(chunk_loop(q, k, v, rates(inputs), 128, state)[0], len(inputs["q"]))


# ---- other peers ----


class Done(Exception):  # noqa: N818 (not an error: it carries the result out of a module)
    pass


class Stop(torch.nn.Module):
    """In the place of what follows the attention."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        raise Done(value)


@functools.cache
def transformers_module(heads: int, size: int, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    sizes = {"hidden_size": heads * size, "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": size}
    with torch.device(device):
        module = MiniMaxLightningAttention(MiniMaxConfig(**sizes, num_hidden_layers=2), 0)
    module.act_fn, module.norm = torch.nn.Identity(), Stop()
    module.qkv_proj = module.out_proj = module.output_gate = torch.nn.Identity()
    return module.to(dtype)  # as a model in this precision holds it, decays included


def transformers_loop(inputs: Inputs) -> Call:
    """The loop of transformers' MiniMaxLightningAttention, without the layers around it; its state has q's dtype."""
    q = inputs["q"]
    module = transformers_module(*q.shape[2:], q.dtype, q.device)
    projected = torch.cat([inputs[name] for name in "qkv"], -1).flatten(2)

    def call() -> torch.Tensor:
        try:
            with torch.no_grad():
                module(projected, None, None)
        except Done as done:
            return done.args[0].view(q.shape)
        raise RuntimeError("the module has changed: its norm was not called")

    return call


def fla(inputs: Inputs) -> Call:
    """flash-linear-attention's chunked simple GLA with a constant decay per head."""
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v, decay = *(inputs[name] for name in "qkv"), -inputs["slopes"]
    return lambda: chunk_simple_gla(q, k, v, g_gamma=decay, scale=1.0)[0]


def sdpa(inputs: Inputs) -> Call:
    """Causal softmax attention: another function, to show where sequences are long enough for this one."""
    q, k, v = (inputs[name].transpose(1, 2).contiguous() for name in "qkv")
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def joined(inputs: Inputs, parts: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


def true_gradients(inputs: Inputs) -> torch.Tensor:
    exact = inputs | {name: inputs[name].double() for name in "qkv"}
    grad = torch.randn(
        inputs["v"].shape, generator=torch.Generator(inputs["q"].device).manual_seed(1), device=inputs["v"].device
    ).to(inputs["v"].dtype)  # fmt: skip
    leaves = [exact[name].requires_grad_() for name in "qkv"]
    out = tokens_first(chunk_loop(*map(heads_first, leaves), rates(inputs), 128)[0], len(inputs["q"]))
    return torch.autograd.grad(out, leaves, grad.double())  # type: ignore[return-value]


# ---- cases of sequences ----


def device_peers(workload: Workload, device: str, **peers: Prepare) -> dict[str, Prepare]:
    """The peers that serve so many tokens on a device."""
    most = {"sdpa": SDPA_TOKENS[device], "fla": 2**30}
    installed = {"transformers": importlib.util.find_spec("transformers"), "fla": importlib.util.find_spec("fla")}
    return {
        name: peer
        for name, peer in peers.items()
        if workload.tokens <= most.get(name, LOOP_TOKENS[device])
        and installed.get(name, True)
        and (name != "fla" or device == "cuda")
    }


def forward_case(workload: Workload, device: str, series: str | None = None) -> Case:
    loops = {"torch": torch_loop, "torch-at-once": torch_at_once, "transformers": transformers_loop}
    tokens = workload.batch * workload.tokens
    return Case(
        name=f"forward-{workload.name}",
        make_inputs=workload.make_inputs,
        run=ours,
        bytes=4 * workload.elements * workload.dtype.itemsize + 4 * workload.heads,
        flops=4 * workload.elements * workload.size,  # the recurrence's: the state grows, and is read
        dtype=workload.dtype,
        peers=device_peers(workload, device, **loops, fla=fla, sdpa=sdpa),
        inexact_peers=frozenset({"sdpa", "transformers"}),
        truth=truth,
        select=last_tokens,
        devices=(device,),
        curve=Curve(series, "tokens", workload.tokens, "sdpa", tokens) if series else None,
        memory=True,
    )


def training_case(workload: Workload, device: str) -> Case:
    peers = {"torch": loop_gradients, "fla": functools.partial(gradients, fla)}
    return Case(
        name=f"forward-backward-{workload.name}",
        make_inputs=workload.make_inputs,
        run=functools.partial(gradients, ours),
        bytes=(4 + 7) * workload.elements * workload.dtype.itemsize,
        # Back: the state's gradient grows, and it and the state give those of q, k and v.
        flops=(4 + 8) * workload.elements * workload.size,
        dtype=workload.dtype,
        peers=device_peers(workload, device, **peers),
        truth=true_gradients,  # type: ignore[arg-type]
        select=joined,
        devices=(device,),
        memory=True,
    )


# ---- decoding ----


@dataclasses.dataclass(frozen=True)
class Pool:
    rows: int
    heads: int
    size: int = 128
    nodes: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"n{self.rows}-h{self.heads}-d{self.size}"

    @property
    def state_bytes(self) -> int:
        return self.rows * self.heads * self.size**2 * 4

    @property
    def elements(self) -> int:
        return self.rows * self.nodes * self.heads * self.size

    @property
    def parents(self) -> list[int]:
        parents = [-1]
        for node, count in enumerate(TREES[TREE_OF[self.nodes]]["counts"] if self.nodes > 1 else []):
            parents += [node] * count
        return parents

    def paths(self) -> list[list[int]]:
        """Of each node, from the root."""
        paths: list[list[int]] = []
        for node, parent in enumerate(self.parents):
            paths.append([*(paths[parent] if parent >= 0 else []), node])
        return paths

    def make_inputs(self, seed: int, device: str) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def numbers(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        q, k, v = (numbers(self.rows, self.nodes, self.heads, self.size) for _ in range(3))
        state = numbers(self.rows, self.heads, self.size, self.size, dtype=torch.float32)
        longest = max(self.paths(), key=len)
        path = torch.tensor([longest + [-1] * (self.nodes - len(longest))] * self.rows, device=device)
        return {
            "q": q,
            "k": k / self.size**0.5,
            "v": v,
            "state": state,
            "slopes": slopes(self.heads).to(device),
            "parents": torch.tensor([self.parents] * self.rows, dtype=torch.int32, device=device),
            "path": path,
            "num_accepted": torch.full((self.rows,), len(longest) - 1, device=device),
        }


def step_ours(inputs: Inputs) -> Call:
    import torch_kernels

    q, k, v = (inputs[name][:, 0] for name in "qkv")
    state, decay = inputs["state"].clone(), inputs["slopes"]
    return lambda: torch_kernels.lightning_attention_step_(q, k, v, state, decay)


def step_torch(inputs: Inputs) -> Call:
    """The recurrence in place, in batched products of float32."""
    q, k, v = (inputs[name][:, 0].flatten(0, 1)[:, None].float().contiguous() for name in "qkv")
    rows, nodes, heads, size = inputs["q"].shape
    state = inputs["state"].clone().flatten(0, 1)
    decay = torch.exp(-inputs["slopes"]).repeat(rows)[:, None, None]

    def call() -> torch.Tensor:
        state.mul_(decay).baddbmm_(k.mT, v)
        return torch.bmm(q, state).to(inputs["q"].dtype).view(rows, heads, -1)

    return call


def step_fla(inputs: Inputs) -> Call:
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    q, k, v = (inputs[name] for name in "qkv")
    state, options = inputs["state"].clone(), {"g_gamma": -inputs["slopes"], "scale": 1.0, "output_final_state": True}
    return lambda: fused_recurrent_simple_gla(q, k, v, initial_state=state, **options)[0][:, 0]


def verify_ours(inputs: Inputs) -> Call:
    import torch_kernels

    arguments = [inputs[name] for name in ("q", "k", "v", "state", "slopes")]
    return lambda: torch_kernels.lightning_attention_verify(*arguments, parents=inputs["parents"])


def verify_torch(pool: Pool, inputs: Inputs) -> Call:
    """Dense products under a ready matrix of decays; the state in float32."""
    q, k, v = (heads_first(inputs[name]) for name in "qkv")
    decay, wide = inputs["slopes"], torch.promote_types(q.dtype, torch.float32)
    distance = torch.full((pool.nodes, pool.nodes), torch.inf)
    for node, path in enumerate(pool.paths()):
        distance[node, path] = torch.arange(len(path) - 1, -1, -1.0)
    depths = torch.tensor([len(path) for path in pool.paths()], dtype=torch.float32)[:, None]
    pairs, of_state = (
        torch.exp(-decay.double()[:, None, None] * x.to(decay.device)).repeat(pool.rows, 1, 1)
        for x in (distance, depths)
    )
    pairs, of_state = pairs.to(q.dtype), of_state.to(wide)
    state = inputs["state"].flatten(0, 1).to(wide)

    def call() -> torch.Tensor:
        out = torch.bmm(torch.bmm(q, k.mT) * pairs, v)
        return tokens_first(torch.baddbmm(out.to(wide), q.to(wide) * of_state, state).to(q.dtype), pool.rows)

    return call


def verify_truth(pool: Pool, inputs: Inputs) -> torch.Tensor:
    return verify_torch(pool, inputs | {name: inputs[name].double() for name in ("q", "k", "v")})()


def commit_ours(inputs: Inputs) -> Call:
    import torch_kernels

    state = inputs["state"].clone()
    arguments = [inputs["k"], inputs["v"], state] + [inputs[name] for name in ("slopes", "path", "num_accepted")]

    def call() -> torch.Tensor:
        torch_kernels.lightning_attention_commit_(*arguments)
        return state

    return call


def commit_torch(dtype: torch.dtype, inputs: Inputs) -> Call:
    """The path's keys and values gathered, the state advanced by them in one product. All paths are equally long."""
    state, slope = inputs["state"].clone().to(dtype), inputs["slopes"].double()
    rows, _, heads, size = inputs["k"].shape
    length = int(inputs["num_accepted"][0]) + 1
    path = inputs["path"][:, :length, None, None].expand(-1, -1, heads, size)
    left = torch.arange(length - 1, -1, -1, device=slope.device)
    keys = torch.exp(-slope * left[:, None]).to(dtype)[None, :, :, None]
    decay = torch.exp(-slope * length).to(dtype).repeat(rows)[:, None, None]

    def call() -> torch.Tensor:
        k, v = (inputs[name].gather(1, path).to(dtype) for name in "kv")
        state.flatten(0, 1).mul_(decay).baddbmm_(heads_first(k * keys).mT, heads_first(v))
        return state

    return call


def step_case(pool: Pool, device: str) -> Case:
    peers = {"torch": step_torch}
    if device == "cuda" and importlib.util.find_spec("fla"):
        peers["fla"] = step_fla
    return Case(
        name=f"step-{pool.name}",
        make_inputs=pool.make_inputs,
        run=step_ours,
        bytes=2 * pool.state_bytes + 4 * pool.elements * pool.dtype.itemsize,
        flops=4 * pool.elements * pool.size,
        dtype=pool.dtype,
        peers=peers,
        truth=lambda inputs: verify_truth(pool, inputs)[:, 0],
        devices=(device,),
    )


def verify_case(pool: Pool, device: str) -> Case:
    pairs = pool.rows * pool.heads * sum(map(len, pool.paths()))
    return Case(
        name=f"verify-t{pool.nodes}-{pool.name}",
        make_inputs=pool.make_inputs,
        run=verify_ours,
        bytes=pool.state_bytes + 4 * pool.elements * pool.dtype.itemsize,
        flops=2 * pool.elements * pool.size + 4 * pairs * pool.size,
        dtype=pool.dtype,
        peers={"torch": functools.partial(verify_torch, pool)},
        truth=functools.partial(verify_truth, pool),
        devices=(device,),
    )


def commit_case(pool: Pool, device: str) -> Case:
    length = max(map(len, pool.paths()))
    accepted = pool.rows * length * pool.heads * pool.size
    return Case(
        name=f"commit-t{pool.nodes}-{pool.name}",
        make_inputs=pool.make_inputs,
        run=commit_ours,
        bytes=2 * pool.state_bytes + 2 * accepted * pool.dtype.itemsize,
        flops=2 * accepted * pool.size,
        dtype=pool.dtype,
        peers={"torch": functools.partial(commit_torch, torch.float32)},
        truth=lambda inputs: commit_torch(torch.float64, inputs)(),
        devices=(device,),
    )


def cases() -> list[Case]:
    fp32, bf16, lengths = torch.float32, torch.bfloat16, [2**n for n in range(10, 21, 2)]
    cpu = [
        forward_case(Workload(tokens, 8, dtype=dtype), "cpu", f"{short(dtype)}, 8 heads of 128")
        for dtype in (bf16, fp32)
        for tokens in lengths
        if tokens <= (2**20 if dtype == bf16 else 2**16)
    ]
    cpu += [training_case(Workload(16384, 8, dtype=dtype), "cpu") for dtype in (bf16, fp32)]
    cpu += [step_case(Pool(64, 8), "cpu"), step_case(Pool(256, 8), "cpu"), step_case(Pool(1, 32), "cpu")]
    cpu += [verify_case(Pool(16, 8, nodes=nodes), "cpu") for nodes in (26, 64)]
    cpu += [commit_case(Pool(16, 8, nodes=26), "cpu")]

    cuda = [forward_case(Workload(tokens, 16), "cuda", "bf16, 16 heads of 128") for tokens in lengths]
    published = [Workload(8192, 64), Workload(16384, 64, batch=2), Workload(8192, 64, dtype=fp32)]
    cuda += [forward_case(workload, "cuda") for workload in published]
    cuda += [training_case(workload, "cuda") for workload in published]
    cuda += [step_case(Pool(rows, 64), "cuda") for rows in (1, 16, 64, 256)]
    cuda += [verify_case(Pool(rows, 64, nodes=nodes), "cuda") for rows in (1, 64) for nodes in (26, 64)]
    cuda += [commit_case(Pool(64, 64, nodes=26), "cuda")]
    return cpu + cuda


def preset(name: str, model: Model) -> list[Case]:
    """A layer of a model: over sequences, in decoding, and in the verification of a draft tree."""
    made, heads, size = [], model.heads, model.head_size
    for device in ("cpu", "cuda"):
        series = f"bf16, {heads} heads of {size}"
        made += [forward_case(Workload(tokens, heads, size), device, series) for tokens in (1024, 4096, 16384)]
        made += [step_case(Pool(rows, heads, size), device) for rows in (1, 16)]
        made += [verify_case(Pool(1, heads, size, nodes=26), device)]
    return [case.of(name) for case in made]


if __name__ == "__main__":
    sys.exit(main("lightning_attention", cases()))
