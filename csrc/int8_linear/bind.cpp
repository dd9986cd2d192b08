// SPDX-License-Identifier: Apache-2.0
// The int8 linear ops as Python functions: outputs first, then the arguments of the op's schema in order.
// Compiled into every native module; TORCH_KERNELS_BACKEND names the kernels it calls.
#include "core/bind.h"
#include "int8_linear/kernels.h"

namespace torch_kernels {

// One value per row, of any rank: contiguous, because the op allocated it.
static Tensor flat(const Tensor& tensor) {
  Tensor values = tensor;
  values.rank = 1;
  values.size[0] = tensor.elements();
  values.stride[0] = 1;
  return values;
}

static double orthonormal(const Tensor& x) { return 1 / std::sqrt(double(x.size[x.rank - 1])); }

static const Binding binding{[](nb::module_& module) {
  module.def("int8_quantize", [](const Argument& q, const Argument& scale, const Argument& outliers, const Argument& x,
                                 double threshold) {
    run(TORCH_KERNELS_BACKEND::int8_quantize, x,
        Int8QuantizeParams{
            .q = rows_of(q), .scale = flat(scale), .outliers = outliers, .x = rows_of(x), .threshold = threshold});
  });
  module.def("int8_mm", [](const Argument& out, const Argument& a, const Argument& b) {
    run(TORCH_KERNELS_BACKEND::int8_mm, a, Int8MmParams{.out = out, .a = a, .b = b});
  });
  module.def("int8_linear",
             [](const Argument& out, const Argument& x, const Argument& weight, const Argument& weight_scale,
                const Argument& bias, const Argument& x_scale, double threshold) {
               run(TORCH_KERNELS_BACKEND::int8_linear, x,
                   Int8LinearParams{.out = rows_of(out),
                                    .x = rows_of(x),
                                    .weight = weight,
                                    .weight_scale = weight_scale,
                                    .bias = bias,
                                    .x_scale = x_scale,
                                    .threshold = threshold});
             });
  module.def("int8_linear_backward",
             [](const Argument& out, const Argument& grad, const Argument& weight, const Argument& weight_scale) {
               run(TORCH_KERNELS_BACKEND::int8_linear_backward, grad,
                   Int8LinearBackwardParams{
                       .out = rows_of(out), .grad = rows_of(grad), .weight = weight, .weight_scale = weight_scale});
             });
  module.def("hadamard_transform", [](const Argument& out, const Argument& x, std::optional<double> scale) {
    run(TORCH_KERNELS_BACKEND::hadamard_transform, x,
        HadamardParams{.out = rows_of(out), .x = rows_of(x), .scale = scale ? *scale : orthonormal(x)});
  });
  module.def("rotate_quantize", [](const Argument& q, const Argument& scale, const Argument& x, const Argument& signs,
                                   const Argument& smooth, const Argument& x_scale, int64_t bits) {
    run(TORCH_KERNELS_BACKEND::rotate_quantize, x,
        RotateQuantizeParams{.q = rows_of(q),
                             .scale = flat(scale),
                             .x = rows_of(x),
                             .signs = signs,
                             .smooth = smooth,
                             .x_scale = x_scale,
                             .bits = bits});
  });
}};

}  // namespace torch_kernels
