# SPDX-License-Identifier: Apache-2.0
"""SEA from a thousand to a hundred thousand tokens: the layer against dense attention, and each of its stages.

The map that cells are selected from is noise that changes over 16 rows, as a convolutional decoder's does; cases named
"rough" have another in every row, which leaves rows nothing to share.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Call, Case, Curve, Inputs, Prepare, main
from presets import Model
from sea_peers import (
    Workload,
    attention_truth,
    csr,
    flex,
    only_checked,
    sdpa,
    select_torch,
    select_truth,
    selected,
    short,
)

# Longest sequences of peers whose time grows faster.
DENSE_TOKENS = {"cpu": 16384, "cuda": 131072}
EAGER_TOKENS = {"cpu": 4096, "cuda": 8192}
MASK_TOKENS = 8192  # of peers that need a mask of all pairs to begin with


# ---- the sparse attention ----


def attention_ours(workload: Workload, inputs: Inputs) -> Call:
    import torch_kernels

    arguments = [inputs[name] for name in ("q", "k", "v", "cells", "widths")]
    return lambda: torch_kernels.sea_attention(*arguments, num_cells=workload.cells)[0]


def gradients(prepare: Prepare, inputs: Inputs) -> Call:
    """Of q, k and v, forward pass included."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in "qkv"}
    grad = torch.randn(leaves["v"].shape, generator=torch.Generator().manual_seed(2)).to(leaves["v"])
    call = prepare(inputs | leaves)
    return lambda: torch.cat(torch.autograd.grad(call(), tuple(leaves.values()), grad), -1)


def attention_case(workload: Workload, device: str, curve: bool) -> Case:
    elements = workload.tokens * workload.width
    peers: dict[str, Prepare] = {}
    if workload.tokens <= DENSE_TOKENS[device]:
        peers["sdpa"] = sdpa
    if workload.tokens <= MASK_TOKENS:
        peers |= {"flex": functools.partial(flex, workload), "torch-csr": functools.partial(csr, workload)}
    series = f"sea_attention, {short(workload.dtype)}"
    return Case(
        name=f"attention-{workload.name}",
        make_inputs=workload.make_inputs,
        run=functools.partial(attention_ours, workload),
        bytes=4 * elements * workload.dtype.itemsize + workload.tokens * (workload.heads * workload.cells // 8 + 8),
        flops=4 * workload.pairs * workload.size,
        dtype=workload.dtype,
        peers=peers,
        slow_peers=frozenset({"flex"}) if device == "cpu" else frozenset(),
        inexact_peers=frozenset({"sdpa"}),
        truth=functools.partial(attention_truth, workload),
        select=functools.partial(only_checked, workload),
        devices=(device,),
        curve=Curve(series, "tokens", workload.tokens, "sdpa") if curve else None,
        memory=True,
    )


def training_case(workload: Workload, device: str) -> Case:
    elements = workload.tokens * workload.width
    return Case(
        name=f"attention-forward-backward-{workload.name}",
        make_inputs=workload.make_inputs,
        run=functools.partial(gradients, functools.partial(attention_ours, workload)),
        bytes=(4 + 8) * elements * workload.dtype.itemsize,
        flops=(4 + 10) * workload.pairs * workload.size,
        dtype=workload.dtype,
        peers={"sdpa": functools.partial(gradients, sdpa)},
        inexact_peers=frozenset({"sdpa"}),
        devices=(device,),
        memory=True,
    )


# ---- selection ----


def select_ours(workload: Workload, inputs: Inputs) -> Call:
    import torch_kernels

    scores, widths = inputs["map"], inputs["widths"]
    return lambda: torch_kernels.sea_select(scores, widths, k=workload.k)


def select_case(workload: Workload, device: str) -> Case:
    scores = workload.tokens * workload.heads * workload.cells
    return Case(
        name=f"select-{workload.name}",
        make_inputs=workload.map_of,
        run=functools.partial(select_ours, workload),
        bytes=scores * 4 + scores // 8,
        flops=0,
        dtype=torch.float32,
        peers={"torch": functools.partial(select_torch, workload)},
        truth=functools.partial(select_truth, workload),
        select=functools.partial(selected, workload),
        tolerance=0.0,
        devices=(device,),
        memory=True,
    )


# ---- the layer, and its stages ----


@functools.cache
def layer_for(workload: Workload, device: torch.device) -> torch.nn.Module:
    import torch_kernels

    torch.manual_seed(0)
    layer = torch_kernels.nn.SEAttention(workload.width, workload.heads, workload.cells, workload.k)
    return layer.to(device, workload.dtype).requires_grad_(False)


def layer_of(workload: Workload, inputs: Inputs) -> torch.nn.Module:
    return layer_for(dataclasses.replace(workload, tokens=0), inputs["x"].device)


def layer_ours(workload: Workload, inputs: Inputs) -> Call:
    layer, x = layer_of(workload, inputs), inputs["x"]
    return lambda: layer(x)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attend_eagerly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def layer_dense(workload: Workload, inputs: Inputs, attend: Callable[..., torch.Tensor] = attend) -> Call:
    """The same projections around attention over all keys."""
    layer, x = layer_of(workload, inputs), inputs["x"]

    def call() -> torch.Tensor:
        q, k, v = layer.qkv_proj(x).unflatten(-1, (3, workload.heads, workload.size)).permute(2, 0, 3, 1, 4)
        return layer.out_proj(attend(q, k, v).transpose(1, 2).flatten(-2))

    return call


def stage_flops(workload: Workload) -> dict[str, int]:
    """Useful arithmetic of the layer by stage."""
    d, rows, channels = workload.size, workload.tokens * workload.heads, 2
    width = workload.cells // 4
    convolutions = 2 * 2 * 9 * channels**2 * workload.heads + 2 * channels * workload.heads  # per row and column
    return {
        "projections": 8 * workload.tokens * workload.width**2,
        "performer": rows * workload.features * (2 * 2 * d + 2 * 2 * 2 * d),
        "decoder": rows * (2 * 3 * d * 2 * d + 2 * 2 * d * (2 + channels * width) + width * convolutions),
        "attention": 4 * workload.pairs * d,
    }


def layer_case(workload: Workload, device: str) -> Case:
    peers: dict[str, Prepare] = {}
    if workload.tokens <= DENSE_TOKENS[device]:
        peers["sdpa"] = functools.partial(layer_dense, workload)
    if workload.tokens <= EAGER_TOKENS[device]:
        peers["eager"] = functools.partial(layer_dense, workload, attend=attend_eagerly)
    return Case(
        name=f"layer-{workload.name}",
        make_inputs=workload.tokens_of,
        run=functools.partial(layer_ours, workload),
        bytes=2 * workload.tokens * workload.width * workload.dtype.itemsize,
        flops=sum(stage_flops(workload).values()),
        dtype=workload.dtype,
        peers=peers,
        inexact_peers=frozenset(peers),  # other functions; the layer's own is held to its formula in the tests
        devices=(device,),
        curve=Curve(f"nn.SEAttention, {short(workload.dtype)}", "tokens", workload.tokens, "sdpa"),
        memory=True,
    )


def eager_case(workload: Workload, device: str) -> Case:
    """Attention with all its probabilities in memory, to hold the layer's memory against."""
    return Case(
        name=f"eager-attention-layer-{workload.name}",
        make_inputs=workload.tokens_of,
        run=functools.partial(layer_dense, workload, attend=attend_eagerly),
        bytes=2 * workload.tokens * workload.width * workload.dtype.itemsize,
        flops=8 * workload.tokens * workload.width**2 + 2 * workload.tokens**2 * workload.width,
        dtype=workload.dtype,
        devices=(device,),
        memory=True,
    )


def stage_inputs(workload: Workload, seed: int, device: str) -> Inputs:
    """What the stages of the layer hand on."""
    inputs = workload.tokens_of(seed, device)
    layer = layer_of(workload, inputs)
    q, k, v = layer._project(inputs["x"])
    generator = torch.Generator(device).manual_seed(seed)
    shape = (1, workload.tokens, workload.heads, 3 * workload.size)
    found = torch.randn(shape, generator=generator, device=device, dtype=workload.dtype)
    return inputs | {"q": q, "k": k, "v": v, "found": found}


def performer_stage(workload: Workload, inputs: Inputs) -> Call:
    from torch_kernels.nn.sea_performer import Rows

    layer, (q, k, v) = layer_of(workload, inputs), (inputs[name] for name in "qkv")
    rows = Rows.of(inputs["x"], None, None)
    return lambda: layer.performer(q, k, v, rows, None)[0]


def decoder_stage(workload: Workload, inputs: Inputs) -> Call:
    layer, found = layer_of(workload, inputs), inputs["found"]

    def call() -> torch.Tensor:
        z = layer.encoder(found)
        layer.gates(z).sigmoid()
        return layer.decoder(z)[0].softmax(-1, dtype=torch.float32)

    return call


def average_stage(workload: Workload, inputs: Inputs) -> Call:
    import torch_kernels

    v = inputs["v"]
    return lambda: torch_kernels.running_mean(v)[0]


def average_torch(workload: Workload, inputs: Inputs) -> Call:
    v, counts = inputs["v"], torch.arange(1, workload.tokens + 1, device=inputs["v"].device)[:, None, None]
    return lambda: (v.cumsum(1, dtype=torch.float64) / counts).to(v.dtype)


def projections_stage(workload: Workload, inputs: Inputs) -> Call:
    layer, x = layer_of(workload, inputs), inputs["x"]
    return lambda: layer.out_proj(layer.qkv_proj(x)[..., : workload.width])


def stage_cases(workload: Workload, device: str) -> list[Case]:
    flops = stage_flops(workload)
    item, elements = workload.dtype.itemsize, workload.tokens * workload.width
    scores = workload.tokens * workload.heads * workload.cells * 4
    stages: dict[str, tuple[Callable[..., Call], int, int]] = {
        "projections": (projections_stage, 2 * elements * item, flops["projections"]),
        "performer": (performer_stage, 5 * elements * item, flops["performer"]),
        "decoder": (decoder_stage, 3 * elements * item + scores, flops["decoder"]),
        "average": (average_stage, 2 * elements * item, elements),
    }
    return [
        Case(
            name=f"stage-{stage}-{workload.name}",
            make_inputs=functools.partial(stage_inputs, workload),
            run=functools.partial(run, workload),
            bytes=size,
            flops=count,
            dtype=workload.dtype,
            peers={"torch": functools.partial(average_torch, workload)} if stage == "average" else {},
            devices=(device,),
            memory=True,
        )
        for stage, (run, size, count) in stages.items()
    ]


# ---- decoding ----


def decoding_inputs(workload: Workload, seed: int, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    shape = (2, 1, workload.tokens, workload.heads, workload.size)
    k, v = torch.randn(shape, generator=generator, device=device, dtype=workload.dtype).unbind()
    x = torch.randn(1, 1, workload.width, generator=generator, device=device, dtype=workload.dtype)
    return {"x": x, "k": k, "v": v}


def step_ours(workload: Workload, inputs: Inputs) -> Call:
    """The last of so many tokens; the state is thrown away, so that every call is the same one."""
    layer, x, before = layer_of(workload, inputs), inputs["x"], workload.tokens - 1
    state = layer.init_state(1, workload.tokens)
    state = state._replace(k=inputs["k"], v=inputs["v"], length=state.length + before, filled=before)
    return lambda: layer.step(x, state)[0]


def step_dense(workload: Workload, inputs: Inputs) -> Call:
    layer, x = layer_of(workload, inputs), inputs["x"]
    k, v = (inputs[name].transpose(1, 2).contiguous() for name in "kv")

    def call() -> torch.Tensor:
        q, k[:, :, -1], v[:, :, -1] = layer.qkv_proj(x).view(1, 3, workload.heads, workload.size).unbind(1)
        out = F.scaled_dot_product_attention(q[:, :, None], k, v)
        return layer.out_proj(out.view(1, 1, -1))

    return call


def step_case(workload: Workload, device: str) -> Case:
    last = dataclasses.replace(workload, tokens=1)
    kept = int(workload.budgets[-1] * workload.tokens / workload.cells) * 2 * workload.size * workload.dtype.itemsize
    state = 2 * workload.heads * workload.features * (2 * workload.size + 1) * 4
    flops = stage_flops(last)
    return Case(
        name=f"step-{workload.name}",
        make_inputs=functools.partial(decoding_inputs, workload),
        run=functools.partial(step_ours, workload),
        bytes=4 * workload.width**2 * workload.dtype.itemsize + kept + state,
        flops=sum(flops.values()),
        dtype=workload.dtype,
        peers={"sdpa": functools.partial(step_dense, workload)},
        inexact_peers=frozenset({"sdpa"}),
        devices=(device,),
    )


def cases() -> list[Case]:
    made = []
    for device, dtype, longest in (("cpu", torch.float32, 32768), ("cuda", torch.bfloat16, 131072)):
        lengths = [2**n for n in range(10, 18) if 2**n <= longest]
        at = functools.partial(Workload, dtype=dtype)
        made += [layer_case(at(tokens), device) for tokens in lengths]
        made += [attention_case(at(tokens), device, curve=True) for tokens in lengths]
        made += [attention_case(at(8192, rough=True), device, curve=False)]
        made += [training_case(at(8192), device)]
        made += [select_case(at(tokens), device) for tokens in (8192, 32768)]
        made += [case for tokens in (8192, 32768) for case in stage_cases(at(tokens), device)]
        made += [eager_case(at(EAGER_TOKENS[device]), device)]
        made += [step_case(at(tokens), device) for tokens in (1024, 8192, 32768)]
    return made


def preset(name: str, model: Model) -> list[Case]:
    """A layer of a model, its attention, its selection, and a step of its decoding."""
    made = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        workloads = [Workload(tokens, model.heads, model.head_size, dtype=dtype) for tokens in (1024, 2048, 4096)]
        made += [layer_case(workload, device) for workload in workloads]
        made += [attention_case(workload, device, curve=True) for workload in workloads]
        made += [select_case(workloads[-1], device), step_case(workloads[-1], device)]
    return [case.of(name) for case in made]


if __name__ == "__main__":
    sys.exit(main("sea", cases()))
