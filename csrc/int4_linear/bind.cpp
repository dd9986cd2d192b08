// SPDX-License-Identifier: Apache-2.0
// The int4 linear ops as Python functions: outputs first, then the arguments of the op's schema in order.
// Compiled into every native module; TORCH_KERNELS_BACKEND names the kernels it calls.
#include "core/bind.h"
#include "int4_linear/kernels.h"

namespace torch_kernels {

static Int4Mode mode_of(const std::string& name) {
  return name == "a8" ? Int4Mode::a8 : name == "fast" ? Int4Mode::fast : Int4Mode::exact;
}

static const Binding binding{[](nb::module_& module) {
  module.def("int4_linear", [](const Argument& out, const Argument& x, const Argument& weight, const Argument& scales,
                               const Argument& zeros, const Argument& perm, const Argument& bias, int64_t out_features,
                               int64_t group_size, const std::string& mode) {
    run(TORCH_KERNELS_BACKEND::int4_linear, x,
        Int4LinearParams{.out = rows_of(out),
                         .x = rows_of(x),
                         .weight = weight,
                         .scales = scales,
                         .zeros = zeros,
                         .perm = perm,
                         .bias = bias,
                         .out_features = out_features,
                         .group_size = group_size,
                         .mode = mode_of(mode)});
  });
  module.def("int4_linear_backward",
             [](const Argument& out, const Argument& grad, const Argument& weight, const Argument& scales,
                const Argument& zeros, const Argument& perm, int64_t in_features, int64_t group_size) {
               run(TORCH_KERNELS_BACKEND::int4_linear_backward, grad,
                   Int4LinearBackwardParams{.out = rows_of(out),
                                            .grad = rows_of(grad),
                                            .weight = weight,
                                            .scales = scales,
                                            .zeros = zeros,
                                            .perm = perm,
                                            .in_features = in_features,
                                            .group_size = group_size});
             });
}};

}  // namespace torch_kernels
