// SPDX-License-Identifier: Apache-2.0
// Checks of the values inside index tensors, on the CPU. Called before anything is written.
#include "core/bind.h"

namespace torch_kernels {
namespace {

// A width of 0 or less is a row that sees nothing.
void validate_widths(const char* op, const Argument& widths, int64_t most, const char* name) {
  for (int64_t b = 0; b < widths.size[0]; b++)
    for (int64_t i = 0; i < widths.size[1]; i++)
      require(widths.index(b, i) <= most, op, ": widths[", b, ", ", i, "] must be at most ", name, "=", most, ", got ",
              widths.index(b, i));
}

}  // namespace

static const Binding binding{[](nb::module_& module) { module.def("validate_widths", &validate_widths); }};

}  // namespace torch_kernels
