# SPDX-License-Identifier: Apache-2.0
"""Checkpoint formats of other libraries, decoded to plain values.

Each function checks what it is given and returns :class:`Values`. Orders of nibbles are those of the libraries
themselves; nibble i of a 32-bit word is its bits 4i to 4i + 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_kernels import _checks
from torch_kernels.int4_linear.op import DTYPES, GROUP_SIZES, number_of_groups

# Where value j lies in a word that holds values 0, 2, 4, 6, 1, 3, 5, 7 from low to high.
INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)


class Values(NamedTuple):
    q: Tensor  # uint8 [N, K]
    scales: Tensor  # [G, N]
    zeros: Tensor | None  # [G, N], uint8 or float32
    g_idx: Tensor | None  # [K]
    group_size: int


def gptq(qweight: Tensor, qzeros: Tensor | None, scales: Tensor, g_idx: Tensor | None, version: int) -> Values:
    name = "Int4Weight.from_gptq"
    if version not in (1, 2):
        _checks.fail(name, "version", "1 or 2", version)
    dims: dict[str, int] = {}
    _tensors(name, (torch.int32,), dims, qweight=(qweight, "K/8 N"))
    dims["K"] = dims["K/8"] * 8
    _tensors(name, DTYPES, dims, scales=(scales, "G N"))
    q = _nibbles(qweight).permute(1, 0, 2).flatten(1)
    zeros = None
    if qzeros is not None:
        dims["N/8"] = -(-dims["N"] // 8)
        _tensors(name, (torch.int32,), dims, qzeros=(qzeros, "G N/8"))
        zeros = _nibbles(qzeros).flatten(1)[:, : dims["N"]]
        if version == 1:
            zeros = (zeros + 1) & 15  # stored as z - 1 per nibble: 15 stands for 0
    if g_idx is not None:
        _tensors(name, _checks.INDEX, dims, g_idx=(g_idx, "K"))
    if g_idx is None or dims["G"] == 1:
        return Values(q, scales, zeros, None, _group_size(name, dims))
    # Groups may have any length; the smallest allowed one that could hold them all stands for them.
    size = next((s for s in GROUP_SIZES[1:] if s * dims["G"] >= dims["K"]), GROUP_SIZES[-1])
    natural = torch.arange(dims["K"], device=g_idx.device) // size
    if number_of_groups(dims["K"], size) == dims["G"] and bool((g_idx == natural).all()):
        g_idx = None
    return Values(q, scales, zeros, g_idx, size)


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Values:
    name = "Int4Weight.from_awq"
    dims: dict[str, int] = {}
    _tensors(name, (torch.int32,), dims, qweight=(qweight, "K N/8"), qzeros=(qzeros, "G N/8"))
    dims["N"] = dims["N/8"] * 8
    _tensors(name, DTYPES, dims, scales=(scales, "G N"))
    q, zeros = (_nibbles(words)[..., INTERLEAVED].flatten(1) for words in (qweight, qzeros))
    return Values(q.T, scales, zeros, None, _group_size(name, dims))


def hqq(w_q: Tensor, scale: Tensor, zero: Tensor, shape: Sequence[int]) -> Values:
    name = "Int4Weight.from_hqq"
    if len(shape) != 2:
        _checks.fail(name, "shape", "(N, K)", tuple(shape))
    out_features, in_features = (int(size) for size in shape)
    dims: dict[str, int] = {}
    _tensors(name, (torch.uint8,), dims, W_q=(w_q, "N*K/g/2 g"))
    width = dims["g"]
    if width == 0 or in_features % width or 2 * w_q.numel() != out_features * in_features:
        expected = f"[N*K/g/2, g] for shape {(out_features, in_features)} quantised along axis 1"
        _checks.fail(name, "W_q", expected, f"shape {list(w_q.shape)}")
    dims["N*K/g"] = 2 * dims["N*K/g/2"]
    _tensors(name, DTYPES, dims, scale=(scale, "N*K/g 1"), zero=(zero, "N*K/g 1"))
    group_size = -1 if width == in_features else width
    if group_size not in GROUP_SIZES:
        _checks.fail(name, "the width of W_q", f"K or one of {GROUP_SIZES[1:]}", width)
    q = torch.cat([w_q >> 4, w_q & 15]).reshape(out_features, in_features)
    scales, zeros = (x.reshape(out_features, -1).T for x in (scale, zero))
    return Values(q, scales, zeros.float(), None, group_size)


def tinygemm(packed: Tensor, scales_and_zeros: Tensor) -> Values:
    name = "Int4Weight.from_tinygemm"
    _checks.is_tensor(name, packed=packed)
    if packed.dtype == torch.uint8:
        expected = "int32 [N/8, K/(16i), 32, i/2], the layout that torch makes on CUDA"
        got = "uint8, torch's CPU layout, which differs between CPUs: convert on the machine that packed it"
        _checks.fail(name, "packed", expected, got)
    dims: dict[str, int] = {}
    _tensors(name, (torch.int32,), dims, packed=(packed, "N/8 K/(16i) 32 i/2"))
    inner = 2 * dims["i/2"]
    if inner not in (2, 4, 8):
        _checks.fail(name, "packed", "[N/8, K/(16i), 32, i/2] with i of 2, 4 or 8", f"shape {list(packed.shape)}")
    dims |= {"N": 8 * dims["N/8"], "K": 16 * inner * dims["K/(16i)"]}
    _tensors(name, DTYPES, dims, scales_and_zeros=(scales_and_zeros, "G N 2"))
    # Lane 4n + t of a tile holds rows n and, of each pair of 16-column tiles, columns 2t, 2t + 1, 2t + 8, 2t + 9.
    values = _nibbles(packed)[..., INTERLEAVED].unflatten(-1, (2, 2, 2)).unflatten(2, (8, 4))
    q = values.permute(0, 2, 1, 4, 5, 6, 3, 7).reshape(dims["N"], dims["K"])
    # There, W = (q - 8) * scale + zero.
    scales, centers = scales_and_zeros.unbind(-1)
    group_size = _group_size(name, dims)
    constant = scales == 0
    if bool(constant.any()):
        # Such a group is its centre everywhere: 9 - 8 steps of that size.
        width = dims["K"] if group_size == -1 else group_size
        q = torch.where(constant.repeat_interleave(width, 0)[: dims["K"]].T, 9, q)
    zeros = torch.where(constant, 8.0, 8 - centers.float() / scales.float().where(~constant, 1.0))
    return Values(q, torch.where(constant, centers, scales), zeros, None, group_size)


def ggml_q4_0(blocks: Tensor) -> Values:
    name = "Int4Weight.from_ggml_q4_0"
    dims: dict[str, int] = {}
    _tensors(name, (torch.uint8,), dims, blocks=(blocks, "N K/32*18"))
    if dims["K/32*18"] % 18:
        _checks.fail(name, "blocks", "[N, K/32*18]: rows of 18-byte blocks", f"shape {list(blocks.shape)}")
    blocks = blocks.reshape(dims["N"], -1, 18)
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    q = torch.cat([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1).flatten(1)
    return Values(q, scales.T, None, None, 32)


def marlin(b: Tensor, s: Tensor) -> Values:
    name = "Int4Weight.from_marlin"
    dims: dict[str, int] = {}
    _tensors(name, (torch.int32,), dims, B=(b, "K/16 2N"))
    if dims["2N"] % 128:
        _checks.fail(name, "B", "[K/16, 2N] with N a multiple of 64", f"shape {list(b.shape)}")
    dims |= {"N": dims["2N"] // 2, "K": 16 * dims["K/16"]}
    _tensors(name, DTYPES, dims, s=(s, "G N"))
    # A tile of 16 columns and 64 rows: word j of lane 4n + t holds rows 16j + n and 16j + n + 8, and of each the
    # columns 2t, 2t + 1, 2t + 8, 2t + 9.
    words = b.reshape(dims["K/16"], -1, 8, 4, 4)
    values = _nibbles(words)[..., INTERLEAVED].unflatten(-1, (2, 2, 2))
    q = values.permute(1, 4, 5, 2, 0, 6, 3, 7).reshape(dims["N"], dims["K"])
    if dims["G"] == 1:
        scales = s.reshape(1, -1, 4, 4, 2).transpose(2, 3)
    else:
        scales = s.reshape(dims["G"], -1, 8, 8).transpose(2, 3)
    return Values(q, scales.reshape(s.shape), None, None, _group_size(name, dims))


def _tensors(name: str, dtypes: Sequence[torch.dtype], dims: dict[str, int], **tensors: tuple[Any, str]) -> None:
    values = {argument: value for argument, (value, _) in tensors.items()}
    _checks.is_tensor(name, **values)
    _checks.dtype(name, dtypes, **values)
    _checks.shape(name, dims, **tensors)


def _nibbles(words: Tensor) -> Tensor:
    """The eight nibbles of each int32, lowest first, in a new last dimension of uint8."""
    pairs = words.contiguous().view(torch.uint8).reshape(*words.shape, 4)
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)


def _group_size(name: str, dims: dict[str, int]) -> int:
    """The group size that gives G groups of K columns; one group is -1."""
    groups, columns = dims["G"], dims["K"]
    if groups == 1:
        return -1
    for size in GROUP_SIZES[1:]:
        if number_of_groups(columns, size) == groups:
            return size
    allowed = sorted({number_of_groups(columns, size) for size in GROUP_SIZES})
    _checks.fail(name, "the number of groups", f"one of {allowed} for K={columns}", groups)
