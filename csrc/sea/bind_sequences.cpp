// SPDX-License-Identifier: Apache-2.0
// The ops that only the CPU module has, as Python functions: on GPUs they are Triton's.
#include "core/bind.h"
#include "sea/kernels.h"

namespace torch_kernels {
namespace {

// A view that repeats what it holds along B, T and H.
Tensor expanded(const Tensor& shift, const Tensor& like) {
  if (!shift) return shift;
  Tensor view = shift;
  view.rank = 4;
  for (int i = 3; i >= 0; i--) {
    int from = i - (4 - shift.rank);
    view.size[i] = like.size[i];
    view.stride[i] = from >= 0 && shift.size[from] > 1 ? shift.stride[from] : 0;
  }
  return view;
}

void bind_cells(nb::module_& module) {
  module.def("sea_stretch", [](const Argument& out, const Argument& x, const Argument& widths, int64_t, double fill) {
    run(cpu::sea_stretch, x, SeaStretchParams{.out = out, .x = x, .widths = widths, .fill = fill});
  });
  module.def("sea_stretch_backward",
             [](const Argument& grad_x, const Argument& grad_out, const Argument& widths, int64_t) {
               run(cpu::sea_stretch_backward, grad_out,
                   SeaStretchBackwardParams{.grad_x = grad_x, .grad_out = grad_out, .widths = widths});
             });
  auto csr = [](const Argument& crow, const Argument& col, const Argument& cells, const Argument& widths,
                int64_t num_heads, int64_t num_cells, int64_t max_columns_per_cell) {
    run(cpu::sea_csr, cells,
        SeaCsrParams{.crow = crow,
                     .col = col,
                     .cells = cells,
                     .widths = widths,
                     .num_heads = num_heads,
                     .num_cells = num_cells,
                     .max_columns = max_columns_per_cell});
  };
  module.def("sea_csr_rows", [csr](const Argument& crow, const Argument& cells, const Argument& widths,
                                   int64_t num_heads, int64_t num_cells, int64_t max_columns_per_cell) {
    csr(crow, {}, cells, widths, num_heads, num_cells, max_columns_per_cell);
  });
  module.def("sea_csr_columns",
             [csr](const Argument& col, const Argument& crow, const Argument& cells, const Argument& widths,
                   int64_t num_heads, int64_t num_cells, int64_t max_columns_per_cell) {
               csr(crow, col, cells, widths, num_heads, num_cells, max_columns_per_cell);
             });
}

void bind_attention_backward(nb::module_& module) {
  module.def("sea_attention_backward",
             [](const Argument& grad_q, const Argument& grad_k, const Argument& grad_v, const Argument& grad_row_gain,
                const Argument& grad_mix, const Argument& grad_pooled, const Argument& grad_out, const Argument& q,
                const Argument& k, const Argument& v, const Argument& out, const Argument& lse, const Argument& cells,
                const Argument& widths, int64_t num_cells, std::optional<double> scale, int64_t max_columns_per_cell,
                const Argument& row_gain, const Argument& mix, const Argument& pooled) {
               run(cpu::sea_attention_backward, q,
                   SeaAttentionBackwardParams{.grad_q = grad_q,
                                              .grad_k = grad_k,
                                              .grad_v = grad_v,
                                              .grad_row_gain = grad_row_gain,
                                              .grad_mix = grad_mix,
                                              .grad_pooled = grad_pooled,
                                              .grad_out = grad_out,
                                              .forward = {.out = out,
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
                                                          .pooled = pooled}});
             });
}

void bind_estimator(nb::module_& module) {
  module.def("running_mean", [](const Argument& mean, const Argument& sum_after, const Argument& count_after,
                                const Argument& v, const Argument& sum, const Argument& count) {
    run(cpu::running_mean, v,
        RunningMeanParams{
            .mean = mean, .sum_after = sum_after, .count_after = count_after, .v = v, .sum = sum, .count = count});
  });
  module.def("favor_features", [](const Argument& out, const Argument& x, const Argument& proj, const std::string& kind,
                                  double eps, const Argument& shift) {
    run(cpu::favor_features, x,
        FavorFeaturesParams{
            .out = out, .x = x, .proj = proj, .shift = expanded(shift, x), .exponential = kind == "exp", .eps = eps});
  });
  module.def("linear_attention", [](const Argument& out, const Argument& state, const Argument& norm, const Argument& q,
                                    const Argument& k, const Argument& v, bool causal, const Argument& initial_state,
                                    const Argument& initial_norm, double eps) {
    run(cpu::linear_attention, q,
        LinearAttentionParams{.out = out,
                              .state = state,
                              .norm = norm,
                              .q = q,
                              .k = k,
                              .v = v,
                              .causal = causal,
                              .initial_state = initial_state,
                              .initial_norm = initial_norm,
                              .eps = eps});
  });
  module.def(
      "linear_attention_backward",
      [](const Argument& grad_q, const Argument& grad_k, const Argument& grad_v, const Argument& grad_initial_state,
         const Argument& grad_initial_norm, const Argument& grad_out, const Argument& q, const Argument& k,
         const Argument& v, const Argument& grad_state, const Argument& grad_norm, bool causal,
         const Argument& initial_state, const Argument& initial_norm, double eps) {
        run(cpu::linear_attention_backward, q,
            LinearAttentionBackwardParams{.grad_q = grad_q,
                                          .grad_k = grad_k,
                                          .grad_v = grad_v,
                                          .grad_initial_state = grad_initial_state,
                                          .grad_initial_norm = grad_initial_norm,
                                          .grad_out = grad_out,
                                          .q = q,
                                          .k = k,
                                          .v = v,
                                          .grad_state = grad_state,
                                          .grad_norm = grad_norm,
                                          .causal = causal,
                                          .initial_state = initial_state,
                                          .initial_norm = initial_norm,
                                          .eps = eps});
      });
}

}  // namespace

static const Binding binding{[](nb::module_& module) {
  bind_cells(module);
  bind_attention_backward(module);
  bind_estimator(module);
}};

}  // namespace torch_kernels
