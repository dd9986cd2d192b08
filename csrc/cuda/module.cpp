// SPDX-License-Identifier: Apache-2.0
// The Python module torch_kernels._cuda.
#include "core/bind.h"

namespace torch_kernels {
void bind_tree_attention(nb::module_& module);
void bind_graph_attention(nb::module_& module);
void bind_int4_linear(nb::module_& module);
void bind_int8_linear(nb::module_& module);
void bind_lightning_decoding(nb::module_& module);
void bind_sea(nb::module_& module);
}  // namespace torch_kernels

NB_MODULE(_cuda, module) {
  module.attr("architectures") = TORCH_KERNELS_ARCHITECTURES;
  module.attr("cuda_version") = TORCH_KERNELS_CUDA_VERSION;
  torch_kernels::bind_tree_attention(module);
  torch_kernels::bind_graph_attention(module);
  torch_kernels::bind_int4_linear(module);
  torch_kernels::bind_int8_linear(module);
  torch_kernels::bind_lightning_decoding(module);
  torch_kernels::bind_sea(module);
}
