# SPDX-License-Identifier: Apache-2.0
"""How DTensor may shard the lightning attention ops: by batch, and by heads. Never by time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

# Where each argument and output has its batch and its heads; None: it has none, so it is the same on all ranks.
BATCH_HEADS = {
    **dict.fromkeys(("q", "k", "v", "g", "out"), (0, 2)),
    **dict.fromkeys(("state", "initial_state", "final_state"), (0, 1)),
    "slopes": (None, 0),
    "parents": (0, None),
}
OUTPUTS = {
    "lightning_attention": ("out", "final_state"),
    "simple_gla": ("out", "final_state"),
    "lightning_attention_backward": ("grad_q", "grad_k", "grad_v", "grad_slopes", "grad_initial_state"),
    "simple_gla_backward": ("grad_q", "grad_k", "grad_v", "grad_g", "grad_initial_state"),
    "lightning_chunk_state": ("state",),
    "lightning_apply_state": ("out",),
    "lightning_attention_verify": ("out",),
}


def register() -> None:
    """Tells DTensor, where torch has it. Ops that decode in place are left to local tensors."""
    try:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError:
        return

    for op in OUTPUTS:
        overload = getattr(torch.ops.kernels, op).default
        arguments = overload._schema.arguments
        keywords = [argument.name for argument in arguments if argument.kwarg_only]
        register_sharding(overload)(_rule(op, [argument.name for argument in arguments], keywords))
        # DTensor remembers decisions by the positional arguments alone; ours depend on the others too.
        info = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[overload]
        info.static_kwargkey = keywords


def _rule(op: str, names: list[str], keywords: list[str]) -> Callable[..., Any]:
    """The function that DTensor asks for placements of outputs and inputs that fit together."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    def rule(*args: Any, **kwargs: Any) -> list[tuple[list[Any], list[Any]]]:
        given = dict(zip(names, args)) | kwargs
        tensors = {name: value for name, value in given.items() if hasattr(value, "placements")}

        def placed(which: int, name: str) -> Any:
            dimension = BATCH_HEADS.get(name.removeprefix("grad_"), (None, None))[which]
            if which == 0 and name == "grad_slopes":
                return Partial()
            if which == 0 and name in OUTPUTS[op] and _is_empty(name, given):
                return Replicate()
            return Replicate() if dimension is None else Shard(dimension)

        def inputs(place: Callable[[str], Any]) -> list[Any]:
            return [place(name) if name in tensors else None for name in given]

        rules = [([Replicate() for _ in OUTPUTS[op]], inputs(lambda name: Replicate()))]
        for which in _shardable(tensors):
            rules.append(([placed(which, name) for name in OUTPUTS[op]], inputs(partial(placed, which))))
        # DTensor moves positional arguments only: keyword arguments decide where they are.
        fixed = [(i, tensors[name]) for i, name in enumerate(given) if name in tensors and name in keywords]
        rules = [rule for rule in rules if all(rule[1][i] in spec.placements for i, spec in fixed)]
        if not rules:
            where = ", ".join(f"{name} {tensors[name].placements}" for name in keywords if name in tensors)
            raise ValueError(f"{op}: keyword arguments must be sharded by batch or heads, all alike, got {where}")
        return rules

    return rule


def _is_empty(output: str, given: dict[str, Any]) -> bool:
    """Whether an output is a state that nobody asked for, with no batch."""
    if output == "final_state":
        return not given.get("output_final_state", False)
    return output == "grad_initial_state" and given.get("initial_state") is None


def _shardable(tensors: dict[str, Any]) -> list[int]:
    """0 if the batch may be sharded: sequences that are packed or chosen by index are not; 1 if the heads may be."""
    allowed = [] if {"cu_seqlens", "state_indices"} & tensors.keys() else [0]
    states = tensors.get("k") or tensors["state"]
    heads = states.shape[-2 if "k" in tensors else 1]
    query_heads = tensors["q"].shape[-2] if "q" in tensors else heads
    # A rank's query heads must find their key/value heads, however many dimensions of the mesh shard them.
    sizes = states.mesh.shape
    shards = {math.prod(some) for n in range(1, len(sizes) + 1) for some in itertools.combinations(sizes, n)}
    if query_heads == heads or all(heads % count == 0 for count in shards if count <= heads):
        allowed.append(1)
    return allowed
