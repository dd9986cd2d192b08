// SPDX-License-Identifier: Apache-2.0
// Checks of the values inside index tensors, on the CPU. Called before anything is written.
#include <vector>

#include "core/bind.h"

namespace torch_kernels {
namespace {

// Packed sequences: from 0 to the number of tokens, never descending.
void validate_sequences(const char* op, const Argument& cu_seqlens, int64_t tokens) {
  int64_t last = cu_seqlens.size[0] - 1;
  require(cu_seqlens.index(0) == 0, op, ": cu_seqlens[0] must be 0, got ", cu_seqlens.index(0));
  for (int64_t n = 0; n < last; n++)
    require(cu_seqlens.index(n) <= cu_seqlens.index(n + 1), op, ": cu_seqlens must not descend, but cu_seqlens[", n,
            "] is ", cu_seqlens.index(n), " and cu_seqlens[", n + 1, "] is ", cu_seqlens.index(n + 1));
  require(cu_seqlens.index(last) == tokens, op, ": cu_seqlens[", last, "] must be T=", tokens, ", got ",
          cu_seqlens.index(last));
}

void validate_state_indices(const char* op, const Argument& indices, int64_t states) {
  std::vector<int64_t> row_of(size_t(states), -1);
  for (int64_t n = 0; n < indices.size[0]; n++) {
    int64_t index = indices.index(n);
    require(index >= -1 && index < states, op, ": state_indices[", n, "] must be in [-1, ", states, "), got ", index);
    if (index < 0) continue;
    require(row_of[index] < 0, op, ": state_indices must differ, but rows ", row_of[index], " and ", n,
            " both have state ", index);
    row_of[index] = n;
  }
}

void validate_state_path(const char* op, const Argument& path, const Argument& accepted) {
  int64_t nodes = path.size[1];
  for (int64_t n = 0; n < path.size[0]; n++) {
    if (nodes == 0 || path.index(n, 0) == -1) continue;
    int64_t count = accepted.index(n);
    require(count >= 0 && count < nodes, op, ": num_accepted[", n, "] must be in [0, ", nodes, "), got ", count);
    for (int64_t j = 0; j <= count && path.index(n, j) != -1; j++) {
      int64_t node = path.index(n, j), lowest = j > 0 ? path.index(n, j - 1) + 1 : 0;
      require(node >= lowest && node < nodes, op, ": path[", n, ", ", j, "] must be -1 or in [", lowest, ", ", nodes,
              "), got ", node);
    }
  }
}

}  // namespace

static const Binding binding{[](nb::module_& module) {
  module.def("validate_sequences", &validate_sequences);
  module.def("validate_state_indices", &validate_state_indices);
  module.def("validate_state_path", &validate_state_path);
}};

}  // namespace torch_kernels
