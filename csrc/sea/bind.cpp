// SPDX-License-Identifier: Apache-2.0
// The ops that every module has, as Python functions: outputs first, then the schema's arguments in order.
#include "core/bind.h"
#include "sea/kernels.h"

namespace torch_kernels {

static const Binding binding{[](nb::module_& module) {
  module.def("sea_select", [](const Argument& cells, const Argument& scores, const Argument& widths, double k) {
    run(TORCH_KERNELS_BACKEND::sea_select, scores,
        SeaSelectParams{.cells = cells, .scores = scores, .widths = widths, .k = k});
  });
  module.def("sea_attention",
             [](const Argument& out, const Argument& lse, const Argument& q, const Argument& k, const Argument& v,
                const Argument& cells, const Argument& widths, int64_t num_cells, std::optional<double> scale,
                int64_t max_columns_per_cell, const Argument& row_gain, const Argument& mix, const Argument& pooled) {
               run(TORCH_KERNELS_BACKEND::sea_attention, q,
                   SeaAttentionParams{.out = out,
                                      .lse = lse,
                                      .q = q,
                                      .k = k,
                                      .v = v,
                                      .cells = cells,
                                      .widths = widths,
                                      .num_cells = num_cells,
                                      .scale = scale.value_or(1 / std::sqrt(double(q.size[3]))),
                                      .max_columns = max_columns_per_cell,
                                      .row_gain = row_gain,
                                      .mix = mix,
                                      .pooled = pooled});
             });
}};

}  // namespace torch_kernels
