// SPDX-License-Identifier: Apache-2.0
#include <stdexcept>

#include "cpu/simd.h"
#include "graph_attention/params.h"

namespace torch_kernels::cpu::TORCH_KERNELS_ISA {
void graph_attention(const GraphAttentionParams&) { throw std::runtime_error("graph_attention: in the making"); }
void graph_attention_backward(const GraphAttentionBackwardParams&) {
  throw std::runtime_error("graph_attention_backward: in the making");
}
}  // namespace torch_kernels::cpu::TORCH_KERNELS_ISA
