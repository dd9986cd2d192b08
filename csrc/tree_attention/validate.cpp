// SPDX-License-Identifier: Apache-2.0
// Checks of the values inside index tensors, on the CPU. Called before anything is written.
#include "core/bind.h"

namespace torch_kernels {
namespace {

// The caches of one call, as far as slots are concerned.
struct Slots {
  const char* op;
  Tensor cache, block_table;

  int64_t capacity() const { return block_table ? block_table.size[1] * cache.size[1] : cache.size[1]; }

  // Slots [0, end) of sequence b must exist.
  void require_prefix(int64_t b, int64_t prefix, int64_t end) const {
    require(prefix >= 0, op, ": prefix_lens[", b, "] must not be negative, got ", prefix);
    require(end <= capacity(), op, ": sequence ", b, " needs ", end, " cache slots (prefix_lens ", prefix,
            "), but the cache has ", capacity());
    if (!block_table) return;
    for (int64_t page = 0; page * cache.size[1] < end; page++) {
      int64_t entry = block_table.index(b, page);
      require(entry >= 0 && entry < cache.size[0], op, ": block_table[", b, ", ", page, "] must be in [0, ",
              cache.size[0], "), got ", entry);
    }
  }
};

void validate_parents(const char* op, const Argument& parents) {
  for (int64_t b = 0; b < parents.size[0]; b++)
    for (int64_t t = 0; t < parents.size[1]; t++) {
      int64_t up = parents.index(b, t);
      require(up >= -2 && up < t, op, ": parents[", b, ", ", t, "] must be -2, -1 or an earlier node, got ", up);
      require(up < 0 || parents.index(b, up) != -2, op, ": parents[", b, ", ", t, "] is node ", up,
              ", which is padding");
    }
}

void validate_tree(const char* op, const Argument& parents, const Argument& cache, const Argument& block_table,
                   const Argument& prefix, bool tree_in_cache) {
  validate_parents(op, parents);
  Slots slots{op, cache, block_table};
  int64_t nodes = tree_in_cache ? parents.size[1] : 0;
  for (int64_t b = 0; b < prefix.size[0]; b++) slots.require_prefix(b, prefix.index(b), prefix.index(b) + nodes);
}

// The path and the slots that moving it along reads and writes. `in_place`: the nodes are read from the cache.
void validate_path(const char* op, const Argument& cache, const Argument& block_table, const Argument& prefix,
                   const Argument& path, const Argument& accepted, int64_t nodes, bool in_place) {
  Slots slots{op, cache, block_table};
  for (int64_t b = 0; b < path.size[0]; b++) {
    require(prefix.index(b) >= 0, op, ": prefix_lens[", b, "] must not be negative, got ", prefix.index(b));
    if (path.size[1] == 0 || path.index(b, 0) == -1) continue;
    int64_t count = accepted.index(b), end = prefix.index(b) + count + 1;
    require(count >= 0 && count < path.size[1], op, ": num_accepted[", b, "] must be in [0, ", path.size[1], "), got ",
            count);
    for (int64_t j = 0; j <= count; j++) {
      int64_t node = path.index(b, j), lowest = j > 0 ? path.index(b, j - 1) + 1 : 0;
      require(node >= lowest && node < nodes, op, ": path[", b, ", ", j, "] must be in [", lowest, ", ", nodes,
              "), got ", node);
      if (in_place) end = std::max(end, prefix.index(b) + node + 1);
    }
    slots.require_prefix(b, prefix.index(b), end);
  }
}

}  // namespace

static const Binding binding{[](nb::module_& module) {
  module.def("validate_parents", &validate_parents);
  module.def("validate_tree", &validate_tree);
  module.def("validate_path", &validate_path);
}};

}  // namespace torch_kernels
