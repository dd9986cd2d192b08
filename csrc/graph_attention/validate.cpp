// SPDX-License-Identifier: Apache-2.0
// Checks of the values inside index tensors, before anything is written.
#include "core/bind.h"
#include "graph_attention/kernels.h"

namespace torch_kernels {
namespace {

// offsets[0 ..] must not descend and stay in [0, end], or start and end there exactly.
void require_offsets(const char* op, const char* name, const Tensor& offsets, int64_t end, bool exact) {
  int64_t last = offsets.size[0] - 1;
  require(offsets.index(0) >= 0, op, ": ", name, "[0] must not be negative, got ", offsets.index(0));
  for (int64_t i = 0; i < last; i++)
    require(offsets.index(i) <= offsets.index(i + 1), op, ": ", name, " must not descend, got ", offsets.index(i),
            " before ", offsets.index(i + 1), " at [", i + 1, "]");
  require(offsets.index(last) <= end, op, ": ", name, "[", last, "] must be at most ", end, ", got ",
          offsets.index(last));
  if (!exact) return;
  require(offsets.index(0) == 0, op, ": ", name, "[0] must be 0, got ", offsets.index(0));
  require(offsets.index(last) == end, op, ": ", name, "[", last, "] must be ", end, ", got ", offsets.index(last));
}

void require_pages(const char* op, const Tensor& pages, const Tensor& kv_offsets, const Tensor& block_table) {
  int64_t page = pages.size[1], capacity = page * block_table.size[1];
  for (int64_t s = 0; s < block_table.size[0]; s++) {
    int64_t length = kv_offsets.index(s + 1) - kv_offsets.index(s);
    require(length <= capacity, op, ": kv_offsets gives segment ", s, " ", length,
            " keys, but its row of block_table has ", capacity, " slots");
    for (int64_t i = 0; i * page < length; i++)
      require(block_table.index(s, i) >= 0 && block_table.index(s, i) < pages.size[0], op, ": block_table[", s, ", ", i,
              "] must be in [0, ", pages.size[0], "), got ", block_table.index(s, i));
  }
}

void validate_graph(const char* op, const Argument& q, const Argument& k, const Argument& q_offsets,
                    const Argument& kv_offsets, const Argument& edge_offsets, const Argument& edge_sources,
                    const Argument& own_segment, const Argument& block_table) {
  int64_t key_segments = kv_offsets.size[0] - 1;
  require_offsets(op, "q_offsets", q_offsets, q.size[0], true);
  require_offsets(op, "kv_offsets", kv_offsets, block_table ? INT64_MAX : k.size[0], false);
  require_offsets(op, "edge_offsets", edge_offsets, edge_sources.size[0], true);
  if (block_table) require_pages(op, k, kv_offsets, block_table);
  std::vector<int64_t> seen_by(key_segments, -1);
  for (int64_t a = 0; a < own_segment.size[0]; a++) {
    int64_t own = own_segment.index(a);
    require(own >= -1 && own < key_segments, op, ": own_segment[", a, "] must be in [-1, ", key_segments, "), got ",
            own);
    for (int64_t e = edge_offsets.index(a); e < edge_offsets.index(a + 1); e++) {
      int64_t source = edge_sources.index(e);
      require(source >= 0 && source < key_segments, op, ": edge_sources[", e, "] must be in [0, ", key_segments,
              "), got ", source);
      require(source != own, op, ": edge_sources[", e, "] is ", source, ", query segment ", a, "'s own segment");
      require(seen_by[source] != a, op, ": edge_sources[", e, "] is ", source, ", which query segment ", a,
              " has already");
      seen_by[source] = a;
    }
  }
}

void validate_offsets(const char* op, const Argument& k, const Argument& offsets) {
  require_offsets(op, "offsets", offsets, k.size[0], false);
}

}  // namespace

static const Binding binding{[](nb::module_& module) {
  module.def("validate_graph", &validate_graph);
  module.def("validate_offsets", &validate_offsets);
}};

}  // namespace torch_kernels
