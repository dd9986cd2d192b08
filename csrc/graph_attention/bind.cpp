// SPDX-License-Identifier: Apache-2.0
// The Graph-KV attention ops as Python functions: outputs first, then the arguments of the op's schema in order.
// Compiled into every native module; TORCH_KERNELS_BACKEND names the kernels it calls.
#include "core/bind.h"
#include "graph_attention/kernels.h"

namespace torch_kernels {

static const Binding binding{[](nb::module_& module) {
  module.def("graph_attention",
             [](const Argument& out, const Argument& lse, const Argument& q, const Argument& k, const Argument& v,
                const Argument& q_offsets, const Argument& kv_offsets, const Argument& edge_offsets,
                const Argument& edge_sources, const Argument& own_segment, std::optional<double> scale,
                const Argument& block_table, const Argument& inv_freq, const Argument& q_start,
                const Argument& edge_start, const Argument& own_start, bool interleaved) {
               double default_scale = 1 / std::sqrt(double(q.size[2]));
               run(TORCH_KERNELS_BACKEND::graph_attention, q,
                   GraphAttentionParams{.out = out,
                                        .lse = lse,
                                        .q = q,
                                        .k = k,
                                        .v = v,
                                        .graph = {q_offsets, kv_offsets, edge_offsets, edge_sources, own_segment},
                                        .block_table = block_table,
                                        .rotation = {inv_freq, q_start, edge_start, own_start, interleaved},
                                        .scale = scale.value_or(default_scale)});
             });
  module.def("rope_shift", [](const Argument& out, const Argument& k, const Argument& offsets, const Argument& delta,
                              const Argument& inv_freq, bool interleaved) {
    run(TORCH_KERNELS_BACKEND::rope_shift, k,
        RopeShiftParams{
            .out = out, .k = k, .offsets = offsets, .delta = delta, .inv_freq = inv_freq, .interleaved = interleaved});
  });
}};

}  // namespace torch_kernels
