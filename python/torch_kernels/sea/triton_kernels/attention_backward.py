# SPDX-License-Identifier: Apache-2.0
"""Gradients of attention to kept columns, from probabilities computed again."""

import math

import torch
import triton

from torch_kernels._triton import architecture, contiguous, in_batches, on_device

from ..heuristics import key_gradient_tile, query_gradient_tile
from .cells import clip_mode
from .key_gradient import key_gradient_kernel, summary_kernel
from .query_gradient import query_gradient_kernel
from .tiles import head_blocks, launch_options, strides


@in_batches()
def sea_attention_backward(
    grad_q, grad_k, grad_v, grad_row_gain, grad_mix, grad_pooled,
    grad_out, q, k, v, out, lse, cells, widths, num_cells, scale, max_columns_per_cell, row_gain, mix, pooled,
):  # fmt: skip
    batch, rows, heads, size = q.shape
    keys, value_size, device = k.shape[1], v.shape[3], q.device
    if grad_q.numel() == 0:
        for grad in (grad_k, grad_v, grad_pooled):
            grad.zero_()
        return
    lse, cells, widths, row_gain, mix = contiguous(lse, cells, widths, row_gain, mix)
    clip = clip_mode(keys, num_cells, max_columns_per_cell)
    arguments = max(size, value_size), q.element_size(), architecture(device), clip > 0
    query_tile, key_tile = query_gradient_tile(*arguments), key_gradient_tile(*arguments)
    row_tiles = triton.cdiv(rows, key_tile.rows)
    scale = 1.0 / math.sqrt(size) if scale is None else float(scale)
    limit = min(max_columns_per_cell, 2**31 - 1)
    along = torch.empty(batch, heads, rows, dtype=torch.float32, device=device)
    counts = torch.empty(batch, heads, row_tiles, num_cells + 1, dtype=torch.int32, device=device)
    extents = torch.empty(batch, row_tiles, 2, dtype=torch.int32, device=device)
    shared = mix is not None and pooled.shape[1] == 1
    tensor_strides = [x.stride(i) for x in (grad_out, q, k, v) for i in range(3)]
    cell_sizes = {"CELLS": num_cells, "WORDS": cells.shape[2]}
    sizes = cell_sizes | head_blocks(size, value_size, q.element_size()) | {"CLIP": clip}
    query_grid = triton.cdiv(rows, query_tile.rows), heads, batch
    key_grid = triton.cdiv(keys, key_tile.columns), heads, batch
    alarms = torch.empty(max(math.prod(query_grid), math.prod(key_grid)), dtype=torch.int32, device=device)
    with on_device(q):
        for repair in (False, True):
            query_gradient_kernel[query_grid](
                grad_q, grad_row_gain, grad_mix, None if shared else grad_pooled, along, alarms, grad_out, q, k, v, lse,
                cells, widths, row_gain, mix, pooled, scale, limit, rows, keys, *tensor_strides, *strides(pooled),
                **sizes, REPAIR=repair, **launch_options(query_tile),
            )  # fmt: skip
        if keys:
            summary_kernel[(row_tiles, heads, batch)](
                counts, extents, cells, widths, rows, keys, row_tiles, **cell_sizes, M=key_tile.rows
            )
            for repair in (False, True):
                key_gradient_kernel[key_grid](
                    grad_k, grad_v, alarms, grad_out, q, k, v, lse, along, row_gain, mix, cells, widths, counts,
                    extents, scale, limit, rows, keys, row_tiles, *tensor_strides,
                    **sizes, REPAIR=repair, **launch_options(key_tile),
                )  # fmt: skip
        if shared:
            rest = (1 - mix.float()).transpose(1, 2)[..., None]
            grad_pooled.copy_((rest * grad_out).sum(1, keepdim=True))
