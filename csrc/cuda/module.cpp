// SPDX-License-Identifier: Apache-2.0
// The Python module torch_kernels._cuda.
#include "core/bind.h"

NB_MODULE(_cuda, module) {
  module.attr("architectures") = TORCH_KERNELS_ARCHITECTURES;
  module.attr("cuda_version") = TORCH_KERNELS_CUDA_VERSION;
  for (torch_kernels::Bind bind : torch_kernels::bindings()) bind(module);
}
