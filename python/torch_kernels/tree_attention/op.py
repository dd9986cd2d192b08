# SPDX-License-Identifier: Apache-2.0
"""Schemas, checks and outputs of the tree attention ops."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_kernels import _checks, _native
from torch_kernels._registry import Backend, Op, may_choose_triton, native, unit_stride
from torch_kernels._triton import architecture, beyond_a_grid
from torch_kernels.tree_attention import heuristics, reference

MAX_NODES = 1024
MAX_HEAD_SIZE = 256
HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
QUANTISED = (torch.float8_e4m3fn, torch.int8)
FLOATING_AND_QUANTISED = (*_checks.FLOATING, *QUANTISED)


def _leaves_many_rows(q: Tensor, k_cache: Tensor, *_: Any) -> str | None:
    """For the CUDA kernel: Triton's serves many rows unless a backend is forced."""
    if beyond_a_grid(q.shape[0]):
        return None
    rows = q.shape[1] * (q.shape[2] // max(k_cache.shape[2], 1))
    if may_choose_triton() and heuristics.prefers_triton(rows, q.dtype, architecture(q.device)):
        return "Triton's kernel is faster for so many rows"
    return None


# An argument that begins with the batch, of ops whose Triton kernels have that along an axis of limited length.
BATCHED = {"tree_attention": 0, "tree_commit_kv_": 2, "tree_compact_kv_": 2}


def _in_one_grid(name: str, *arguments: Any) -> str | None:
    return beyond_a_grid(arguments[BATCHED[name]].shape[0]) if name in BATCHED else None


def _backends(name: str, dtypes: tuple[torch.dtype, ...]) -> tuple[Backend, ...]:
    """The backends of an op; dtypes are those of its floating-point arguments and caches."""

    def triton() -> Callable[..., Any]:
        return getattr(importlib.import_module("torch_kernels.tree_attention.triton_kernels"), name)

    on_gpu = tuple(dtype for dtype in dtypes if dtype != torch.float64)
    return (
        Backend("cpu", native("cpu", name), dtypes),
        Backend(
            "cuda", native("cuda", name), on_gpu, unit_stride, _leaves_many_rows if name == "tree_attention" else None
        ),
        Backend("triton", triton, on_gpu, refuses=partial(_in_one_grid, name)),
        Backend("emulator", native("emulator", name), on_gpu, accepts=unit_stride),
        Backend("reference", lambda: getattr(reference, name), dtypes),
    )


def _op(
    schema: str,
    check: Callable[..., None],
    allocate: Callable[..., Any],
    validate: Callable[..., None],
    dtypes: tuple[torch.dtype, ...] = (),
) -> Op:
    name = schema.partition("(")[0]
    return Op(schema, partial(check, name), allocate, _backends(name, dtypes), partial(validate, name))


def _floating(op: str, reference: Tensor, **tensors: Tensor | None) -> None:
    """float32, float16 or bfloat16, float64 on the CPU, and all the same."""
    allowed = _checks.FLOATING if reference.device.type == "cpu" else HALF_AND_SINGLE
    first = next(iter(tensors))
    _checks.dtype(op, allowed, **{first: tensors[first]})
    _checks.dtype(op, (reference.dtype,), **tensors)


# ---- tree_attention ----


def _check_caches(op: str, dims: dict[str, int], k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None) -> None:
    pattern = "B S Hk {}" if block_table is None else "P page Hk {}"
    _checks.shape(op, dims, k_cache=(k_cache, pattern.format("D")), v_cache=(v_cache, pattern.format("Dv")))
    _checks.shape(op, dims, block_table=(block_table, "B pages"))
    _checks.dtype(op, _checks.INDEX, block_table=block_table)
    if block_table is not None and k_cache.shape[1] < 1:
        _checks.fail(op, "k_cache", "pages of at least one slot", f"shape {list(k_cache.shape)}")


def _check_scales(
    op: str, dims: dict[str, int], dtype: torch.dtype, k_cache: Tensor, v_cache: Tensor, **scales: Tensor | None
) -> None:
    """Caches hold q's dtype, or both the same quantised dtype with a scale each."""
    _checks.dtype(op, (dtype, *QUANTISED), k_cache=k_cache)
    _checks.dtype(op, (k_cache.dtype,), v_cache=v_cache)
    for name, scale in scales.items():
        if (scale is not None) != (k_cache.dtype in QUANTISED):
            expected = "given" if scale is None else "None"
            _checks.fail(op, name, f"{expected} for {k_cache.dtype} caches", "None" if scale is None else "a tensor")
        _checks.dtype(op, (torch.float32,), **{name: scale})
        if scale is not None and tuple(scale.shape) not in ((1,), (dims["Hk"],)):
            _checks.fail(op, name, f"[1] or [Hk={dims['Hk']}]", f"shape {list(scale.shape)}")


def _check_head_sizes(op: str, dims: dict[str, int]) -> None:
    for name, size in (("D", dims["D"]), ("Dv", dims["Dv"])):
        if size % 8 or not 8 <= size <= MAX_HEAD_SIZE:
            _checks.fail(op, f"head size {name}", f"a multiple of 8 up to {MAX_HEAD_SIZE}", size)


def _check_tree_attention(
    op: str,
    q: Any,
    k_cache: Any,
    v_cache: Any,
    prefix_lens: Any,
    parents: Any,
    k_tree: Any,
    v_tree: Any,
    block_table: Any,
    scale: Any,
    softcap: float,
    window: int,
    sinks: Any,
    k_scale: Any,
    v_scale: Any,
) -> None:
    dims: dict[str, int] = {}
    _checks.shape(op, dims, q=(q, "B T Hq D"))
    _check_caches(op, dims, k_cache, v_cache, block_table)
    _checks.shape(op, dims, prefix_lens=(prefix_lens, "B"), parents=(parents, "B T"))
    _checks.shape(op, dims, k_tree=(k_tree, "B T Hk D"), v_tree=(v_tree, "B T Hk Dv"), sinks=(sinks, "Hq"))
    _floating(op, q, q=q)
    _checks.dtype(op, (q.dtype,), k_tree=k_tree, v_tree=v_tree)
    _check_scales(op, dims, q.dtype, k_cache, v_cache, k_scale=k_scale, v_scale=v_scale)
    _checks.dtype(op, _checks.INDEX, prefix_lens=prefix_lens, parents=parents)
    _checks.dtype(op, (torch.float32,), sinks=sinks)
    _checks.same_device(
        op,
        q,
        k_cache=k_cache,
        v_cache=v_cache,
        prefix_lens=prefix_lens,
        parents=parents,
        k_tree=k_tree,
        v_tree=v_tree,
        block_table=block_table,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    _check_head_sizes(op, dims)
    if dims["T"] > MAX_NODES:
        _checks.fail(op, "T", f"at most {MAX_NODES} nodes", dims["T"])
    if dims["Hk"] == 0 or dims["Hq"] % dims["Hk"]:
        _checks.fail(op, "Hq", f"a multiple of Hk={dims['Hk']}", dims["Hq"])
    if (k_tree is None) != (v_tree is None):
        _checks.fail(op, "k_tree and v_tree", "given together", "one of them")
    if softcap != 0 and not torch.finfo(torch.float32).tiny <= softcap < math.inf:
        _checks.fail(op, "softcap", "0 or a positive normal float32", softcap)
    if window < 0:
        _checks.fail(op, "window", "at least 0", window)


def _allocate_tree_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, nodes, heads = q.shape[:3]
    return q.new_empty((batch, nodes, heads, v_cache.shape[3])), q.new_empty((batch, heads, nodes), dtype=torch.float32)


def _validate_tree_attention(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix_lens: Tensor,
    parents: Tensor,
    k_tree: Tensor | None,
    v_tree: Tensor | None,
    block_table: Tensor | None,
    *_: Any,
) -> None:
    _native.cpu.validate_tree(op, parents, k_cache, block_table, prefix_lens, k_tree is None)


tree_attention = _op(
    "tree_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor prefix_lens, Tensor parents, *, "
    "Tensor? k_tree=None, Tensor? v_tree=None, Tensor? block_table=None, float? scale=None, float softcap=0.0, "
    "int window=0, Tensor? sinks=None, Tensor? k_scale=None, Tensor? v_scale=None) -> (Tensor out, Tensor lse)",
    _check_tree_attention, _allocate_tree_attention, _validate_tree_attention, FLOATING_AND_QUANTISED,
)  # fmt: skip


# ---- structure ----


def _check_tree_mask(op: str, parents: Any) -> None:
    _checks.shape(op, {}, parents=(parents, "B T"))
    _checks.dtype(op, _checks.INDEX, parents=parents)


def _check_tree_positions(op: str, parents: Any, prefix_lens: Any) -> None:
    _checks.shape(op, {}, parents=(parents, "B T"), prefix_lens=(prefix_lens, "B"))
    _checks.dtype(op, _checks.INDEX, parents=parents, prefix_lens=prefix_lens)
    _checks.same_device(op, parents, prefix_lens=prefix_lens)


def _validate_parents(op: str, parents: Tensor, *_: Any) -> None:
    _native.cpu.validate_parents(op, parents)


tree_mask = _op(
    "tree_mask(Tensor parents) -> Tensor", _check_tree_mask,
    lambda parents: (parents.new_empty((*parents.shape, parents.shape[1]), dtype=torch.bool),), _validate_parents,
)  # fmt: skip

tree_positions = _op(
    "tree_positions(Tensor parents, Tensor prefix_lens) -> Tensor", _check_tree_positions,
    lambda parents, prefix_lens: (parents.new_empty(parents.shape, dtype=torch.int32),), _validate_parents,
)  # fmt: skip


# ---- verification ----


def _check_verify(op: str, draft_tokens: Any, parents: Any, uniforms: Any, **others: tuple[Any, str]) -> None:
    dims: dict[str, int] = {}
    _checks.shape(op, dims, draft_tokens=(draft_tokens, "B T"), parents=(parents, "B T"), **others)
    _checks.dtype(op, _checks.INDEX, draft_tokens=draft_tokens, parents=parents)
    if dims.get("V") == 0:
        name = next(iter(others))
        _checks.fail(op, name, "over a vocabulary of at least one token", f"shape {list(others[name][0].shape)}")
    dims["T+1"] = dims["T"] + 1
    _checks.shape(op, dims, uniforms=(uniforms, "B T+1"))
    _checks.dtype(op, (torch.float32, torch.float64), uniforms=uniforms)
    _checks.same_device(
        op, draft_tokens, parents=parents, uniforms=uniforms, **{name: value for name, (value, _) in others.items()}
    )


def _check_verify_greedy(op: str, draft_tokens: Any, target_tokens: Any, parents: Any) -> None:
    _check_verify(op, draft_tokens, parents, None, target_tokens=(target_tokens, "B T"))
    _checks.dtype(op, _checks.INDEX, target_tokens=target_tokens)


def _check_verify_typical(
    op: str,
    draft_tokens: Any,
    target_logits: Any,
    parents: Any,
    temperature: float,
    epsilon: float,
    delta: float,
    uniforms: Any,
) -> None:
    _check_verify(op, draft_tokens, parents, uniforms, target_logits=(target_logits, "B T V"))
    _floating(op, target_logits, target_logits=target_logits)
    if not temperature > 0:
        _checks.fail(op, "temperature", "positive", temperature)
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if not value >= 0:
            _checks.fail(op, name, "at least 0", value)


def _check_verify_sampling(
    op: str, draft_tokens: Any, target_probs: Any, parents: Any, uniforms: Any, draft_probs: Any, replacement: bool
) -> None:
    _check_verify(
        op, draft_tokens, parents, uniforms, target_probs=(target_probs, "B T V"), draft_probs=(draft_probs, "B T V")
    )
    _floating(op, target_probs, target_probs=target_probs)
    _floating(op, target_probs, draft_probs=draft_probs) if draft_probs is not None else None


def _allocate_verify(draft_tokens: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, nodes = draft_tokens.shape
    path = draft_tokens.new_empty((batch, nodes), dtype=torch.int32)
    return path, draft_tokens.new_empty((batch,), dtype=torch.int32), draft_tokens.new_empty((batch, nodes))


def _validate_verify(op: str, draft_tokens: Tensor, target: Tensor, parents: Tensor, *_: Any) -> None:
    _native.cpu.validate_parents(op, parents)


tree_verify_greedy = _op(
    "tree_verify_greedy(Tensor draft_tokens, Tensor target_tokens, Tensor parents) -> "
    "(Tensor path, Tensor num_accepted, Tensor tokens)",
    _check_verify_greedy, _allocate_verify, _validate_verify,
)  # fmt: skip

tree_verify_typical = _op(
    "tree_verify_typical(Tensor draft_tokens, Tensor target_logits, Tensor parents, *, float temperature, "
    "float epsilon, float delta, Tensor? uniforms=None) -> (Tensor path, Tensor num_accepted, Tensor tokens)",
    _check_verify_typical, _allocate_verify, _validate_verify, _checks.FLOATING,
)  # fmt: skip

tree_verify_sampling = _op(
    "tree_verify_sampling(Tensor draft_tokens, Tensor target_probs, Tensor parents, Tensor uniforms, *, "
    "Tensor? draft_probs=None, bool replacement=True) -> (Tensor path, Tensor num_accepted, Tensor tokens)",
    _check_verify_sampling, _allocate_verify, _validate_verify, _checks.FLOATING,
)  # fmt: skip


# ---- cache ----


def _check_path(
    op: str, dims: dict[str, int], cache: Tensor, prefix_lens: Any, path: Any, num_accepted: Any, block_table: Any
) -> None:
    _checks.shape(op, dims, prefix_lens=(prefix_lens, "B"), path=(path, "B T"), num_accepted=(num_accepted, "B"))
    _checks.dtype(op, _checks.INDEX, prefix_lens=prefix_lens, path=path, num_accepted=num_accepted)
    _checks.same_device(
        op, cache, prefix_lens=prefix_lens, path=path, num_accepted=num_accepted, block_table=block_table
    )


def _check_commit(
    op: str,
    k_cache: Any,
    v_cache: Any,
    k_tree: Any,
    v_tree: Any,
    prefix_lens: Any,
    path: Any,
    num_accepted: Any,
    block_table: Any,
    k_scale: Any,
    v_scale: Any,
) -> None:
    dims: dict[str, int] = {}
    _check_caches(op, dims, k_cache, v_cache, block_table)
    _checks.shape(op, dims, k_tree=(k_tree, "B T Hk D"), v_tree=(v_tree, "B T Hk Dv"))
    _floating(op, k_tree, k_tree=k_tree, v_tree=v_tree)
    _check_scales(op, dims, k_tree.dtype, k_cache, v_cache, k_scale=k_scale, v_scale=v_scale)
    _check_path(op, dims, k_cache, prefix_lens, path, num_accepted, block_table)
    _checks.same_device(op, k_cache, v_cache=v_cache, k_tree=k_tree, v_tree=v_tree, k_scale=k_scale, v_scale=v_scale)


def _validate_commit(
    op: str,
    k_cache: Tensor,
    v_cache: Tensor,
    k_tree: Tensor,
    v_tree: Tensor,
    prefix_lens: Tensor,
    path: Tensor,
    num_accepted: Tensor,
    block_table: Tensor | None,
    *_: Any,
) -> None:
    _native.cpu.validate_path(op, k_cache, block_table, prefix_lens, path, num_accepted, k_tree.shape[1], False)


def _check_compact(
    op: str, k_cache: Any, v_cache: Any, prefix_lens: Any, path: Any, num_accepted: Any, block_table: Any
) -> None:
    dims: dict[str, int] = {}
    _check_caches(op, dims, k_cache, v_cache, block_table)
    _checks.dtype(op, FLOATING_AND_QUANTISED, k_cache=k_cache)
    _checks.dtype(op, (k_cache.dtype,), v_cache=v_cache)
    _check_path(op, dims, k_cache, prefix_lens, path, num_accepted, block_table)
    _checks.same_device(op, k_cache, v_cache=v_cache)


def _validate_compact(
    op: str,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix_lens: Tensor,
    path: Tensor,
    num_accepted: Tensor,
    block_table: Tensor | None,
) -> None:
    _native.cpu.validate_path(op, k_cache, block_table, prefix_lens, path, num_accepted, path.shape[1], True)


tree_commit_kv_ = _op(
    "tree_commit_kv_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k_tree, Tensor v_tree, Tensor prefix_lens, "
    "Tensor path, Tensor num_accepted, *, Tensor? block_table=None, Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
    _check_commit, lambda *_: (), _validate_commit, FLOATING_AND_QUANTISED,
)  # fmt: skip

tree_compact_kv_ = _op(
    "tree_compact_kv_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor prefix_lens, Tensor path, "
    "Tensor num_accepted, *, Tensor? block_table=None) -> ()",
    _check_compact, lambda *_: (), _validate_compact, FLOATING_AND_QUANTISED,
)  # fmt: skip


# ---- merge ----


def _check_merge(op: str, out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> None:
    if out_a.dim() < 3:
        _checks.fail(op, "out_a", "[.., T, H, Dv]", f"shape {list(out_a.shape)}")
    _floating(op, out_a, out_a=out_a, out_b=out_b)
    _checks.dtype(op, (torch.float32,), lse_a=lse_a, lse_b=lse_b)
    *lead, rows, heads, _ = out_a.shape
    for name, value, expected in (
        ("out_b", out_b, list(out_a.shape)),
        ("lse_a", lse_a, [*lead, heads, rows]),
        ("lse_b", lse_b, [*lead, heads, rows]),
    ):
        if list(value.shape) != expected:
            _checks.fail(op, name, str(expected), f"shape {list(value.shape)}")
    _checks.same_device(op, out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)


def _allocate_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _with_one_batch_dimension(backend: Backend) -> Backend:
    """Kernels see out [B, T, H, Dv] and lse [B, H, T]; calls may have any number of leading dimensions."""

    def load() -> Callable[..., Any]:
        kernel = backend.load()

        def run(*states: Tensor) -> None:
            kernel(*(s.flatten(0, -rank) if s.dim() >= rank else s[None] for s, rank in zip(states, (4, 3) * 3)))

        return run

    return backend if backend.name == "reference" else replace(backend, load=load)


merge_attention_states = Op(
    "merge_attention_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)",
    partial(_check_merge, "merge_attention_states"), _allocate_merge,
    [_with_one_batch_dimension(b) for b in _backends("merge_attention_states", _checks.FLOATING)],
)  # fmt: skip
