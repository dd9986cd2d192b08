// SPDX-License-Identifier: Apache-2.0
// The backward pass as a Python function, which only the CPU module has: on GPUs it is Triton's.
#include "core/bind.h"
#include "graph_attention/kernels.h"

namespace torch_kernels {

static const Binding binding{[](nb::module_& module) {
  module.def(
      "graph_attention_backward",
      [](const Argument& grad_q, const Argument& grad_k, const Argument& grad_v, const Argument& grad_out,
         const Argument& q, const Argument& k, const Argument& v, const Argument& out, const Argument& lse,
         const Argument& q_offsets, const Argument& kv_offsets, const Argument& edge_offsets,
         const Argument& edge_sources, const Argument& own_segment, std::optional<double> scale,
         const Argument& inv_freq, const Argument& q_start, const Argument& edge_start, const Argument& own_start,
         bool interleaved) {
        double default_scale = 1 / std::sqrt(double(q.size[2]));
        run(cpu::graph_attention_backward, q,
            GraphAttentionBackwardParams{.grad_q = grad_q,
                                         .grad_k = grad_k,
                                         .grad_v = grad_v,
                                         .grad_out = grad_out,
                                         .q = q,
                                         .k = k,
                                         .v = v,
                                         .out = out,
                                         .lse = lse,
                                         .graph = {q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment},
                                         .rotation = {inv_freq, q_start, edge_start, own_start, interleaved},
                                         .scale = scale.value_or(default_scale)});
      });
}};

}  // namespace torch_kernels
