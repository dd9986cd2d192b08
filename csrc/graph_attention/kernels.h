// SPDX-License-Identifier: Apache-2.0
// The kernels of the Graph-KV attention family, per backend.
#pragma once
#include "core/context.h"
#include "cpu/isa.h"
#include "graph_attention/params.h"

namespace torch_kernels::cpu {
TORCH_KERNELS_CPU_KERNEL(graph_attention, GraphAttentionParams)
TORCH_KERNELS_CPU_KERNEL(graph_attention_backward, GraphAttentionBackwardParams)
TORCH_KERNELS_CPU_KERNEL(rope_shift, RopeShiftParams)
}  // namespace torch_kernels::cpu

// Made for decoding: every token is computed alone. Longer query segments are Triton's where it is there, as are
// gradients.
namespace torch_kernels::cuda {
void graph_attention(const GraphAttentionParams&, const Context&);
void rope_shift(const RopeShiftParams&, const Context&);
}  // namespace torch_kernels::cuda
