// SPDX-License-Identifier: Apache-2.0
// Checks of the values inside the index tensor of the int4 linear ops, on the CPU. Called before anything is written.
#include "core/bind.h"

namespace torch_kernels {
namespace {

void validate_perm(const char* op, const Argument& perm, int64_t in_features) {
  for (int64_t j = 0; perm && j < perm.size[0]; j++) {
    int64_t source = perm.index(j);
    require(source >= -1 && source < in_features, op, ": perm[", j, "] must be in [-1, ", in_features, "), got ",
            source);
  }
}

}  // namespace

static const Binding binding{[](nb::module_& module) { module.def("validate_perm", &validate_perm); }};

}  // namespace torch_kernels
